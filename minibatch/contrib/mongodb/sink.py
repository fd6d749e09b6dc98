"""Write the results of windows into a MongoDB collection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

from pymongo import DeleteMany, ReadPreference, ReplaceOne, WriteConcern
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError
from pymongo.read_concern import ReadConcern

from minibatch.abc import WindowCommit
from minibatch.errors import ArgumentError, DataError

MAX_DOCUMENTS = 1_000_000
MAX_WINDOWS = 200  # in one write, or transaction
MAX_TOGETHER = 10_000  # documents, of several windows

_Write: TypeAlias = 'ReplaceOne[Any] | DeleteMany'


class MongoSink:
    """A sink that writes the result of each window into a collection, of any MongoDB.

    A mapping becomes one document, a list (or other iterable) of mappings one document each, an empty list none.
    The write concern is majority, unless the collection or its client has one.

    Without options, documents are inserted. A window is tried again after a crash between sink and commit, and its
    documents are then inserted a second time; return the ``window.id`` with the result to recognise them.

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
                ``upsert=`` that a document lacks; nothing was written.
            pymongo.errors.PyMongoError: as the driver does.
        """
        if self._exactly_once:
            raise ArgumentError('MongoSink with exactly_once=True must be told the window; call put_once, not put')
        docs = _documents(messages)
        if docs and self._key:
            self._collection.bulk_write(_replacements(docs, self._key))
        elif docs:
            self._collection.insert_many(docs)

    def put_many(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> int:
        """Write the results of many windows at once; returns how many. See `minibatch.abc.BulkSink`."""
        sizes = accumulate(len(result) if isinstance(result, (list, tuple)) else 1 for result in results[:MAX_WINDOWS])
        count = max(sum(1 for size in sizes if size <= MAX_TOGETHER), 1)
        results, windows = results[:count], windows[:count]
        if self._exactly_once:
            return len(results) if self._write_once(results, windows) else 0
        if self._key:
            docs = [doc for result in results for doc in _documents(result)]
            if docs:
                self._collection.bulk_write(_replacements(docs, self._key))
        else:
            return self._insert_many([_documents(result) for result in results])
        return len(results)

    def _insert_many(self, results: list[list[dict[str, Any]]]) -> int:
        docs = [doc for result in results for doc in result]
        try:
            if docs:
                self._collection.insert_many(docs)
            return len(results)
        except BulkWriteError as exc:
            if not exc.details['writeErrors'] or exc.details.get('writeConcernErrors'):
                raise
            inserted = exc.details['writeErrors'][0]['index']
        ends = accumulate(map(len, results))
        return sum(1 for end in ends if end <= inserted)

    def _put_once(self, messages: Any, window: WindowCommit) -> None:
        """Write the result of one window so that it is there once; see the class. Raises as `put` does."""
        self._write_once([messages], [window])

    def _write_once(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> bool:
        """Write the results of windows; False if they must be given one by one, and nothing is written."""
        joins = windows[0].joins(self._collection.database.client)
        writes: list[_Write] = []
        for result, window in zip(results, windows, strict=True):
            docs = _documents(result)
            generated = 0 if self._key else _number(docs, window.id)
            writes += _replacements(docs, self._key or ('_id',))
            if not joins and not self._key:
                writes.append(DeleteMany(_numbered_from(generated, window.id)))
        if writes and joins:
            return self._commit(windows, writes)
        if writes:
            self._collection.bulk_write(writes)
        return True

    def _commit(self, windows: Sequence[WindowCommit], writes: list[_Write]) -> bool:
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
