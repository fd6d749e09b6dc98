"""Follow the changes of a collection.

The token of a message is where to go on, one of these::

    {'resume': <resume token>, 'time': datetime}      the change stream behind this change
    {'start': Timestamp, 'time': datetime}            the change stream from this time of the server on
    {'scan': {'at': Timestamp, 'snapshot': bool, 'after': bytes}}
                                                      the documents beyond the packed _id, as they were at this time,
                                                      and then the change stream from there on
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import bson
from bson import Timestamp
from bson.raw_bson import RawBSONDocument
from pymongo.change_stream import ChangeStream
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError, ServerError

from .documents import (
    PAGE_BYTES,
    RAW,
    Anchored,
    check_apart,
    check_name,
    check_size,
    digest,
    message,
    packed,
    raw,
    raw_collection,
    reached,
)

if TYPE_CHECKING:
    from minibatch import Stream

logger = logging.getLogger(__name__)

AWAIT_MS = 500
SAVE_PAUSE = 10.0
CLOSE_TIMEOUT = 5.0
HISTORY_LOST = {
    136,  # CappedPositionLost
    260,  # InvalidResumeToken
    280,  # ChangeStreamFatalError
    286,  # ChangeStreamHistoryLost
    10334,  # BSONObjectTooLarge: a change whose _id and document are too large together is told by no server
}
SNAPSHOT_PAUSE = 0.2
SNAPSHOT_TRIES = 25
NO_SNAPSHOTS = 72  # InvalidOptions: before MongoDB 5.0
SNAPSHOT_LOST = {
    NO_SNAPSHOTS,
    239,  # SnapshotTooOld
    246,  # SnapshotUnavailable
}
INTERNAL = {'admin', 'config', 'local'}  # databases
UPDATES = ['update', 'replace']


class MongoReplicasetSource(Anchored):
    """A source that follows the changes of a collection on a replica set, as they happen.

    Every insert becomes a message: the document, as it was inserted. With ``updates=True`` and ``deletes=True`` so do
    the others. The data is always a document, whatever the options, so that a function for inserts needs no change:

    ========  =====================================================  =========================================
    change    ``data``                                               ``meta['operation']``
    ========  =====================================================  =========================================
    insert    the document that was inserted                         'insert'
    update    the whole document, as it is when the change is read   'update', also if it was replaced
    delete    ``{'_id': ...}``                                       'delete'
    none      the document, as it was when the rescan began          'rescan', see below
    ========  =====================================================  =========================================

    ``meta`` has 'id', the _id of the document, and 'time', when it was changed, too. A function finds it in
    ``window.messages``. An update of a document that is deleted when the update is read brings nothing.

    **Guarantees.** No change is lost or comes twice, by a crash or restart of any process or server: the position is
    stored with the messages. Changes come in the order in which they were made. There are two exceptions, and each is
    said in a warning:

    - *History lost.* A server keeps its changes for a while only, in the oplog. If the source was away for longer, the
      warning says from when to when changes are missing, and the collection is read again: each document of it becomes
      a message, once more for those that had come before. What was deleted in that time is not told.
    - *The collection is replaced* as a whole (``$out``, or another one renamed to its name): it is read again, too.

    After the collection is dropped or renamed, the source goes on with the next one of its name; the documents that
    went with it are not told as deletes.

    A rescan reads the collection as it was at one moment, and goes on with the changes since that moment. MongoDB can
    do that for 5 minutes (``minSnapshotHistoryWindowInSeconds``), and from version 5.0 on. Beyond that it reads what
    there is, and what is changed during the rescan may come twice: the document and then the change. So it is with
    capped collections, in all versions. The oplog must hold the changes made during a rescan, else another one follows.

    Args:
        collection: the pymongo collection; it need not exist yet.
            Its client must have a ``maxPoolSize`` of 2 or more, as the change stream holds one connection.
        size: how many messages are appended at a time at most, up to 10,000; it never waits for more.
        updates: whether changes of documents become messages.
        deletes: whether deletes of documents become messages.
        start: where to start when the stream has nothing of this source yet: 'now', or 'earliest' to begin with a
            rescan, which brings all documents that there are.
        name: the name under which the position is stored. It is made of the name of the replica set and that of the
            collection; give one if a stream has sources of two collections where both are the same.

    Raises:
        ArgumentError: naming the argument that is wrong; from ``stream()``, if there are no change streams, which is so
            on a standalone server, of views, time series, and collections of MongoDB's own: use `MongoSource`;
            or if the collection is the one where the stream keeps its messages.
        ServerError: from ``stream()``, if MongoDB refuses it.

    Example:
        >>> import minibatch as mb
        >>> from pymongo import MongoClient
        >>> source = MongoReplicasetSource(MongoClient().shop.orders, deletes=True)
        >>> @mb.streaming('orders', size=100, max_wait=1, source=source)    # doctest: +SKIP
        ... def process(window):
        ...     for message in window.messages:
        ...         print(message.meta['operation'], message.data)
    """

    def __init__(
        self,
        collection: Collection[Any],
        size: int = 1000,
        updates: bool = False,
        deletes: bool = False,
        start: str = 'now',
        name: str | None = None,
    ) -> None:
        self.collection = collection
        self._documents = raw_collection(collection)
        if collection.database.client.options.pool_options.max_pool_size == 1:
            raise ArgumentError(
                'the client of the collection has maxPoolSize=1, and the change stream would hold its only connection; '
                'give it 2 or more'
            )
        self._size = check_size(size)
        for option, value in (('updates', updates), ('deletes', deletes)):
            if not isinstance(value, bool):
                raise ArgumentError(f'{option} must be True or False, not {value!r}')
        if start not in ('now', 'earliest'):
            raise ArgumentError(f"start must be 'now' or 'earliest', not {start!r}")
        self._updates, self._deletes, self._start = updates, deletes, start
        self._name = check_name(name)
        self._cancelled = threading.Event()

    def stream(self, stream: Stream) -> None:
        """Append the changes of the collection to `stream` until `cancel` is called."""
        self._cancelled.clear()
        with reached(self.collection):
            check_apart(self.collection, stream)
            producer = stream.producer(self._find_name())
            if producer.token is None:
                now = self._now()
                producer.save(_scan(now) if self._start == 'earliest' else _behind(now))
            while not self._cancelled.is_set():
                if 'scan' in producer.token:
                    self._rescan(producer, producer.token['scan'])
                else:
                    self._follow(producer, producer.token)

    def cancel(self) -> None:
        """Make `stream` return within a second."""
        self._cancelled.set()

    def _find_name(self) -> str:
        server = self.collection.database.client.admin.command('hello')
        if 'setName' not in server and server.get('msg') != 'isdbgrid':
            raise ArgumentError(
                f'the server of collection {self.collection.full_name} is a standalone, which has no change streams; '
                f'start mongod with --replSet, or use MongoSource'
            )
        self._check_collection()
        name = self.collection.full_name
        if len(name) > 100:
            name = f'{name[:80]}#{digest(name).hex()}'
        return self._name or f'mongodb/{server.get("setName", "sharded")[:60]}/{name}/changes'

    def _check_collection(self) -> None:
        """Refuse what has no change stream, as long as we may look."""
        name, database = self.collection.full_name, self.collection.database
        if database.name in INTERNAL or self.collection.name.startswith('system.'):
            raise ArgumentError(f'collection {name} belongs to MongoDB, which tells no changes of it; use MongoSource')
        found: Mapping[str, Any] = {}
        with suppress(OperationFailure):
            found = next(iter(database.list_collections(filter={'name': self.collection.name})), found)
        if found.get('type') == 'view':
            behind = f'{database.name}.{found["options"]["viewOn"]}'
            raise ArgumentError(f'{name} is a view, which has no changes; follow {behind}, or use MongoSource')
        if found.get('type') == 'timeseries':
            field = found['options']['timeseries']['timeField']
            raise ArgumentError(
                f'{name} is a time series, which has no change stream; use MongoSource with idcol={field!r}'
            )

    def _now(self) -> Timestamp:
        """The time of the server, as it counts its writes."""
        now: Timestamp = self.collection.database.command('ping')['operationTime']
        return now

    # --- changes

    def _watch(self, place: Mapping[str, Any]) -> ChangeStream[RawBSONDocument]:
        operations = ['insert', *(UPDATES if self._updates else ()), *(['delete'] if self._deletes else ())]
        wanted = {'operationType': {'$in': [*operations, 'rename', 'invalidate']}}
        return self._documents.watch(
            # What was changed can be as large as the document, and both together too large for an event.
            [{'$match': wanted}, {'$unset': 'updateDescription'}],
            full_document='updateLookup' if self._updates else None,
            start_after=place.get('resume'),
            start_at_operation_time=place.get('start'),
            max_await_time_ms=AWAIT_MS,
            batch_size=self._size,
        )

    def _follow(self, producer: Any, place: Mapping[str, Any]) -> None:
        """Append changes until cancelled, or until the token of the producer says something else."""
        try:
            with _reading(self._watch(place), self._size) as reader:
                logger.info('collection %s is followed', self.collection.full_name)
                saved = time.monotonic()
                while not self._cancelled.is_set():
                    events, idle_at = reader.take(AWAIT_MS / 1000)
                    end = next((i for i, event in enumerate(events) if self._ends(event)), len(events))
                    if messages := [each for event in events[:end] for each in self._messages(event)]:
                        producer.append_many(messages)
                        saved = time.monotonic()
                    if end < len(events):
                        return self._go_on_behind(producer, events[end])
                    if idle_at and time.monotonic() - saved > SAVE_PAUSE:
                        producer.save({'resume': idle_at, 'time': datetime.now(timezone.utc)})
                        saved = time.monotonic()
        except OperationFailure as exc:
            if exc.code not in HISTORY_LOST:
                raise
            self._recover(producer, place, exc)

    def _messages(self, event: RawBSONDocument) -> Iterator[SourceMessage]:
        """A change as a message; none if the document is gone, or the collection got another name."""
        operation = event['operationType']
        if operation == 'rename':
            return
        key = event.get('documentKey', {}).get('_id')
        changed = event.get('wallTime') or event['clusterTime'].as_datetime()
        document = raw({'_id': key}) if operation == 'delete' else event.get('fullDocument')
        if document is not None:
            meta = {'operation': 'update' if operation == 'replace' else operation, 'id': key, 'time': changed}
            yield message(document, {'resume': event['_id'], 'time': changed}, meta)

    def _replaces(self, event: RawBSONDocument) -> bool:
        """Whether another collection was renamed to the name of this one."""
        to = event.get('to')
        return to is not None and f'{to["db"]}.{to["coll"]}' == self.collection.full_name

    def _ends(self, event: RawBSONDocument) -> bool:
        operation = event['operationType']
        return operation == 'invalidate' or (operation == 'rename' and self._replaces(event))

    def _go_on_behind(self, producer: Any, event: RawBSONDocument) -> None:
        name = self.collection.full_name
        if self._replaces(event):
            logger.warning('collection %s was replaced by another one: all documents of that one are brought', name)
            producer.save(_scan(self._now()))
        else:
            logger.warning('collection %s was dropped or renamed; the next one of this name is followed', name)
            producer.save({'resume': event['_id'], 'time': event['clusterTime'].as_datetime()})

    def _recover(self, producer: Any, place: Mapping[str, Any], exc: OperationFailure) -> None:
        now = self._now()
        logger.warning(
            'collection %s: the server has no longer all changes from %s on (error %s). What was updated and deleted '
            'from then until %s may be missing; all documents are brought again, as operation rescan',
            self.collection.full_name, producer.token.get('time', place['time']), exc.code, now.as_datetime(),
        )  # fmt: skip
        producer.save(_scan(now))

    # --- a rescan

    def _rescan(self, producer: Any, scan: Mapping[str, Any]) -> None:
        """Append all documents as they were at a time, then go on with the changes from there on."""
        logger.info('collection %s is read as it was at %s', self.collection.full_name, scan['at'].as_datetime())
        tries = 0
        while not self._cancelled.is_set():
            try:
                documents = self._page(scan)
            except OperationFailure as exc:
                tries += 1
                scan = self._without_snapshot(producer, scan, exc, tries)
                continue
            if not documents:
                producer.save(_behind(scan['at']))
                break
            messages = []
            for document in documents:
                scan = {**scan, 'after': packed({'_id': document['_id']})}
                meta = {'operation': 'rescan', 'id': document['_id'], 'time': scan['at'].as_datetime()}
                messages.append(message(document, {'scan': scan}, meta))
            producer.append_many(messages)

    def _without_snapshot(
        self, producer: Any, scan: Mapping[str, Any], exc: OperationFailure, tries: int
    ) -> Mapping[str, Any]:
        """How to go on when the collection cannot be read as it was at that time; if it is capped, not at any."""
        if exc.code not in SNAPSHOT_LOST or not scan['snapshot']:
            raise exc
        if 'after' not in scan and exc.code != NO_SNAPSHOTS and tries < SNAPSHOT_TRIES:
            # Nothing was brought, so another time will do, such as one when a new collection was there.
            self._cancelled.wait(SNAPSHOT_PAUSE)
            producer.save(_scan(self._now()))
            return dict(producer.token['scan'])
        logger.warning('collection %s cannot be read as it was at one moment (error %s): what changes while it is read '
                       'may come twice', self.collection.full_name, exc.code)  # fmt: skip
        return {**scan, 'snapshot': False}

    def _page(self, scan: Mapping[str, Any]) -> list[RawBSONDocument]:
        """The documents that follow, by _id in the order of all types, which a filter would not compare."""
        at = {'level': 'snapshot', 'atClusterTime': scan['at']}
        command = {
            'find': self.collection.name, 'sort': {'_id': 1}, 'hint': {'_id': 1}, 'limit': self._size,
            'singleBatch': True,
            'readConcern': at if scan['snapshot'] else {'level': 'majority', 'afterClusterTime': scan['at']},
        }  # fmt: skip
        if 'after' in scan:
            after = bson.decode(scan['after'], codec_options=RAW)['_id']
            command.update(min=raw({'_id': after}), filter={'_id': raw({'$ne': after})})
        reply = self.collection.database.command(command, codec_options=RAW)
        documents: list[RawBSONDocument] = reply['cursor']['firstBatch']
        return documents


def _behind(time: Timestamp) -> dict[str, Any]:
    """The position just behind a time of the server."""
    return {'start': Timestamp(time.time, time.inc + 1), 'time': time.as_datetime()}


def _scan(now: Timestamp) -> dict[str, Any]:
    return {'scan': {'at': now, 'snapshot': True}}


@contextmanager
def _reading(changes: ChangeStream[RawBSONDocument], size: int) -> Iterator[_Reader]:
    reader = _Reader(changes, size)
    try:
        yield reader
    finally:
        reader.close()


class _Reader:
    """Reads a change stream in a thread, so that what has come can be taken without waiting for more."""

    def __init__(self, changes: ChangeStream[RawBSONDocument], size: int) -> None:
        self._changes, self._size = changes, size
        self._condition = threading.Condition()
        self._events: list[RawBSONDocument] = []
        self._bytes = 0
        self._idle_at: Mapping[str, Any] | None = None
        self._error: Exception | None = None
        self._ended = self._closing = False
        self._thread = threading.Thread(target=self._run, name='minibatch-changes', daemon=True)
        self._thread.start()

    def take(self, timeout: float) -> tuple[list[RawBSONDocument], Mapping[str, Any] | None]:
        """What has come, if need be after `timeout` seconds; and, if no more has, where the stream is behind it."""
        with self._condition:
            self._condition.wait_for(lambda: self._events or self._ended, timeout)
            events, self._events, self._bytes = self._events, [], 0
            self._condition.notify_all()
            if not events and self._ended:
                raise self._error or ServerError('the change stream has ended')
            return events, self._idle_at

    def close(self) -> None:
        """End the thread, and close the change stream."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(CLOSE_TIMEOUT)
        self._changes.close()

    def _run(self) -> None:
        try:
            while self._changes.alive and not self._closing:
                self._put(self._changes.try_next())
        except Exception as exc:
            self._error = exc
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _put(self, event: RawBSONDocument | None) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._closing or not self._is_full())
            self._idle_at = None if event else self._changes.resume_token
            if event:
                self._events.append(event)
                self._bytes += len(event.raw)
                self._condition.notify_all()

    def _is_full(self) -> bool:
        return len(self._events) >= self._size or self._bytes >= PAGE_BYTES
