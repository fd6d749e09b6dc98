"""Every MongoDB query about consumer groups: leases, windows, positions, and the shape of what is stored.

Collections (see docs/architecture.rst for why):

``group``     {_id: stream/group, stream, group, lease: {owner, epoch, expires}, fingerprint, keep, picks, number,
              event, frontier, watermark, seen, started, sessions, stalled, source_error, deleted, reset, windows,
              messages, expired_unprocessed, retried, failed, late, function, latency, sizes, committed, workers,
              forgotten};
              ``forgotten`` messages were of producers whose positions are gone; every window up to ``number`` is
              finished, and below the positions; ``frontier`` and ``watermark`` are theirs, of the time of messages
              if ``event``, else of that of creation; ``reset`` are positions decided on, not all written yet;
              ``deleted`` makes it a tombstone
``position``  {_id: stream/group/producer, stream, group, producer, offset, epoch, updated, cleaned}; every message
              of the producer below ``offset`` is finished
``window``    {_id: stream/group/number, stream, group, number, spans, n, start, end, key, watermark, frontier, part,
              late, bad, event, status, epoch, attempts, error, traceback, failed, tried, picked, created, processed}

              - spans are [producer, from, to, from, to ...), and go on in ``window_spans`` if there are many
              - its status goes from open to processed or failed (a dead letter), from failed to replay when somebody
                asks for it, and on to processed or failed; or it is void
              - ``frontier``: with this window, all up to that time is claimed; ``part``: emitted before its end;
                ``late``: of messages whose windows were closed; ``bad``: of one message, and why it has no window

The functions take the database and know nothing of any connection. Those that change what a consumer group owns
take its `epoch`, and change nothing once another consumer has taken over.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from bson import Binary, Int64
from pymongo import ReturnDocument, UpdateOne
from pymongo.client_session import ClientSession
from pymongo.errors import BulkWriteError, DuplicateKeyError, OperationFailure

from . import store
from .clock import EPOCH, MILLISECOND, aware
from .connection import is_passing
from .errors import LeaseLostError
from .store import DB, DUPLICATE_KEY, Doc, Span, id_prefix

MAX_SPANS = 100_000
VOID_KEPT = timedelta(days=1)
MAX_SESSIONS = 100
IDLE_POSITION_KEPT = timedelta(days=1)
UNFINISHED: Doc = {'status': {'$in': ['open', 'replay']}}
PROCESSED: Doc = {'status': 'processed', 'processed': True}


# --- the lease of a consumer group


def group_id(stream: str, group: str) -> str:
    return f'{stream}/{group}'


def find_group(db: DB, stream: str, group: str) -> Doc | None:
    """The document of a consumer group."""
    return db.group.find_one({'_id': group_id(stream, group)})


def groups_of(db: DB, stream: str, session: ClientSession | None = None) -> list[Doc]:
    """The consumer groups of a stream; the group without a name is the lease for adopting messages."""
    live = {'stream': stream, 'group': {'$ne': ''}, 'deleted': None}
    return list(db.group.find({**id_prefix(f'{stream}/'), **live}, session=session))


def take_lease(db: DB, stream: str, group: str, owner: Doc, seconds: float, instead_of: str, fields: Doc) -> Doc | None:
    """Take the lease with the next epoch if it is free, or held by the owner with the token `instead_of`.

    Returns the group's document as it is then, with ``taken``, the server's time, and ``clean``, whether the owner
    before (if any) had finished and released it; None if the lease is held.
    """
    id_ = group_id(stream, group)
    identity = {'stream': stream, 'group': group, 'number': 0}
    with suppress(DuplicateKeyError):  # made by another consumer at the same moment
        db.group.update_one({'_id': id_}, {'$setOnInsert': identity}, upsert=True)
    free = [
        {'$lte': [{'$ifNull': ['$lease.expires', EPOCH]}, '$$NOW']},
        {'$eq': ['$lease.owner.token', {'$literal': instead_of}]},
    ]
    lease = {
        'owner': {'$literal': owner},
        'epoch': {'$add': [{'$ifNull': ['$lease.epoch', 0]}, 1]},
        'expires': _seconds_from_now(seconds),
    }
    clean = {'$eq': [{'$ifNull': ['$lease.expires', EPOCH]}, EPOCH]}
    literals = {key: {'$literal': value} for key, value in fields.items()}
    taken = {'lease': lease, 'taken': '$$NOW', 'clean': clean, **literals}
    return db.group.find_one_and_update(
        {'_id': id_, '$expr': {'$or': free}}, [{'$set': taken}], return_document=ReturnDocument.AFTER
    )


def start_group(db: DB, stream: str, group: str, epoch: int) -> None:
    """Note that a group has its first positions, and is there again if it was deleted.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    update = {'$set': {'started': True}, '$unset': {'deleted': 1}}
    if db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, update).matched_count == 0:
        raise LeaseLostError


