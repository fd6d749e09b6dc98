"""What a message says of itself: its key, and its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from datetime import datetime, timezone
from typing import Any

from bson import ObjectId

from . import clock, functions, signals, store
from .errors import ArgumentError

MAX_KEY = 1000
MAX_PARTS = 100
MAX_TEXT = 1000
MAX_INT = 1 << 63
FIRST, LAST = (clock.to_ms(datetime(year, 1, 1, tzinfo=timezone.utc)) for year in (100, 9900))

IN_A_SECOND = {'milliseconds': 10**3, 'microseconds': 10**6, 'nanoseconds': 10**9}

Of = str | Callable[[Any], Any]


class BadMessage(Exception):
    """The key or time of a message is missing, or is none."""


class Fields:
    """Where the key and the time of a message are: the names of fields ('a', or 'a.b'), or functions of its data."""

    def __init__(self, key: Of | None = None, timestamp: Of | None = None) -> None:
        self._key, self._timestamp = key, timestamp
        for name, of in {'key': key, 'timestamp': timestamp}.items():
            if of is not None and not callable(of) and not (isinstance(of, str) and all(of.split('.'))):
                raise ArgumentError(f"{name} must be the name of a field, 'a' or 'a.b', or a function, not {of!r}")
            if callable(of):
                functions.check(name, of, 'the data of a message', plain=True)

    @property
    def names(self) -> list[str] | None:
        """The fields that must be read; None for the whole message."""
        given = [of for of in (self._key, self._timestamp) if of is not None]
        return None if any(callable(of) for of in given) else [str(of) for of in given]

    def key(self, data: Any) -> Any:
        """The key of a message, None without one."""
        return None if self._key is None else _value('key', self._key, data, key_of)

    def time(self, data: Any) -> int | None:
        """The time of a message, None without one of its own."""
        return None if self._timestamp is None else int(_value('timestamp', self._timestamp, data, time_of))


def _value(name: str, of: Of, data: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        value = of(data) if callable(of) else _field(of, data)
        if value is None:
            raise BadMessage('is None')
        return convert(value)
    except BadMessage as exc:
        where = 'what the function returned ' if callable(of) else f'field {of!r} '
        raise BadMessage(f'{name}: {where}{exc}') from None
    except BaseException as exc:  # of a function that was given
        if signals.is_signal(exc):
            raise
        raise BadMessage(f'{name}: {store.in_words(exc)}'[:MAX_TEXT]) from exc


def _field(path: str, data: Any) -> Any:
    for name in path.split('.'):
        if not isinstance(data, dict) or name not in data:
            raise BadMessage('is missing')
        data = data[name]
    return data


def time_of(value: Any) -> int:
    """A time as whole milliseconds since 1970.

    Args:
        value: a datetime (naive is UTC), a number of seconds since 1970, or a string as
            ``datetime.fromisoformat`` reads it, also with a ``Z``. A number in a string is no time.
    """
    if isinstance(value, str):
        value = iso_time(value)
    if isinstance(value, datetime):
        time = clock.to_ms(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        whole = clock.whole_ms(value)
        time = math.floor(value * 1000) if whole is None else whole
    else:
        raise BadMessage(f'is no time: {str(value)[:100]!r} ({type(value).__name__})')
    if not FIRST <= time < LAST:
        raise BadMessage(f'is not between the years 100 and 9900: {str(value)[:100]}{_unit_hint(value)}')
    return time


def iso_time(text: str) -> datetime:
    """The time that a string in ISO 8601 says, also with a ``Z``; naive if it says no offset."""
    read = text[:-1] + '+00:00' if text.endswith(('Z', 'z')) else text
    try:
        if text[:9].isdecimal():
            if len(text) != 8:  # Python reads the year 1712 in 1712121300123, milliseconds of the year 2024
                raise ValueError
            read = f'{text[:4]}-{text[4:6]}-{text[6:]}'  # as Python 3.10 reads it, too
        return datetime.fromisoformat(read)
    except ValueError:
        raise BadMessage(f'is no time: {text[:100]!r}{_number_hint(text)}') from None


def _number_hint(text: str) -> str:
    """What to do about a number in a string."""
    try:
        number = float(text)
    except ValueError:
        return ''
    return f', which is a number in a string{_unit_hint(number)}; give seconds since 1970, as a number'


def _unit_hint(number: Any) -> str:
    """The unit in which a number would be a time, when it is none in seconds."""
    if isinstance(number, (int, float)) and not FIRST <= number * 1000 < LAST:
        for unit, in_a_second in IN_A_SECOND.items():
            if FIRST <= number / in_a_second * 1000 < LAST:
                return f'; it looks like {unit}, and seconds are expected'
    return ''


def key_of(value: Any) -> Any:
    """A key as it is after it was stored: str, bool, int, float, datetime (aware), ObjectId, or a tuple of those."""
    if not isinstance(value, (tuple, list)):
        return _part_of(value)
    key = tuple(map(_part_of, value))
    if len(key) > MAX_PARTS or sum(len(part) for part in key if isinstance(part, str)) > MAX_KEY:
        raise BadMessage(f'is no key: it has more than {MAX_PARTS} parts, or {MAX_KEY} characters')
    return key


def stored_key(value: Any) -> Any:
    """The key that a document has, None if it has none."""
    return None if value is None else key_of(value)


def _part_of(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > MAX_KEY:
            raise BadMessage(f'is no key: it has more than {MAX_KEY} characters')
        value.encode()
        return str(value)
    if isinstance(value, (bool, ObjectId)):
        return value
    if isinstance(value, int) and -MAX_INT <= value < MAX_INT:
        return int(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    if isinstance(value, datetime):
        return clock.from_ms(clock.to_ms(value))
    raise BadMessage(f'is no key: {str(value)[:100]!r} ({type(value).__name__})')


def identity(key: Any) -> Hashable:
    """What tells one key from another, as MongoDB does: 1 and 1.0 are the same, True is another."""
    if type(key) is str or key is None:
        return key
    if isinstance(key, tuple):
        return tuple(map(identity, key))
    number = isinstance(key, (int, float)) and not isinstance(key, bool)
    return float if number else type(key), key
