"""The queries, on a real MongoDB."""

from datetime import datetime, timedelta

import pytest
from bson import Timestamp
from pymongo.errors import BulkWriteError

from minibatch import clock, store
from minibatch.connection import Target
from minibatch.encoding import encode, encode_meta
from minibatch.store import Span


@pytest.fixture
def log(url, db):
    """The database at majority, with its indexes."""
    target = Target(url, db.name)
    store.ensure_indexes(target.db)
    return target.majority


def write(log, producer, offset, n, time=None, stream='s'):
    datas = [encode({'v': v}) for v in range(offset, offset + n)]
    record = store.record_batch(stream, producer, offset, datas, [time or clock.now()] * n, [None] * n)
    assert store.insert_records(log.buffer, [record]) == (1, '')


def values(records):
    return [d['v'] for r in records for d in (r['batch'] if 'batch' in r else [r['data']])]


def plan_of(db, query, **options):
    return str(db.command('explain', {'find': 'buffer', 'filter': query, **options}, verbosity='queryPlanner'))


def test_the_end_of_each_producer_is_found(log):
    write(log, 'a', 0, 5)
    write(log, 'a', 5, 1)
    write(log, 'b', 0, 2)
    write(log, 'c', 0, 9, stream='other')
    assert store.log_ends(log, 's') == {'a': 6, 'b': 2}


def test_looking_for_the_ends_takes_one_step_of_the_index_a_producer(log):
    for producer in 'abc':
        for offset in range(50):
            write(log, producer, offset, 1)
    explained = str(
        log.command(
            'explain',
            {
                'aggregate': 'buffer',
                'pipeline': [
                    {'$match': {'stream': 's', 'offset': {'$gte': 0}}},
                    {'$sort': {'producer': -1, 'offset': -1}},
                    {'$group': {'_id': '$producer', 'offset': {'$first': '$offset'}, 'n': {'$first': '$n'}}},
                ],
                'cursor': {},
            },
            verbosity='executionStats',
        )
    )
    assert 'DISTINCT_SCAN' in explained


def append(log, offset, *datas):
    times = [clock.EPOCH + timedelta(seconds=offset + i) for i in range(len(datas))]
    record = store.record_batch('s', 'a', offset, [encode(data) for data in datas], times, [None] * len(datas))
    assert store.insert_records(log.buffer, [record]) == (1, '')


def test_of_messages_only_the_fields_that_are_named_are_read(log):
    append(log, 0, {'a': {'b': 1, 'c': 2}, 'd': 3}, {'d': 4}, {})
    append(log, 3, {'a': {'b': 5}, 'x': 6})

    def read(names, start=0, end=4):
        return [(offset, data) for offset, _, data in store.read_messages(log, 's', Span('a', start, end), names)]

    assert read(['a.b']) == [(0, {'a': {'b': 1}}), (1, {}), (2, {}), (3, {'a': {'b': 5}})]
    assert read(['a.b', 'd', 'a', 'a'], 0, 2) == [(0, {'a': {'b': 1, 'c': 2}, 'd': 3}), (1, {'d': 4})]
    assert read(None, 2) == [(2, {}), (3, {'a': {'b': 5}, 'x': 6})]
    assert read(['$x', 'd'], 1, 2) == [(1, {'d': 4})]
    assert read([], 1, 3) == [(1, {}), (2, {})]
    times = [created for _, created, _ in store.read_messages(log, 's', Span('a', 1, 4), [])]
    assert [(time - datetime(1970, 1, 1)).total_seconds() for time in times] == [1, 2, 3]


def test_a_span_that_begins_inside_a_record_batch_is_read_with_it(log):
    write(log, 'a', 0, 10)
    write(log, 'a', 10, 10)
    assert values(store.read_records(log, 's', Span('a', 3, 12))) == list(range(20))
    assert values(store.read_records(log, 's', Span('a', 10, 12))) == list(range(10, 20))
    assert store.read_records(log, 's', Span('a', 5, 5)) == []


def test_an_insert_that_is_repeated_after_an_unclear_result_is_not_doubled(log):
    now = clock.now()
    records = [store.record_batch('s', 'a', i, [encode({'v': i})], [now], [None]) for i in range(4)]
    store.insert_records(log.buffer, records[:2])
    assert store.insert_records(log.buffer, records) == (4, '')
    assert values(store.read_records(log, 's', Span('a', 0, 4))) == [0, 1, 2, 3]


def test_a_place_in_the_log_is_never_taken_twice(log):
    write(log, 'a', 0, 1)
    stranger = store.record_batch('s', 'a', 0, [encode({'v': 'other'})], [clock.now()], [None])
    stored, refusal = store.insert_records(log.buffer, [stranger])
    assert stored == 0
    assert 'duplicate key' in refusal


