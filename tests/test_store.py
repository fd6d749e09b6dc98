"""The queries, on a real MongoDB."""

from datetime import datetime, timedelta

import pytest
from pymongo.errors import BulkWriteError

from minibatch import clock, store
from minibatch.connection import Target
from minibatch.errors import LeaseLostError
from minibatch.lease import is_dead, owner
from minibatch.producer import encode, encode_meta
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


def test_messages_older_than_a_time_are_deleted_from_the_oldest_on(log):
    long_ago = clock.now() - timedelta(hours=1)
    write(log, 'a', 0, 10, time=long_ago)
    write(log, 'a', 10, 10)
    write(log, 'b', 0, 3, time=long_ago)
    assert store.delete_older(log, 's', clock.now() - timedelta(minutes=1)) == 13
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


def test_a_lease_is_held_by_one_and_taken_with_the_next_epoch(log):
    first = store.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    assert (first['lease']['epoch'], first['clean']) == (1, True)
    assert store.take_lease(log, 's', 'g', owner('2'), 60, '', {}) is None
    second = store.take_lease(log, 's', 'g', owner('2'), 60, '1', {})
    assert (second['lease']['epoch'], second['clean']) == (2, False)
    with pytest.raises(LeaseLostError):
        store.renew_lease(log, 's', 'g', 1, 60)
    store.release_lease(log, 's', 'g', 1, clean=True)
    assert store.take_lease(log, 's', 'g', owner('3'), 60, '', {}) is None
    store.release_lease(log, 's', 'g', 2, clean=True)
    assert store.take_lease(log, 's', 'g', owner('3'), 60, '', {})['clean'] is True


def test_a_lease_that_ran_out_by_the_servers_time_is_free(log):
    store.take_lease(log, 's', 'g', owner('1'), 0.0, '', {})
    assert store.take_lease(log, 's', 'g', owner('2'), 60, '', {})['lease']['epoch'] == 2


def test_an_owner_in_another_host_or_namespace_is_not_taken_for_dead():
    mine = owner('x')
    assert not is_dead(mine)
    assert is_dead({**mine, 'started': mine['started'] - 100})
    assert not is_dead({**mine, 'started': mine['started'] - 100, 'host': 'elsewhere'})
    assert not is_dead({**mine, 'started': mine['started'] - 100, 'namespace': 'pid:[1]'})


def window(number, epoch, spans=(('a', 0, 1),)):
    id_ = store.window_id('s', 'g', number)
    base = {'stream': 's', 'group': 'g', 'number': number, 'status': 'open', 'epoch': epoch}
    return {'_id': id_, **base, 'spans': [list(span) for span in spans], 'created': clock.now()}


def test_a_consumer_that_lost_its_lease_meets_the_void_window(log):
    store.claim_windows(log, [window(1, epoch=1)], epoch=1)
    following = store.next_number(log, 's', 'g', 1)
    assert store.fence(log, 's', 'g', 2, following, clock.now()) == 3
    with pytest.raises(LeaseLostError):
        store.claim_windows(log, [window(2, epoch=1)], epoch=1)
    adopted = store.adopt_windows(log, 's', 'g', 2, 1, 3)
    assert [doc['number'] for doc in adopted] == [1]
    with pytest.raises(LeaseLostError):
        store.commit_windows(log, [store.window_id('s', 'g', 1)], epoch=1)
    store.commit_windows(log, [store.window_id('s', 'g', 1)], epoch=2)


def test_a_claim_may_be_repeated_after_an_unclear_result(log):
    windows = [window(number, epoch=1) for number in (1, 2, 3)]
    store.claim_windows(log, windows[:2], epoch=1)
    store.claim_windows(log, windows, epoch=1)
    assert log.window.count_documents({}) == 3


def test_positions_of_an_earlier_epoch_do_not_overwrite_later_ones(log):
    store.write_positions(log, 's', 'g', 2, {'a': 10})
    with pytest.raises(LeaseLostError):
        store.write_positions(log, 's', 'g', 1, {'a': 5, 'b': 3})
    assert store.read_positions(log, 's', 'g')['a'] == 10


def test_progress_of_an_earlier_epoch_is_refused(log):
    store.take_lease(log, 's', 'g', owner('1'), 0.0, '', {})
    store.take_lease(log, 's', 'g', owner('2'), 60, '', {})
    with pytest.raises(LeaseLostError):
        store.write_progress(log, 's', 'g', 1, {'number': 3}, {})


def test_messages_are_released_when_every_group_is_through(log):
    for group in ('g', 'h'):
        store.take_lease(log, 's', group, owner(group), 60, '', {'keep': False})
    assert store.released(log, 's', 'g', {'a': 10}) == ({'a': 0}, False)
    store.write_positions(log, 's', 'h', 1, {'a': 7})
    assert store.released(log, 's', 'g', {'a': 10}) == ({'a': 7}, False)


def test_the_lease_for_adopting_messages_is_no_consumer_group(log):
    store.take_lease(log, 's', '', owner('1'), 60, '', {})
    assert store.groups_of(log, 's') == []
    assert store.released(log, 's', 'g', {'a': 10}) == ({'a': 10}, False)


def test_groups_of_streams_whose_names_begin_alike_are_told_apart(log):
    store.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    store.take_lease(log, 's/g', 'h', owner('2'), 60, '', {})
    assert [doc['group'] for doc in store.groups_of(log, 's')] == ['g']
    store.write_positions(log, 's/g', 'h', 1, {'a': 1})
    assert store.read_positions(log, 's', 'g') == {}


def test_a_list_of_spans_that_is_too_long_for_a_document_goes_on_in_others(log, monkeypatch):
    monkeypatch.setattr(store, 'MAX_SPANS', 3)
    spans = [(f'p{i:02d}', 0, 1) for i in range(10)]
    store.claim_windows(log, [window(1, epoch=1, spans=spans)], epoch=1)
    (doc,) = store.adopt_windows(log, 's', 'g', 2, 1, 2)
    assert [tuple(span) for span in doc['spans']] == spans
    store.commit_windows(log, [doc['_id']], epoch=2)
    store.delete_windows(log, 's', 'g', 1, 2)
    assert log.window_spans.count_documents({}) == 0


def test_the_shape_of_a_record_batch_is_what_the_document_says(log):
    now = clock.now()
    record = store.record_batch('s', 'a', 3, [encode({'v': 1})], [now], [encode_meta({'k': 1})])
    store.insert_records(log.buffer, [record])
    doc = log.buffer.find_one({}, {'_id': 0})
    naive = now.replace(tzinfo=None, microsecond=now.microsecond // 1000 * 1000)
    expected = {'stream': 's', 'producer': 'a', 'offset': 3, 'n': 1, 'created': naive, 'processed': False}
    assert doc == {**expected, 'meta': [{'k': 1}], 'data': {'v': 1}}


def test_a_foreign_document_without_producer_does_not_break_the_index(db):
    store.ensure_indexes(db)
    db.buffer.insert_many([{'stream': 's', 'data': {}}, {'stream': 's', 'data': {}}])
    with pytest.raises(BulkWriteError):
        db.buffer.insert_many([{'stream': 's', 'producer': 'a', 'offset': 0}] * 2)
