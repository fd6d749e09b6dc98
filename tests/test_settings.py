"""A stream's document is the one truth about it: how long messages are kept, and how many may wait."""

import copy
import multiprocessing
import pickle
import threading
from datetime import timedelta

import pytest
from bson import Timestamp
from bson.errors import InvalidBSON
from processes import Seen, appended, note, write_at
from servers import eventually

import minibatch as mb
from minibatch import backlog, clock, connection, settings, store
from minibatch.errors import ArgumentError, BacklogFullError
from minibatch.testing import InlineExecutor

SHORT = 0.1


@pytest.fixture
def rounds(url):
    """Wait until this process has looked for what is too old, after now, in each stream that it has opened."""

    def wait():
        for name in ('control1', 'control2'):
            control = mb.stream(name, url=url, max_age=SHORT)
            control.append({})
            eventually(lambda control=control: not control.buffer().count())

    return wait


def grow_old(db, stream, age, **which):
    """Let messages have been stored so many seconds ago."""
    then = clock.now() - timedelta(seconds=age)
    assert db.buffer.update_many({'stream': stream, **which}, {'$set': {'stored': Timestamp(then, 0)}}).matched_count


# --- max_age


def test_what_is_older_than_max_age_is_deleted_though_it_was_not_processed(url):
    stream = mb.stream('s', url=url, max_age=SHORT)
    stream.append_many([{}] * 10)
    eventually(lambda: not stream.buffer().count())


def test_a_stream_that_was_deleted_and_made_anew_without_max_age_keeps_its_messages(url, rounds):
    old = mb.stream('s', url=url, max_age=SHORT)
    old.append({})
    old.delete()
    new = mb.stream('s', url=url)
    new.append({})
    rounds()
    assert new.buffer().count() == 1


def test_a_stream_keeps_its_messages_after_the_database_was_dropped(url, db, rounds):
    mb.stream('s', url=url, max_age=SHORT)
    db.client.drop_database(db.name)
    new = mb.stream('s', url=url)
    new.append({})
    rounds()
    assert new.buffer().count() == 1


def test_nothing_looks_after_a_stream_whose_document_is_gone(url, db):
    stream = mb.stream('s', url=url, max_age=SHORT)
    db.stream.delete_one({'name': 's'})
    eventually(lambda: (stream.target, 's') not in settings._tended)


def test_a_longer_max_age_of_another_process_holds_here_too(url, db, rounds):
    stream = mb.stream('s', url=url, max_age=SHORT)
    db.stream.update_one({'name': 's'}, {'$set': {'max_age': 3600.0}})
    rounds()
    stream.append({})
    rounds()
    assert stream.buffer().count() == 1


def test_a_max_age_that_another_process_has_set_is_found_when_the_document_is_read_again(url, db, monkeypatch):
    monkeypatch.setattr(settings, 'READ_PAUSE', SHORT)
    stream = mb.stream('s', url=url)
    stream.append({})
    db.stream.update_one({'name': 's'}, {'$set': {'max_age': SHORT}})
    eventually(lambda: not stream.buffer().count())


def test_max_age_is_unset_by_none_and_stays_when_it_is_not_given(url, rounds):
    stream = mb.stream('s', url=url, max_age=SHORT)
    assert mb.stream('s', url=url).max_age == SHORT
    assert mb.stream('s', url=url, max_age=None).max_age is None
    stream.append({})
    rounds()
    assert stream.buffer().count() == 1


def test_what_was_kept_only_for_max_age_is_deleted_when_that_is_unset(url):
    stream = mb.stream('s', url=url, max_age=3600)

    def process(start, end):
        appended(stream, 0, start, end)
        emitter = mb.make_emitter('s', note, stream=stream, size=10, sink=Seen(), executor=InlineExecutor)
        assert emitter._run_once() == 1

    process(0, 10)
    assert [record.processed for record in stream.buffer()] == [True]
    mb.stream('s', url=url, max_age=None)
    process(10, 20)
    assert stream.buffer().count() == 0


