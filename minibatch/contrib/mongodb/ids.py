"""Ids of documents: which can be compared with each other, and how far two are apart. Pure."""

from __future__ import annotations

import math
import struct
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import bson
from bson import Decimal128, Int64, ObjectId, Timestamp
from bson.code import Code
from bson.datetime_ms import DatetimeMS

from .documents import RAW, packed

# MongoDB compares values of one kind with each other; the names are those of its operator $type.
KINDS = ('number', 'string', 'object', 'binData', 'objectId', 'bool', 'date', 'timestamp')
TIMED = ('objectId', 'date', 'timestamp')

_LARGEST = 2**32 - 1
_SMALLEST = -(2**63)


def kind_of(value: Any) -> str | None:
    """The kind of a value; None if it has no order, such as a list."""
    if isinstance(value, bool):
        return 'bool'
    for kind, types in (
        ('number', (int, float, Decimal128)), ('objectId', ObjectId), ('date', DatetimeMS), ('timestamp', Timestamp),
        ('object', Mapping), ('binData', (bytes, uuid.UUID)),
    ):  # fmt: skip
        if isinstance(value, types):
            return kind
    return 'string' if isinstance(value, str) and not isinstance(value, Code) else None


def place_of(kind: str, value: Any) -> Any:
    """Where a value lies: seconds since 1970, the number itself, or None if its kind has no distances."""
    if kind == 'objectId':
        return struct.unpack('>I', value.binary[:4])[0]
    if kind == 'date':
        return int(value) / 1000
    if kind == 'timestamp':
        return value.time
    if kind == 'number':
        return value.to_decimal() if isinstance(value, Decimal128) else value
    return None


def value_at(kind: str, place: Any) -> Any:
    """The lowest value at a place; the opposite of `place_of`."""
    if kind == 'objectId':
        return ObjectId(struct.pack('>I', min(max(math.floor(place), 0), _LARGEST)) + bytes(8))
    if kind == 'date':
        return DatetimeMS(math.floor(place * 1000))
    if kind == 'timestamp':
        return Timestamp(min(max(math.floor(place), 0), _LARGEST), 0)
    if isinstance(place, Decimal):
        return Decimal128(place)
    return Int64(max(place, _SMALLEST)) if isinstance(place, int) else place


def below(place: Any, distance: float) -> Any:
    """The number that is so much smaller."""
    return place - (Decimal(distance) if isinstance(place, Decimal) else distance)


class Bound(NamedTuple):
    """A point in the order of documents: just before all with this value, or just after one document."""

    value: Any
    before: bool = False
    id: Any = None

    def packed(self) -> bytes:
        """As bytes, so that whoever stores it need not be able to decode it."""
        return packed({'value': self.value, 'before': self.before, 'id': self.id})

    @classmethod
    def unpacked(cls, packed: bytes) -> Bound:
        """The opposite of `packed`."""
        doc = bson.decode(packed, codec_options=RAW)
        return cls(doc['value'], doc['before'], doc['id'])
