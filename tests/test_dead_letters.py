"""Retries, timeouts, dead letters and their replay, with real worker processes on a real server."""
from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from processes import Seen, appended, note, prove, started
from pymongo.errors import AutoReconnect
from servers import eventually

import minibatch as mb
from minibatch import clock, delivery, ledger, retention
from minibatch import dead as letters
from minibatch.contrib.mongodb import MongoSink
from minibatch.dead import REPLAY_EPOCH
from minibatch.errors import ArgumentError, WindowFailedError
from minibatch.testing import InlineExecutor


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(delivery, 'RETRY_PAUSES', (0.05, 0.2))


@pytest.fixture
def stream(url):
    return mb.stream('s', url=url)


def here(stream, fn, **options):
    """A consumer whose functions run in this thread."""
    return mb.make_emitter('s', fn, stream=stream, executor=InlineExecutor, **{'size': 10, **options})


def dead(db):
    return list(db.window.find({'status': 'failed'}).sort('number', 1))


def replay(db):
    db.window.update_many({'status': 'failed'}, {'$set': {'status': 'replay', 'epoch': REPLAY_EPOCH}})


def poisoned(window):
    if any(data['seq'] == 13 for data in window.data):
        raise ValueError('poison')
    return note(window)


def test_a_window_that_fails_for_good_becomes_a_dead_letter_and_the_others_go_on(stream, db):
    seen = Seen()
    appended(stream, 0, 0, 50)
    with started(here(stream, poisoned, max_attempts=3, sink=seen)):
        (letter,) = eventually(lambda: dead(db))
        eventually(lambda: not db.buffer.count_documents({}), message='the dead letter holds the log')
        eventually(lambda: db.group.find_one()['number'] == 5)
    assert seen.messages() == [[0, seq] for seq in (*range(10), *range(20, 50))]
    assert (letter['attempts'], letter['error'], letter['n']) == (3, 'ValueError: poison', 10)
    assert letter['traceback'].endswith('ValueError: poison\n')
    assert "raise ValueError('poison')" in letter['traceback']
    (window,) = stream.window(status='failed')
    assert [data['seq'] for data in window.data] == list(range(10, 20))
    group = db.group.find_one()
    assert (group['failed'], group['retried'], group['windows'], group['messages']) == (1, 2, 4, 40)


def test_a_dead_letter_keeps_just_its_own_messages_also_of_record_batches_it_shares(stream, db):
    stream.append({'source': 0, 'seq': 0})
    appended(stream, 0, 1, 40)
    with started(here(stream, poisoned, max_attempts=1)):
        eventually(lambda: not db.buffer.count_documents({}))
    copies = list(db.dead.find())
    assert [data['seq'] for copy in copies for data in copy['batch']] == list(range(10, 20))
    (window,) = stream.window(status='failed')
    assert [(m.data['seq'], m.offset) for m in window.load().messages] == [(seq, seq) for seq in range(10, 20)]


def test_a_dead_letter_that_is_replayed_is_processed_under_its_id_and_leaves_nothing(stream, db):
    seen = Seen()
    appended(stream, 0, 0, 30)
    with started(here(stream, poisoned, max_attempts=2)):
        (letter,) = eventually(lambda: dead(db))
    replay(db)
    with started(here(stream, note, sink=seen)):
        eventually(lambda: len(seen) == 1)
        eventually(lambda: not db.dead.count_documents({}))
    assert (seen[0]['window'], seen[0]['attempt']) == (letter['_id'], 3)
    assert seen.messages() == [[0, seq] for seq in range(10, 20)]
    assert db.window.count_documents({}) == 0


def test_a_consumer_that_leads_replays_what_it_has_buried_itself(stream, db):
    seen, broken = Seen(), [True]

    def fails(window):
        if broken:
            raise ValueError
        return note(window)

    appended(stream, 0, 0, 10)
    with started(here(stream, fails, max_attempts=1, sink=seen)):
        eventually(lambda: dead(db))
        broken.clear()
        replay(db)
        eventually(lambda: seen.count() == 10)
        appended(stream, 0, 10, 20)
        eventually(lambda: seen.count() == 20)