def test_a_consumer_that_runs_deletes_what_was_kept_when_max_age_is_unset(url):
    stream = mb.stream('s', url=url, max_age=3600)
    emitter = mb.make_emitter('s', note, stream=stream, size=10, sink=Seen(), executor=InlineExecutor)
    emitter.start()
    appended(stream, 0, 0, 10)
    eventually(lambda: [record.processed for record in stream.buffer()] == [True])
    mb.stream('s', url=url, max_age=None)
    appended(stream, 0, 10, 20)
    eventually(lambda: not stream.buffer().count())
    emitter.stop()


def test_one_thread_of_a_process_looks_after_all_its_streams(url):
    for i in range(20):
        mb.stream(f's{i}', url=url, max_age=3600)
    assert [thread.name for thread in threading.enumerate()].count('minibatch-settings') == 1


def test_a_message_that_cannot_be_deleted_holds_up_no_other_stream(url, db, caplog):
    mb.stream('bad', url=url)
    db.stream.update_one({'name': 'bad'}, {'$set': {'max_age': 'long'}})
    mb.stream('bad', url=url)
    eventually(lambda: "old messages of stream 'bad' not deleted" in caplog.text)
    good = mb.stream('good', url=url, max_age=SHORT)
    good.append({})
    eventually(lambda: not good.buffer().count())


def keeps_nothing_for_long(url):
    stream = mb.stream('child', url=url, max_age=SHORT)
    stream.append({})
    eventually(lambda: not stream.buffer().count())


def appends_until_there_is_a_limit(stream):
    stream.append({})
    eventually(lambda: stream._limits.max_backlog == 1)


def test_documents_that_cannot_be_read_once_do_not_end_what_looks_after_streams(url, monkeypatch):
    failed, find = [], store.find_streams

    def fail_once(db, names):
        if not failed:
            failed.append(names)
            raise InvalidBSON('not UTF-8')
        return find(db, names)

    monkeypatch.setattr(store, 'find_streams', fail_once)
    stream = mb.stream('s', url=url, max_age=SHORT)
    stream.append({})
    eventually(lambda: failed and not stream.buffer().count())


def test_a_forked_child_looks_after_the_streams_that_it_opens(url):
    mb.stream('parent', url=url, max_age=SHORT)
    child = multiprocessing.get_context('fork').Process(target=keeps_nothing_for_long, args=(url,))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_a_forked_child_hears_of_a_limit_of_a_stream_that_it_has_inherited(url, monkeypatch):
    monkeypatch.setattr(settings, 'READ_PAUSE', SHORT)
    stream = mb.stream('s', url=url)
    child = multiprocessing.get_context('fork').Process(target=appends_until_there_is_a_limit, args=(stream,))
    child.start()
    eventually(stream.buffer().count)
    mb.stream('s', url=url, max_backlog=1)
    child.join(30)
    assert child.exitcode == 0


def test_closing_the_connections_of_a_process_is_not_undone_by_what_looks_after_streams(url, monkeypatch):
    monkeypatch.setattr(settings, 'READ_PAUSE', SHORT)
    where = mb.stream('s', url=url, max_age=SHORT).target
    connection.disconnect()
    before = settings._tended[where, 's'].due
    eventually(lambda: settings._tended[where, 's'].due > before)
    assert not where.is_connected


# --- whose clock


@pytest.mark.parametrize('hours', [-1, 1], ids=['behind', 'ahead'])
def test_the_age_of_a_message_is_by_the_clock_of_the_server_though_that_of_its_producer_is_wrong(url, db, hours):
    stream = mb.stream('s', url=url)
    write_at(db, 's', [clock.now() + timedelta(hours=hours)])
    log, now = stream.target.majority, clock.now()
    assert store.delete_older(log, 's', now - timedelta(minutes=10))[0] == 0
    assert store.delete_older(log, 's', now + timedelta(minutes=10)) == (1, None)


def test_messages_are_deleted_though_the_clock_of_this_machine_is_behind(url, db, monkeypatch):
    now = clock.now()
    write_at(db, 's', [now, now])
    grow_old(db, 's', age=7200, offset=0)
    monkeypatch.setattr(clock, 'now', lambda: now - timedelta(hours=3))
    stream = mb.stream('s', url=url, max_age=1800)
    eventually(lambda: stream.buffer().count() < 2)
    assert [record.data['seq'] for record in stream.buffer()] == [1]