def note_session(db: DB, stream: str, group: str, epoch: int, session: Binary) -> None:
    """Note the id of a session before its first transaction, so that whoever takes over can end what it left.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    mine = {'_id': group_id(stream, group), 'lease.epoch': epoch}
    latest = {'$each': [session], '$slice': -MAX_SESSIONS}
    if db.group.update_one(mine, {'$push': {'sessions': latest}}).matched_count == 0:
        raise LeaseLostError


def end_sessions(db: DB, stream: str, group: str, epoch: int, sessions: list[Any], clean: bool) -> None:
    """End the transactions of the consumer before, if it did not: their locks would hold us up for a minute."""
    if not clean:
        with suppress(OperationFailure):  # where it is not allowed they end when their time is over
            ids = [{'id': session} for session in sessions]
            db.client.admin.command('killSessions', ids, codec_options=db.codec_options)
    db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, {'$unset': {'sessions': 1}})


def note(db: DB, stream: str, group: str, epoch: int, **fields: Any) -> None:
    """Note how the group is, as fields of its document; None takes a field away."""
    update: Doc = {'$set': {}, '$unset': {}}
    for name, value in fields.items():
        update['$unset' if value is None else '$set'][name] = value
    db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, {k: v for k, v in update.items() if v})


def renew_lease(db: DB, stream: str, group: str, epoch: int, seconds: float) -> datetime:
    """Extend the lease; returns the server's time.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    doc = db.group.find_one_and_update(
        {'_id': group_id(stream, group), 'lease.epoch': epoch},
        [{'$set': {'lease.expires': _seconds_from_now(seconds)}}],
        return_document=ReturnDocument.AFTER,
        projection={'lease.expires': 1},
    )
    if doc is None:
        raise LeaseLostError
    expires: datetime = doc['lease']['expires']
    return expires - timedelta(seconds=seconds)


def release_lease(db: DB, stream: str, group: str, epoch: int, clean: bool) -> None:
    """Give the lease up, so that the next consumer need not wait; `clean` if no write of ours can be under way."""
    update = {
        '$set': {'lease.expires': EPOCH if clean else EPOCH + MILLISECOND},
        '$currentDate': {'seen': True},
    }
    db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, update)


def _seconds_from_now(seconds: float) -> Doc:
    return {'$add': ['$$NOW', int(seconds * 1000)]}


# --- windows


def window_id(stream: str, group: str, number: int) -> str:
    return f'{stream}/{group}/{number:012d}'


def next_number(db: DB, stream: str, group: str, first: int, session: ClientSession | None = None) -> int:
    """The number after the last window from number `first` on."""
    last = db.window.find_one(_windows(stream, group, first), {'number': 1}, sort=[('_id', -1)], session=session)
    return first if last is None else int(last['number']) + 1


def fence(db: DB, stream: str, group: str, epoch: int, number: int, now: datetime) -> int:
    """Insert a void window at the first free number from `number` on, and return the number after it.

    A consumer that lost its lease without noticing inserts its windows at contiguous numbers, in order: it must
    meet the void window, and stops there.
    """
    void = {'stream': stream, 'group': group, 'status': 'void', 'epoch': epoch, 'created': now, 'processed': True}
    while True:
        try:
            db.window.insert_one({'_id': window_id(stream, group, number), 'number': number, **void})
            return number + 1
        except DuplicateKeyError:
            number += 1


def adopt_windows(
    db: DB, stream: str, group: str, epoch: int, first: int, end: int, session: ClientSession | None = None
) -> list[Doc]:
    """Make the open windows from number `first` to below `end` ours; returns all windows there, in order."""
    numbers = _windows(stream, group, first, end)
    theirs = {**numbers, 'status': 'open', 'epoch': {'$lt': epoch}}
    db.window.update_many(theirs, {'$set': {'epoch': epoch}}, session=session)
    docs = list(db.window.find({**numbers, 'status': {'$ne': 'void'}}, session=session).sort('_id', 1))
    for doc in docs:
        doc['spans'] = all_spans(db, doc)
    return docs


