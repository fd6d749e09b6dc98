"""Messages as MongoDB stores them, and what is wrong with those that it cannot store, or nobody could read again."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import bson
from bson import Decimal128, Int64, ObjectId
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from bson.raw_bson import RawBSONDocument

from .connection import Target
from .errors import DataError

MAX_MESSAGE_BYTES = (16 << 20) - 8192
MAX_DEPTH = 170
Codec = Any  # bson.CodecOptions
CODEC: Codec = bson.CodecOptions(
    uuid_representation=UuidRepresentation.STANDARD, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
# What is of these types is read back for certain; what is bytes already, such as a RawBSONDocument, may not be.
SAFE = {str, int, float, bool, type(None), bytes, datetime, uuid.UUID, ObjectId, Int64, Decimal128}


def codec_of(target: Target) -> Codec:
    """How the messages of a database are stored: UUIDs are as its URL says."""
    if target.is_mock:
        return CODEC
    return CODEC.with_options(uuid_representation=target.client.codec_options.uuid_representation)


def encode(data: Any, codec: Codec = CODEC) -> bytes:
    """The message as MongoDB stores it.

    Raises:
        DataError: naming the key, if it is not a mapping or cannot be stored.
    """
    if type(data) is not dict and not isinstance(data, Mapping):
        raise DataError(f'data must be a mapping such as a dict, not {type(data).__name__}')
    try:
        raw = bson.encode(data, codec_options=codec)
        if type(data) is not dict or not SAFE.issuperset(map(type, data.values())):  # most are; cheap first
            _read_back(data, raw, codec)
    except Exception as exc:
        path, reason = _culprit(data, exc, codec)
        raise DataError(f'MongoDB cannot store data{path}: {reason}') from None
    size = len(raw)
    if size > MAX_MESSAGE_BYTES:
        key = max(data, key=lambda name: len(bson.encode({name: data[name]}, codec_options=codec)))
        raise DataError(
            f'the message has {size:,} bytes, MongoDB stores at most {MAX_MESSAGE_BYTES:,}; '
            f'the largest value is data[{key!r}]'
        )
    # Cheap first: every level of nesting takes 7 bytes, one of which is 3 or 4.
    if size > 7 * MAX_DEPTH and raw.count(b'\x03') + raw.count(b'\x04') > MAX_DEPTH and _is_deeper(data, MAX_DEPTH):
        raise DataError(f'data is nested more than {MAX_DEPTH} levels deep')
    if b'$ref\x00' in raw and (path := _find_key(data, '$ref')):
        raise DataError(f'data{path} has the key $ref, which MongoDB reads back as a reference; rename it')
    return raw


def encode_both(data: Any, meta: Any, codec: Codec = CODEC) -> tuple[bytes, RawBSONDocument | None]:
    """A message and what is said about it; see `encode` and `encode_meta`.

    Raises:
        DataError: also if they are too large together.
    """
    raw = encode(data, codec)
    if meta is None:
        return raw, None
    frozen = encode_meta(meta, codec)
    size = len(raw) + (0 if frozen is None else len(frozen.raw))
    if size > MAX_MESSAGE_BYTES:
        raise DataError(f'data and meta have {size:,} bytes together, MongoDB stores at most {MAX_MESSAGE_BYTES:,}')
    return raw, frozen


def encode_meta(meta: Any, codec: Codec = CODEC) -> RawBSONDocument | None:
    """What is said about a message, as it is now.

    Raises:
        DataError: if it cannot be stored.
    """
    if meta is None:
        return None
    try:
        return RawBSONDocument(to_bson({'meta': meta}, codec))
    except Exception as exc:
        path, reason = _culprit(meta, exc, codec)
        raise DataError(f'MongoDB cannot store meta{path}: {reason}') from None


def to_bson(value: Any, codec: Codec = CODEC) -> bytes:
    """A document as bytes; raises if it could not be stored, or not be read any more."""
    raw = bson.encode(value, codec_options=codec)
    _read_back(value, raw, codec)
    return raw


def _read_back(value: Any, raw: bytes, codec: Codec) -> None:
    """Raise if it could be stored, but not read any more: that would hold up all who read the stream."""
    if type(value) is not dict or not _is_safe(value.values()):
        bson.decode(raw, codec)


def _is_safe(values: Iterable[Any]) -> bool:
    """Whether all these values, at any depth, are of types that are read back for certain."""
    if SAFE.issuperset(map(type, values)):
        return True
    for value in values:
        kind = type(value)
        inner = value.values() if kind is dict else value if kind is list or kind is tuple else None
        if not (kind in SAFE if inner is None else _is_safe(inner)):
            return False
    return True


def _culprit(value: Any, exc: Exception, codec: Codec, path: str = '') -> tuple[str, str]:
    if isinstance(value, RawBSONDocument):
        return path, str(exc)
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                return path, f'its key {key!r} is not a string'
            if '\0' in key:
                return path, f'its key {key!r} contains a NUL'
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    for key, child in children:
        try:
            to_bson({'value': child}, codec)
        except RecursionError:
            return f'{path}[{key!r}]', 'it is nested too deeply, or contains itself'
        except Exception as inner:
            return _culprit(child, inner, codec, f'{path}[{key!r}]')
    return path, str(exc)


def _is_deeper(value: Any, most: int) -> bool:
    children: Iterable[Any] = ()
    if isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    return most < 0 or any(_is_deeper(child, most - 1) for child in children)


def _find_key(value: Any, wanted: str, path: str = '') -> str:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        if wanted in value:
            return path or ' itself'
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    return next((found for key, child in children if (found := _find_key(child, wanted, f'{path}[{key!r}]'))), '')
