"""What sources and sink have in common; both sources pass a document on as it is stored, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NoReturn

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.errors import ConnectionFailure
from pymongo.read_concern import ReadConcern

from minibatch.abc import SourceMessage
from minibatch.connection import same_server
from minibatch.errors import ArgumentError, PortabilityError, UnreachableError

if TYPE_CHECKING:
    from minibatch import Stream

MAX_MESSAGES = 10_000  # in one append
PAGE_BYTES = 16 << 20

# Whatever is stored comes out, and goes into a query, as it is.
RAW: CodecOptions[RawBSONDocument] = CodecOptions(
    document_class=RawBSONDocument,
    datetime_conversion=DatetimeConversion.DATETIME_MS,
    unicode_decode_error_handler='replace',
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
    """What is to be said when the server of the collection does not answer."""
    try:
        yield
    except ConnectionFailure as exc:
        reason = str(exc).partition(', Timeout:')[0]
        raise UnreachableError(f'the server of collection {collection.full_name} does not answer: {reason}') from exc


def message(document: Mapping[str, Any], token: Any, meta: Any = None) -> SourceMessage:
    """A document as a message; one that cannot be read in Python says why."""
    if isinstance(document, RawBSONDocument):
        try:
            bson.decode(document.raw)
        except InvalidBSON as exc:
            return SourceMessage(document.raw, meta, token, f'it cannot be decoded: {str(exc).partition(" (")[0]}')
    return SourceMessage(document, meta, token)


def digest(value: Any, size: int = 8) -> bytes:
    """A fingerprint of what BSON can store; of different values it is the same once in 2 ** 64 times."""
    return blake2b(bson.encode({'': value}, codec_options=RAW), digest_size=size).digest()
