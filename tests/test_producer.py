"""What a message may be, and how messages become record batches."""

import decimal
import uuid
from datetime import datetime

import bson
import pytest

from minibatch.errors import DataError
from minibatch.producer import RECORD_BYTES, RECORD_MESSAGES, _cuts, encode, encode_meta


@pytest.mark.parametrize(
    'data',
    [
        {},
        {'a.b': 1, '$set': {'x': 2}, 'c': {'$gt': 3, 'd.e': 4}},
        {'_id': 1, 'a': [1, {'b': None}]},
        {'_cls': 'Stream', 'x': {'_cls': 'Window'}},
        {'t': datetime(2020, 1, 1), 'u': uuid.UUID(int=5), 'b': b'x', 'f': 1.5},
        {'text': 'a value that mentions $ref'},
    ],
)
def test_data_comes_back_as_it_was(data):
    options = bson.CodecOptions(uuid_representation=bson.binary.UuidRepresentation.STANDARD)
    assert bson.decode(encode(data), options) == data


@pytest.mark.parametrize('data', [1, 'text', None, [1], [('a', 1)], {1, 2}])
def test_data_must_be_a_mapping(data):
    with pytest.raises(DataError, match='must be a mapping'):
        encode(data)


@pytest.mark.parametrize(
    ('data', 'named'),
    [
        ({'a': object()}, r"data\['a'\]"),
        ({'a': {'b': [1, {'c': decimal.Decimal(1)}]}}, r"data\['a'\]\['b'\]\[1\]\['c'\]"),
        ({'n': 2**70}, r"data\['n'\]"),
        ({1: 2}, 'key 1 is not a string'),
        ({'a': {2: 3}}, r"data\['a'\].*key 2 is not a string"),
        ({'a': '\ud800'}, r"data\['a'\]"),
        ({'x': {'$ref': 'c', '$id': 1}}, r"\['x'\].*\$ref"),
        ({'big': 'x' * (17 << 20), 'small': 1}, r"data\['big'\]"),
    ],
)
def test_what_mongodb_cannot_store_is_refused_with_the_key(data, named):
    with pytest.raises(DataError, match=named):
        encode(data)


def test_data_that_contains_itself_is_refused():
    data = {}
    data['self'] = data
    with pytest.raises(DataError, match='contains itself'):
        encode(data)


def test_data_nested_deeper_than_the_server_takes_is_refused():
    data = {}
    for _ in range(175):
        data = {'in': data}
    with pytest.raises(DataError, match='nested'):
        encode(data)


def cuts(datas, meta=None):
    return _cuts(datas, meta or [None] * len(datas), 0)


def test_record_batches_are_bounded_in_number_and_bytes():
    many = list(cuts([b'x' * 10] * (2 * RECORD_MESSAGES + 1)))
    assert [end - start for start, end, _ in many] == [RECORD_MESSAGES, RECORD_MESSAGES, 1]
    big = list(cuts([b'x' * (RECORD_BYTES // 2 + 1)] * 3))
    assert [end - start for start, end, _ in big] == [1, 1, 1]


def test_one_message_larger_than_a_record_batch_goes_alone():
    assert [(start, end) for start, end, _ in cuts([b'a', b'x' * (2 * RECORD_BYTES), b'b'])] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


def test_what_is_said_about_messages_counts_as_their_bytes():
    about = encode_meta({'header': 'x' * (RECORD_BYTES // 2)})
    assert [end - start for start, end, _ in cuts([b'x'] * 3, [about] * 3)] == [1, 1, 1]


def test_meta_that_cannot_be_stored_is_refused_at_the_call():
    with pytest.raises(DataError, match=r"meta\['header'\]"):
        encode_meta({'header': object()})
