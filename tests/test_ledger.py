"""What is stored about consumer groups, and what the database refuses."""

from datetime import timedelta

import pytest

from minibatch import clock, ledger, store
from minibatch.connection import Target
from minibatch.errors import LeaseLostError
from minibatch.lease import is_dead, owner


@pytest.fixture
def log(url, db):
    """The database at majority, with its indexes."""
    target = Target(url, db.name)
    store.ensure_indexes(target.db)
    return target.majority


def test_a_lease_is_held_by_one_and_taken_with_the_next_epoch(log):
    first = ledger.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    assert (first['lease']['epoch'], first['clean']) == (1, True)
    assert ledger.take_lease(log, 's', 'g', owner('2'), 60, '', {}) is None
    second = ledger.take_lease(log, 's', 'g', owner('2'), 60, '1', {})
    assert (second['lease']['epoch'], second['clean']) == (2, False)
    with pytest.raises(LeaseLostError):
        ledger.renew_lease(log, 's', 'g', 1, 60)
    ledger.release_lease(log, 's', 'g', 1, clean=True)
    assert ledger.take_lease(log, 's', 'g', owner('3'), 60, '', {}) is None
    ledger.release_lease(log, 's', 'g', 2, clean=True)
    assert ledger.take_lease(log, 's', 'g', owner('3'), 60, '', {})['clean'] is True


def test_a_lease_that_ran_out_by_the_servers_time_is_free(log):
    ledger.take_lease(log, 's', 'g', owner('1'), 0.0, '', {})
    assert ledger.take_lease(log, 's', 'g', owner('2'), 60, '', {})['lease']['epoch'] == 2


def test_an_owner_in_another_host_or_namespace_is_not_taken_for_dead():
    mine = owner('x')
    assert not is_dead(mine)
    assert is_dead({**mine, 'started': mine['started'] - 100})
    assert not is_dead({**mine, 'started': mine['started'] - 100, 'host': 'elsewhere'})
    assert not is_dead({**mine, 'started': mine['started'] - 100, 'namespace': 'pid:[1]'})


def window(number, epoch, spans=(('a', 0, 1),)):
    id_ = ledger.window_id('s', 'g', number)
    base = {'stream': 's', 'group': 'g', 'number': number, 'status': 'open', 'epoch': epoch}
    return {'_id': id_, **base, 'spans': [list(span) for span in spans], 'created': clock.now()}


def test_a_consumer_that_lost_its_lease_meets_the_void_window(log):
    ledger.claim_windows(log, [window(1, epoch=1)], epoch=1)
    following = ledger.next_number(log, 's', 'g', 1)
    assert ledger.fence(log, 's', 'g', 2, following, clock.now()) == 3
    with pytest.raises(LeaseLostError):
        ledger.claim_windows(log, [window(2, epoch=1)], epoch=1)
    adopted = ledger.adopt_windows(log, 's', 'g', 2, 1, 3)
    assert [doc['number'] for doc in adopted] == [1]
    with pytest.raises(LeaseLostError):
        ledger.commit_windows(log, [ledger.window_id('s', 'g', 1)], epoch=1)
    ledger.commit_windows(log, [ledger.window_id('s', 'g', 1)], epoch=2)


def test_a_claim_may_be_repeated_after_an_unclear_result(log):
    windows = [window(number, epoch=1) for number in (1, 2, 3)]
    ledger.claim_windows(log, windows[:2], epoch=1)
    ledger.claim_windows(log, windows, epoch=1)
    assert log.window.count_documents({}) == 3


def test_positions_of_an_earlier_epoch_do_not_overwrite_later_ones(log):
    ledger.write_positions(log, 's', 'g', 2, {'a': 10})
    with pytest.raises(LeaseLostError):
        ledger.write_positions(log, 's', 'g', 1, {'a': 5, 'b': 3})
    assert ledger.read_positions(log, 's', 'g')['a'] == 10


def test_progress_of_an_earlier_epoch_is_refused(log):
    ledger.take_lease(log, 's', 'g', owner('1'), 0.0, '', {})
    ledger.take_lease(log, 's', 'g', owner('2'), 60, '', {})
    with pytest.raises(LeaseLostError):
        ledger.write_progress(log, 's', 'g', 1, {'number': 3}, {})


def test_messages_are_released_when_every_group_is_through(log):
    for group in ('g', 'h'):
        ledger.take_lease(log, 's', group, owner(group), 60, '', {'keep': False})
    assert ledger.released(log, 's', 'g', {'a': 10}) == ({'a': 0}, False)
    ledger.write_positions(log, 's', 'h', 1, {'a': 7})
    assert ledger.released(log, 's', 'g', {'a': 10}) == ({'a': 7}, False)


def test_the_lease_for_adopting_messages_is_no_consumer_group(log):
    ledger.take_lease(log, 's', '', owner('1'), 60, '', {})
    assert ledger.groups_of(log, 's') == []
    assert ledger.released(log, 's', 'g', {'a': 10}) == ({'a': 10}, False)


def test_groups_of_streams_whose_names_begin_alike_are_told_apart(log):
    ledger.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    ledger.take_lease(log, 's/g', 'h', owner('2'), 60, '', {})
    assert [doc['group'] for doc in ledger.groups_of(log, 's')] == ['g']
    ledger.write_positions(log, 's/g', 'h', 1, {'a': 1})
    assert ledger.read_positions(log, 's', 'g') == {}


