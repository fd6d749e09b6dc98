"""What MongoDB stores and Python cannot read, such as a string that is no UTF-8: told apart from what it can read.

Nothing that goes through an append is so, but what other programs write may be. One such message must not keep those
beside it from being read, so `Unreadable` stands for it, with its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bson
from bson.errors import InvalidBSON
from bson.raw_bson import DEFAULT_RAW_BSON_OPTIONS, RawBSONDocument
from pymongo.client_session import ClientSession
from pymongo.collection import Collection

READ_AT_ONCE = 5000
DOCUMENT, ARRAY, BINARY, REGEX, POINTER, SCOPED_CODE = 3, 4, 5, 11, 12, 15
FIXED = {1: 8, 6: 0, 7: 12, 8: 1, 9: 8, 10: 0, 16: 4, 17: 8, 18: 8, 19: 16, 127: 0, 255: 0}  # bytes of other types

Doc = dict[str, Any]
Element = tuple[bytes, int, bytes]
"""The name, the type and the value of an element of a document, as they are stored."""


class Unreadable(dict[str, Any]):
    """Stands for a value that cannot be read: ``{'unreadable': bytes, 'error': str}``.

    The bytes are those of the document; what is none is in one, under an empty name.
    """


def read(
    collection: Collection[Doc], query: Doc, fields: Any = None, session: ClientSession | None = None,
    order: str = 'offset', direction: int = 1, limit: int = 0,
) -> Iterator[Doc]:  # fmt: skip
    """Documents of a collection in order, also those of which Python cannot read all: these are as `decode` says."""

    def find(collection: Collection[Any]) -> Iterator[Any]:
        return collection.find(
            query, fields, sort=[(order, direction)], limit=limit, batch_size=READ_AT_ONCE, session=session
        )

    last = None
    try:
        for doc in find(collection):
            yield doc
            last = doc[order]
    except InvalidBSON:
        for raw in find(collection.with_options(DEFAULT_RAW_BSON_OPTIONS)):
            doc = decode(raw, collection.codec_options)
            if last is None or (doc[order] > last) == (direction > 0):
                yield doc


def decode(raw: RawBSONDocument, options: Any) -> Doc:
    """A document; of what cannot be read, each value, or each item of a list, is an `Unreadable`.

    The document then has ``'unreadable': True`` beside its own fields.
    """
    try:
        return dict(bson.decode(raw.raw, options))
    except InvalidBSON:
        doc: Doc = {'unreadable': True}
        for name, kind, value in _elements(bytes(raw.raw)):
            found = _value(kind, value, options)
            if kind == ARRAY and isinstance(found, Unreadable):
                found = [_value(*element[1:], options) for element in _elements(value)]
            doc[name.decode(errors='replace')] = found
        return doc


def as_stored(value: Any) -> Any:
    """A value as it is to be stored again."""
    return RawBSONDocument(value['unreadable']) if isinstance(value, Unreadable) else value


def _value(kind: int, value: bytes, options: Any) -> Any:
    alone = (len(value) + 7).to_bytes(4, 'little') + bytes([kind, 0]) + value + b'\0'
    try:
        return bson.decode(alone, options)['']
    except InvalidBSON as exc:
        return Unreadable(unreadable=value if kind == DOCUMENT else alone, error=str(exc))


def _elements(raw: bytes) -> Iterator[Element]:
    at = 4
    while kind := raw[at]:
        end = raw.index(0, at)
        name, start = raw[at + 1 : end], end + 1
        at = start + _length(raw, kind, start)
        yield name, kind, raw[start:at]


def _length(raw: bytes, kind: int, start: int) -> int:
    """How many bytes a value has."""
    if kind in FIXED:
        return FIXED[kind]
    if kind == REGEX:
        return raw.index(0, raw.index(0, start) + 1) + 1 - start
    said = int.from_bytes(raw[start : start + 4], 'little')
    if kind in (DOCUMENT, ARRAY, SCOPED_CODE):
        return said
    return said + {BINARY: 5, POINTER: 16}.get(kind, 4)  # else it is a string
