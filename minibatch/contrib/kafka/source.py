"""Bring the messages of Kafka topics into a stream."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from kafka import ConsumerRebalanceListener, KafkaConsumer
from kafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata

import minibatch as mb
from minibatch import jsontext
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError, OvertakenError

from .client import checked_configs, checked_topic, checked_urls, coder, opened
from .records import Undecodable, made_tolerant

logger = logging.getLogger(__name__)

POLL_MS = 500
ASK_MS = 5000
CLOSE_MS = 2000
MAX_NAME = 200
TOPIC_ID = 'topic-id='  # in the metadata of a commit
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
SOURCE_DEFAULTS = {
    'group_id': 'group',
    'auto_offset_reset': 'earliest',
    'isolation_level': 'read_committed',
    'max_poll_records': 1000,
    'session_timeout_ms': 10_000,
    'reconnect_backoff_max_ms': 5_000,
    'bootstrap_timeout_ms': 5_000,
}


class KafkaSource:
    """A source that brings the messages of Kafka topics, each once, whatever is killed or lost meanwhile.

    A message is what its value says in JSON: an object as it is, anything else (a number, a text, a list, the null of
    a tombstone) as ``{'value': ...}``. With it goes its meta, in ``window.messages``::

        {'topic': 'orders', 'partition': 0, 'offset': 7, 'key': 'k', 'timestamp': datetime, 'headers': [['name', 'v']]}

    Key and header values are text where they are UTF-8, else bytes; None where there is none. The timestamp is aware,
    in UTC; None where Kafka has none. A message that cannot be decoded goes to the stream ``<stream>.dead_letters``,
    with its bytes: its value if that is no JSON; the whole record, or batch of records, if that is broken (a wrong
    checksum, an unknown compression, a header whose name is no UTF-8). Its error and its meta say where it was.

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
        self._topic = checked_topic(topic)
        self._urls = checked_urls(urls)
        self._configs = checked_configs(KafkaConsumer, SOURCE_DEFAULTS, configs)
        if self._configs.pop('enable_auto_commit', False):
            raise ArgumentError('enable_auto_commit=True would lose messages; they are committed when they are stored')
        if not isinstance(self._configs['group_id'], str) or not self._configs['group_id']:
            raise ArgumentError(f'group_id must be a string that is not empty, not {self._configs["group_id"]!r}')
        self._configs.setdefault('heartbeat_interval_ms', self._configs['session_timeout_ms'] // 4)
        self._reset = self._configs.pop('auto_offset_reset')
        if self._reset not in ('earliest', 'latest', 'none'):
            raise ArgumentError(f"auto_offset_reset must be 'earliest', 'latest' or 'none', not {self._reset!r}")
        self._value = coder(self._configs, 'value_deserializer', jsontext.loads)
        self._key = coder(self._configs, 'key_deserializer', _text)
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
        consumer, client = opened(KafkaConsumer, self._urls, configs)
        logger.info('reading from Kafka at %s', ', '.join(self._urls))
        return _Connected(made_tolerant(consumer), client.cluster, ','.join(sorted(self._urls)))

    def _decode(self, record: Any) -> SourceMessage:
        """A Kafka message as it is appended; one that cannot be decoded says why."""
        headers = [[name, _text(value)] for name, value in record.headers or ()]
        meta = {
            'topic': record.topic, 'partition': record.partition, 'offset': record.offset, 'key': record.key,
            'timestamp': _time(record.timestamp), 'headers': headers,
        }  # fmt: skip
        if isinstance(record.value, Undecodable):
            first, raw = record.value.first, bytes(record.value)
            which = f'message {first}' if first == record.offset else f'messages {first} to {record.offset}'
            why = f'{which} of {record.topic}/{record.partition}: {record.value.why}'
            return SourceMessage(raw, meta, record.offset + 1, why)
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