def test_a_list_of_spans_that_is_too_long_for_a_document_goes_on_in_others(log, monkeypatch):
    monkeypatch.setattr(ledger, 'MAX_SPANS', 3)
    spans = [(f'p{i:02d}', 0, 1) for i in range(10)]
    ledger.claim_windows(log, [window(1, epoch=1, spans=spans)], epoch=1)
    (doc,) = ledger.adopt_windows(log, 's', 'g', 2, 1, 2)
    assert [tuple(span) for span in doc['spans']] == spans
    ledger.commit_windows(log, [doc['_id']], epoch=2)
    ledger.delete_windows(log, 's', 'g', 1, 2)
    assert log.window_spans.count_documents({}) == 0


def test_spans_are_stored_as_runs_and_those_of_older_windows_are_read(log):
    spans = [('a', 0, 1), ('a', 2, 5), ('b', 0, 3), ('a', 7, 8)]
    ledger.claim_windows(log, [window(1, epoch=1, spans=spans)], epoch=1)
    doc = log.window.find_one({'number': 1})
    assert doc['spans'] == [['a', 0, 1, 2, 5], ['b', 0, 3], ['a', 7, 8]]
    assert ledger.all_spans(log, doc) == spans
    assert ledger.all_spans(log, {'spans': [list(span) for span in spans]}) == spans


# --- consumer groups, administered


def test_groups_are_given_with_the_servers_time_and_without_deleted_ones(log):
    for stream, group in (('s', 'b'), ('s', 'a'), ('s', ''), ('t', 'a')):
        ledger.take_lease(log, stream, group, owner('1'), 60, '', {})
    found = ledger.groups_now(log, 's')
    assert [doc['group'] for doc in found] == ['a', 'b']
    left = [doc['lease']['expires'] - doc['now'] for doc in found]
    assert all(timedelta(seconds=50) < each <= timedelta(seconds=60) for each in left)
    assert [doc['_id'] for doc in ledger.groups_now(log)] == ['s/a', 's/b', 't/a']
    ledger.delete_group(log, 's', 'a', 1, 5)
    assert [doc['_id'] for doc in ledger.groups_now(log)] == ['s/b', 't/a']
    assert ledger.groups_now(log, 's', 'a') == []


@pytest.mark.parametrize('change', [ledger.delete_group, lambda *args: ledger.reset_group(*args, {'a': 5})])
def test_a_group_of_another_epoch_is_neither_reset_nor_deleted(log, change):
    ledger.take_lease(log, 's', 'g', owner('1'), 0.0, '', {})
    ledger.take_lease(log, 's', 'g', owner('2'), 60, '', {})
    before = ledger.find_group(log, 's', 'g')
    with pytest.raises(LeaseLostError):
        change(log, 's', 'g', 1, 7)
    assert ledger.find_group(log, 's', 'g') == before
    assert ledger.read_positions(log, 's', 'g') == {}


def test_a_reset_is_finished_once_by_whoever_leads(log):
    ledger.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    ledger.write_positions(log, 's', 'g', 1, {'a': 10})
    ledger.finish_reset(log, 's', 'g', 1, [['a', 3], ['b', 4]])
    assert ledger.read_positions(log, 's', 'g') == {'a': 3, 'b': 4}
    ledger.write_positions(log, 's', 'g', 2, {'a': 8})
    with pytest.raises(LeaseLostError):
        ledger.finish_reset(log, 's', 'g', 1, [['a', 3], ['b', 4]])
    assert ledger.read_positions(log, 's', 'g')['a'] == 8


def test_what_a_group_made_anew_has_written_is_not_cleared(log):
    ledger.take_lease(log, 's', 'g', owner('1'), 60, '', {})
    ledger.write_positions(log, 's', 'g', 1, {'a': 10})
    ledger.write_positions(log, 's', 'g', 3, {'b': 10})
    ledger.claim_windows(log, [window(number, epoch=1) for number in (1, 2, 3)], epoch=1)
    for number in (2, 3):
        log.dead.insert_one({'_id': f'{ledger.window_id("s", "g", number)}+000000', 'stream': 's', 'group': 'g'})
    ledger.clear_group(log, 's', 'g', 2, 2)
    assert ledger.read_positions(log, 's', 'g') == {'b': 10}
    assert [doc['number'] for doc in log.window.find()] == [3]
    assert [doc['_id'] for doc in log.dead.find()] == ['s/g/000000000003+000000']


def test_dead_letters_are_found_through_their_index(log):
    query = {'stream': 's', 'failed': {'$exists': True}, 'status': {'$in': ['failed', 'replay']}}
    plan = log.command('explain', {'find': 'window', 'filter': query, 'sort': {'stream': 1, 'group': 1, 'number': 1}})
    assert "'indexName': 'dead'" in str(plan['queryPlanner']['winningPlan'])
    assert "'SORT'" not in str(plan['queryPlanner']['winningPlan'])


def test_a_consumer_that_lost_its_lease_takes_no_windows_back(log):
    ledger.claim_windows(log, [window(1, epoch=1)], epoch=1)
    assert [doc['epoch'] for doc in ledger.adopt_windows(log, 's', 'g', 3, 1, 2)] == [3]
    assert [doc['epoch'] for doc in ledger.adopt_windows(log, 's', 'g', 2, 1, 2)] == [3]


def test_few_sessions_are_noted(log, monkeypatch):
    monkeypatch.setattr(ledger, 'MAX_SESSIONS', 3)
    epoch = ledger.take_lease(log, 's', 'g', owner('1'), 60, '', {})['lease']['epoch']
    for i in range(5):
        ledger.note_session(log, 's', 'g', epoch, i)
    assert log.group.find_one()['sessions'] == [2, 3, 4]
