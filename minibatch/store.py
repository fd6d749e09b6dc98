"""Every MongoDB query about streams and their messages, and the shape of what is stored.

Collections (see docs/architecture.rst for why):

``stream``    {name, status, created, closed, interval, last_read, format, max_age, group_expiry, max_backlog, on_full}
``buffer``    a record batch: {_id, stream, producer, offset, n, created, processed, stored}, and

              - ``data`` when n is 1, else ``batch`` with n documents
              - ``times``: the n creation times, if they differ; ``created`` is the first of them
              - ``meta``: n values, if any message has one
              - ``stored``: when it was stored, by the clock of the server; those of older versions have none
              - ``token``: where a source goes on after it

              A producer's offsets are 0, 1, 2 ... without gaps; a record batch takes n of them from ``offset`` on.

``source``    where a named producer is, if its last record batch is gone: {_id, stream, producer, offset, token}

The functions take the database and know nothing of any connection. What consumer groups have stored is in ledger.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import datetime, timedelta
from itertools import chain, pairwise
from typing import Any, NamedTuple

import bson
from bson import Int64, ObjectId, Timestamp
from bson.raw_bson import DEFAULT_RAW_BSON_OPTIONS, RawBSONDocument
from pymongo import ReturnDocument, UpdateOne, WriteConcern
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError, WriteError

from .clock import aware
from .connection import is_passing, masked_text
from .unreadable import as_stored, decode, read

FORMAT = 1
MAX_BATCH = 10_000
NEAR = 100  # reading so many messages more costs less than another query
DUPLICATE_KEY = 11000
NAMED = 'source:'
SERVER_TIME = Timestamp(0, 0)  # in its place the server stores its own time, in seconds
SECOND = timedelta(seconds=1)

Doc = dict[str, Any]
DB = Database[Doc]


class Span(NamedTuple):
    """The messages of one producer from offset `start` up to, not including, `end`."""

    producer: str
    start: int
    end: int


# --- streams


def ensure_indexes(db: DB) -> None:
    """Create what is missing of the indexes; also on a database that holds messages without offsets."""
    db.stream.create_index('name', unique=True)
    db.buffer.create_index(
        [('stream', 1), ('producer', 1), ('offset', 1)],
        name='log',
        unique=True,
        partialFilterExpression={'offset': {'$exists': True}},
    )
    db.buffer.create_index(
        [('stream', 1), ('processed', 1)], name='without_offset', partialFilterExpression={'offset': None}
    )
    db.window.create_index(
        [('stream', 1), ('group', 1), ('number', 1)],
        name='dead',
        partialFilterExpression={'failed': {'$exists': True}},
    )


def open_stream(db: DB, name: str, options: Doc, now: datetime, first: Doc | None = None) -> Doc:
    """Create the stream if need be, with the options `first`, set those given, and return its document.

    An option that is None is unset.
    """
    created = {'status': 'open', 'created': now, 'format': FORMAT}
    update = {'$setOnInsert': {**created, **(first or {})}}
    with suppress(DuplicateKeyError):  # made by another process at the same moment
        db.stream.update_one({'name': name}, update, upsert=True)
    change: Doc = {'$set': {'name': name}, '$unset': {}}
    for option, value in options.items():
        change['$unset' if value is None else '$set'][option] = value
    found: Any = db.stream.find_one_and_update(
        {'name': name}, {how: fields for how, fields in change.items() if fields}, return_document=ReturnDocument.AFTER
    )
    doc: Doc = found
    return doc


def find_stream(db: DB, name: str, session: ClientSession | None = None) -> Doc:
    """The document of a stream, empty if there is none."""
    return db.stream.find_one({'name': name}, session=session) or {}


def find_streams(db: DB, names: list[str]) -> dict[str, Doc]:
    """The documents of those of these streams that there are, by name."""
    return {doc['name']: doc for doc in db.stream.find({'name': {'$in': names}})}


def stream_names(db: DB, limit: int) -> list[str]:
    """The names of at most `limit` streams, in the order of the alphabet."""
    return [doc['name'] for doc in db.stream.find({}, {'name': 1}).sort('name', 1).limit(limit)]


def clear_stream(db: DB, name: str) -> int:
    """Delete messages, windows and dead letters of a stream; positions and numbers go on. Returns how many messages."""
    deleted = count_messages(db, name)
    for producer, end in log_ends(db, name).items():
        _keep_place(db, name, Span(producer, 0, end))
    for part in _indexed(name):
        db.buffer.delete_many(part)
    for ids in (id_prefix(f'{name}/'), {'_id': {'$type': 'objectId'}}):  # the others are of the older library
        db.window.delete_many({**ids, 'stream': name})
    db.window_spans.delete_many({**id_prefix(f'{name}/'), 'stream': name})
    db.dead.delete_many({**id_prefix(f'{name}/'), 'stream': name})
    return deleted


def delete_stream(db: DB, name: str) -> None:
    """Delete what is left of a stream that was cleared, and whose groups were deleted."""
    db.source.delete_many({**id_prefix(f'{name}/'), 'stream': name})
    db.stream.delete_one({'name': name})


def count_messages(db: DB, name: str) -> int:
    """How many messages of a stream are stored."""
    total: Doc = {'$group': {'_id': None, 'n': {'$sum': {'$ifNull': ['$n', 1]}}}}
    return sum(int(doc['n']) for part in _indexed(name) for doc in db.buffer.aggregate([{'$match': part}, total]))


def _indexed(name: str) -> list[Doc]:
    """All messages of a stream, in two queries that each have an index."""
    return [{'stream': name, 'offset': {'$gte': 0}}, {'stream': name, 'offset': None}]


def storable(text: str) -> str:
    """Text as MongoDB can store it: what is no UTF-8 is escaped."""
    return text.encode(errors='backslashreplace').decode()


def tellable(text: str) -> str:
    """Text as MongoDB can store it, and without passwords."""
    return storable(masked_text(text))


def in_words(exc: BaseException) -> str:
    """The type and the text of an exception, whatever it is, as MongoDB can store it, and without passwords."""
    try:
        text = str(exc)
    except BaseException as why:
        text = f'(its text cannot be had: {type(why).__name__})'
    return tellable(f'{type(exc).__name__}: {text}')


# --- the log, written


def record_batch(
    stream: str,
    producer: str,
    offset: int,
    datas: Sequence[bytes],
    times: Sequence[datetime],
    meta: Sequence[RawBSONDocument | None],
    token: Any = None,
) -> RawBSONDocument:
    """Put encoded messages into one document, without decoding them again; `meta` are documents {meta: value}."""
    fields: Doc = {
        '_id': ObjectId(),
        'stream': stream,
        'producer': producer,
        'offset': Int64(offset),
        'n': len(datas),
        'created': times[0],
        'processed': False,
        'stored': SERVER_TIME,
    }
    if times[-1] != times[0]:
        fields['times'] = list(times)
    if any(value is not None for value in meta):
        fields['meta'] = [value and value['meta'] for value in meta]
    if token is not None:
        fields['token'] = token
    if len(datas) == 1:
        payload = b'\x03data\x00' + datas[0]
    else:
        items = b''.join([b'\x03%d\x00%b' % item for item in enumerate(datas)])
        payload = b'\x04batch\x00' + (len(items) + 5).to_bytes(4, 'little') + items + b'\x00'
    head = bson.encode(fields)
    size = len(head) + len(payload)
    return RawBSONDocument(size.to_bytes(4, 'little') + head[4:-1] + payload + b'\x00')


def insert_records(buffer: Collection[Any], records: list[Any]) -> tuple[int, str]:
    """Insert record batches in order. May be called again with the same ones after an unclear result.

    Returns:
        How many of them are stored for certain, and why the server refused the next one, or ''.

    Raises:
        PyMongoError: if that is not certain, or a matter of time, such as a full disk.
    """
    done = 0
    while done < len(records):
        try:
            if len(records) - done == 1:  # costs the client less
                buffer.insert_one(records[done])
            else:
                buffer.insert_many(records[done:])
            return len(records), ''
        except (BulkWriteError, WriteError) as exc:
            if is_passing(exc):  # then also what stands before the one that failed may not last
                raise
            details: Any = exc.details
            error = details.get('writeErrors', [details])[0]
            done += error['index']
            if error['code'] != DUPLICATE_KEY or not is_stored(buffer, records[done]):
                return done, error['errmsg']
            done += 1
    return done, ''


def is_stored(buffer: Collection[Any], record: Any) -> bool:
    """Whether a record batch of ours is in the log, for certain: the majority has it, or never will."""
    db = buffer.database.with_options(write_concern=WriteConcern('majority'))
    with db.client.start_session(causal_consistency=True) as session:
        see_all(db, record['stream'], session)
        return buffer.find_one({'_id': record['_id']}, {'_id': 1}, session=session) is not None


def adopt_without_offset(db: DB, stream: str, producer: str, next_offset: int, limit: int = 1000) -> int:
    """Give messages that were stored without an offset a place in the log. Returns how many were found."""
    ids = [doc['_id'] for doc in _without_offset(db, stream, limit)]
    is_time = {'$eq': [{'$type': '$created'}, 'date']}
    created = {'created': {'$cond': [is_time, '$created', '$$NOW']}}  # what another program has stored may have none
    if ids:
        db.buffer.bulk_write([
            UpdateOne(
                {'_id': id_, 'offset': None},
                [{'$set': {'producer': producer, 'offset': Int64(next_offset + i), 'n': 1, **created}}],
            )
            for i, id_ in enumerate(ids)
        ])
    return len(ids)


def has_without_offset(db: DB, stream: str) -> bool:
    """Whether messages wait that were stored without an offset."""
    return bool(_without_offset(db, stream, 1))


def _without_offset(db: DB, stream: str, limit: int) -> list[Doc]:
    unread = {'stream': stream, 'offset': None, 'processed': {'$ne': True}}
    return list(db.buffer.find(unread, {'_id': 1}).sort('_id', 1).limit(limit))


def unbatch(db: DB, span: Span, stream: str, before_each: Callable[[], None] = lambda: None) -> int:
    """Replace record batches by one document a message, in place. Returns how many record batches there were.

    First the messages after the first one are inserted at their offsets, from the last one down, then the record
    batch is reduced to its first message. Thus the record batch just below an offset always has its message, also
    after a crash half way, and it can be done again.
    """
    batches = 0
    for doc in read(db.buffer, {**_log_range(stream, span), 'n': {'$gt': 1}}):
        before_each()
        base: Doc = {key: doc[key] for key in ('stream', 'producer', 'processed', 'stored') if key in doc}
        singles = []
        for i, data in enumerate(doc['batch']):
            single = {**base, 'offset': Int64(doc['offset'] + i), 'n': 1, 'created': times_of(doc)[i]}
            single['data'] = as_stored(data)
            singles.append({**single, 'meta': [as_stored(doc['meta'][i])]} if 'meta' in doc else single)
        if 'token' in doc:
            singles[-1]['token'] = doc['token']
        rest = _log_range(stream, Span(doc['producer'], singles[0]['offset'] + 1, singles[-1]['offset'] + 1))
        present = {other['offset'] for other in db.buffer.find(rest, {'offset': 1})}
        missing = [single for single in reversed(singles[1:]) if single['offset'] not in present]
        if missing:
            db.buffer.insert_many(missing)
        db.buffer.update_one({'_id': doc['_id']}, {'$set': singles[0], '$unset': {'batch': 1, 'times': 1, 'token': 1}})
        batches += 1
    return batches


# --- where sources are


def find_place(db: DB, stream: str, producer: str, session: ClientSession | None = None) -> tuple[int, Any]:
    """The offset at which a named producer goes on, and the token of its source, None if there is none."""
    last = _last_record(db, stream, producer, session)
    # In this order: a record batch is deleted only after its token was saved.
    saved = db.source.find_one({'_id': f'{stream}/{producer}'}, session=session)
    end = 0 if last is None else int(last['offset']) + int(last['n'])
    if saved is not None and saved['offset'] >= end:
        return int(saved['offset']), saved.get('token')
    return end, last and last.get('token')


def save_place(db: DB, stream: str, producer: str, offset: int, token: Any) -> None:
    """Save the token of a source that brought no message with it; `offset` is where the log of the producer ends."""
    _save_place(db, stream, producer, offset, token, older={'$lte': offset})


def _keep_place(db: DB, stream: str, span: Span, session: ClientSession | None = None) -> None:
    """Save where a named producer is, if its last record batch is about to be deleted with others of the span.

    A session must have written before, see `see_all`; without one it takes its own.
    """
    if not is_named(span.producer):
        return
    if session is None:
        with db.client.start_session(causal_consistency=True) as session:
            see_all(db, stream, session)
            _keep_place(db, stream, span, session)
        return
    last = _last_record(db, stream, span.producer, session)
    if last is not None and last['offset'] + last['n'] <= span.end:
        end = last['offset'] + last['n']
        _save_place(db, stream, span.producer, end, last.get('token'), older={'$lt': end})


def _save_place(db: DB, stream: str, producer: str, offset: int, token: Any, older: Doc) -> None:
    place = {'stream': stream, 'producer': producer, 'offset': Int64(offset), 'token': token}
    with suppress(DuplicateKeyError):  # what is saved is further
        db.source.update_one({'_id': f'{stream}/{producer}', 'offset': older}, {'$set': place}, upsert=True)


def _last_record(db: DB, stream: str, producer: str, session: ClientSession | None) -> Doc | None:
    fields = {'_id': 0, 'offset': 1, 'n': 1, 'token': 1}
    ours = {'stream': stream, 'producer': producer, 'offset': {'$gte': 0}}
    return db.buffer.find_one(ours, fields, sort=[('offset', -1)], session=session)


def producer_id(name: str) -> str:
    """The id of a named producer."""
    return NAMED + name


def is_named(producer: str) -> bool:
    """Whether a producer has a name, and thus goes on where it was; the ids of others are made up for one run."""
    return producer.startswith(NAMED)


# --- the log, read


def log_ends(db: DB, stream: str) -> dict[str, int]:
    """For each producer with records: the offset after its last message. One step of the index per producer."""
    last: list[Doc] = [
        {'$match': {'stream': stream, 'offset': {'$gte': 0}}},
        {'$sort': {'producer': -1, 'offset': -1}},
        {'$group': {'_id': '$producer', 'offset': {'$first': '$offset'}, 'n': {'$first': '$n'}}},
    ]
    found = db.buffer.aggregate(last, batchSize=10_000)
    return dict(sorted((doc['_id'], int(doc['offset']) + int(doc['n'])) for doc in found))


def log_starts(db: DB, stream: str) -> dict[str, int]:
    """For each producer with records: the first offset stored. One step of the index per producer."""
    first: list[Doc] = [
        {'$match': {'stream': stream, 'offset': {'$gte': 0}}},
        {'$sort': {'producer': 1, 'offset': 1}},
        {'$group': {'_id': '$producer', 'offset': {'$first': '$offset'}}},
    ]
    return {doc['_id']: int(doc['offset']) for doc in db.buffer.aggregate(first, batchSize=10_000)}


def count_unprocessed(db: DB, stream: str) -> int:
    """How many messages are not marked as processed; reads every record batch."""
    unread = {'stream': stream, 'offset': {'$gte': 0}, 'processed': {'$ne': True}}
    total: Doc = {'$group': {'_id': None, 'n': {'$sum': '$n'}}}
    return sum(int(doc['n']) for doc in db.buffer.aggregate([{'$match': unread}, total]))


def first_kept(
    db: DB, stream: str, producer: str, offset: int, session: ClientSession | None = None
) -> int | None:
    """The first offset from `offset` on whose message is still stored."""
    doc = db.buffer.find_one(
        {'stream': stream, 'producer': producer, 'offset': {'$gte': offset}},
        {'offset': 1},
        sort=[('offset', 1)],
        session=session,
    )
    if doc is not None and doc['offset'] == offset:
        return offset
    around = _record_around(db, stream, producer, offset, session=session)
    if around is not None and around['offset'] + around['n'] > offset:
        return offset
    return None if doc is None else int(doc['offset'])


def read_records(db: DB, stream: str, span: Span, session: ClientSession | None = None) -> list[Doc]:
    """The record batches that hold the messages of a span, in order; the outer ones may hold more."""
    if span.start >= span.end:
        return []
    fields = {'_id': 0, 'stream': 0, 'producer': 0, 'processed': 0, 'stored': 0, 'token': 0}
    found = list(read(db.buffer, _log_range(stream, span), fields, session))
    if not found or found[0]['offset'] != span.start:
        around = _record_around(db, stream, span.producer, span.start, fields, session)
        found = [around, *found] if around is not None else found
    return found


def count_stored(db: DB, stream: str, span: Span) -> int:
    """How many messages of a span are stored."""
    return sum(end - first for _, first, end in _covering(db, stream, span, {'_id': 0, 'offset': 1, 'n': 1}))


class Records:
    """The record batches that hold the messages of many spans, each stretch of a producer's log read once."""

    def __init__(
        self, db: DB, stream: str, spans: Iterable[Span], session: ClientSession | None = None
    ) -> None:
        self._found: dict[str, tuple[list[int], list[Doc]]] = {}
        spans = sorted(spans)
        self._shared = any(one[0] == next_[0] and next_.start < one.end for one, next_ in pairwise(spans))
        for stretch in _stretches(spans):
            offsets, records = self._found.setdefault(stretch.producer, ([], []))
            for record in read_records(db, stream, stretch, session):
                offsets.append(record['offset'])
                records.append(record)

    def of(self, spans: Iterable[Span]) -> list[tuple[Span, list[Doc]]]:
        """Each of some of these spans with its record batches; the outer ones may hold more."""
        found = [(span, self._covering(span)) for span in spans]
        return deepcopy(found) if self._shared else found  # what one function changes, another does not see

    def _covering(self, span: Span) -> list[Doc]:
        offsets, records = self._found.get(span.producer, ([], []))
        first = max(bisect_right(offsets, span.start) - 1, 0)
        return records[first : bisect_left(offsets, span.end)]


