"""What sources and sink have in common; both sources pass a document on as it is stored, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NoReturn

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.errors import ConnectionFailure, OperationFailure
from pymongo.read_concern import ReadConcern

from minibatch.abc import SourceMessage
from minibatch.connection import reason_of, same_server
from minibatch.errors import ArgumentError, PortabilityError, ServerError, UnreachableError

if TYPE_CHECKING:
    from minibatch import Stream

MAX_MESSAGES = 10_000  # in one append
PAGE_BYTES = 16 << 20

# Whatever is stored comes out, and goes into a query by `raw`, as it is, also text that is no UTF-8.
RAW: CodecOptions[RawBSONDocument] = CodecOptions(
    document_class=RawBSONDocument,
    datetime_conversion=DatetimeConversion.DATETIME_MS,
    unicode_decode_error_handler='surrogateescape',
)


def raw_collection(collection: Any) -> Collection[RawBSONDocument]:
    """The collection with documents as bytes, and what a majority has."""
    if not isinstance(collection, Collection):
        raise ArgumentError(f'collection must be a pymongo collection, not {type(collection).__name__}')
    return collection.with_options(codec_options=RAW, read_concern=ReadConcern('majority'))


class Anchored:
    """What holds a collection, and so the client of it, which is for one process."""

    def __reduce__(self) -> NoReturn:
        raise PortabilityError(
            f'{type(self).__name__} holds a collection, whose client belongs to this process, so it cannot be copied '
            f'or sent to another; make it there'
        )


def check_size(size: Any) -> int:
    """The number of messages in an append."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_MESSAGES:
        raise ArgumentError(f'size must be a number from 1 to {MAX_MESSAGES:,}, not {size!r}')
    return size


def check_name(name: Any) -> str | None:
    """The name under which the position is stored."""
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise ArgumentError(f'name must be a string that is not empty, not {name!r}')
    return name


def check_apart(collection: Collection[Any], stream: Stream) -> None:
    """Raise `ArgumentError` if the messages of the stream are in this collection: each would bring the next one."""
    database = collection.database
    if (database.name, collection.name) != (stream.target.dbname, 'buffer'):
        return
    if same_server(database.client, stream.target.client):
        raise ArgumentError(
            f'collection {collection.full_name} is where stream {stream.name!r} keeps its messages, so each message '
            f'would bring another one for ever; read it as a stream, or keep the stream in another database'
        )


@contextmanager
def reached(collection: Collection[Any]) -> Iterator[None]:
    """What is to be said when the server of the collection does not answer, or refuses something."""
    try:
        yield
    except OperationFailure as exc:
        reason = str((exc.details or {}).get('errmsg') or reason_of(exc))
        raise ServerError(f'MongoDB refused to read collection {collection.full_name}: {reason}') from exc
    except ConnectionFailure as exc:
        name = collection.full_name
        raise UnreachableError(f'the server of collection {name} does not answer: {reason_of(exc)}') from exc


def message(document: Mapping[str, Any], token: Any, meta: Mapping[str, Any] | None = None) -> SourceMessage:
    """A document as a message; one that cannot be read in Python says which, and why."""
    if isinstance(document, RawBSONDocument):
        try:
            bson.decode(document.raw)
        except InvalidBSON as exc:
            id_ = _readable(RawBSONDocument(document.raw, RAW).get('_id'))
            why = f'the document with _id {str(id_)[:100]} cannot be decoded: {str(exc).partition(" (")[0]}'
            return SourceMessage(document.raw, {**(meta or {}), 'id': id_}, token, why)
    return SourceMessage(document, meta, token)


def raw(fields: Mapping[str, Any]) -> RawBSONDocument:
    """A document of values that were read as `RAW`, byte by byte."""
    return RawBSONDocument(packed(fields), RAW)


def packed(fields: Mapping[str, Any]) -> bytes:
    """The same as bytes."""
    try:
        return bson.encode(fields, codec_options=RAW)
    except UnicodeEncodeError:
        elements = b''.join(_element(name.encode() + b'\0', value) for name, value in fields.items())
        return struct.pack('<i', len(elements) + 5) + elements + b'\0'


def digest(value: Any, size: int = 8) -> bytes:
    """A fingerprint of what BSON can store; of different values it is the same once in 2 ** 64 times."""
    return blake2b(packed({'': value}), digest_size=size).digest()


def _element(name: bytes, value: Any) -> bytes:
    if isinstance(value, str):
        text = value.encode('utf-8', 'surrogateescape')
        return b'\x02' + name + struct.pack('<i', len(text) + 1) + text + b'\0'
    if isinstance(value, list):
        return b'\x04' + name + packed({str(i): each for i, each in enumerate(value)})
    document = packed({'': value})  # length, type, a name of no bytes, value, end
    return document[4:5] + name + document[6:-1]


def _readable(id_: Any) -> Any:
    """An _id as it can be stored."""
    if isinstance(id_, str):
        return id_.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    return id_.raw if isinstance(id_, RawBSONDocument) else id_
