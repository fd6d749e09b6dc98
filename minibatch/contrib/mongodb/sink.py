"""Write the results of windows into a MongoDB collection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import DeleteMany, ReadPreference, ReplaceOne, WriteConcern
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError
from pymongo.read_concern import ReadConcern

from minibatch.abc import WindowCommit
from minibatch.errors import ArgumentError, DataError

from .documents import RAW, Anchored

DUPLICATE_KEY = 11000
MAX_LOOKED_UP = 500  # documents, in one query
MAX_DOCUMENTS = 1_000_000
MAX_WINDOWS = 200  # in one write, or transaction
MAX_TOGETHER = 10_000  # documents, of several windows


class MongoSink(Anchored):
    """A sink that writes the result of each window into a collection, of any MongoDB.

    A mapping becomes one document, a list (or other iterable) of mappings one document each, an empty list none.
    The write concern is majority, unless the collection or its client has one.

    Without options, documents are inserted. A window is tried again after a crash between sink and commit, or when a
    reply was lost, and its documents are then inserted a second time; return the ``window.id`` with the result to
    recognise them. Documents with an ``_id`` of their own, and those that a unique index keeps apart, are not: what is
    there already, as it would be inserted, is delivered. Another document at its place is an error.

    **exactly_once=True** shows the result of each window once. The sink then has ``put_once``, and so is an
    `minibatch.abc.ExactlyOnceSink`; its ``put`` refuses. A document without an ``_id`` (or None) is given one made of
    the window's id and a number, ``'<window.id>#000000'``, at most 1,000,000 in a window; another document of that
    ``_id`` is replaced. So let only the streams of one database write into the collection.

    - *The collection is on the replica set of the stream*: one transaction (write concern majority, read concern
      snapshot) commits the window and writes the documents. It is tried for up to two minutes. MongoDB ends it after
      60 seconds (``transactionLifetimeLimitSeconds``), and its cache bounds it: let a window have no more results than
      that. They may be more than 16 MB together, not one alone. What a consumer that was killed inside the transaction
      has left of it is ended by the next one; where it may not do that, it waits for the end of that lifetime.
    - *It is elsewhere, or on a standalone server*: the documents are replaced without a transaction, and what only an
      earlier attempt returned is deleted. After a crash at any point and another attempt, exactly the documents of
      the last attempt are there. Limits: for a moment, or when the window fails for good, readers see a part; a
      consumer that lost its lease may still write; documents with an ``_id`` of their own, or of ``upsert=``, that only
      an earlier attempt returned stay. A function that returns the same at every attempt is not concerned by the last
      two.

    **upsert=** names the field, or the list of fields, whose values are the key of a document: it replaces the document
    with the same key, or is added. Of two with the same key in a window the last one stays. Make a unique index of the
    fields, as in ``collection.create_index('sensor', unique=True)``: without it every document searches the whole
    collection, and two consumers at once may both add the same key. With exactly_once=True, such documents are given
    no ``_id`` by the sink.

    Args:
        collection: the pymongo collection.
        exactly_once: whether a window that is tried again shows its result once.
        upsert: the field, or the list of fields, by which documents are replaced; at the top level of the document,
            and '_id' only alone.

    Raises:
        ArgumentError: naming the argument that is wrong, or if the writes of the collection are not acknowledged (w=0).

    Example:
        >>> import minibatch as mb
        >>> from pymongo import MongoClient
        >>> sink = MongoSink(MongoClient().test.totals, exactly_once=True)
        >>> @mb.streaming('test', size=2, sink=sink)    # doctest: +SKIP
        ... def total(window):
        ...     return {'total': sum(data['a'] for data in window.data)}
    """

    def __init__(
        self, collection: Collection[Any], exactly_once: bool = False, upsert: str | Sequence[str] | None = None
    ) -> None:
        if not isinstance(collection, Collection):
            raise ArgumentError(f'collection must be a pymongo collection, not {type(collection).__name__}')
        if not collection.write_concern.acknowledged:
            raise ArgumentError(f'w=0 of collection {collection.name!r} would lose results unseen; use w=1 or majority')
        if 'w' not in collection.write_concern.document:
            collection = collection.with_options(write_concern=WriteConcern('majority'))
        if not isinstance(exactly_once, bool):
            raise ArgumentError(f'exactly_once must be True or False, not {exactly_once!r}')
        self._collection = collection
        self._exactly_once = exactly_once
        self._key = _key_fields(upsert)
        if exactly_once:
            self.put_once = self._put_once  # only an instance that has it is an ExactlyOnceSink

    def put(self, messages: Any) -> None:
        """Write the result of one window: insert it, or replace by the key of ``upsert=``.

        Raises:
            ArgumentError: with exactly_once=True; call ``put_once``, which is told the window.
            DataError: naming the type, if it is neither a mapping nor an iterable of mappings, or the field of
                ``upsert=`` that a document lacks; nothing was written. Or naming the key, if another document has it.
            pymongo.errors.PyMongoError: as the driver does.
        """
        if self._exactly_once:
            raise ArgumentError('MongoSink with exactly_once=True must be told the window; call put_once, not put')
        docs = _documents(messages)
        if self._key:
            self._replace(docs, self._key)
            return
        there, refusal = self._insert(docs)
        if refusal:
            raise DataError(
                f'item {there} is not what the collection has under its unique key: {refusal}; return documents with '
                f'keys of their own, or let upsert= or exactly_once=True replace what is there'
            )

    def put_many(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> int:
        """Write the results of many windows at once; returns how many. See `minibatch.abc.BulkSink`."""
        sizes = accumulate(len(result) if isinstance(result, (list, tuple)) else 1 for result in results[:MAX_WINDOWS])
        count = max(sum(1 for size in sizes if size <= MAX_TOGETHER), 1)
        results, windows = results[:count], windows[:count]
        if self._exactly_once:
            return len(results) if self._write_once(results, windows) else 0
        parts = [_documents(result) for result in results]
        docs = [doc for part in parts for doc in part]
        if self._key:
            self._replace(docs, self._key)
            return len(results)
        there, _ = self._insert(docs)
        return sum(1 for end in accumulate(map(len, parts)) if end <= there)

    def _put_once(self, messages: Any, window: WindowCommit) -> None:
        """Write the result of one window so that it is there once; see the class. Raises as `put` does."""
        self._write_once([messages], [window])

    def _write_once(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> bool:
        """Write the results of windows; False if they must be given one by one, and nothing is written."""
        key = self._key or ('_id',)
        all_docs: list[dict[str, Any]] = []
        stale: list[DeleteMany] = []
        for result, window in zip(results, windows, strict=True):
            docs = _documents(result)
            if not self._key:
                stale.append(DeleteMany(_numbered_from(_number(docs, window.id), window.id)))
            all_docs += docs

        if not windows[0].joins(self._collection.database.client):
            self._replace(all_docs, key, stale)
        elif all_docs:
            return self._commit(windows, _replacements(all_docs, key))
        return True

    def _replace(self, docs: list[dict[str, Any]], key: tuple[str, ...], then: Sequence[DeleteMany] = ()) -> None:
        """Replace documents by their key; if they cannot follow on each other, the last one of each key."""
        if not docs and not then:
            return
        try:
            self._collection.bulk_write([*_replacements(docs, key), *then])
        except BulkWriteError as exc:
            options = self._collection.codec_options
            keys = [bson.encode({field: doc[field] for field in key}, codec_options=options) for doc in docs]
            last = list(dict(zip(keys, docs, strict=True)).values())
            if _duplicate(exc) is None or len(last) == len(docs):
                raise
            # An earlier attempt may have written all of them, and what came later has a unique value of one before.
            self._collection.bulk_write([*_replacements(last, key), *then])

    def _insert(self, docs: list[dict[str, Any]]) -> tuple[int, str]:
        """Insert documents, but those that an earlier attempt has inserted.

        Returns:
            How many of them, from the first on, are there, and why the next one is not: another one has its key.
        """
        own = ['_id' in doc for doc in docs]  # pymongo gives the others one
        left = list(range(len(docs)))
        while left:
            try:
                self._collection.insert_many([docs[i] for i in left])
                break
            except BulkWriteError as exc:
                if (error := _duplicate(exc)) is None:
                    raise
            left = left[error['index'] :]
            there = self._find_alike([(docs[i], own[i]) for i in left], list(error.get('keyPattern', ['_id'])))
            if not there[0]:
                return left[0], error['errmsg']
            left = [i for i, found in zip(left, there, strict=True) if not found]
        return len(docs), ''

    def _find_alike(self, docs: list[tuple[dict[str, Any], bool]], key: list[str]) -> list[bool]:
        """Of each document (and whether its _id is its own) whether it is stored as it is, under the same unique key.

        As the server has refused one of them at the write concern of the collection, what it has is there to stay.
        """
        options = self._collection.codec_options
        raw_options = options.with_options(document_class=RawBSONDocument)
        stored = self._collection.with_options(raw_options, ReadPreference.PRIMARY)
        alike = []
        for first in range(0, len(docs), MAX_LOOKED_UP):
            part = docs[first : first + MAX_LOOKED_UP]
            queries = [{field: {'$eq': _value_at(doc, field)} for field in key} for doc, _ in part]
            found = [document.raw for document in stored.find({'$or': queries})]
            contents = {own: {_content(raw, own) for raw in found} for own in (True, False)}
            alike += [_content(bson.encode(doc, codec_options=options), own) in contents[own] for doc, own in part]
        return alike

    def _commit(self, windows: Sequence[WindowCommit], writes: list[ReplaceOne[Any]]) -> bool:
        def attempt(session: ClientSession) -> bool:
            if len(windows) > 1:
                new = done = windows[0].commit_all(windows, session)
            else:
                new, done = windows[0].commit(session), True  # else an earlier attempt has, with its results
            if new:
                self._collection.bulk_write(writes, session=session)
            else:
                session.abort_transaction()
            return done

        with self._collection.database.client.start_session() as session:
            return bool(
                session.with_transaction(
                    attempt, ReadConcern('snapshot'), WriteConcern('majority'), ReadPreference.PRIMARY
                )
            )


def _key_fields(upsert: Any) -> tuple[str, ...]:
    """The fields of ``upsert=``; none without it."""
    if upsert is None:
        return ()
    fields = (upsert,) if isinstance(upsert, str) else upsert
    if not isinstance(fields, (list, tuple)) or not fields:
        raise ArgumentError(f'upsert must be the name of a field or a list of names, not {upsert!r}')
    for field in fields:
        if not isinstance(field, str) or not field or field.startswith('$') or '.' in field or '\0' in field:
            raise ArgumentError(f'upsert must name fields at the top level of the documents, not {field!r}')
    if '_id' in fields and len(fields) > 1:
        raise ArgumentError("upsert takes '_id' only alone, because it is unique already")
    return tuple(fields)


def _number(docs: list[dict[str, Any]], window_id: str) -> int:
    """Give the documents without an _id one; returns how many. Numbers have no gaps, so what is stale lies above."""
    without = [doc for doc in docs if doc.get('_id') is None]
    if len(without) > MAX_DOCUMENTS:
        raise DataError(f'exactly_once=True takes {MAX_DOCUMENTS:,} documents of a window, not {len(without):,}')
    for i, doc in enumerate(without):
        doc['_id'] = f'{window_id}#{i:06d}'
    return len(without)


def _numbered_from(first: int, window_id: str) -> dict[str, Any]:
    """The documents of a window with a number of at least `first`. The range is for the index, the pattern is exact."""
    prefix = f'{window_id}#'
    pattern = f'^{re.escape(prefix)}[0-9]{{6}}$'
    return {'_id': {'$gte': f'{prefix}{first:06d}', '$lte': f'{prefix}999999', '$regex': pattern}}


def _replacements(docs: list[dict[str, Any]], key: tuple[str, ...]) -> list[ReplaceOne[Any]]:
    """Upserts by key. What is an operator, or matches more than itself, is refused."""
    for i, doc in enumerate(docs):
        for field in key:
            if doc.get(field) is None:
                raise DataError(f'item {i} has no {field!r}, by which documents are replaced')
            if isinstance(doc[field], (list, tuple)):
                raise DataError(f'{field!r} of item {i} is a list; documents cannot be replaced by a list')
        if '_id' in doc and '_id' not in key:
            raise DataError(f"item {i} has an '_id', which upsert= may not change; leave it out, or use upsert='_id'")
        for field in doc:
            if str(field).startswith('$'):
                raise DataError(f'{field!r} of item {i} begins with $, which MongoDB refuses in a replacement')
    return [ReplaceOne({field: {'$eq': doc[field]} for field in key}, doc, upsert=True) for doc in docs]


def _duplicate(exc: BulkWriteError) -> Mapping[str, Any] | None:
    """What the server says of a document that it refused for the sake of a unique key; None of other errors."""
    errors = exc.details['writeErrors']
    lasting = errors and not exc.details.get('writeConcernErrors')
    return errors[0] if lasting and errors[0]['code'] == DUPLICATE_KEY else None


def _value_at(doc: Any, path: str) -> Any:
    for name in path.split('.'):
        doc = doc.get(name) if isinstance(doc, Mapping) else None
    return doc


def _content(raw: bytes, with_id: bool) -> bytes:
    """A document as bytes that can be compared, with its _id or without."""
    fields = RawBSONDocument(raw, RAW).items()
    return bson.encode({name: value for name, value in fields if with_id or name != '_id'}, codec_options=RAW)


def _documents(messages: Any) -> list[dict[str, Any]]:
    """Copies, because pymongo adds an _id to what it inserts."""
    if isinstance(messages, Mapping):
        return [dict(messages)]
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes)):
        raise DataError(f'MongoSink takes a mapping or a list of mappings, not {type(messages).__name__}')
    docs = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f'MongoSink takes a list of mappings; item {i} is of type {type(message).__name__}')
        docs.append(dict(message))
    return docs