def test_a_replay_that_fails_again_is_a_dead_letter_again_with_its_attempts_counted_on(stream, db):
    appended(stream, 0, 0, 30)
    with started(here(stream, poisoned, max_attempts=2)):
        eventually(lambda: dead(db))
        replay(db)
        eventually(lambda: [letter['attempts'] for letter in dead(db)] == [4])
        eventually(lambda: not db.buffer.count_documents({}))
    assert db.dead.count_documents({}) == 1
    assert db.position.find_one()['offset'] == 30


def test_a_replay_is_taken_on_by_the_next_consumer_with_its_attempts(stream, db):
    seen, reached = Seen(), threading.Event()

    def hangs(window):
        reached.set()
        raise ValueError

    appended(stream, 0, 0, 10)
    with started(here(stream, poisoned, size=5, max_attempts=1)):
        eventually(lambda: db.group.find_one({'number': 2}))
    appended(stream, 0, 10, 20)
    with started(here(stream, poisoned, size=10, max_attempts=1)):
        eventually(lambda: dead(db))
    replay(db)
    with started(here(stream, hangs, max_attempts=50)):
        assert reached.wait(10)
        eventually(lambda: db.window.find_one({'status': 'replay', 'attempts': {'$gt': 3}}))
    attempts = db.window.find_one()['attempts']
    with started(here(stream, note, sink=seen)):
        eventually(lambda: seen.count() == 10)
    assert seen[0]['attempt'] == attempts


def test_a_kept_window_stays_as_processed_when_its_replay_succeeds(stream, db):
    appended(stream, 0, 0, 20)
    with started(here(stream, poisoned, max_attempts=1, keep=True)):
        eventually(lambda: dead(db))
    replay(db)
    with started(here(stream, note, keep=True)):
        eventually(lambda: db.window.count_documents({'status': 'processed'}) == 2)
        eventually(lambda: not db.dead.count_documents({}))
    assert [len(window.data) for window in stream.window().order_by('number')] == [10, 10]


def test_a_message_that_an_emitter_picked_is_a_dead_letter_and_is_not_picked_again(stream, db):
    class Each(mb.window.WindowEmitter):
        def window_ready(self):
            found = list(mb.Buffer.objects.filter(processed=False).order_by('offset')[:1])
            return bool(found), (found,)

        def query(self, found):
            return found

    seen = Seen()
    appended(stream, 0, 12, 16)
    with started(here(stream, poisoned, emitter=Each, size=1, max_attempts=2, sink=seen)):
        eventually(lambda: not db.buffer.count_documents({}))
    assert [message[1] for message in seen.messages()] == [12, 14, 15]
    replay(db)
    with started(here(stream, note, emitter=Each, size=1, sink=seen)):
        eventually(lambda: not db.dead.count_documents({}))
    assert seen[-1]['seen'] == [[0, 13]]


def test_on_error_stop_ends_the_consumer_and_leaves_the_window_open(stream, db):
    appended(stream, 0, 0, 30)
    emitter = here(stream, poisoned, max_attempts=3, on_error='stop')
    with pytest.raises(WindowFailedError, match='has failed 3 times, and on_error is stop; the last error was'):
        emitter.run()
    assert db.window.find_one({'number': 2})['status'] == 'open'
    seen = Seen()
    with started(here(stream, note, sink=seen)):
        eventually(lambda: not db.buffer.count_documents({}))
    assert [message[1] for message in seen.messages()][:10] == list(range(10, 20))


