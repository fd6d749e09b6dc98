"""Keys and times of messages, as users write them."""

from datetime import datetime, timedelta, timezone

import pytest
from bson import Int64, ObjectId

from minibatch import clock
from minibatch.fields import BadMessage, Fields, identity, key_of, time_of

AT = 1_769_860_800_000  # 2026-01-31T12:00:00Z


@pytest.mark.parametrize('value', [
    datetime(2026, 1, 31, 12), datetime(2026, 1, 31, 13, tzinfo=timezone(timedelta(hours=1))), AT // 1000, AT / 1000,
    '2026-01-31T12:00:00', '2026-01-31T12:00:00Z', '2026-01-31 13:00:00+01:00', Int64(AT // 1000),
])  # fmt: skip
def test_a_time_is_a_datetime_a_number_or_a_string(value):
    assert time_of(value) == AT


@pytest.mark.parametrize(('seconds', 'ms'), [
    (1.001, 1001), (0.001, 1), (56.99999999999999, 57_000), (-1.001, -1001), (250_000_000_000.001, 250_000_000_000_001),
    (1_769_860_800.123, AT + 123), (1.0019, 1001),
])  # fmt: skip
def test_seconds_are_the_milliseconds_that_they_mean(seconds, ms):
    assert time_of(seconds) == ms


def test_digits_are_a_date_when_they_are_eight():
    assert time_of('20260131') == AT - 43_200_000


@pytest.mark.parametrize(('value', 'why'), [
    ('1712121300123', 'a number in a string; it looks like milliseconds, and seconds are expected; give seconds'),
    ('1712121300123Z', 'is no time'),
    ('1712121300', 'a number in a string; give seconds since 1970, as a number'),
    ('1712121300.123', 'a number in a string; give seconds'),
    ('-1712121300123', 'it looks like milliseconds'),
    ('1712121300123456', 'it looks like microseconds'),
    ('20261128120000', 'is no time'),
    ('202611281200001', 'is no time'),
    ('99999999', 'a number in a string'),
    (1712121300123, 'it looks like milliseconds, and seconds are expected'),
    (1712121300123.0, 'it looks like milliseconds, and seconds are expected'),
    (1712121300123456789, 'it looks like nanoseconds, and seconds are expected'),
])  # fmt: skip
def test_numbers_that_are_no_seconds_are_refused_and_it_is_said_what_they_look_like(value, why):
    with pytest.raises(BadMessage, match=f'timestamp: .*{why}'):
        Fields(timestamp='at').time({'at': value})


def test_a_time_is_kept_in_whole_milliseconds():
    assert time_of(datetime(2026, 1, 31, 12, 0, 0, 1999)) == AT + 1
    assert time_of(-0.0001) == -1


@pytest.mark.parametrize('value', [
    None, True, 'noon', '', b'2026-01-31', float('nan'), float('inf'), [AT], 10**400, 1e300, datetime(1, 1, 1),
    '9999-12-31T23:59:59',
])  # fmt: skip
def test_anything_else_is_no_time(value):
    with pytest.raises(BadMessage, match='timestamp: '):
        Fields(timestamp='at').time({'at': value})


@pytest.mark.parametrize('value', [
    'x', '', 0, -5, 1.5, True, False, ObjectId(), ('x', 1), (), 'ä\0',
])  # fmt: skip
def test_a_key_comes_back_as_it_is(value):
    assert key_of(value) == value
    assert type(key_of(value)) is type(value)


def test_a_key_is_as_it_will_be_when_it_was_stored():
    assert key_of(['x', 1]) == ('x', 1)
    assert type(key_of(Int64(5))) is int
    assert key_of(datetime(2026, 1, 31, 12, 0, 0, 1999)) == clock.from_ms(AT + 1)


@pytest.mark.parametrize('value', [
    None, {}, float('nan'), 1 << 63, b'x', 'x' * 1001, '\ud800', ('x', None), (('x',),), ['x' * 600] * 2, [1] * 101,
])  # fmt: skip
def test_anything_else_is_no_key(value):
    with pytest.raises(BadMessage, match='key: '):
        Fields(key='k').key({'k': value})


def test_keys_of_different_types_are_different_keys_but_equal_numbers_are_one():
    keys = [1, True, '1', (1,), (True,), ('1',), None, ()]
    assert len({identity(key) for key in keys}) == len(keys)
    assert identity(1) == identity(1.0)
    assert identity((0, 'a')) == identity((-0.0, 'a'))


def test_a_field_of_a_field_is_named_with_a_dot():
    fields = Fields(key='a.b', timestamp='a.t')
    assert (fields.key({'a': {'b': 'x'}}), fields.names) == ('x', ['a.b', 'a.t'])
    for data in ({}, {'a': 3}, {'a': {}}, {'a.b': 'x'}):
        with pytest.raises(BadMessage, match=r"key: field 'a\.b' is missing"):
            fields.key(data)


def test_what_a_function_raises_is_said_and_can_be_stored():
    def fail(data):
        raise ValueError('\ud800' + 'x' * 5000)

    with pytest.raises(BadMessage, match='key: ValueError') as caught:
        Fields(key=fail).key({})
    assert len(str(caught.value).encode()) <= 1000
    assert Fields(key=fail).names is None


def test_an_error_of_a_function_whose_text_exits_or_has_a_password_is_told_all_the_same():
    class Wordless(BaseException):
        def __str__(self):
            raise SystemExit(1)

    def raises(exc):
        def of(data):
            raise exc

        return of

    with pytest.raises(BadMessage, match=r'^key: Wordless: \(its text cannot be had: SystemExit\)$'):
        Fields(key=raises(Wordless())).key({})
    with pytest.raises(BadMessage, match=r'timestamp: OSError: no answer from mongodb://me:\*+@host$'):
        Fields(timestamp=raises(OSError('no answer from mongodb://me:secret@host'))).time({})
