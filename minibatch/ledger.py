"""Every MongoDB query about consumer groups: leases, windows, positions, and the shape of what is stored.

Collections (see docs/architecture.rst for why):

``group``     {_id: stream/group, stream, group, lease: {owner, epoch, expires}, fingerprint, keep, picks, number,
              frontier, windows, messages, expired_unprocessed}; every window up to ``number`` is finished
``position``  {_id: stream/group/producer, stream, group, producer, offset, epoch, updated, cleaned}; every message
              of the producer below ``offset`` is finished
``window``    {_id: stream/group/number, stream, group, number, spans, n, start, end, status, epoch, attempts, error,
              picked, created, processed}; spans are [producer, from, to), and go on in ``window_spans`` if there are
              many

The functions take the database and know nothing of any connection. Those that change what a consumer group owns
take its `epoch`, and change nothing once another consumer has taken over.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta

from bson import Int64
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from .clock import EPOCH, MILLISECOND
from .errors import LeaseLostError
from .store import DB, DUPLICATE_KEY, Doc, Span, id_prefix

MAX_SPANS = 100_000
VOID_KEPT = timedelta(days=1)
IDLE_POSITION_KEPT = timedelta(days=1)


# --- the lease of a consumer group


def group_id(stream: str, group: str) -> str:
    return f'{stream}/{group}'


def find_group(db: DB, stream: str, group: str) -> Doc | None:
    """The document of a consumer group."""
    return db.group.find_one({'_id': group_id(stream, group)})


def groups_of(db: DB, stream: str) -> list[Doc]:
    """The consumer groups of a stream; the group without a name is the lease for adopting messages."""
    return list(db.group.find({**id_prefix(f'{stream}/'), 'stream': stream, 'group': {'$ne': ''}}))


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
    expires = EPOCH if clean else EPOCH + MILLISECOND
    db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, {'$set': {'lease.expires': expires}})


def _seconds_from_now(seconds: float) -> Doc:
    return {'$add': ['$$NOW', int(seconds * 1000)]}


# --- windows


def window_id(stream: str, group: str, number: int) -> str:
    return f'{stream}/{group}/{number:012d}'


def next_number(db: DB, stream: str, group: str, first: int) -> int:
    """The number after the last window from number `first` on."""
    last = db.window.find_one(_windows(stream, group, first), {'number': 1}, sort=[('_id', -1)])
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


def adopt_windows(db: DB, stream: str, group: str, epoch: int, first: int, end: int) -> list[Doc]:
    """Make the open windows from number `first` to below `end` ours; returns all windows there, in order."""
    numbers = _windows(stream, group, first, end)
    db.window.update_many({**numbers, 'status': 'open'}, {'$set': {'epoch': epoch}})
    docs = list(db.window.find({**numbers, 'status': {'$ne': 'void'}}).sort('_id', 1))
    for doc in docs:
        doc['spans'] = all_spans(db, doc)
    return docs


def claim_windows(db: DB, docs: list[Doc], epoch: int) -> None:
    """Insert windows in order, before they are dispatched. May be called again after an unclear result.

    Raises:
        LeaseLostError: if a number is taken by another consumer.
    """
    parts = [part for doc in docs for part in _split_spans(doc)]
    if parts:
        db.window_spans.bulk_write([UpdateOne({'_id': p['_id']}, {'$set': p}, upsert=True) for p in parts])
    while docs:
        try:
            db.window.insert_many(docs)
            return
        except BulkWriteError as exc:
            if not exc.details['writeErrors'] or exc.details['writeErrors'][0]['code'] != DUPLICATE_KEY:
                raise
            at = exc.details['writeErrors'][0]['index']
            ours = db.window.find_one({'_id': docs[at]['_id'], 'epoch': epoch, 'status': 'open'}, {'_id': 1})
            if ours is None:
                raise LeaseLostError from None
            docs = docs[at + 1 :]


def commit_windows(db: DB, ids: list[str], epoch: int) -> None:
    """Make open windows processed.

    Raises:
        LeaseLostError: if one of them is no longer ours.
    """
    ours = {'_id': {'$in': ids}, 'epoch': epoch}
    result = db.window.update_many({**ours, 'status': 'open'}, {'$set': {'status': 'processed', 'processed': True}})
    if result.matched_count < len(ids) and db.window.count_documents({**ours, 'status': 'processed'}) < len(ids):
        raise LeaseLostError


def retry_windows(db: DB, errors: dict[str, str], epoch: int) -> None:
    """Write, before they are tried again, that an attempt at each of these windows failed, and why."""
    updates = [
        UpdateOne({'_id': id_, 'epoch': epoch, 'status': 'open'}, {'$inc': {'attempts': 1}, '$set': {'error': why}})
        for id_, why in errors.items()
    ]
    db.window.bulk_write(updates, ordered=False)


def delete_windows(db: DB, stream: str, group: str, first: int, end: int) -> None:
    """Delete the processed windows from number `first` to below `end`."""
    numbers = _windows(stream, group, first, end)
    db.window.delete_many({**numbers, 'status': 'processed'})
    db.window_spans.delete_many(numbers)


def sweep_windows(db: DB, stream: str, group: str, upto: int, now: datetime) -> None:
    """Delete what crashes left behind: unfinished claims that nobody may own, and void windows of long ago."""
    below = _windows(stream, group, 0, upto + 1)
    db.window.delete_many({**below, 'status': 'open'})
    db.window.delete_many({**below, 'status': 'void', 'created': {'$lt': now - VOID_KEPT}})


def all_spans(db: DB, doc: Doc) -> list[Span]:
    """The spans of a window, also those that did not fit into its document."""
    spans = [Span(*span) for span in doc.get('spans') or ()]
    if doc.get('parts'):
        for part in db.window_spans.find({'_id': {'$in': doc['parts']}}).sort('_id', 1):
            spans += [Span(*span) for span in part['spans']]
    return spans


def _split_spans(doc: Doc) -> list[Doc]:
    spans = doc['spans']
    if len(spans) <= MAX_SPANS:
        return []
    doc['spans'] = spans[:MAX_SPANS]
    # With the epoch in their names, a consumer that lost its lease cannot overwrite those of the next one.
    doc['parts'] = [f'{doc["_id"]}+{doc["epoch"]}+{i:06d}' for i in range(-(-len(spans) // MAX_SPANS) - 1)]
    same = {key: doc[key] for key in ('stream', 'group', 'number')}
    return [
        {'_id': id_, **same, 'spans': spans[(i + 1) * MAX_SPANS : (i + 2) * MAX_SPANS]}
        for i, id_ in enumerate(doc['parts'])
    ]


def _windows(stream: str, group: str, first: int, end: int | None = None) -> Doc:
    id_range = {'$gte': window_id(stream, group, first)}
    id_range['$lt'] = f'{stream}/{group}0' if end is None else window_id(stream, group, end)
    return {'_id': id_range, 'stream': stream, 'group': group}


# --- positions and progress


def read_positions(db: DB, stream: str, group: str) -> dict[str, int]:
    """The position of a group in the log of each producer."""
    found = db.position.find({**id_prefix(f'{stream}/{group}/'), 'stream': stream, 'group': group})
    return {doc['producer']: int(doc['offset']) for doc in found}


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


def prune_positions(db: DB, stream: str, group: str, alive: Iterable[str], now: datetime) -> None:
    """Forget the positions of producers that have no records and were idle for a day."""
    idle = {'updated': {'$lt': now - IDLE_POSITION_KEPT}, 'producer': {'$nin': list(alive)}}
    db.position.delete_many({**id_prefix(f'{stream}/{group}/'), 'stream': stream, 'group': group, **idle})


def write_progress(db: DB, stream: str, group: str, epoch: int, fields: Doc, counts: Doc) -> None:
    """Write, after the positions, up to which number all windows are finished, and count them.

    Raises:
        LeaseLostError: if another consumer has the lease.
    """
    update: Doc = {'$set': fields}
    if counts:
        update['$inc'] = counts
    result = db.group.update_one({'_id': group_id(stream, group), 'lease.epoch': epoch}, update)
    if result.matched_count == 0:
        raise LeaseLostError


# --- retention


def released(db: DB, stream: str, group: str, positions: dict[str, int]) -> tuple[dict[str, int], bool]:
    """Up to which offset every group is finished with each producer, and whether a group keeps what it processed."""
    limits = dict(positions)
    keep = False
    for other in groups_of(db, stream):
        keep = keep or bool(other.get('keep'))
        if other['group'] != group:
            theirs = read_positions(db, stream, other['group'])
            limits = {producer: min(offset, theirs.get(producer, 0)) for producer, offset in limits.items()}
    return limits, keep
