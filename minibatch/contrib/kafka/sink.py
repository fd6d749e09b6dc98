"""Write the results of windows to Kafka topics."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any, NamedTuple

from bson import Decimal128, ObjectId
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from minibatch import functions, jsontext
from minibatch.errors import ArgumentError, DataError

from .client import TOPIC_NAME, checked_configs, checked_topic, checked_urls, coder, opened

SINK_DEFAULTS = {
    'acks': 'all',
    'enable_idempotence': True,
    'delivery_timeout_ms': 30_000,
    'request_timeout_ms': 10_000,
    'max_block_ms': 10_000,
    'bootstrap_timeout_ms': 5_000,
}


class KafkaSink:
    """A sink that sends the result of each window to a Kafka topic.

    ``put`` returns when Kafka has acknowledged every message: all replicas in sync have it (acks='all'). What is sent
    twice by one ``put``, as a reply was lost, Kafka drops (enable_idempotence=True). A window is tried again if any of
    its messages was not acknowledged, or after a crash before the window was committed, and all its messages are then
    sent again: nothing is lost, and some may come twice. Return the ``window.id`` with the result to recognise them.

    A message becomes JSON; datetimes are in ISO 8601 (without a zone they are UTC, as in MongoDB), ids and decimal
    numbers are text, and NaN and infinities, which JSON has not, are null. The key decides the partition, and so the
    order: of messages with equal keys it is that of the windows.

    Args:
        topic: the name of the topic, or a function of the message which returns it.
        urls: 'host:port' of a broker, or a list of them; default 'localhost:9092'.
        expand: True sends each item of a list (or other iterable) as a message; False the whole result as one.
        key: the field whose value is the key, or a function of the message which returns it; text is sent as UTF-8,
            bytes as they are, None as no key, and another value of a field as its JSON.
        configs: those of ``kafka.KafkaProducer``, such as ``compression_type`` or ``security_protocol``. Here
            acks='all' always; the defaults are delivery_timeout_ms=30_000, after which ``put`` raises TimeoutError,
            request_timeout_ms=10_000 and max_block_ms=10_000. ``value_serializer`` replaces JSON: a function of the
            message that returns bytes (or None, a tombstone), or a ``kafka.serializer.Serializer``;
            ``key_serializer`` that of keys.

    Raises:
        ArgumentError: naming the argument that is wrong.

    Example:
        >>> import minibatch as mb
        >>> sink = KafkaSink('totals', urls='localhost:9092', key='shop')
        >>> @mb.streaming('orders', interval=10, key='shop', sink=sink)    # doctest: +SKIP
        ... def total(window):
        ...     return {'shop': window.key, 'total': sum(data['price'] for data in window.data)}
    """

    def __init__(
        self,
        topic: str | Callable[[Any], str],
        urls: str | Sequence[str] | None = None,
        expand: bool = True,
        key: str | Callable[[Any], Any] | None = None,
        **configs: Any,
    ) -> None:
        if isinstance(topic, str):
            checked_topic(topic)
        elif not callable(topic):
            raise ArgumentError(f'topic must be the name of a topic or a function, not {topic!r}')
        else:
            functions.check('topic', topic, 'a message', plain=True)
        self._topic = topic
        self._urls = checked_urls(urls)
        if not isinstance(expand, bool):
            raise ArgumentError(f'expand must be True or False, not {expand!r}')
        if key is not None and not callable(key) and not (isinstance(key, str) and key):
            raise ArgumentError(f'key must be the name of a field or a function, not {key!r}')
        if callable(key):
            functions.check('key', key, 'a message', plain=True)
        self._expand, self._key_of = expand, key
        self._configs = checked_configs(KafkaProducer, SINK_DEFAULTS, configs)
        if self._configs['acks'] not in ('all', -1):
            raise ArgumentError(f"acks must be 'all', not {self._configs['acks']!r}: else results may be lost")
        if self._configs.pop('transactional_id', None) is not None:
            raise ArgumentError('transactional_id is not supported: a window is one call, not one transaction')
        self._value = coder(self._configs, 'value_serializer', _to_json)
        self._key = coder(self._configs, 'key_serializer', _key_bytes)
        self._patience = self._configs['delivery_timeout_ms'] / 1000 + 5  # then nothing is on its way any more
        self._producer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_producer': None}  # a copy, or one in another process, has a connection of its own

    def put(self, messages: Any) -> None:
        """Send the result of one window.

        Raises:
            DataError: naming the item, and its field, that cannot be sent; nothing was sent, unless it is too large.
            TimeoutError: if Kafka did not acknowledge it within ``delivery_timeout_ms``.
            ConnectionError: if no broker answers.
            kafka.errors.KafkaError: if Kafka refused it.
        """
        one = isinstance(messages, (Mapping, str, bytes)) or not isinstance(messages, Iterable)
        items = [messages] if one or not self._expand else messages
        records = [self._record(i, message) for i, message in enumerate(items)]
        if not records:
            return
        try:
            self._send(records)
        except KafkaError as exc:
            self.close()  # and what is not acknowledged is not sent behind our back
            if isinstance(exc, KafkaTimeoutError):
                raise TimeoutError(f'Kafka at {", ".join(self._urls)} did not acknowledge: {exc}') from exc
            if exc.retriable:
                raise ConnectionError(f'Kafka at {", ".join(self._urls)}: {exc}') from exc
            raise

    def close(self) -> None:
        """Close the connection; ``put`` opens it again."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError):
                producer.close(timeout=self._patience)

    def _send(self, records: list[_Record]) -> None:
        if self._producer is None:
            self._producer, _ = opened(KafkaProducer, self._urls, self._configs)
        futures = []
        for record in records:
            with _too_large(record):
                futures.append(self._producer.send(record.topic, value=record.value, key=record.key))
        self._producer.flush(self._patience)
        for record, future in zip(records, futures, strict=True):
            with _too_large(record):
                future.get(timeout=1)

    def _record(self, i: int, message: Any) -> _Record:
        """A message as it is sent, or what is wrong with it."""
        topic = self._topic(message) if callable(self._topic) else self._topic
        if not isinstance(topic, str) or not TOPIC_NAME.fullmatch(topic):
            raise DataError(f'the topic of item {i} must be letters, digits, and . _ -, not {topic!r}')
        named = self._key_value(i, message)
        key = None if named is None else _coded(f'the key of item {i}', lambda: self._key(topic, [], named))
        value = _coded(f'item {i}', lambda: self._value(topic, [], message))
        if key is None and value is None:
            raise DataError(f'item {i} is a tombstone (its value is None), which must have a key')
        return _Record(i, topic, key, value)

    def _key_value(self, i: int, message: Any) -> Any:
        if self._key_of is None or callable(self._key_of):
            return self._key_of(message) if self._key_of else None
        if not isinstance(message, Mapping) or self._key_of not in message:
            raise DataError(f'item {i} has no field {self._key_of!r}, which is the key')
        return message[self._key_of]


