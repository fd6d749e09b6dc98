"""Every MongoDB query about dead letters, windows that have failed for good, and the shape of what is kept of them.

``window``    of ledger.py, with status failed, or replay when it is to be tried again; ``failed`` is when it failed
              last, ``tried`` how many attempts had been made before the replay
``dead``      a copy of a record batch, cut to a window that failed: {_id: window+number, stream, group, producer,
              offset, n, created, kept}, and ``data`` or ``batch``, ``times``, ``meta`` as in ``buffer``

The functions take the database and know nothing of any connection. Those that a consumer calls take its `epoch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from bson import Int64
from pymongo import ReplaceOne, UpdateOne
from pymongo.client_session import ClientSession

from . import ledger, store
from .errors import LeaseLostError
from .store import DB, Doc, Span, id_prefix
from .unreadable import as_stored, read

REPLAY_EPOCH = 0  # of a dead letter that waits to be replayed, and that nobody has taken on yet
CHUNK = 1000
DEAD: Doc = {'failed': {'$exists': True}, 'status': {'$in': ['failed', 'replay']}}


def keep(db: DB, stream: str, group: str, id_: str, spans: list[Span], now: datetime) -> None:
    """Copy the messages of a window that is about to become a dead letter, for the log will not wait for it."""
    with db.client.start_session(causal_consistency=True) as session:
        store.see_all(db, stream, session)
        found = store.Records(db, stream, spans, session).of(spans)
        pieces = [(span.producer, *piece) for span, records in found for piece in store.trim(span, records)]
    copies = []
    for i, (producer, record, first, end) in enumerate(pieces):
        lists = [key for key in ('batch', 'times', 'meta') if key in record]
        cut: Doc = {key: [as_stored(value) for value in record[key][first:end]] for key in lists}
        if 'data' in record:
            cut['data'] = as_stored(record['data'])
        created = store.times_of(record)[first]
        place = {'producer': producer, 'offset': Int64(record['offset'] + first), 'n': end - first}
        copy = {'stream': stream, 'group': group, **place, 'created': created, 'kept': now, **cut}
        copies.append(ReplaceOne({'_id': f'{id_}+{i:09d}'}, copy, upsert=True))
    if copies:
        db.dead.bulk_write(copies, ordered=False)


def fail(db: DB, failed: dict[str, Doc], epoch: int) -> set[str]:
    """Make windows dead letters; `failed` has the fields to set by id. Their messages must have been copied.

    Returns:
        The ids of those that were processed after all, by a transaction whose outcome was unclear.

    Raises:
        LeaseLostError: if one of them is no longer ours.
    """
    db.window.bulk_write(
        [
            UpdateOne({'_id': id_, 'epoch': epoch, **ledger.UNFINISHED}, {'$set': {**fields, 'status': 'failed'}})
            for id_, fields in failed.items()
        ],
        ordered=False,
    )
    found = list(db.window.find({'_id': {'$in': list(failed)}, 'epoch': epoch}, {'status': 1}))
    if len(found) < len(failed):
        raise LeaseLostError
    return {doc['_id'] for doc in found if doc['status'] == 'processed'}


def take_replays(db: DB, stream: str, group: str, epoch: int, limit: int = 100) -> list[Doc]:
    """Make dead letters that somebody wants replayed ours, and return them, oldest first."""
    asked = {'stream': stream, 'group': group, **DEAD, 'status': 'replay', 'epoch': {'$lt': epoch}}
    wanted = db.window.find(asked, {'_id': 1})
    ids = [doc['_id'] for doc in wanted.sort('number', 1).limit(limit)]
    if not ids:
        return []
    these = {'_id': {'$in': ids}, 'status': 'replay'}
    first_attempt = {'epoch': epoch, 'tried': '$attempts', 'attempts': {'$add': ['$attempts', 1]}}
    db.window.update_many({**these, 'epoch': REPLAY_EPOCH}, [{'$set': first_attempt}])
    with db.client.start_session(causal_consistency=True) as session:
        older = {**these, 'epoch': {'$lt': epoch}}
        db.window.update_many(older, {'$set': {'epoch': epoch}}, session=session)
        docs = list(db.window.find({**these, 'epoch': epoch}, session=session).sort('number', 1))
    for doc in docs:
        doc['spans'] = ledger.all_spans(db, doc)
    return docs


def copies(db: DB, id_: str, session: ClientSession | None = None) -> list[Doc]:
    """The copies of the record batches of a dead letter, in its order."""
    return list(read(db.dead, _copies(id_), session=session, order='_id'))


def records(
    db: DB, id_: str, spans: Iterable[Span], session: ClientSession | None = None
) -> list[tuple[Span, list[Doc]]]:
    """The spans of a dead letter, each with the copies of its record batches."""
    kept = iter([*copies(db, id_, session), None])
    found, copy = [], next(kept)
    for span in spans:  # the copies were made in this order
        here: list[Doc] = []
        while copy is not None and copy['producer'] == span.producer and span.start <= copy['offset'] < span.end:
            here.append(copy)
            copy = next(kept)
        found.append((span, here))
    return found


def find(
    db: DB, stream: str | None = None, group: str | None = None, ids: list[str] | None = None
) -> list[Doc]:
    """Dead letters, of a stream, of a group, or with these ids, without what may be long."""
    query = dict(DEAD)
    given = {'stream': stream, 'group': group, '_id': None if ids is None else {'$in': ids}}
    query.update((key, value) for key, value in given.items() if value is not None)
    in_order = [('stream', 1), ('group', 1), ('number', 1)]
    return list(db.window.find(query, {'spans': 0, 'parts': 0, 'traceback': 0}).sort(in_order))


def count(db: DB, stream: str, group: str) -> int:
    """How many dead letters a group has."""
    return db.window.count_documents({'stream': stream, 'group': group, **DEAD})


def replay(db: DB, ids: list[str]) -> int:
    """Ask the consumer of their groups to run dead letters again; returns how many did not wait for it already."""
    asked = {'status': 'replay', 'epoch': REPLAY_EPOCH}
    return db.window.update_many({'_id': {'$in': ids}, 'status': 'failed'}, {'$set': asked}).modified_count


def discard(db: DB, ids: list[str]) -> int:
    """Delete dead letters, but for those that wait to be run again. Returns how many."""
    dead = {'_id': {'$in': ids}, 'status': 'failed'}
    doomed = [doc['_id'] for doc in db.window.find(dead, {'_id': 1})]
    given_up = db.window.update_many(dead, {'$set': ledger.PROCESSED}).modified_count
    left = {doc['_id'] for doc in db.window.find({'_id': {'$in': doomed}, 'status': 'replay'}, {'_id': 1})}
    drop(db, [id_ for id_ in doomed if id_ not in left])
    return given_up


def drop(db: DB, ids: list[str], windows: bool = True) -> None:
    """Delete what was kept for windows that are dead letters no more, and, unless they are kept, the windows.

    A window above the number of its group stays as one that is processed, until the positions have passed it.
    """
    for id_ in ids:
        db.dead.delete_many(_copies(id_))
    db.window.update_many({'_id': {'$in': ids}}, {'$unset': {'failed': 1, 'tried': 1, 'error': 1, 'traceback': 1}})
    numbers: dict[tuple[str, str], int] = {}
    for doc in db.window.find({'_id': {'$in': ids}}, {'stream': 1, 'group': 1, 'number': 1}) if windows else ():
        place = doc['stream'], doc['group']
        if place not in numbers:
            numbers[place] = (ledger.find_group(db, *place) or doc)['number']
        if doc['number'] <= numbers[place]:
            db.window_spans.delete_many(_copies(doc['_id']))
            db.window.delete_one({'_id': doc['_id']})


def sweep(db: DB, stream: str, group: str, keeps: bool) -> None:
    """Delete what a crash right after the commit of a replay has left."""
    replayed = {'stream': stream, 'group': group, **DEAD, 'status': 'processed'}
    drop(db, [doc['_id'] for doc in db.window.find(replayed, {'_id': 1})], windows=not keeps)


def trim(db: DB, stream: str, group: str, before: datetime, most: int) -> int:
    """Delete dead letters that failed before a time, and the oldest of more than `most`. Returns how many."""
    dead = {'stream': stream, 'group': group, **DEAD, 'status': 'failed'}
    ids = [doc['_id'] for doc in db.window.find({**dead, 'failed': {'$lt': before}}, {'_id': 1})]
    surplus = db.window.count_documents(dead) - len(ids) - most
    if surplus > 0:
        younger = {**dead, 'failed': {'$gte': before}}
        ids += [doc['_id'] for doc in db.window.find(younger, {'_id': 1}).sort('failed', 1).limit(surplus)]
    trimmed = sum(discard(db, ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK))
    _drop_orphans(db, stream, group, before)
    return trimmed


def _drop_orphans(db: DB, stream: str, group: str, before: datetime) -> None:
    """Delete old copies of windows that are no dead letters, which crashes leave behind."""
    theirs = {'stream': stream, 'group': group}
    letters = {doc['_id'] for doc in db.window.find({**theirs, **DEAD}, {'_id': 1})}
    old = db.dead.find({**id_prefix(f'{stream}/{group}/'), **theirs, 'kept': {'$lt': before}}, {'_id': 1})
    orphans = [doc['_id'] for doc in old if doc['_id'].rpartition('+')[0] not in letters]
    for at in range(0, len(orphans), CHUNK):
        # Again by age: a window that failed again has written its copies anew.
        db.dead.delete_many({'_id': {'$in': orphans[at : at + CHUNK]}, 'kept': {'$lt': before}})


def _copies(id_: str) -> Doc:
    return {'_id': {'$gte': f'{id_}+', '$lt': f'{id_},'}}