def test_a_script_whose_consumer_stops_on_an_error_has_an_exit_code_that_is_not_0(stream, url):
    appended(stream, 0, 0, 10)
    script = (
        'import minibatch as mb\n'
        'def fails(window): raise ValueError(13)\n'
        f'mb.streaming("s", fails, size=10, url={url!r}, max_attempts=1, on_error="stop")'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'WindowFailedError: window s/default/000000000001 has failed 1 times' in done.stderr


def test_a_function_that_hangs_is_ended_after_its_timeout_and_the_neighbours_are_not_blamed(stream, db):
    def hangs(window):
        if any(data['seq'] == 13 for data in window.data):
            ctypes.PyDLL(None).sleep(100)  # it holds the interpreter, too
        return note(window)

    seen = Seen()
    appended(stream, 0, 0, 100)
    emitter = mb.make_emitter('s', hangs, stream=stream, size=5, workers=2, timeout=0.5, max_attempts=2, sink=seen)
    with started(emitter):
        (letter,) = eventually(lambda: dead(db))
        eventually(lambda: seen.count() == 95)
    assert letter['error'] == 'TimeoutError: the function did not return within timeout=0.5 s'
    assert 'in hangs' in letter['traceback']
    assert 'minibatch/worker.py' not in letter['traceback']
    assert {result['attempt'] for result in seen} == {1}


def test_a_function_that_ends_its_worker_is_a_dead_letter_and_the_neighbours_are_not_blamed(stream, db):
    def dies(window):
        if any(data['seq'] == 13 for data in window.data):
            os._exit(3)
        return note(window)

    seen = Seen()
    appended(stream, 0, 0, 100)
    with started(mb.make_emitter('s', dies, stream=stream, size=5, workers=2, max_attempts=2, sink=seen)):
        (letter,) = eventually(lambda: dead(db))
        eventually(lambda: seen.count() == 95)
    assert letter['error'].startswith('WorkerDied: the worker process ended while it ran the function, {EXIT(3)')
    assert letter['attempts'] == 2
    assert {result['attempt'] for result in seen} == {1}


@pytest.mark.parametrize('ordered', [True, False])
def test_results_reach_the_sink_in_the_order_of_the_windows_if_that_is_wanted(stream, ordered):
    def uneven(window):
        if window.number % 10 == 1 and window.attempt == 1:
            raise ValueError
        time.sleep(0.05 if window.number % 5 == 2 else 0)
        return window.number

    numbers: list[int] = []
    appended(stream, 0, 0, 500)
    sink = type('Sink', (), {'put': lambda self, number: numbers.append(number)})()
    with started(mb.make_emitter('s', uneven, stream=stream, size=10, workers=2, ordered=ordered, sink=sink)):
        eventually(lambda: len(numbers) == 50)
    assert (numbers == sorted(numbers)) is ordered


def test_few_results_are_held_for_the_window_before_them(stream, monkeypatch):
    monkeypatch.setattr(delivery, 'MAX_HELD', 5)
    calls, wait, seen = [], [True], Seen()

    def first_fails(window):
        if window.number == 1 and wait:
            raise ValueError
        calls.append(window.number)
        return note(window)

    appended(stream, 0, 0, 1000)
    with started(here(stream, first_fails, ordered=True, sink=seen, max_attempts=10**6)) as emitter:
        eventually(lambda: len(calls) >= 5)
        windows = emitter.stream.target.db.window
        eventually(lambda: windows.find_one({'number': 1, 'attempts': {'$gt': 5}}))
        assert len(calls) == 5
        assert not seen
        wait.clear()
        eventually(lambda: seen.count() == 1000)
    assert [result['number'] for result in seen] == list(range(1, 101))


def test_dead_letters_that_are_too_old_or_too_many_go_with_their_messages(stream, db, monkeypatch, caplog):
    monkeypatch.setattr(retention, 'MAX_DEAD', 3)
    monkeypatch.setattr(retention, 'TRIM_PAUSE', 0.0)
    appended(stream, 0, 0, 100)

    def fails(window):
        raise ValueError

    with started(here(stream, fails, max_attempts=1)):
        eventually(lambda: [letter['number'] for letter in dead(db)] == [8, 9, 10])
        eventually(lambda: db.dead.count_documents({}) == 3)
    assert 'or more than 3, and are gone' in caplog.text


def test_windows_that_wait_while_none_is_finished_are_said_once_and_written_down(stream, db, caplog):
    release = threading.Event()

    def put(result: Any) -> None:
        release.wait(30)

    sink = type('Sink', (), {'put': staticmethod(put)})()
    appended(stream, 0, 0, 20)
    with started(here(stream, note, sink=sink, stall_after=0.2)):
        eventually(lambda: db.group.find_one({'stalled': {'$exists': True}}))
        release.set()
        eventually(lambda: db.group.find_one({'stalled': {'$exists': False}}))
        eventually(lambda: 'finished again' in caplog.text)
    assert caplog.text.count('stalled') == 1


def test_whoever_leads_next_forgets_what_the_source_of_the_last_one_failed_with(stream, db):
    appended(stream, 0, 0, 5)
    with started(here(stream, note)):
        eventually(lambda: db.group.find_one())
    db.group.update_one({}, {'$set': {'source_error': 'OSError: away'}})
    with started(here(stream, note)):
        eventually(lambda: db.group.find_one({'source_error': {'$exists': False}}))


def test_an_idle_consumer_is_not_stalled(stream, db, caplog):
    appended(stream, 0, 0, 15)
    with started(here(stream, note, stall_after=0.05)) as emitter:
        eventually(lambda: db.group.find_one({'windows': 1}))
        emitter.stream.append({'source': 0, 'seq': 15})
        eventually(lambda: emitter._consumer is not None and db.buffer.count_documents({}) <= 2)
        caplog.clear()  # a busy machine may stall while there is work
        with pytest.raises(AssertionError):
            eventually(lambda: 'stalled' in caplog.text, 0.5)


def test_a_stream_as_a_sink_that_is_full_makes_windows_wait_and_no_dead_letters(url, stream, db):
    full, seen = mb.stream('full', url=url, max_backlog=20, on_full='raise'), Seen()
    appended(stream, 0, 0, 100)
    with started(here(stream, lambda window: window.data, max_attempts=1, sink=full, ordered=True)):
        eventually(lambda: db.group.find_one({'stream': 's', 'retried': {'$gt': 2}}))
        emitter = mb.make_emitter('full', note, stream=full, size=10, executor=InlineExecutor, sink=seen)
        with started(emitter):
            eventually(lambda: seen.count() == 100)
    assert not dead(db)
    prove(seen.messages(), {0: 100})


@pytest.mark.parametrize('error', [ConnectionError, TimeoutError, AutoReconnect])
def test_a_sink_that_is_not_reachable_is_waited_for_and_costs_no_attempt(stream, db, error):
    class Away:
        """A sink that comes back at the third call."""

        calls, taken = 0, []

        def put(self, result):
            self.calls += 1
            if self.calls < 3:
                raise error('away')
            self.taken.append(result)

    appended(stream, 0, 0, 10)
    with started(here(stream, lambda window: len(window), max_attempts=1, sink=(sink := Away()))):
        eventually(lambda: db.group.find_one({'number': 1}))
    assert (sink.taken, sink.calls) == ([10], 3)
    assert db.window.count_documents({'status': 'failed'}) == 0


@pytest.mark.parametrize('start', ['earliest', 'latest'])
def test_a_new_group_starts_where_it_is_told_to_and_only_once(stream, db, start):
    appended(stream, 0, 0, 20)
    for first, end in ((0, 20), (20, 40)):
        seen = Seen()
        with started(here(stream, note, group='new', start=start, sink=seen, keep=True)):
            eventually(lambda: db.group.find_one({'started': True}))
            if first == 0 and start == 'latest':
                appended(stream, 0, 20, 30)
                eventually(lambda: seen.messages() == [[0, seq] for seq in range(20, 30)])  # noqa: B023
                break
            eventually(lambda: seen.messages() == [[0, seq] for seq in range(first, end)])  # noqa: B023
        appended(stream, 0, 20, 40)


def test_a_group_that_began_with_the_latest_does_not_skip_what_came_while_it_was_away(stream, db):
    seen = Seen()
    appended(stream, 0, 0, 10)
    with started(here(stream, note, start='latest', sink=seen)):
        eventually(lambda: db.group.find_one({'started': True}))
    appended(stream, 0, 10, 30)
    with started(here(stream, note, start='latest', sink=seen)):
        eventually(lambda: seen.count() == 20)


def test_an_exactly_once_sink_shows_each_window_once_although_the_commit_is_lost_again_and_again(stream, db):
    committed = []
    original = ledger.commit_with

    def unclear(*args):
        result = original(*args)
        committed.append(result)
        return result

    class Unsure(MongoSink):
        """It does not know, every third time, that it has done it."""

        def put_many(self, results, windows):
            return 0

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.calls, put_once = 0, self.put_once

            def doubtful(messages, window):
                put_once(messages, window)
                self.calls += 1
                if self.calls % 3 == 0:
                    raise ConnectionError('no reply')

            self.put_once = doubtful

    ledger.commit_with, sink = unclear, Unsure(db.once, exactly_once=True)
    try:
        appended(stream, 0, 0, 300)
        with started(here(stream, lambda window: window.data, max_attempts=1, sink=sink)):
            eventually(lambda: db.group.find_one({'number': 30}))
    finally:
        ledger.commit_with = original
    prove([[doc['source'], doc['seq']] for doc in db.once.find().sort('seq', 1)], {0: 300})
    assert db.window.count_documents({'status': 'failed'}) == 0
    assert db.dead.count_documents({}) == 0
    assert committed.count(True) == 30


def test_the_same_sink_keeps_each_window_once_on_a_standalone_server(standalone_url):
    stream = mb.stream('s', url=standalone_url)
    db = stream.target.client[stream.target.dbname]
    calls = []

    class Doubtful(MongoSink):
        def put_many(self, results, windows):
            return 0

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            put_once = self.put_once

            def doubtful(messages, window):
                put_once(messages, window)
                calls.append(window.id)
                if calls.count(window.id) == 1:
                    raise ConnectionError('no reply')

            self.put_once = doubtful

    appended(stream, 0, 0, 100)
    sink = Doubtful(db.once, exactly_once=True)
    with started(here(stream, lambda window: window.data, sink=sink)):
        eventually(lambda: db.group.find_one({'number': 10}))
    prove([[doc['source'], doc['seq']] for doc in db.once.find().sort('seq', 1)], {0: 100})
    assert len(calls) == 20


@pytest.mark.parametrize(('options', 'message'), [
    ({'max_attempts': 0}, 'max_attempts must be a whole number'),
    ({'timeout': 0}, 'timeout must be from'),
    ({'on_error': 'explode'}, "on_error must be 'continue' or 'stop', not 'explode'"),
    ({'start': 'middle'}, "start must be 'earliest' or 'latest', not 'middle'"),
    ({'stall_after': -1}, 'stall_after must be from'),
    ({'timeout': 1, 'executor': InlineExecutor}, 'timeout ends worker processes of the default executor'),
])
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ArgumentError, match=message):
        mb.make_emitter('s', note, size=1, **options)


