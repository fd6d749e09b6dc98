"""What Kafka's client cannot decode is brought as bytes, and does not hold up what is behind it. Without a broker."""

import random
import struct

import pytest
from kafka import TopicPartition, codec
from kafka.record.default_records import DefaultRecordBatchBuilder as Builder
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder
from kafka.record.util import calc_crc32c
from processes import SEED

from minibatch.contrib.kafka.records import HEADER_BYTES, Undecodable, _PartitionRecords
from minibatch.errors import MinibatchError

PARTITION = TopicPartition('orders', 0)
GZIP, ZSTD, UNKNOWN = 1, 4, 5


class Header(str):
    """A name of a header that is no UTF-8."""

    def encode(self, *args):
        return b'\xff'


def batch(offsets, magic=2, compression=0, header='h'):
    """A batch as Kafka has it, with messages of these offsets: 'm5' is the fifth."""
    builder = MemoryRecordsBuilder(magic, compression, 1 << 20)
    for i, offset in enumerate(offsets):
        headers = [(header if i == 1 else 'h', b'')] if magic == 2 else []
        builder.append(1000, b'k' * (300 if compression else 1), b'm%d' % offset, headers)
    builder.close()
    raw = bytearray(builder.buffer())
    struct.pack_into('>q', raw, 0, offsets[0])
    return raw


def signed(raw):
    """With a checksum that is right."""
    struct.pack_into('>I', raw, Builder.CRC_OFFSET, calc_crc32c(memoryview(raw)[Builder.ATTRIBUTES_OFFSET :]))
    return raw


def fetched(*batches, at=0):
    return _PartitionRecords(at, PARTITION, MemoryRecords(b''.join(batches)))


def seen(records):
    """What comes of a fetch: a value, or the offsets that could not be decoded."""
    return [
        f'{record.value.first}-{record.offset}' if isinstance(record.value, Undecodable) else record.value.decode()
        for record in records.take()
    ]


def test_a_header_whose_name_is_no_utf8_spoils_its_own_message_alone():
    records = fetched(batch([0, 1, 2], header=Header()), batch([3]))
    assert seen(records) == ['m0', '1-1', 'm2', 'm3']
    assert records.next_fetch_offset == 4


@pytest.mark.parametrize('compression', [0, GZIP])
def test_a_batch_with_a_wrong_checksum_is_one_thing_and_the_next_fetch_begins_behind_it(compression):
    broken = batch([5, 6, 7], compression=compression)
    broken[-1] ^= 1
    records = fetched(batch([3, 4]), broken, batch([8]), at=3)
    found = records.take()
    assert [record.value for record in found[:2]] == [b'm3', b'm4']
    assert (found[2].value, found[2].value.first, found[2].offset) == (bytes(broken), 5, 7)
    assert found[2].value.why == 'its checksum is wrong'
    assert (len(found), records.next_fetch_offset) == (3, 8)


def test_a_broken_batch_is_told_also_when_reading_goes_on_inside_it():
    broken = batch([5, 6, 7])
    broken[-1] ^= 1
    assert seen(fetched(broken, at=7)) == ['7-7']


def test_a_broken_batch_that_contradicts_itself_is_passed_one_offset_at_a_time():
    broken = batch([5, 6, 7])
    broken[24] = 0x7F  # it would reach far beyond the end of the partition
    for offset in (5, 6, 7):
        records = fetched(broken, batch([8]), at=offset)
        assert seen(records) == [f'{offset}-{offset}']
        assert records.next_fetch_offset == offset + 1


def test_a_compression_that_nobody_knows_is_told():
    unknown = batch([0, 1])
    unknown[Builder.ATTRIBUTES_OFFSET + 1] |= UNKNOWN
    assert seen(fetched(signed(unknown), batch([2]))) == ['0-1', 'm2']


def test_what_is_not_compressed_as_it_says_is_told():
    wrong = batch([0, 1])
    wrong[Builder.ATTRIBUTES_OFFSET + 1] |= GZIP
    assert seen(fetched(signed(wrong), batch([2]))) == ['0-1', 'm2']


def test_a_compression_whose_package_is_missing_is_no_fault_of_the_messages(monkeypatch):
    monkeypatch.setattr(codec, 'has_zstd', lambda: False)
    compressed = batch([0])
    compressed[Builder.ATTRIBUTES_OFFSET + 1] |= ZSTD
    with pytest.raises(MinibatchError, match='pip install zstandard'):
        seen(fetched(signed(compressed)))


@pytest.mark.parametrize('magic', [0, 1])
@pytest.mark.parametrize('compression', [0, GZIP])
def test_older_formats_are_read_and_their_broken_batches_told(magic, compression):
    good = batch([0], magic, compression)
    broken = batch([0], magic, compression)
    struct.pack_into('>q', broken, 0, 1)
    broken[-1] ^= 1
    records = fetched(good, broken)
    assert seen(records) == ['m0', '1-1']
    assert records.next_fetch_offset == 2


def test_a_record_longer_than_its_batch_leaves_those_before_it():
    wrong = batch([0, 1, 2])
    wrong[wrong.index(b'm1') - 7] = 0x7E
    assert seen(fetched(signed(wrong), batch([3]))) == ['m0', '1-2', 'm3']


def test_offsets_that_contradict_those_of_the_batch_are_told():
    wrong = batch([0, 1, 2])
    wrong[wrong.index(b'm1') - 4] = 0x7E
    assert seen(fetched(signed(wrong), batch([3]))) == ['m0', '1-2', 'm3']


def test_a_batch_too_short_to_be_one_is_told():
    assert seen(fetched(struct.pack('>qi', 9, 3) + b'abc', at=9)) == ['9-9']


def test_whatever_is_broken_reading_goes_on_and_messages_of_sound_batches_come():
    rng = random.Random(SEED)
    for _ in range(200):
        raw = [batch([0, 1, 2], compression=rng.choice([0, GZIP])), batch([3, 4, 5])]
        at = rng.randrange(12, len(raw[0]))  # behind offset and length
        raw[0][at] ^= rng.randrange(1, 256)
        raw[0] = signed(raw[0]) if rng.random() < 0.5 and at >= HEADER_BYTES else raw[0]
        records = fetched(*raw)
        found = [(record.offset, record.value) for record in records.take()]
        offsets = [offset for offset, _ in found]
        assert found, f'seed {SEED}'
        assert offsets == sorted(set(offsets)), f'seed {SEED}'
        assert records.next_fetch_offset > offsets[-1], f'seed {SEED}'
