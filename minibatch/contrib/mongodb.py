"""Write the results of windows into a MongoDB collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pymongo import WriteConcern
from pymongo.collection import Collection

from minibatch.errors import ArgumentError, DataError


class MongoSink:
    """A sink that inserts the result of each window into a collection, of any MongoDB.

    A mapping becomes one document, a list (or other iterable) of mappings one document each, an empty list none.
    The write concern is majority, unless the collection or its client has one.

    A window is tried again after a crash between sink and commit, and its documents are then inserted a second time;
    return the ``window.id`` with the result to recognise them.

    Args:
        collection: the pymongo collection.

    Raises:
        ArgumentError: if it is not a collection, or its writes are not acknowledged (w=0).

    Example:
        >>> import minibatch as mb
        >>> from pymongo import MongoClient
        >>> sink = MongoSink(MongoClient().test.totals)
        >>> @mb.streaming('test', size=2, sink=sink)    # doctest: +SKIP
        ... def total(window):
        ...     return {'window': window.id, 'total': sum(data['a'] for data in window.data)}
    """

    def __init__(self, collection: Collection[Any]) -> None:
        if not isinstance(collection, Collection):
            raise ArgumentError(f'collection must be a pymongo collection, not {type(collection).__name__}')
        if not collection.write_concern.acknowledged:
            raise ArgumentError(f'w=0 of collection {collection.name!r} would lose results unseen; use w=1 or majority')
        if 'w' not in collection.write_concern.document:
            collection = collection.with_options(write_concern=WriteConcern('majority'))
        self._collection = collection

    def put(self, messages: Any) -> None:
        """Insert the result of one window.

        Raises:
            DataError: naming the type, if it is neither a mapping nor an iterable of mappings; nothing was written.
            pymongo.errors.PyMongoError: as the driver does.
        """
        docs = _documents(messages)
        if docs:
            self._collection.insert_many(docs)


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