class _Record(NamedTuple):
    item: int
    topic: str
    key: bytes | None
    value: bytes | None


class _UnfitError(Exception):
    """What JSON has not, in words."""


@contextmanager
def _too_large(record: _Record) -> Iterator[None]:
    try:
        yield
    except MessageSizeTooLargeError as exc:
        raise DataError(f'item {record.item} is too large for Kafka: {exc}') from exc


def _coded(what: str, serialize: Callable[[], Any]) -> Any:
    try:
        coded = serialize()
    except (_UnfitError, UnicodeEncodeError) as exc:
        raise DataError(f'{what} cannot be sent to Kafka: {exc}') from None
    if coded is not None and not isinstance(coded, (bytes, bytearray)):
        raise DataError(f'{what} was not serialized to bytes, but to {type(coded).__name__}')
    return coded


def _key_bytes(key: Any) -> Any:
    if isinstance(key, (bytes, bytearray)):
        return key
    return key.encode() if isinstance(key, str) else _to_json(key)


def _to_json(message: Any) -> bytes:
    try:
        return jsontext.dumps(message, _plain)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _UnfitError(_culprit(message, '') or str(exc)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, (ObjectId, uuid.UUID, Decimal, Decimal128)):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f'JSON has no {type(value).__name__}; give another value, or value_serializer=')


def _culprit(value: Any, path: str) -> str:
    """Which field it is that JSON has not, and why."""
    with suppress(RecursionError):
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inner = value.items()
        elif isinstance(value, (list, tuple)):
            inner = enumerate(value)
        for name, each in inner:
            try:
                jsontext.dumps({name: each}, _plain)
            except (TypeError, ValueError) as exc:
                field = f'{path}.{name}' if path else f'{name}'
                return _culprit(each, field) or f'field {field!r}: {exc}'
    return ''
