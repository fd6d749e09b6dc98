"""Get past what Kafka's client cannot decode.

kafka-python raises an error at such a record or batch, and again at each later attempt, so that nothing behind it is
ever read. A consumer that was `made_tolerant` brings its bytes instead, as the value of a record: an `Undecodable`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from kafka import codec
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecord
from kafka.record.util import decode_varint

from minibatch.errors import MinibatchError

LAST_FORMAT = 2
HEADER_BYTES = 61
CODECS = {2: ('snappy', 'python-snappy'), 3: ('lz4', 'lz4'), 4: ('zstd', 'zstandard')}


class Undecodable(bytes):
    """What cannot be decoded: a record, or a whole batch of them.

    Attributes:
        first: the offset of the first message that is in it; that of the last one is the offset of its record.
        why: what is wrong.
    """

    first: int
    why: str


def made_tolerant(consumer: Any) -> Any:
    """A KafkaConsumer that goes on behind what it cannot decode."""
    consumer._fetcher.PartitionRecords = _PartitionRecords
    return consumer


class _PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    """What was fetched of a partition."""

    def _unpack_records(self, tp: Any, records: Any, *deserializers: Any) -> Any:
        batches = _Batches(records, self.fetch_offset, self.check_crcs)
        return super()._unpack_records(tp, batches, *deserializers)


class _Batches:
    """The batches that were fetched."""

    def __init__(self, records: Any, fetch_offset: int, check_crcs: bool) -> None:
        self._records, self._next, self._check_crcs = records, fetch_offset, check_crcs
        self._ended = False

    def next_batch(self) -> Any:
        """The next batch; None behind the last one, or one that is broken: if its length is, too, only Kafka knows."""
        raw = self._records._next_slice
        if raw is None or self._ended:
            return None
        try:
            batch = self._records.next_batch()
            if self._check_crcs and not batch.validate_crc():
                raise CorruptRecordError('its checksum is wrong')
            if batch.magic > LAST_FORMAT:
                raise CorruptRecordError(f'its format is {batch.magic}')
            if batch.magic == LAST_FORMAT and batch.records_count > batch.last_offset_delta + 1:
                raise CorruptRecordError('it has more messages than offsets')
        except Exception as exc:
            self._ended = True
            return _BrokenBatch(bytes(raw), self._next, exc)
        self._next = _last_offset(batch) + 1
        return _Batch(batch)


class _BrokenBatch:
    """A batch of which nothing is certain but where it was fetched. It looks like one of the oldest format."""

    magic = 0

    def __init__(self, raw: bytes, fetch_offset: int, exc: Exception) -> None:
        base = struct.unpack_from('>q', raw)[0] if len(raw) >= 8 else fetch_offset
        self._record = _undecodable(raw, fetch_offset, max(_claimed_end(raw, base), fetch_offset), exc)
        self.base_offset, self.is_control_batch = base, False

    def validate_crc(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter([self._record])


class _Batch:
    """A batch whose checksum is right; what it holds may be decodable or not."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def validate_crc(self) -> bool:
        return True

    def __next__(self) -> Any:
        """The mark at the end of a transaction. One that cannot be read is as good as one of a transaction aborted."""
        try:
            return next(self._batch)
        except Exception:
            return SimpleNamespace(abort=True)

    def __iter__(self) -> Iterator[Any]:
        batch, new = self._batch, self._batch.magic == LAST_FORMAT
        if (missing := CODECS.get(batch.compression_type)) and not getattr(codec, f'has_{missing[0]}')():
            raise MinibatchError(f'messages are compressed by {missing[0]}: pip install {missing[1]}')
        done, last = batch.base_offset if new else 0, _last_offset(batch)
        rest: Exception | None = None
        try:
            records = iter(batch)
        except Exception as exc:
            rest = exc
        while rest is None:
            try:
                record = next(records)
                if not record.validate_crc():
                    raise CorruptRecordError('its checksum is wrong')
            except StopIteration:
                return
            except Exception as exc:
                record = _skipped(batch, exc) if new else None
                rest = exc if record is None else None
            if record is not None and new and not done <= record.offset <= last:
                rest = CorruptRecordError('its offset is not in order')
            if rest is None:
                done = record.offset + 1
                yield record
        if done <= last:
            yield _undecodable(bytes(batch._buffer), done, last, rest)


def _skipped(batch: Any, exc: Exception) -> Any:
    """Step over one record of a batch; None if that is not possible."""
    buffer = batch._buffer
    try:
        length, start = decode_varint(buffer, batch._pos)
        end = start + length
        if not start < end <= len(buffer) or batch._next_record_index >= batch.records_count:
            return None
        _, pos = decode_varint(buffer, start)  # attributes
        _, pos = decode_varint(buffer, pos)  # time
        delta, _ = decode_varint(buffer, pos)
    except (ValueError, IndexError):
        return None
    batch._pos, batch._next_record_index = end, batch._next_record_index + 1
    offset = batch.base_offset + delta
    return _undecodable(bytes(buffer[start:end]), offset, offset, exc)


def _undecodable(raw: bytes, first: int, last: int, exc: Exception) -> DefaultRecord:
    value = Undecodable(raw)
    value.first, value.why = min(first, last), str(exc.args[0]) if exc.args else type(exc).__name__
    return DefaultRecord(len(raw), last, -1, 0, None, value, [])


def _last_offset(batch: Any) -> int:
    """Older formats have the last one of a compressed batch where others have the first."""
    return int(batch.last_offset if batch.magic == LAST_FORMAT else batch.base_offset)


def _claimed_end(raw: bytes, base: int) -> int:
    """The last offset of a broken batch, if its two places that say it agree; else its first."""
    if len(raw) < HEADER_BYTES or raw[16] != LAST_FORMAT:
        return base
    delta, count = struct.unpack_from('>i', raw, 23)[0], struct.unpack_from('>i', raw, 57)[0]
    return base + max(delta, 0) if delta == count - 1 else base