def test_messages_no_longer_wait_for_a_group_that_nobody_has_run_for_its_expiry(url, db, caplog, monkeypatch):
    monkeypatch.setattr(retention, 'TRIM_PAUSE', 0.0)
    stream = mb.stream('s', url=url, group_expiry=0.3)
    assert stream.group_expiry == 0.3
    appended(stream, 0, 0, 10)
    with started(here(stream, note, group='gone')):
        eventually(lambda: db.group.find_one({'group': 'gone', 'number': 1}))
    appended(stream, 0, 10, 20)
    with started(here(stream, note)):
        eventually(lambda: db.group.find_one({'group': 'default', 'number': 1}))
        eventually(lambda: ledger.expired_groups(db, 's') == ['s/gone'])
        appended(stream, 0, 20, 30)
        eventually(lambda: not db.buffer.count_documents({}))
    assert caplog.text.count('group s/gone has not been run') == 1


@pytest.mark.parametrize('ordered', [True, False])
def test_a_sink_that_takes_many_windows_at_once_gets_each_once_and_the_bad_one_alone(stream, db, ordered):
    class Bulk:
        def __init__(self):
            self.windows, self.calls = [], 0

        def put(self, result):
            if result['number'] == 7:
                raise ValueError('seven')
            self.windows.append(result['number'])

        def put_many(self, results, windows):
            self.calls += 1
            taken = [result['number'] for result in results if result['number'] < 7 or result['number'] > 12][:5]
            if taken != [result['number'] for result in results[: len(taken)]]:
                raise ValueError('one of them')
            self.windows += taken
            return len(taken)

    sink = Bulk()
    appended(stream, 0, 0, 300)
    with started(here(stream, note, max_attempts=2, sink=sink, ordered=ordered, size=10)):
        eventually(lambda: db.group.find_one({'number': 30}))
    assert sorted(sink.windows) == [number for number in range(1, 31) if number != 7]
    assert not ordered or sink.windows == sorted(sink.windows)
    assert [letter['number'] for letter in dead(db)] == [7]
    assert sink.calls