def test_the_first_message_still_stored_is_found(log):
    write(log, 'a', 0, 10)
    write(log, 'a', 20, 5)
    assert store.first_kept(log, 's', 'a', 3) == 3
    assert store.first_kept(log, 's', 'a', 12) == 20
    assert store.first_kept(log, 's', 'a', 30) is None


def test_only_whole_record_batches_are_deleted(log):
    write(log, 'a', 0, 10)
    write(log, 'a', 10, 10)
    assert store.delete_records(log, 's', Span('a', 0, 15)) == 10
    assert values(store.read_records(log, 's', Span('a', 10, 20))) == list(range(10, 20))
    assert store.delete_records(log, 's', Span('a', 10, 20)) == 20
    assert store.count_messages(log, 's') == 0


@pytest.mark.parametrize('clean', [store.delete_records, store.mark_processed])
def test_a_record_batch_unknown_to_a_former_primary_is_not_deleted_with_those_before(log, monkeypatch, clean):
    write(log, 'a', 0, 5)
    write(log, 'a', 5, 5)
    monkeypatch.setattr(store, '_record_around', lambda *args: None)
    clean(log, 's', Span('a', 0, 7))
    assert log.buffer.find_one({'offset': 5})['processed'] is False


def test_messages_older_than_a_time_are_deleted_from_the_oldest_on(log):
    long_ago = clock.now() - timedelta(hours=1)
    write(log, 'a', 0, 10, time=long_ago)
    write(log, 'a', 10, 10)
    write(log, 'b', 0, 3, time=long_ago)
    log.buffer.update_many({'offset': 0}, {'$set': {'stored': Timestamp(long_ago, 0)}})
    deleted, oldest = store.delete_older(log, 's', clock.now() - timedelta(minutes=1))
    assert (deleted, clock.aware(log.buffer.find_one()['created'])) == (13, oldest)
    assert store.log_ends(log, 's') == {'a': 20}


def test_record_batches_are_taken_apart_in_place(log):
    write(log, 'a', 0, 5)
    write(log, 'a', 5, 1)
    assert store.unbatch(log, Span('a', 0, 6), 's') == 1
    docs = list(log.buffer.find().sort('offset', 1))
    assert [(doc['offset'], doc['n'], doc['data']['v']) for doc in docs] == [(i, 1, i) for i in range(6)]
    assert not any('batch' in doc for doc in docs)


def test_taking_apart_can_be_done_again_after_a_crash_half_way(log):
    write(log, 'a', 0, 5)
    template = log.buffer.find_one({}, {'_id': 0, 'batch': 0})
    log.buffer.insert_many([{**template, 'offset': i, 'n': 1, 'data': {'v': i}} for i in (4, 3)])
    assert store.log_ends(log, 's') == {'a': 5}
    assert values(store.read_records(log, 's', Span('a', 1, 2))) == [0, 1, 2, 3, 4]
    store.unbatch(log, Span('a', 0, 5), 's')
    assert values(log.buffer.find().sort('offset', 1)) == [0, 1, 2, 3, 4]


def test_indexes_build_on_a_database_with_messages_without_offsets(db, url):
    old = [{'stream': 's', 'data': {'v': i}, 'processed': False, 'created': datetime(2020, 1, 1)} for i in range(3)]
    db.buffer.insert_many(old)
    store.ensure_indexes(db)
    assert 'IXSCAN' in plan_of(db, {'stream': 's', 'offset': None})
    assert store.adopt_without_offset(db, 's', 'old', 0) == 3
    assert values(store.read_records(db, 's', Span('old', 0, 3))) == [0, 1, 2]
    assert not store.has_without_offset(db, 's')


def test_the_shape_of_a_record_batch_is_what_the_document_says(log):
    now = clock.now()
    record = store.record_batch('s', 'a', 3, [encode({'v': 1})], [now], [encode_meta({'k': 1})])
    store.insert_records(log.buffer, [record])
    doc = log.buffer.find_one({}, {'_id': 0})
    naive = now.replace(tzinfo=None, microsecond=now.microsecond // 1000 * 1000)
    expected = {'stream': 's', 'producer': 'a', 'offset': 3, 'n': 1, 'created': naive, 'processed': False}
    assert abs(doc.pop('stored').as_datetime() - now) < timedelta(minutes=1)  # by the clock of the server
    assert doc == {**expected, 'meta': [{'k': 1}], 'data': {'v': 1}}


def test_a_foreign_document_without_producer_does_not_break_the_index(db):
    store.ensure_indexes(db)
    db.buffer.insert_many([{'stream': 's', 'data': {}}, {'stream': 's', 'data': {}}])
    with pytest.raises(BulkWriteError):
        db.buffer.insert_many([{'stream': 's', 'producer': 'a', 'offset': 0}] * 2)
