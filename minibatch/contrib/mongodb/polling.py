"""Poll a collection for new documents.

How far a collection is brought is said for each kind of id apart, because MongoDB compares only ids of one kind::

    {<kind>: {'low': bytes, 'top': bytes, 'seen': bytes}}

``top`` is just after the last document that was brought, ``low`` is the point up to which nothing more is looked for.
Between the two lies the overlap, and there ``seen`` has a fingerprint of 8 bytes of each document that was brought.
This is the token of each message. So whoever goes on from it knows exactly what was brought, and what came late.

A pass first reads the ids from ``low`` to ``top`` and brings those that are not among the seen; then a page above
``top``. ``low`` follows: up to what was brought, but not above the *floor*, which is where the overlap begins. The
floor is taken before the pass reads; what becomes visible later, and does not lie below it, the next pass finds.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timezone
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from minibatch.errors import ArgumentError

from .documents import (
    PAGE_BYTES,
    Anchored,
    check_apart,
    check_name,
    check_size,
    digest,
    message,
    raw,
    raw_collection,
    reached,
)
from .ids import KINDS, TIMED, Bound, below, kind_of, place_of, value_at

if TYPE_CHECKING:
    from minibatch import Stream

logger = logging.getLogger(__name__)

MAX_SEEN = 10_000
FINGERPRINT = 8
TOGETHER = 1000
LOOK_PAUSE = 60.0
BINARY_ORDER = {'locale': 'simple'}
UNFIT = ['null', 'undefined', 'array', 'regex', 'javascript', 'javascriptWithScope', 'symbol', 'dbPointer',
         'minKey', 'maxKey']  # fmt: skip


class MongoSource(Anchored):
    """A source that polls a collection, of any MongoDB, for documents beyond those it has brought.

    Each document becomes a message, as it is stored, in the order of ``idcol``, from the first one on. The source goes
    on where it was after any crash or restart: its position is stored with the messages. It waits when the collection
    does not exist yet.

    **What it finds.** A document is found by its id, so it must have a higher one than those brought before:
    ObjectIds, times of insertion, growing numbers. Nothing tells of a document that becomes visible when a higher id
    was brought already, because it was made on a machine whose clock is behind, or by a transaction that took long, or
    by the slower of two writers. So each poll looks again at a stretch behind, ``overlap``, and brings what is new:

    - *ObjectIds, dates, timestamps*: a document is found if it becomes visible within ``overlap`` seconds after the
      time in its id, by the clock of the server. A time in the future is no harm.
    - *numbers*: a document is found if it becomes visible before one with a number that is more than ``overlap``
      higher is read. Let ``overlap`` be at least as many numbers as may be under way at once.
    - *text, binary data (also UUIDs), documents, booleans* have no distances, and there is no overlap. Ids by chance,
      such as most UUIDs, are found only by luck: use another ``idcol``, or `MongoReplicasetSource`.

    A collection may have several of these kinds; each has a position of its own.

    **Guarantees.** No document is lost or comes twice, by a crash or restart of any process or server, but: one that
    becomes visible later than the overlap allows is never brought; nor is one that was deleted, or has ``query=`` no
    longer true, before it was read. Neither are those without ``idcol``, or where it is null, a list, or no finite
    number; a warning says so. Changes of documents are not told. A document whose id, or time in ``idcol``, is changed
    to a higher one is brought again. A document that Python or minibatch cannot read goes to the dead letters.

    **Cost.** What was brought in the overlap is remembered in the position, up to 10,000 documents. If there are more,
    the next ones come when they are older than ``overlap`` seconds, so none is lost, but late; of numbers
    the overlap becomes shorter. With ``overlap=0`` nothing is remembered, and each id must be higher than all before.

    **Which position.** That of this collection, by its UUID, and of ``idcol`` and ``query``, in this stream. So a
    collection that was dropped and made again, or restored, is brought from its first document on; one that was
    renamed goes on. With ``name=`` you decide.

    Args:
        collection: the pymongo collection; also a view. Its read preference counts, and reads are at majority.
        size: how many documents are brought at a time, at most 10,000.
        idcol: the field by which documents are ordered, at the top level. Several may have the same value. For another
            one than '_id' make an index, ``collection.create_index([(idcol, 1), ('_id', 1)])``: without it each poll
            reads the whole collection, and a warning says so.
        delay: seconds to wait when there are no more documents.
        overlap: how far behind it looks again, in seconds or numbers; see above.
        query: a filter; only documents that match it are brought.
        name: the name of the position, if it is not to be made of the collection.

    Raises:
        ArgumentError: naming the argument that is wrong; from ``stream()``, if the collection is the one where the
            stream keeps its messages, and no ``query`` leaves them out.

    Example:
        >>> import minibatch as mb
        >>> from pymongo import MongoClient
        >>> source = MongoSource(MongoClient().shop.orders)
        >>> @mb.streaming('orders', size=100, source=source)    # doctest: +SKIP
        ... def process(window):
        ...     print(sum(order['total'] for order in window.data))
    """

    def __init__(
        self,
        collection: Collection[Any],
        size: int = 1000,
        idcol: str | None = '_id',
        delay: float = 1.0,
        overlap: float = 10,
        query: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.collection = collection
        self._documents = raw_collection(collection)
        self._size = check_size(size)
        self._idcol = idcol = '_id' if idcol is None else idcol
        if not isinstance(idcol, str) or not idcol or idcol.startswith('$') or '.' in idcol or '\0' in idcol:
            raise ArgumentError(f'idcol must name a field at the top level of the documents, not {idcol!r}')
        self._delay = _check_number('delay', delay)
        self._overlap = _check_number('overlap', overlap)
        if not self._delay:
            raise ArgumentError('delay must be more than 0 seconds')
        if query is not None and not isinstance(query, Mapping):
            raise ArgumentError(f'query must be a filter such as {{"kind": "order"}}, not {query!r}')
        self._query = dict(query or {})
        self._name = check_name(name)
        self._cancelled = threading.Event()
        self._said: dict[str, float] = {}

    def stream(self, stream: Stream) -> None:
        """Append the documents of the collection to `stream` until `cancel` is called."""
        self._cancelled.clear()
        self._said = {}
        current = None
        with reached(self.collection):
            if not self._query:  # which may leave out the messages of this stream
                check_apart(self.collection, stream)
            while not self._cancelled.is_set():
                name = self._name or self._find_name()
                if name and name != current:
                    current, producer = name, stream.producer(name)
                    reaches = _unpacked(producer.token)
                    self._check_index()
                    logger.info('collection %s is polled, as %s', self.collection.full_name, name)
                if not current or not self._poll(producer, reaches):
                    self._cancelled.wait(self._delay)

    def cancel(self) -> None:
        """Make `stream` return, after the query that runs."""
        self._cancelled.set()

    def data_of(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """What is appended for a document: the document itself. For subclasses."""
        return document

    # --- which collection

    def _find_name(self) -> str | None:
        """The name of the position; None while there is no such collection."""
        for found in self.collection.database.list_collections(filter={'name': self.collection.name}):
            id_ = found['info'].get('uuid') or digest(self.collection.full_name)  # a view has none
            name = f'mongodb/{id_.hex() if isinstance(id_, bytes) else id_.hex}/{self._idcol[:100]}'
            if self._idcol == '_id' and 'timeseries' in found['options']:
                self._say('collection %s is a time series, whose _id has no index, so each poll reads all of it; use '
                          'idcol=%r', self.collection.full_name,
                          found['options']['timeseries']['timeField'])  # fmt: skip
            return f'{name}/{digest(self._query).hex()}' if self._query else name
        return None

    def _check_index(self) -> None:
        needed = [self._idcol, '_id']
        try:
            indexes = self.collection.index_information() if self._idcol != '_id' else {}
        except OperationFailure:  # it is a view, or we may not
            return
        if indexes and not any([field for field, _ in index['key']][:2] == needed for index in indexes.values()):
            self._say("collection %s has no index to poll, so all of it is read; create_index([(%r, 1), ('_id', 1)])",
                      self.collection.full_name, self._idcol)  # fmt: skip

    def _say(self, text: str, *args: Any) -> None:
        """Warn, at most once a minute."""
        if time.monotonic() >= self._said.get(text, 0):
            self._said[text] = time.monotonic() + LOOK_PAUSE
            logger.warning(text, *args)

    # --- a pass

    def _poll(self, producer: Any, reaches: dict[str, _Reach]) -> bool:
        """Bring what is new of each kind of id; False if there is no more for now."""
        now = self._server_time() if self._overlap and set(reaches) & set(TIMED) else 0
        more = False
        for kind in list(reaches):
            if not self._cancelled.is_set():
                more |= _Pass(self, producer, reaches, kind, now).run()
        return more or self._find_kind(reaches)

    def _server_time(self) -> int:
        told = self.collection.database.client.admin.command('hello')['localTime']
        return int(told.replace(tzinfo=timezone.utc).timestamp())

    def _find_kind(self, reaches: dict[str, _Reach]) -> bool:
        """Look for ids of another kind, or of none."""
        others = [kind for kind in KINDS if kind not in reaches]
        for doc in self._find(None, {self._idcol: {'$type': others}}).limit(1) if others else ():
            reaches[str(kind_of(doc[self._idcol]))] = _Reach()
            return True
        unfit: list[Any] = [None, math.nan, math.inf, -math.inf]
        if time.monotonic() >= self._said.get('unfit', 0):
            self._said['unfit'] = time.monotonic() + LOOK_PAUSE
            either = [{self._idcol: {'$in': unfit}}, {self._idcol: {'$type': UNFIT}}]
            for doc in self._documents.find({'$and': [self._query, {'$or': either}]}, {'_id': 1}).limit(1):
                self._say('collection %s has documents that are not brought, because %s is missing, null, a list or '
                          'another value without order; one has the _id %r', self.collection.full_name, self._idcol,
                          doc['_id'])  # fmt: skip
        return False

    def _find(self, kind: str | None, *conditions: Mapping[str, Any], only: list[str] | None = None) -> Any:
        """A cursor over documents whose id is of this kind, in order."""
        conditions = (self._query, *conditions)
        if kind == 'number':  # no others can be compared
            conditions = (*conditions, {self._idcol: {'$gt': -math.inf, '$lt': math.inf}})
        elif kind:
            conditions = (*conditions, {self._idcol: {'$type': kind}})
        order = [(self._idcol, 1)]
        if self._idcol != '_id':
            conditions = (*conditions, {self._idcol: {'$not': {'$type': 'array'}}})
            order.append(('_id', 1))
        return self._documents.find({'$and': list(conditions)}, only, sort=order, collation=BINARY_ORDER)

    def _beyond(self, bound: Bound) -> dict[str, Any]:
        if bound.before:
            return {self._idcol: raw({'$gte': bound.value})}
        return self._compared('$gt', '$gt', bound)

    def _up_to(self, bound: Bound) -> dict[str, Any]:
        return self._compared('$lt', '$lte', bound)

    def _compared(self, strictly: str, last: str, bound: Bound) -> dict[str, Any]:
        if self._idcol == '_id':
            return {'_id': raw({last: bound.value})}
        same = {self._idcol: raw({'$eq': bound.value}), '$expr': {last: ['$_id', raw({'$literal': bound.id})]}}
        return {'$or': [{self._idcol: raw({strictly: bound.value})}, same]}


@dataclass
class _Reach:
    """How far the documents of one kind of id are brought; see the top of this file. Bounds are packed."""

    low: bytes = b''
    top: bytes = b''
    seen: dict[bytes, Any] = field(default_factory=dict)  # fingerprint: place; None if that is not known yet

    def packed(self) -> dict[str, bytes]:
        return {'low': self.low, 'top': self.top, 'seen': b''.join(self.seen)}


def _unpacked(token: Mapping[str, Mapping[str, bytes]] | None) -> dict[str, _Reach]:
    return {
        kind: _Reach(said['low'], said['top'], dict.fromkeys(_cut(said['seen'] + said.get('new', b''))))
        for kind, said in (token or {}).items()
    }


def _cut(fingerprints: bytes) -> Iterator[bytes]:
    return (fingerprints[i : i + FINGERPRINT] for i in range(0, len(fingerprints), FINGERPRINT))


class _Pass:
    """One look at the documents with ids of one kind."""

    def __init__(self, source: MongoSource, producer: Any, reaches: dict[str, _Reach], kind: str, now: int) -> None:
        self._source, self._producer, self._reaches, self._kind = source, producer, reaches, kind
        self._reach = reaches[kind]
        self._floor = self._find_floor(now)
        self._held = False

    def run(self) -> bool:
        """Bring what is late, and a page of what is next; whether there may be more at once."""
        reach, source = self._reach, self._source
        if reach.low != reach.top:
            self._look_back()
        beyond = [source._beyond(Bound.unpacked(reach.top))] if reach.top else []
        page, full = _page(source._find(self._kind, *beyond).limit(source._size), source._size)
        self._append(list(takewhile(self._room(), page)), ahead=True)
        if self._held:
            source._say('collection %s has more than %d documents younger than overlap=%g, or of the future; those '
                        'above wait until they are older', source.collection.full_name, MAX_SEEN,
                        source._overlap)  # fmt: skip
        return full and not self._held

    def _find_floor(self, now: int) -> Any:
        """Where the overlap begins; None without one."""
        overlap = self._source._overlap
        if not overlap or self._kind not in (*TIMED, 'number'):
            return None
        if self._kind in TIMED:
            return math.floor(now - overlap)
        return below(self._place(Bound.unpacked(self._reach.top).value), overlap) if self._reach.top else -math.inf

    def _place(self, value: Any) -> Any:
        return place_of(self._kind, value)

    def _mark(self, doc: RawBSONDocument) -> bytes:
        return digest([doc.get(self._source._idcol), doc['_id']])

    def _is_settled(self, value: Any) -> bool:
        """Whether it lies below the overlap, so that nothing needs to remember it."""
        return self._floor is None or self._place(value) < self._floor

    def _room(self) -> Callable[[RawBSONDocument], bool]:
        """Whether a document can be remembered, or need not be; asked for one after the other."""
        remembered = len(self._reach.seen)

        def has_room(doc: RawBSONDocument) -> bool:
            nonlocal remembered
            if self._kind == 'number' or self._is_settled(doc[self._source._idcol]):
                return True
            remembered += 1
            self._held |= remembered > MAX_SEEN
            return remembered <= MAX_SEEN

        return has_room

    # --- the overlap

    def _look_back(self) -> None:
        """Read the ids between low and top, bring those that came late, and let low follow."""
        reach, source = self._reach, self._source
        low, top = [source._beyond(Bound.unpacked(reach.low))] if reach.low else [], Bound.unpacked(reach.top)
        ids = source._find(self._kind, *low, source._up_to(top), only=['_id', source._idcol])
        present: dict[bytes, Any] = {}
        room, late = self._room(), {}
        for doc in ids:
            mark = self._mark(doc)
            if mark in reach.seen:
                present[mark] = self._place(doc[source._idcol])
            elif room(doc):
                late[mark] = doc['_id']
            if len(late) == source._size:
                present.update(self._bring(late))
                late, room = {}, self._room()
        present.update(self._bring(late))
        self._forget(present, top)

    def _bring(self, late: dict[bytes, Any]) -> dict[bytes, Any]:
        """Bring documents by their ids, in this order; returns what is to be remembered of them."""
        if not late:
            return {}
        source = self._source
        found = source._documents.find({'_id': raw({'$in': list(late.values())})})
        docs = {mark: doc for doc in found if (mark := self._mark(doc)) in late}  # else it was changed meanwhile
        logger.info('collection %s: %d documents became visible late', source.collection.full_name, len(docs))
        self._append([docs[mark] for mark in late if mark in docs], ahead=False)  # others are deleted
        return {mark: self._place(doc[source._idcol]) for mark, doc in docs.items()}

    def _forget(self, present: dict[bytes, Any], top: Bound) -> None:
        """What lies below the floor is settled, and what is not there any more, is gone."""
        reach = self._reach
        if self._is_settled(top.value):
            reach.low, reach.seen = reach.top, {}
            return
        reach.low = self._at_floor()
        reach.seen = {mark: place for mark, place in present.items() if place >= self._floor}
        if len(reach.seen) > MAX_SEEN:
            first_too_many = sorted(reach.seen.values(), reverse=True)[MAX_SEEN]
            reach.seen = {mark: place for mark, place in reach.seen.items() if place > first_too_many}
            places = reach.seen.values()
            reach.low = Bound(value_at(self._kind, min(places)), before=True).packed() if places else reach.top
            self._source._say('collection %s has more than %d documents in overlap=%g; it reaches no further back',
                              self._source.collection.full_name, MAX_SEEN, self._source._overlap)  # fmt: skip

    def _at_floor(self) -> bytes:
        """The floor as a bound; low does not go back, also if the clock, or the user's overlap, does."""
        if self._reach.low and self._place(Bound.unpacked(self._reach.low).value) >= self._floor:
            return self._reach.low
        return Bound(value_at(self._kind, self._floor), before=True).packed()

    # --- appending

    def _append(self, docs: list[RawBSONDocument], ahead: bool) -> None:
        """Append documents, so many at a time that their tokens are not too large together."""
        for start in range(0, len(docs), TOGETHER):
            self._append_some(docs[start : start + TOGETHER], ahead)

    def _append_some(self, docs: list[RawBSONDocument], ahead: bool) -> None:
        """Append documents, each with the token that says what is brought with it."""
        reach, source = self._reach, self._source
        others = {kind: other.packed() for kind, other in self._reaches.items() if kind != self._kind and other.top}
        low, top, seen, new = reach.low, reach.top, b''.join(reach.seen), {}
        at_floor = b'' if self._floor is None else self._at_floor()
        messages = []
        for doc in docs:
            value = doc[source._idcol]
            here = Bound(value, id=None if source._idcol == '_id' else doc['_id']).packed()
            top = here if ahead else top
            if self._is_settled(value):
                low = here
            else:
                low = at_floor
                new[self._mark(doc)] = self._place(value)
            said = {'low': low, 'top': top, 'seen': seen, 'new': b''.join(new)}
            messages.append(message(source.data_of(doc), {**others, self._kind: said}))
        self._producer.append_many(messages)
        reach.low, reach.top = low, top
        reach.seen.update(new)


def _page(documents: Iterable[RawBSONDocument], size: int) -> tuple[list[RawBSONDocument], bool]:
    """So many documents, or as many as fit into memory comfortably; and whether there may be more."""
    page, taken = [], 0
    for doc in documents:
        page.append(doc)
        taken += len(doc.raw)
        if taken >= PAGE_BYTES:
            return page, True
    return page, len(page) == size


def _check_number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ArgumentError(f'{name} must be a number of at least 0, not {value!r}')
    return value