def test_many_windows_are_committed_with_their_results_in_one_transaction(stream, db):
    transactions = []
    commit = MongoSink._commit

    class Counting(MongoSink):
        def _commit(self, windows, writes):
            transactions.append(len(windows))
            return commit(self, windows, writes)

    appended(stream, 0, 0, 2000)
    emitter = mb.make_emitter(
        's', lambda window: window.data, stream=stream, size=1, workers=1, sink=Counting(db.once, exactly_once=True)
    )
    with started(emitter):
        eventually(lambda: db.group.find_one({'number': 2000}))
    prove([[doc['source'], doc['seq']] for doc in db.once.find().sort('seq', 1)], {0: 2000})
    assert sum(transactions) == 2000
    assert max(transactions) > 1


def test_windows_of_which_an_earlier_attempt_has_committed_some_are_committed_one_by_one(stream, db):
    class Unsure(MongoSink):
        """It does not know, the first time, that it has committed many windows."""

        unsure = None

        def _commit(self, windows, writes):
            done = super()._commit(windows, writes)
            if len(windows) > 1 and self.unsure is None:
                self.unsure = len(windows)
                raise AutoReconnect('no reply')
            return done

    appended(stream, 0, 0, 500)
    sink = Unsure(db.once, exactly_once=True)
    emitter = mb.make_emitter('s', lambda window: window.data, stream=stream, size=1, workers=1, sink=sink)
    with started(emitter):
        eventually(lambda: db.group.find_one({'number': 500}))
    prove([[doc['source'], doc['seq']] for doc in db.once.find().sort('seq', 1)], {0: 500})
    assert sink.unsure