def claim_windows(db: DB, docs: list[Doc], epoch: int) -> None:
    """Insert windows in order, before they are dispatched. May be called again after an unclear result.

    Raises:
        LeaseLostError: if a number is taken by another consumer.
    """
    docs = [dict(doc) for doc in docs]
    parts = [part for doc in docs for part in _pack_spans(doc)]
    if parts:
        db.window_spans.bulk_write([UpdateOne({'_id': p['_id']}, {'$set': p}, upsert=True) for p in parts])
    while docs:
        try:
            db.window.insert_many(docs)
            return
        except BulkWriteError as exc:
            if is_passing(exc) or exc.details['writeErrors'][0]['code'] != DUPLICATE_KEY:
                raise
            at = exc.details['writeErrors'][0]['index']
            ours = db.window.find_one({'_id': docs[at]['_id'], 'epoch': epoch, 'status': 'open'}, {'_id': 1})
            if ours is None:
                raise LeaseLostError from None
            docs = docs[at + 1 :]


def commit_windows(db: DB, ids: list[str], epoch: int) -> None:
    """Make open and replayed windows processed.

    Raises:
        LeaseLostError: if one of them is no longer ours.
    """
    ours = {'_id': {'$in': ids}, 'epoch': epoch}
    result = db.window.update_many({**ours, **UNFINISHED}, {'$set': PROCESSED})
    if result.matched_count < len(ids) and db.window.count_documents({**ours, 'status': 'processed'}) < len(ids):
        raise LeaseLostError


def retry_windows(db: DB, errors: dict[str, str], epoch: int) -> None:
    """Write, before they are tried again, that an attempt at each of these windows failed, and why."""
    updates = [
        UpdateOne({'_id': id_, 'epoch': epoch, **UNFINISHED}, {'$inc': {'attempts': 1}, '$set': {'error': why}})
        for id_, why in errors.items()
    ]
    db.window.bulk_write(updates, ordered=False)


def commit_with(db: DB, id_: str, epoch: int, session: ClientSession) -> bool | None:
    """Make a window processed in a transaction: False if it was already, None if it is not there as ours."""
    ours = {'_id': id_, 'epoch': epoch}
    if db.window.update_one({**ours, **UNFINISHED}, {'$set': PROCESSED}, session=session).matched_count:
        return True
    return None if db.window.find_one({**ours, **PROCESSED}, {'_id': 1}, session=session) is None else False


def commit_all_with(db: DB, ids: list[str], epoch: int, session: ClientSession) -> bool:
    """Make windows processed in a transaction; False if one of them is not there as ours and unfinished."""
    ours = {'_id': {'$in': ids}, 'epoch': epoch, **UNFINISHED}
    return db.window.update_many(ours, {'$set': PROCESSED}, session=session).matched_count == len(ids)


def is_unfinished(db: DB, id_: str, epoch: int) -> bool:
    """Whether a window is ours and not finished."""
    return db.window.find_one({'_id': id_, 'epoch': epoch, **UNFINISHED}, {'_id': 1}) is not None


# --- windows, removed


def delete_windows(db: DB, stream: str, group: str, first: int, end: int) -> None:
    """Delete the processed windows from number `first` to below `end`."""
    numbers = _windows(stream, group, first, end)
    db.window.delete_many({**numbers, 'status': 'processed'})
    dead = [doc['number'] for doc in db.window.find({**numbers, 'failed': {'$exists': True}}, {'number': 1})]
    db.window_spans.delete_many({**numbers, 'number': {'$nin': dead}})


def sweep_windows(db: DB, stream: str, group: str, upto: int, now: datetime) -> None:
    """Delete what crashes left behind: unfinished claims that nobody may own, and void windows of long ago."""
    below = _windows(stream, group, 0, upto + 1)
    db.window.delete_many({**below, 'status': 'open'})
    db.window.delete_many({**below, 'status': 'void', 'created': {'$lt': now - VOID_KEPT}})


def all_spans(db: DB, doc: Doc) -> list[Span]:
    """The spans of a window, also those that did not fit into its document."""
    packed = list(doc.get('spans') or ())
    if doc.get('parts'):
        for part in db.window_spans.find({'_id': {'$in': doc['parts']}}).sort('_id', 1):
            packed += part['spans']
    return [Span(producer, *run) for producer, *edges in packed for run in zip(edges[::2], edges[1::2], strict=True)]


