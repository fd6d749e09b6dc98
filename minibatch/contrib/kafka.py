"""Bring the messages of Kafka topics into a stream, and write the results of windows to Kafka topics."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from bson import Decimal128, ObjectId

import minibatch as mb
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError, DataError, OvertakenError

try:
    from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer
    from kafka.errors import (
        KafkaError,
        KafkaTimeoutError,
        MessageSizeTooLargeError,
        NoOffsetForPartitionError,
        OffsetOutOfRangeError,
    )
    from kafka.structs import OffsetAndMetadata
except ImportError as exc:
    raise ImportError('KafkaSource and KafkaSink need kafka-python 3: pip install minibatch[kafka]') from exc

logger = logging.getLogger(__name__)

LOCAL = 'localhost:9092'
POLL_MS = 500
ASK_MS = 5000
CLOSE_MS = 2000
MAX_NAME = 200
TOPIC_ID = 'topic-id='  # in the metadata of a commit
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
TOPIC_NAME = re.compile(r'[a-zA-Z0-9._-]{1,249}')
SOURCE_DEFAULTS = {
    'group_id': 'group',
    'auto_offset_reset': 'earliest',
    'isolation_level': 'read_committed',
    'max_poll_records': 1000,
    'session_timeout_ms': 10_000,
    'reconnect_backoff_max_ms': 5_000,
    'bootstrap_timeout_ms': 5_000,
}
SINK_DEFAULTS = {
    'acks': 'all',
    'enable_idempotence': True,
    'delivery_timeout_ms': 30_000,
    'request_timeout_ms': 10_000,
    'max_block_ms': 10_000,
    'bootstrap_timeout_ms': 5_000,
}

_Coder: TypeAlias = Callable[[str, Any, Any], Any]  # of topic, headers, data


class KafkaSource:
    """A source that brings the messages of Kafka topics, each once, whatever is killed or lost meanwhile.

    A message is what its value says in JSON: an object as it is, anything else (a number, a text, a list, the null of
    a tombstone) as ``{'value': ...}``. With it goes its meta, in ``window.messages``::

        {'topic': 'orders', 'partition': 0, 'offset': 7, 'key': 'k', 'timestamp': datetime, 'headers': [['name', 'v']]}

    Key and header values are text where they are UTF-8, else bytes; None where there is none. The timestamp is aware,
    in UTC; None where Kafka has none. A message that cannot be decoded goes to the stream ``<stream>.dead_letters``,
    with its bytes.

    **Where it goes on**: the offset to read next is stored in MongoDB by the same write as the messages, for each
    partition. From there a new run goes on, and a partition that Kafka gives to this process. So a kill -9 at any
    point, a lost broker, a rebalance, or a process that slept and thinks a partition is still its own neither lose nor
    double a message. The offset is committed to Kafka too, after that, for tools which show the lag of the group; what
    Kafka has committed counts only where this stream has read nothing of a partition yet, then
    ``auto_offset_reset``. The stored offset is of this cluster (by its id, else by `urls`), this topic (by its id,
    from Kafka 2.8 on; a topic that was deleted and made again is another one) and partition.

    **What may be lost**: messages which Kafka deleted (its retention) before they were read; a warning says which
    offsets. Reading goes on as ``auto_offset_reset`` says, 'none' fails instead. Where a topic has no id, one that was
    made again under its name is read from the stored offset on, or, if it is not so long, as ``auto_offset_reset``
    says, with a warning. **What may come twice**: what a Kafka producer has sent twice; and if a topic is deleted and
    made again while it is read, what is read of the new one before that is noticed (within ``metadata_max_age_ms``, 5
    minutes).

    Processes that run this source with the same ``group_id`` share the partitions. Give each stream a ``group_id`` of
    its own if several read a topic, or each gets only a part of it.

    Args:
        topic: the name of a topic, a list of names, or a compiled pattern: then all topics whose names begin with a
            match (as by ``re.match``), also those that are made later; they are found within ``metadata_max_age_ms``.
        urls: 'host:port' of a broker, or a list of them; default 'localhost:9092'.
        configs: those of ``kafka.KafkaConsumer``, such as ``security_protocol``, ``sasl_mechanism``, ``ssl_cafile``.
            Here the defaults are group_id='group'; auto_offset_reset='earliest'; isolation_level='read_committed',
            which leaves out what belongs to an aborted transaction; max_poll_records=1000;
            session_timeout_ms=10_000, after which Kafka gives the partitions of a killed process to the others. A
            source that waits for longer than max_poll_interval_ms (kafka-python's 5 minutes), as the stream is full,
            leaves its partitions to the others and takes part again later. ``value_deserializer`` replaces JSON and
            ``key_deserializer`` the decoding of keys: functions of bytes, or ``kafka.serializer.Deserializer``.
            ``enable_auto_commit`` is always False.

    Raises:
        ArgumentError: naming the argument that is wrong.

    Example:
        >>> import minibatch as mb
        >>> source = KafkaSource('orders', urls='localhost:9092', group_id='billing')
        >>> @mb.streaming('orders', interval=10, source=source)    # doctest: +SKIP
        ... def bill(window):
        ...     return {'total': sum(order['price'] for order in window.data)}
    """

    def __init__(
        self,
        topic: str | Sequence[str] | re.Pattern[str],
        urls: str | Sequence[str] | None = None,
        **configs: Any,
    ) -> None:
        self._topic = _checked_topic(topic)
        self._urls = _checked_urls(urls)
        self._configs = _checked_configs(KafkaConsumer, SOURCE_DEFAULTS, configs)
        if self._configs.pop('enable_auto_commit', False):
            raise ArgumentError('enable_auto_commit=True would lose messages; they are committed when they are stored')
        if not isinstance(self._configs['group_id'], str) or not self._configs['group_id']:
            raise ArgumentError(f'group_id must be a string that is not empty, not {self._configs["group_id"]!r}')
        self._configs.setdefault('heartbeat_interval_ms', self._configs['session_timeout_ms'] // 4)
        self._reset = self._configs.pop('auto_offset_reset')
        if self._reset not in ('earliest', 'latest', 'none'):
            raise ArgumentError(f"auto_offset_reset must be 'earliest', 'latest' or 'none', not {self._reset!r}")
        self._value = _coder(self._configs, 'value_deserializer', json.loads)
        self._key = _coder(self._configs, 'key_deserializer', _text)
        self._cancelled = threading.Event()

    def stream(self, stream: mb.Stream) -> None:
        """Append messages until `cancel` is called.

        Raises:
            ConnectionError: if no broker answers.
            kafka.errors.KafkaError: if Kafka refused something.
        """
        self._cancelled.clear()
        reader = _Reader(self._connect(), stream, self._decode, self._reset)
        try:
            reader.subscribe(self._topic)
            while not self._cancelled.is_set():
                reader.read()
        except KafkaError as exc:
            if exc.retriable:
                raise ConnectionError(f'Kafka at {", ".join(self._urls)}: {exc}') from exc
            raise
        finally:
            reader.close()

    def cancel(self) -> None:
        """Let `stream` return, within a second or two."""
        self._cancelled.set()

    def _connect(self) -> _Connected:
        # What went out of range is decided here, because kafka-python would skip it without a word.
        configs = {**self._configs, 'auto_offset_reset': 'none', 'enable_auto_commit': False}
        consumer, client = _opened(KafkaConsumer, self._urls, configs)
        logger.info('reading from Kafka at %s', ', '.join(self._urls))
        return _Connected(consumer, client.cluster, ','.join(sorted(self._urls)))

    def _decode(self, record: Any) -> SourceMessage:
        """A Kafka message as it is appended; one that cannot be decoded says why."""
        headers = [[name, _text(value)] for name, value in record.headers or ()]
        meta = {
            'topic': record.topic, 'partition': record.partition, 'offset': record.offset, 'key': record.key,
            'timestamp': _time(record.timestamp), 'headers': headers,
        }  # fmt: skip
        try:
            meta['key'] = self._key(record.topic, record.headers, record.key) if record.key is not None else None
            data = self._value(record.topic, record.headers, record.value) if record.value is not None else None
        except Exception as exc:
            why = f'message {record.offset} of {record.topic}/{record.partition}: {type(exc).__name__}: {exc}'
            return SourceMessage(record.value, meta, record.offset + 1, why)
        return SourceMessage(data if isinstance(data, Mapping) else {'value': data}, meta, record.offset + 1)


class _Connected(NamedTuple):
    consumer: Any
    cluster: Any
    urls: str


class _Place(NamedTuple):
    """A partition that is being read: the id of its topic, and what its messages are appended through."""

    topic_id: str
    producer: Any


class _Reader(ConsumerRebalanceListener):  # type: ignore[misc]
    """One run of a source.

    Whenever the partitions may have changed, all of them are placed anew, each at the token stored for it. That is so
    cheap that nothing else needs to be right: what was fetched from elsewhere is dropped.
    """

    def __init__(
        self, connected: _Connected, stream: mb.Stream, decode: Callable[[Any], SourceMessage], reset: str
    ) -> None:
        self._consumer, self._cluster, self._urls = connected
        self._stream, self._decode, self._reset = stream, decode, reset
        self._places: dict[Any, _Place] = {}
        self._topic_ids: dict[str, str] = {}
        self._changed = False

    def subscribe(self, topic: list[str] | re.Pattern[str]) -> None:
        """Join the group."""
        self._cluster.add_listener(self._on_metadata)
        if isinstance(topic, list):
            self._consumer.subscribe(topic, listener=self)
        else:
            self._consumer.subscribe(pattern=topic, listener=self)
        self._cluster.request_update()

    def read(self) -> None:
        """Append what has arrived, of each partition by itself, or wait a moment for something."""
        try:
            records = self._consumer.poll(timeout_ms=POLL_MS)
        except OffsetOutOfRangeError as exc:
            for partition, offset in exc.args[0].items():
                self._move(partition, offset)
            return
        if self._changed or self._is_another_topic():
            self._place_all()
            return
        offsets = {}
        for partition, batch in records.items():
            topic_id, producer = self._places[partition]
            try:
                producer.append_many(map(self._decode, batch))
            except OvertakenError:
                logger.info('another process has read %s/%d meanwhile; going on behind it', *partition)
                self._changed = True
            else:
                offsets[partition] = OffsetAndMetadata(producer.token, TOPIC_ID + topic_id, -1)
        if offsets:
            self._commit(offsets)

    def close(self) -> None:
        """Leave the group."""
        with suppress(KafkaError):
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_MS)

    # --- what kafka-python calls, in a thread of its own which must not wait

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        """Let nothing be fetched before it is known from where."""
        for partition in assigned:
            self._consumer.seek(partition, 0)
            self._consumer.pause(partition)
        self._changed = True

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        """Nothing is to be saved: all is stored.

        kafka-python 3.0.12 forgets to end a rebalance that begins as a topic or its partitions were added, if `poll`
        returns before it is through; the source would stand still for ever. It does not forget what is asked for.
        """
        self._changed = True
        self._consumer._coordinator.request_rejoin()

    def _on_metadata(self, cluster: Any) -> None:
        """Note the ids of topics. Brokers before Kafka 2.8 do not tell them."""
        for topic in cluster.topics(exclude_internal_topics=False):
            self._topic_ids[topic] = str(cluster.topic_id(topic) or self._topic_ids.get(topic, ''))

    def _on_commit(self, offsets: Any, response: Any) -> None:
        if isinstance(response, Exception):
            logger.info('Kafka did not take a commit, which only its own tools will miss: %s', response)

    # --- where to read

    def _is_another_topic(self) -> bool:
        """Whether a topic was deleted and made again."""
        return any(self._topic_ids[tp.topic] != place.topic_id for tp, place in self._places.items())

    def _place_all(self) -> None:
        self._changed = False
        before, self._places = self._places, {}
        for partition in self._consumer.assignment():
            topic_id = self._topic_ids.get(partition.topic)
            if topic_id is None:
                self._changed = True  # it will come with the next metadata
            else:
                made_again = partition in before and before[partition].topic_id != topic_id
                self._places[partition] = self._place(partition, topic_id, made_again)

    def _place(self, partition: Any, topic_id: str, made_again: bool) -> _Place:
        """Go to where the stream has got to, else to where Kafka says that the group has, else to an end."""
        producer = self._stream.producer(self._name_of(partition, topic_id))
        offset, whose = producer.token, 'of the stream'
        if offset is None and made_again:  # what is committed is still of the other one
            offset, whose = self._first_of(partition), 'the topic was made again'
        if offset is None:
            offset, whose = self._committed(partition, topic_id), 'of the consumer group'
        if offset is None:
            offset, whose = self._end_of(partition), self._reset
            if self._reset == 'latest':
                producer.save(offset)  # else what comes while nothing reads would be skipped
        self._go(partition, offset)
        logger.info('reading %s/%d from offset %d (%s)', *partition, offset, whose)
        return _Place(topic_id, producer)

    def _go(self, partition: Any, offset: int) -> None:
        try:
            self._consumer.seek(partition, offset)
            self._consumer.resume(partition)
        except (KeyError, ValueError):
            if partition in self._consumer.assignment():
                raise
            self._changed = True  # it was taken from us just now

    def _name_of(self, partition: Any, topic_id: str) -> str:
        """The name of its producer."""
        topic = f'{partition.topic}@{topic_id}' if topic_id else partition.topic
        name = f'kafka/{self._cluster.cluster_id or self._urls}/{topic}/{partition.partition}'
        if len(name) > MAX_NAME:
            name = f'{name[: MAX_NAME - 33]}#{hashlib.sha256(name.encode()).hexdigest()[:32]}'
        return name

    def _committed(self, partition: Any, topic_id: str) -> int | None:
        """What the group has committed, unless we know that it was in another topic of this name."""
        committed = self._consumer.committed(partition, metadata=True, timeout_ms=ASK_MS)
        if committed is None or committed.offset < 0:
            return None
        said = committed.metadata or ''
        if said.startswith(TOPIC_ID) and said != TOPIC_ID + topic_id:
            return None
        return int(committed.offset)

    def _end_of(self, partition: Any) -> int:
        """The offset that ``auto_offset_reset`` says."""
        if self._reset == 'none':
            raise NoOffsetForPartitionError(f"{partition.topic}/{partition.partition}, with auto_offset_reset='none'")
        if self._reset == 'earliest':
            return self._first_of(partition)
        return int(self._consumer.end_offsets([partition], timeout_ms=ASK_MS)[partition])

    def _first_of(self, partition: Any) -> int:
        return int(self._consumer.beginning_offsets([partition], timeout_ms=ASK_MS)[partition])

    def _move(self, partition: Any, offset: int) -> None:
        """Leave an offset that Kafka does not have, and say what is missing."""
        if self._reset == 'none':
            raise OffsetOutOfRangeError({partition: offset})
        target = self._end_of(partition)
        if offset < target:
            logger.warning(
                'offsets %d to %d of %s/%d are skipped: Kafka has deleted messages there before they were read',
                offset, target - 1, *partition,
            )  # fmt: skip
        else:
            logger.warning(
                'reading %s/%d from offset %d, as it does not reach %d, where reading was to go on: the topic was made '
                'again, or Kafka has lost its end', *partition, target, offset,
            )  # fmt: skip
        self._go(partition, target)

    def _commit(self, offsets: dict[Any, Any]) -> None:
        try:
            self._consumer.commit_async(offsets, callback=self._on_commit)
        except KafkaError as exc:
            self._on_commit(offsets, exc)


class KafkaSink:
    """A sink that sends the result of each window to a Kafka topic.

    ``put`` returns when Kafka has acknowledged every message: all replicas in sync have it (acks='all'). What is sent
    twice by one ``put``, as a reply was lost, Kafka drops (enable_idempotence=True). A window is tried again if any of
    its messages was not acknowledged, or after a crash before the window was committed, and all its messages are then
    sent again: nothing is lost, and some may come twice. Return the ``window.id`` with the result to recognise them.

    A message becomes JSON; datetimes are in ISO 8601 (without a zone they are UTC, as in MongoDB), ids and decimal
    numbers are text. The key decides the partition, and so the order: of messages with equal keys it is that of the
    windows.

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
            _checked_topic(topic)
        elif not callable(topic):
            raise ArgumentError(f'topic must be the name of a topic or a function, not {topic!r}')
        self._topic = topic
        self._urls = _checked_urls(urls)
        if not isinstance(expand, bool):
            raise ArgumentError(f'expand must be True or False, not {expand!r}')
        if key is not None and not callable(key) and not (isinstance(key, str) and key):
            raise ArgumentError(f'key must be the name of a field or a function, not {key!r}')
        self._expand, self._key_of = expand, key
        self._configs = _checked_configs(KafkaProducer, SINK_DEFAULTS, configs)
        if self._configs['acks'] not in ('all', -1):
            raise ArgumentError(f"acks must be 'all', not {self._configs['acks']!r}: else results may be lost")
        if self._configs.pop('transactional_id', None) is not None:
            raise ArgumentError('transactional_id is not supported: a window is one call, not one transaction')
        self._value = _coder(self._configs, 'value_serializer', _to_json)
        self._key = _coder(self._configs, 'key_serializer', _key_bytes)
        self._patience = self._configs['delivery_timeout_ms'] / 1000 + 5  # then nothing is on its way any more
        self._producer: Any = None

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
            self._producer, _ = _opened(KafkaProducer, self._urls, self._configs)
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


# --- arguments


def _checked_topic(topic: Any) -> list[str] | re.Pattern[str]:
    """The names of topics, or a pattern."""
    if isinstance(topic, re.Pattern) and isinstance(topic.pattern, str):
        return topic
    names = [topic] if isinstance(topic, str) else topic
    if not isinstance(names, (list, tuple)) or not names:
        raise ArgumentError(f'topic must be a name, a list of names, or a compiled pattern, not {topic!r}')
    for name in names:
        if not isinstance(name, str) or not TOPIC_NAME.fullmatch(name):
            raise ArgumentError(
                f'topic must have 1 to 249 letters, digits, and . _ -, not {name!r}; for a pattern pass re.compile(...)'
            )
    return list(names)


def _checked_urls(urls: Any) -> list[str]:
    urls = LOCAL if urls is None else urls
    found = urls.split(',') if isinstance(urls, str) else urls
    if not isinstance(found, (list, tuple)) or not found:
        raise ArgumentError("urls must be 'host:port' of a broker, or a list of such")
    for each in found:
        # Not shown: somebody may write a password into it.
        if not isinstance(each, str) or not re.fullmatch(r'([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?', each.strip()):
            raise ArgumentError(
                "urls must be 'host:port' of a broker, or a list of such; give user and password as "
                'sasl_plain_username and sasl_plain_password'
            )
    return [each.strip() for each in found]


def _checked_configs(client: Any, defaults: dict[str, Any], configs: dict[str, Any]) -> dict[str, Any]:
    """Our defaults, and what the user has given."""
    if 'bootstrap_servers' in configs:
        raise ArgumentError('bootstrap_servers is called urls here')
    for name in configs:
        if name not in client.DEFAULT_CONFIG:
            raise ArgumentError(f'{name} is no argument, and no configuration of kafka.{client.__name__}')
    return {**defaults, **configs}


def _coder(configs: dict[str, Any], name: str, default: Any) -> _Coder:
    """Take a (de)serializer out of configs, as a function of topic, headers and data."""
    given = configs.pop(name, None) or default
    method = 'deserialize' if name.endswith('_deserializer') else 'serialize'
    if hasattr(given, method):
        coder: _Coder = getattr(given, method)
        return coder
    if not callable(given):
        raise ArgumentError(f'{name} must be a function, or have a method {method}, not {given!r}')
    return lambda topic, headers, data: given(data)


def _opened(client: Any, urls: list[str], configs: dict[str, Any]) -> tuple[Any, Any]:
    """A consumer or producer, and the network client of it; which it leaves open, with a thread, if it fails."""
    made: list[Any] = []
    make = configs.get('kafka_client') or client.DEFAULT_CONFIG['kafka_client']

    def note(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    try:
        return client(**{**configs, 'bootstrap_servers': urls, 'kafka_client': note}), made[0]
    except BaseException as exc:
        for each in made:
            each.close()
        if isinstance(exc, KafkaError) and exc.retriable:
            raise ConnectionError(
                f'no Kafka broker answers at {", ".join(urls)}, or the security settings are not right: {exc}'
            ) from exc
        raise


# --- what is in a message


def _text(data: bytes | None) -> str | bytes | None:
    """Text where it is UTF-8."""
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return data


def _time(milliseconds: int | None) -> datetime | None:
    try:
        return None if milliseconds is None or milliseconds < 0 else EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return None


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
        return json.dumps(message, default=_plain, allow_nan=False, ensure_ascii=False).encode()
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
                json.dumps({name: each}, default=_plain, allow_nan=False)
            except (TypeError, ValueError) as exc:
                field = f'{path}.{name}' if path else f'{name}'
                return _culprit(each, field) or f'field {field!r}: {exc}'
    return ''