def test_a_group_that_was_killed_after_a_long_life_is_not_expired(db, url):
    stream = mb.stream('s', url=url, group_expiry=3600)
    appended(stream, 0, 0, 10)
    with started(here(stream, note)):
        eventually(lambda: db.group.find_one({'number': 1}))
    two_days_ago = clock.now() - timedelta(days=2)
    died = {'taken': two_days_ago, 'seen': two_days_ago, 'lease.expires': clock.now() - timedelta(minutes=1)}
    db.group.update_one({}, {'$set': died})
    assert ledger.expired_groups(db, 's') == []
    db.group.update_one({}, {'$set': {'lease.expires': two_days_ago}})
    assert ledger.expired_groups(db, 's') == ['s/default']
    db.group.update_one({}, {'$unset': {'lease': 1, 'taken': 1, 'seen': 1}})  # killed while it was made
    assert ledger.expired_groups(db, 's') == []


def test_copies_of_a_dead_letter_stay_as_long_as_it_does_and_those_of_no_dead_letter_go(stream, db):
    appended(stream, 0, 0, 20)
    with started(here(stream, poisoned, max_attempts=1)):
        eventually(lambda: dead(db))
    old = clock.now() - timedelta(days=40)
    db.dead.update_many({}, {'$set': {'kept': old}})
    db.dead.insert_one({'_id': 's/default/000000000001+000000000', 'stream': 's', 'group': 'default', 'kept': old})
    assert letters.trim(db, 's', 'default', clock.now() - timedelta(days=30), 100) == 0
    (copy,) = db.dead.find()
    assert copy['_id'].startswith('s/default/000000000002+')