def _pack_spans(doc: Doc) -> list[Doc]:
    """Put the spans of a window into its document in their stored form; what is too much for it is returned."""
    spans = doc['spans']
    first, *more = (_packed(spans[at : at + MAX_SPANS]) for at in range(0, max(len(spans), 1), MAX_SPANS))
    doc['spans'] = first
    if not more:
        return []
    # With the epoch in their names, a consumer that lost its lease cannot overwrite those of the next one.
    doc['parts'] = [f'{doc["_id"]}+{doc["epoch"]}+{i:06d}' for i in range(len(more))]
    same = {key: doc[key] for key in ('stream', 'group', 'number')}
    return [{'_id': id_, **same, 'spans': packed} for id_, packed in zip(doc['parts'], more, strict=True)]


def _packed(spans: Iterable[Span]) -> list[list[Any]]:
    """Spans as [producer, from, to, from, to ...]; their order is kept."""
    packed: list[list[Any]] = []
    for producer, start, end in spans:
        if packed and packed[-1][0] == producer:
            packed[-1] += (start, end)
        else:
            packed.append([producer, start, end])
    return packed


def _windows(stream: str, group: str, first: int, end: int | None = None) -> Doc:
    id_range = {'$gte': window_id(stream, group, first)}
    id_range['$lt'] = f'{stream}/{group}0' if end is None else window_id(stream, group, end)
    return {'_id': id_range, 'stream': stream, 'group': group}


# --- positions and progress


def read_positions(db: DB, stream: str, group: str, session: ClientSession | None = None) -> dict[str, int]:
    """The position of a group in the log of each producer."""
    ours = {**id_prefix(f'{stream}/{group}/'), 'stream': stream, 'group': group}
    found = db.position.find(ours, session=session)
    return {doc['producer']: int(doc['offset']) for doc in found}


def furthest_position(db: DB, stream: str, producer: str, session: ClientSession | None = None) -> int:
    """The furthest position of any group in the log of a producer."""
    ids = [f'{group["_id"]}/{producer}' for group in groups_of(db, stream, session)]
    return max((int(doc['offset']) for doc in db.position.find({'_id': {'$in': ids}}, session=session)), default=0)


def write_positions(db: DB, stream: str, group: str, epoch: int, moved: dict[str, int]) -> None:
    """Write the positions that have moved.

    Raises:
        LeaseLostError: if another consumer has written them since.
    """
    if not moved:
        return
    identity = {'stream': stream, 'group': group}
    try:
        db.position.bulk_write(
            [
                UpdateOne(
                    {'_id': f'{stream}/{group}/{producer}', 'epoch': {'$lte': epoch}},
                    {
                        '$set': {**identity, 'producer': producer, 'offset': Int64(offset), 'epoch': epoch},
                        '$currentDate': {'updated': True},
                    },
                    upsert=True,
                )
                for producer, offset in moved.items()
            ],
            ordered=False,
        )
    except BulkWriteError as exc:
        if any(error['code'] == DUPLICATE_KEY for error in exc.details['writeErrors']):
            raise LeaseLostError from None
        raise


def read_cleaned(db: DB, stream: str, group: str) -> dict[str, int]:
    """Up to which offset of each producer this group has deleted or marked what is finished."""
    found = db.position.find({**id_prefix(f'{stream}/{group}/'), 'stream': stream, 'group': group})
    return {doc['producer']: int(doc.get('cleaned', 0)) for doc in found}


def write_cleaned(db: DB, stream: str, group: str, cleaned: dict[str, int]) -> None:
    """Note how far was cleaned up, so that the next consumer need not look at what is kept again."""
    updates = [
        UpdateOne({'_id': f'{stream}/{group}/{producer}'}, {'$set': {'cleaned': Int64(at)}})
        for producer, at in cleaned.items()
    ]
    if updates:
        db.position.bulk_write(updates, ordered=False)


def forget_cleaned(db: DB, stream: str) -> None:
    """What the groups of a stream have marked is not to be kept any more: they clean up from the start again."""
    db.position.update_many({**id_prefix(f'{stream}/'), 'stream': stream}, {'$unset': {'cleaned': 1}})