def _stretches(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that overlap, touch, or are near each other joined."""
    joined: list[Span] = []
    for span in sorted(spans):
        last = joined[-1] if joined else None
        if last is not None and last.producer == span.producer and span.start <= last.end + NEAR:
            joined[-1] = last._replace(end=max(span.end, last.end))
        else:
            joined.append(span)
    return joined


def see_all(db: DB, stream: str, session: ClientSession) -> None:
    """After this a (causally consistent) session sees all that the majority had before.

    A primary that has just been elected may not see it yet. When it has acknowledged a write, it does.
    """
    db.stream.update_one({'name': stream}, {'$currentDate': {'last_read': True}}, session=session)


def read_times(db: DB, stream: str, span: Span, limit: int = 5000) -> Iterator[tuple[int, int, list[datetime]]]:
    """(offset, n, creation times) of at most `limit` record batches of a span, in order, without their data."""
    fields = {'_id': 0, 'offset': 1, 'n': 1, 'created': 1, 'times': 1}
    around = _record_around(db, stream, span.producer, span.start, fields)
    if around is not None and around['offset'] + around['n'] > span.start and around['n'] > 1:
        yield int(around['offset']), int(around['n']), times_of(around)
    found = db.buffer.find(_log_range(stream, span), fields, batch_size=5000).sort('offset', 1).limit(limit)
    for doc in found:
        yield int(doc['offset']), int(doc['n']), times_of(doc)


def read_messages(
    db: DB, stream: str, span: Span, names: list[str] | None, session: ClientSession | None = None
) -> Iterator[tuple[int, datetime, Any]]:
    """(offset, creation time, data) of the messages of a span, in order; of the data only these fields, if named."""
    fields = {'_id': 0, 'stream': 0, 'producer': 0, 'processed': 0, 'stored': 0, 'meta': 0, 'token': 0}
    if names is not None and not any('$' in name for name in names):
        inner = [name for name in sorted(set(names)) if not any(name.startswith(f'{other}.') for other in names)]
        fields = {'_id': 0, **dict.fromkeys(('offset', 'n', 'created', 'times'), 1)}
        fields.update((f'{where}.{name}', 1) for where in ('data', 'batch') for name in inner)
    for record, first, end in _covering(db, stream, span, fields, session):
        offset, times, batch = int(record['offset']), times_of(record), batch_of(record)
        for i in range(first, end):
            yield offset + i, times[i], batch[i]


def read_documents(db: DB, stream: str, spans: Iterable[Span]) -> list[Doc]:
    """The whole documents of spans whose messages are stored one by one."""
    return [doc for span in spans for doc in read(db.buffer, _log_range(stream, span))]


def unreadable_messages(db: DB, stream: str) -> list[Doc]:
    """Messages that are stored one by one, not processed, and that cannot be read; all are looked at."""
    waiting = {'stream': stream, 'offset': {'$gte': 0}, 'processed': {'$ne': True}}
    found = db.buffer.with_options(DEFAULT_RAW_BSON_OPTIONS).find(waiting)
    docs = (decode(raw, db.codec_options) for raw in found)
    return [doc for doc in docs if 'unreadable' in doc and doc['n'] == 1]


def times_of(record: Doc) -> list[datetime]:
    """The creation time of each message of a record batch."""
    return record.get('times') or [record['created']] * int(record.get('n', 1))


def batch_of(record: Doc) -> list[Any]:
    """The data of each message of a record batch; where none is stored, or was read, it is empty."""
    return record.get('batch') or [record.get('data', {})] * int(record.get('n', 1))


def trim(span: Span, records: Iterable[Doc]) -> Iterator[tuple[Doc, int, int]]:
    """(record batch, first, end) of the messages of a span, each once although record batches may overlap."""
    next_offset = span.start
    for record in records:
        offset = int(record['offset'])
        first, end = max(next_offset - offset, 0), min(int(record['n']), span.end - offset)
        if first < end:
            yield record, first, end
            next_offset = offset + end


def _covering(
    db: DB, stream: str, span: Span, fields: Any, session: ClientSession | None = None
) -> Iterator[tuple[Doc, int, int]]:
    """The record batches that hold the messages of a span, as `trim` gives them."""
    around = _record_around(db, stream, span.producer, span.start, fields, session)
    found = read(db.buffer, _log_range(stream, span), fields, session)
    return trim(span, chain([around] if around is not None else [], found))


def gaps(span: Span, finished: Iterable[Span]) -> Iterator[Span]:
    """What is left of a span without those that are finished."""
    for done in sorted(finished):
        if span.start < min(done.start, span.end):
            yield span._replace(end=min(done.start, span.end))
        span = span._replace(start=max(span.start, done.end))
    if span.start < span.end:
        yield span


def _log_range(stream: str, span: Span) -> Doc:
    return {'stream': stream, 'producer': span.producer, 'offset': {'$gte': span.start, '$lt': span.end}}


def _record_around(
    db: DB, stream: str, producer: str, offset: int, fields: Any = None, session: ClientSession | None = None
) -> Doc | None:
    # Bounded below: entries of deleted documents would make an open search slow.
    before = _log_range(stream, Span(producer, offset - MAX_BATCH, offset))
    last = read(db.buffer, before, fields, session, direction=-1, limit=1)
    return next(last, None)


# --- retention


def delete_records(db: DB, stream: str, span: Span, session: ClientSession | None = None) -> int:
    """Delete the record batches that lie wholly within a span; returns where the span is deleted up to.

    A session that has written before reads from the primary that is one.
    """
    _keep_place(db, stream, span, session)
    db.buffer.delete_many(_whole_batches(stream, span), session=session)
    return _end_of_whole_batches(db, stream, span, session)


def mark_processed(db: DB, stream: str, span: Span, session: ClientSession | None = None) -> int:
    """Mark the record batches that lie wholly within a span as processed; returns where they are up to."""
    db.buffer.update_many(_whole_batches(stream, span), {'$set': {'processed': True}}, session=session)
    return _end_of_whole_batches(db, stream, span, session)


def delete_older(db: DB, stream: str, before: datetime) -> tuple[int, datetime | None]:
    """Delete the messages kept since before a time of the server, whole record batches from the oldest on.

    The logs are read only where that may be so.

    Returns:
        How many were deleted, and since about when the oldest of the others are kept, None if there are none.
    """
    deleted, left = 0, []
    for producer, (start, since) in _oldest(db, stream).items():
        upto, rest = _first_left(db, stream, producer, start, before) if since < before else (start, since)
        if rest is not None:
            left.append(rest)
        if upto > start:
            _keep_place(db, stream, Span(producer, start, upto))
            db.buffer.delete_many(_log_range(stream, Span(producer, start, upto)))
            deleted += upto - start
    old = {'created': {'$lt': before}, 'stored': {'$not': {'$gte': Timestamp(before, 0)}}}
    deleted += db.buffer.delete_many({'stream': stream, 'offset': None, **old}).deleted_count
    return deleted, min(left, default=None)


def _oldest(db: DB, stream: str) -> dict[str, tuple[int, datetime]]:
    """For each producer with records: the first offset stored, and since about when it is kept. One step of the index
    per producer."""
    first: list[Doc] = [
        {'$match': {'stream': stream, 'offset': {'$gte': 0}}},
        {'$sort': {'producer': 1, 'offset': 1}},
        {'$group': {'_id': '$producer', **{key: {'$first': f'${key}'} for key in ('offset', 'created', 'stored')}}},
    ]
    found = db.buffer.aggregate(first, batchSize=10_000)
    return {doc['_id']: (int(doc['offset']), _kept_since(doc)) for doc in found}


def _first_left(
    db: DB, stream: str, producer: str, start: int, before: datetime
) -> tuple[int, datetime | None]:
    """Up to which offset record batches from `start` on are kept since before a time, and since when the next is."""
    upto, fields = start, {'_id': 0, **dict.fromkeys(('offset', 'n', 'created', 'times', 'stored'), 1)}
    log = {'stream': stream, 'producer': producer, 'offset': {'$gte': start}}
    for record in db.buffer.find(log, fields).sort('offset', 1):
        since = _kept_since(record)
        if since >= before:
            return upto, since
        upto = int(record['offset']) + int(record['n'])
    return upto, None


def _kept_since(record: Doc) -> datetime:
    """Since when a record batch is kept, by the clock of the server.

    That knows the second. Within it, it is when the youngest message was created; if that is another second, the clock
    of the producer is wrong, or it has waited, and it is the end of the second.
    """
    youngest = aware(max(times_of(record)))
    stored = record.get('stored')
    if not stored or not stored.time:  # it is of an older version, or not on a real server
        return youngest
    second: datetime = stored.as_datetime()
    return youngest if second <= youngest < second + SECOND else second + SECOND


def server_time(db: DB) -> datetime:
    """The time of the server."""
    now: datetime = db.command('hello')['localTime']
    return now


def touch_stream(db: DB, stream: str, now: datetime) -> None:
    """Write when the stream was last read."""
    db.stream.update_one({'name': stream}, {'$set': {'last_read': now}})


def _whole_batches(stream: str, span: Span) -> Doc:
    # What reaches beyond the span is left out by the write itself: what is read before it may be out of date by then,
    # if it is of a primary that has been replaced.
    whole = {'$expr': {'$lte': [{'$add': ['$offset', '$n']}, span.end]}}
    return {**_log_range(stream, span), '$or': [{'n': 1}, whole]}  # one message is whole, and cheaper to see


def _end_of_whole_batches(db: DB, stream: str, span: Span, session: ClientSession | None) -> int:
    last = _record_around(db, stream, span.producer, span.end, {'offset': 1, 'n': 1}, session)
    cut = last is not None and last['offset'] + last['n'] > span.end
    return int(last['offset']) if last is not None and cut else span.end


def id_prefix(prefix: str) -> Doc:
    """The documents whose _id begins so."""
    return {'_id': {'$gte': prefix, '$lt': prefix[:-1] + chr(ord(prefix[-1]) + 1)}}


# --- news


def watch_inserts(db: DB, max_wait: float) -> Any:
    """A change stream of the inserts into the log: each event has stream, producer, offset and n only."""
    events: list[Doc] = [
        {'$match': {'operationType': 'insert'}},
        {'$project': {'_id': 1, **{f'fullDocument.{key}': 1 for key in ('stream', 'producer', 'offset', 'n')}}},
    ]
    return db.buffer.watch(events, max_await_time_ms=int(max_wait * 1000), batch_size=1000)