def test_a_replay_without_its_messages_is_no_success(stream, db):
    appended(stream, 0, 0, 20)
    with started(here(stream, poisoned, max_attempts=1)):
        eventually(lambda: dead(db))
        db.dead.delete_many({})
        replay(db)
        gone = ['DataError: the copies of its messages are gone']
        eventually(lambda: [letter['error'] for letter in dead(db)] == gone)


def test_replays_of_many_dead_letters_do_not_keep_new_windows_waiting(stream, db):
    replayed, before, seen = [], [], Seen()

    def again(window):
        if window.attempt > 1:
            if not replayed:
                appended(stream, 0, 40, 50)
            replayed.append(window.id)
        result = note(window)
        if [0, 49] in result['seen']:
            before.append(len(replayed))
        return result

    appended(stream, 0, 0, 40)
    with started(here(stream, lambda window: 1 / 0, size=1, max_attempts=1)):
        eventually(lambda: len(dead(db)) == 40)
    replay(db)
    with started(here(stream, again, size=1, workers=1, sink=seen)):
        eventually(lambda: [0, 49] in seen.messages())
        assert before[0] < 40
        eventually(lambda: seen.count() == 50)
    assert sorted(replayed) == sorted(set(replayed))


def test_a_replay_that_fails_does_not_end_a_consumer_that_stops_on_errors(stream, db):
    appended(stream, 0, 0, 20)
    with started(here(stream, poisoned, max_attempts=1)):
        eventually(lambda: dead(db))
    replay(db)
    seen = Seen()
    emitter = here(stream, poisoned, max_attempts=1, on_error='stop', sink=seen)
    with started(emitter):
        eventually(lambda: [letter['attempts'] for letter in dead(db)] == [2])
        appended(stream, 0, 20, 30)
        eventually(lambda: seen.count() == 10)
    assert emitter.error is None


def test_a_group_that_was_killed_while_it_took_the_latest_positions_takes_them_again(stream, db):
    appended(stream, 0, 0, 10)
    with started(here(stream, note, start='latest')):
        eventually(lambda: db.group.find_one({'started': True}))
    db.group.update_one({}, {'$unset': {'started': 1}})
    db.position.delete_many({})
    seen = Seen()
    with started(here(stream, note, start='latest', sink=seen)):
        eventually(lambda: db.group.find_one({'started': True}))
        appended(stream, 0, 10, 20)
        eventually(lambda: seen.messages() == [[0, seq] for seq in range(10, 20)])


def test_a_consumer_that_waits_for_a_retried_window_does_not_spin(stream, db):
    release, turns = threading.Event(), []

    def hangs_at_second_attempt(window):
        if window.attempt == 1:
            raise ValueError
        release.wait(30)
        return note(window)

    appended(stream, 0, 0, 10)
    pool = ThreadPoolExecutor(1)
    emitter = mb.make_emitter('s', hangs_at_second_attempt, stream=stream, size=10, executor=pool, max_workers=1)
    emitter.should_stop = lambda: turns.append(1) or emitter._stop
    with started(emitter):
        eventually(lambda: db.window.find_one({'attempts': 2}))
        before = len(turns)
        with pytest.raises(AssertionError):
            eventually(lambda: len(turns) > before + 200, 1.0)
        release.set()
        eventually(lambda: db.group.find_one({'number': 1}))
    pool.shutdown()


def test_names_and_errors_make_no_line_of_their_own_in_a_log_and_steer_no_terminal(url, caplog):
    caplog.set_level(logging.DEBUG, 'minibatch')
    forged = 'x\nERROR forged\r\x1b[2J\u2028ERROR forged'

    def fail(window):
        raise ValueError(forged)

    mb.stream(forged, url=url).append_many([{'i': 0}] * 2)
    emitter = mb.make_emitter(forged, fail, url=url, group=forged, size=1, max_attempts=1, executor=InlineExecutor)
    while emitter._run_once():
        pass
    emitter.stop()
    assert 'ValueError' in caplog.text
    lines = [line for record in caplog.records for line in record.getMessage().split('\n')]
    assert [line for line in lines if not line.isprintable() or line.startswith('ERROR')] == []