def prune_positions(db: DB, stream: str, group: str, alive: Iterable[str], now: datetime) -> None:
    """Forget the positions of producers that have no records, no name, and were idle for a day."""
    unnamed = {'$nin': list(alive), '$not': {'$regex': f'^{store.NAMED}'}}
    idle = {'updated': {'$lt': now - IDLE_POSITION_KEPT}, 'producer': unnamed}
    ours = {**id_prefix(f'{stream}/{group}/'), 'stream': stream, 'group': group}
    found = {doc['_id']: int(doc['offset']) for doc in db.position.find({**ours, **idle}, {'offset': 1})}
    if found:
        db.position.delete_many({'_id': {'$in': list(found)}, **idle})
        db.group.update_one({'_id': group_id(stream, group)}, {'$inc': {'forgotten': sum(found.values())}})


def write_progress(
    db: DB, stream: str, group: str, epoch: int, fields: Doc, counts: Doc, session: ClientSession | None = None
) -> None:
    """Write, after the positions, up to which number all windows are finished, and count them.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    update: Doc = {'$set': fields}
    if counts:
        update['$inc'] = counts
    mine = {'_id': group_id(stream, group), 'lease.epoch': epoch}
    result = db.group.update_one(mine, update, session=session)
    if result.matched_count == 0:
        raise LeaseLostError


def begin_time(db: DB, stream: str, group: str, epoch: int, event: bool) -> None:
    """The windows of a group are of event time from now on, or no longer: its frontier and watermark mean nothing."""
    ours = {'_id': group_id(stream, group), 'lease.epoch': epoch}
    db.group.update_one(ours, {'$set': {'event': event}, '$unset': {'frontier': 1, 'watermark': 1}})


# --- retention


def released(
    db: DB, stream: str, group: str, positions: dict[str, int], session: ClientSession | None = None
) -> tuple[dict[str, int], bool]:
    """Up to which offset every group is finished with each producer, and whether what is processed is kept.

    A group may keep it, or the stream, until it is `max_age` old. The session is one that has just written, so that no
    former primary, which may not know a new group, can answer.
    """
    limits = dict(positions)
    keep = store.find_stream(db, stream, session).get('max_age') is not None
    for other in groups_that_hold(db, stream, session):
        keep = keep or bool(other.get('keep'))
        if other['group'] != group:
            theirs = read_positions(db, stream, other['group'], session)
            limits = {producer: min(offset, theirs.get(producer, 0)) for producer, offset in limits.items()}
    return limits, keep


def groups_that_hold(db: DB, stream: str, session: ClientSession | None = None) -> list[Doc]:
    """The consumer groups that messages wait for: all but those that nobody has run for `group_expiry`."""
    expired = expired_groups(db, stream)
    return [doc for doc in groups_of(db, stream, session) if doc['_id'] not in expired]


def expired_groups(db: DB, stream: str) -> list[str]:
    """The ids of the groups of a stream that nobody has run for `group_expiry`, if the stream has that option."""
    expiry = store.find_stream(db, stream).get('group_expiry')
    if expiry is None:
        return []
    return [
        doc['_id']
        for doc in groups_now(db, stream)
        if 'lease' in doc and doc['now'] - max(_signs_of_life(doc)) > timedelta(seconds=expiry)
    ]


def _signs_of_life(doc: Doc) -> list[datetime]:
    # A lease that ran out says when its holder was alive, one that was released says 1970.
    return [doc['lease']['expires'], *(doc[key] for key in ('taken', 'seen') if key in doc)]


# --- consumer groups, administered


def groups_now(db: DB, stream: str | None = None, group: str | None = None) -> list[Doc]:
    """The consumer groups of a stream, or of all, each with ``now``, the server's time."""
    live: Doc = {'group': {'$ne': ''} if group is None else group, 'deleted': None}
    if stream is not None:
        live = {**id_prefix(f'{stream}/'), 'stream': stream, **live}
    return list(db.group.aggregate([{'$match': live}, {'$sort': {'_id': 1}}, {'$set': {'now': '$$NOW'}}]))


def finished_spans(db: DB, stream: str, group: str, number: int) -> dict[str, list[Span]]:
    """The spans of the windows after `number` that are finished already, by producer."""
    finished = {**_windows(stream, group, number + 1), 'status': {'$nin': ['open', 'void']}}
    spans: dict[str, list[Span]] = {}
    for doc in db.window.find(finished, {'spans': 1, 'parts': 1}):
        for span in all_spans(db, doc):
            spans.setdefault(span.producer, []).append(span)
    return spans