def test_a_record_batch_of_an_older_version_has_the_age_of_its_youngest_message(url, db):
    stream, now = mb.stream('s', url=url), clock.now()
    times = [now - timedelta(hours=2), now, now - timedelta(hours=1)]
    record = store.record_batch('s', 'a', 0, [b'\5\0\0\0\0'] * 3, times, [None] * 3)
    store.insert_records(db.buffer, [record])
    db.buffer.update_many({}, {'$unset': {'stored': 1}})
    log = stream.target.majority
    assert store.delete_older(log, 's', now - timedelta(minutes=30))[0] == 0
    assert store.delete_older(log, 's', now + timedelta(minutes=30)) == (3, None)


def test_a_message_without_a_place_in_the_log_has_its_age_by_the_clock_of_the_server_too(url, db):
    stream = mb.stream('s', url=url)
    mb.models.Buffer(stream='s', data={}, created=clock.now() - timedelta(hours=1)).save()
    log, now = stream.target.majority, clock.now()
    assert store.delete_older(log, 's', now - timedelta(minutes=10)) == (0, None)
    assert store.delete_older(log, 's', now + timedelta(minutes=10)) == (1, None)


def test_record_batches_taken_apart_keep_when_they_were_stored(url, db):
    stream = mb.stream('s', url=url)
    stream.append_many([{}] * 3)
    (stored,) = db.buffer.distinct('stored')
    store.unbatch(stream.target.majority, store.Span(db.buffer.find_one()['producer'], 0, 3), 's')
    assert [doc['stored'] for doc in db.buffer.find()] == [stored] * 3


# --- max_backlog, on_full, and the others


def test_a_limit_that_is_unset_by_none_holds_for_no_handle_any_more(url):
    stream = mb.stream('s', url=url, max_backlog=2, on_full='raise')
    stream.append_many([{}, {}])
    with pytest.raises(BacklogFullError):
        stream.append({})
    unlimited = mb.stream('s', url=url, max_backlog=None)
    stream.append({})
    assert (unlimited.max_backlog, unlimited.on_full) == (None, None)


def test_a_limit_that_another_process_has_raised_lets_an_append_go_on_that_waits_for_room(url, db, monkeypatch):
    monkeypatch.setattr(backlog, 'MAX_AGE', SHORT)
    stream = mb.stream('s', url=url, max_backlog=2)
    stream.append_many([{}, {}])
    appending = threading.Thread(target=stream.append, args=({},))
    appending.start()
    db.stream.update_one({'name': 's'}, {'$set': {'max_backlog': 3}})
    appending.join(30)
    assert store.count_messages(db, 's') == 3


def test_a_handle_that_is_open_keeps_to_a_limit_that_is_set_later(url):
    stream = mb.stream('s', url=url)
    mb.stream('s', url=url, max_backlog=1, on_full='raise')
    stream.append({})
    with pytest.raises(BacklogFullError):
        stream.append({})


@pytest.mark.parametrize('travel', [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_a_stream_that_has_travelled_keeps_to_a_limit_that_is_set_later(url, travel):
    there = travel(mb.stream('s', url=url))
    mb.stream('s', url=url, max_backlog=1, on_full='raise')
    there.append({})
    with pytest.raises(BacklogFullError):
        there.append({})


@pytest.mark.parametrize(('option', 'value'), [('interval', 2.5), ('group_expiry', 3600), ('max_age', 3600)])
def test_what_is_stored_with_a_stream_stays_when_it_is_not_given_and_goes_by_none(url, option, value):
    mb.stream('s', url=url, **{option: value})
    assert mb.stream('s', url=url)[option] == value
    assert mb.stream('s', url=url, **{option: None})[option] is None
    assert mb.Stream.find('s', url=url)[option] is None


def test_on_full_is_refused_with_a_limit_that_is_unset(url):
    mb.stream('s', url=url, max_backlog=2)
    with pytest.raises(ArgumentError, match='on_full goes with max_backlog'):
        mb.stream('s', url=url, max_backlog=None, on_full='raise')
    assert mb.stream('s', url=url, on_full='raise').max_backlog == 2
    assert mb.stream('s', url=url, on_full=None).on_full is None