def count_open(db: DB, stream: str, group: str, number: int) -> int:
    """How many windows of a group after `number` are claimed and not finished."""
    return db.window.count_documents({**_windows(stream, group, number + 1), 'status': 'open'})


def offsets_at(db: DB, stream: str, to: str | datetime) -> dict[str, int]:
    """For each producer with records the offset of its first message at 'earliest', at 'latest', or at a time.

    A time is when messages were created: the first one created at it or later, which the server looks for from the
    oldest one on. Where there is none, it is the offset of the next message to come.
    """
    ends = store.log_ends(db, stream)
    if to == 'latest':
        return ends
    firsts = {
        producer: _first_since(db, stream, producer, to)
        if isinstance(to, datetime)
        else store.first_kept(db, stream, producer, 0)
        for producer in ends
    }
    return {producer: end if (first := firsts[producer]) is None else first for producer, end in ends.items()}


def _first_since(db: DB, stream: str, producer: str, time: datetime) -> int | None:
    log = {'stream': stream, 'producer': producer, 'offset': {'$gte': 0}}
    since = {'$or': [{'created': {'$gte': time}}, {'times': {'$gte': time}}]}
    fields = {'offset': 1, 'n': 1, 'created': 1, 'times': 1}
    doc = db.buffer.find_one({**log, **since}, fields, sort=[('offset', 1)])
    if doc is None:
        return None
    return int(doc['offset']) + next(i for i, at in enumerate(store.times_of(doc)) if aware(at) >= aware(time))


def reset_group(db: DB, stream: str, group: str, epoch: int, number: int, positions: dict[str, int]) -> None:
    """Let a group go on from other positions, with the window after `number`, its last one.

    One write decides: it gives up what was claimed, and says which positions hold from now on. Whoever has the lease
    next finishes what a crash after it has left undone (`finish_reset`); before it, nothing has happened.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    decided = [[producer, Int64(offset)] for producer, offset in positions.items()]
    update = {
        '$set': {'number': number, 'started': True, 'reset': decided},
        '$unset': {'frontier': 1, 'watermark': 1, 'stalled': 1},
    }
    if db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, update).matched_count == 0:
        raise LeaseLostError
    finish_reset(db, stream, group, epoch, decided)


def finish_reset(db: DB, stream: str, group: str, epoch: int, decided: list[list[Any]]) -> None:
    """Write the positions that the ``reset`` of a group says. May be done again.

    Raises:
        LeaseLostError: if another consumer has written them since.
    """
    positions = {producer: int(offset) for producer, offset in decided}
    write_positions(db, stream, group, epoch, positions)
    cleaned = read_cleaned(db, stream, group)
    write_cleaned(db, stream, group, {p: at for p, at in positions.items() if at < cleaned.get(p, 0)})
    db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, {'$unset': {'reset': 1}})


def delete_group(db: DB, stream: str, group: str, epoch: int, number: int) -> None:
    """Leave a tombstone of a group: its lease, so that whoever led before stays refused, and its last number.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    same = {key: f'${key}' for key in ('_id', 'stream', 'group', 'lease')}
    tombstone = {**same, 'number': {'$literal': number}, 'deleted': '$$NOW'}
    ours = {'_id': group_id(stream, group), 'lease.epoch': epoch}
    if db.group.update_one(ours, [{'$replaceWith': tombstone}]).matched_count == 0:
        raise LeaseLostError


def clear_group(db: DB, stream: str, group: str, epoch: int, number: int) -> None:
    """Delete what a deleted group has left: positions, and the windows and dead letters up to `number`.

    Void windows stay, as those who led before must still meet them. May be done again.
    """
    ours = {'stream': stream, 'group': group}
    db.position.delete_many({**id_prefix(f'{stream}/{group}/'), **ours, 'epoch': {'$lte': epoch}})
    below = _windows(stream, group, 0, number + 1)
    db.window.delete_many({**below, 'status': {'$ne': 'void'}})
    db.window_spans.delete_many(below)
    db.dead.delete_many(below)


def find_window(db: DB, id_: str) -> Doc | None:
    """The whole document of a window, without the spans that go on elsewhere."""
    return db.window.find_one({'_id': id_})


