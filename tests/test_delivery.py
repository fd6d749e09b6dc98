"""What every consumer is promised, on a real MongoDB, while nothing fails."""
from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import threading
import time
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from processes import (
    InThisThread,
    Seen,
    appended,
    consumer,
    kill,
    note,
    owner_of,
    producer,
    prove,
    prove_times,
    prove_windows,
    running,
    seen_count,
    started,
    terminate,
    windows_seen,
    write_at,
)
from servers import eventually

import minibatch as mb
from minibatch.errors import ArgumentError, GroupConflictError, PortabilityError
from minibatch.models import Buffer, Window
from minibatch.window import WindowEmitter

LOCK = threading.Lock()


@pytest.fixture
def stream(url: str) -> mb.Stream:
    return mb.stream('test', url=url)


def emitter_of(stream: mb.Stream, fn: Any = note, **options: Any) -> WindowEmitter:
    return mb.make_emitter(stream.name, fn, stream=stream, **{'executor': InThisThread, **options})


# --- many messages


def test_100000_messages_of_4_producer_processes_arrive_once_and_in_order(url, db):
    with ExitStack() as stack:
        process = stack.enter_context(consumer(url, 'test', size=100, workers=2))
        producers = [stack.enter_context(producer(url, 'test', source, 25_000)) for source in range(4)]
        assert [each.wait(60) for each in producers] == [0] * 4
        eventually(lambda: db.seen.count_documents({}) == 1000, 60, 'not all 1000 windows seen')
        terminate(process)
    prove_windows(db, dict.fromkeys(range(4), 25_000))
    assert all(len(times) == 1 and len(times[0]['seen']) == 100 for times in windows_seen(db).values())
    assert db.buffer.count_documents({}) == db.window.count_documents({'status': {'$ne': 'void'}}) == 0


def test_100000_messages_of_8_threads_with_one_handle_arrive_once_and_in_order(url, db, stream):
    def append(source):
        for start in range(0, 12_500, 125):
            appended(stream, source, start, start + 120)
            for seq in range(start + 120, start + 125):
                stream.append({'source': source, 'seq': seq})

    threads = [threading.Thread(target=append, args=(source,)) for source in range(8)]
    with consumer(url, 'test', size=100, workers=2) as process:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        eventually(lambda: db.seen.count_documents({}) == 1000, 60, 'not all 1000 windows seen')
        terminate(process)
    prove_windows(db, dict.fromkeys(range(8), 12_500))
    assert len(windows_seen(db)) == 1000


@pytest.mark.parametrize('options', [{'size': 50}, {'interval': 0.1}])
def test_a_window_of_50_megabytes_works(stream, options):
    seen = []
    text = 'x' * (1 << 20)
    stream.append_many({'seq': seq, 'text': text} for seq in range(50))
    emitter = mb.make_emitter('test', length, stream=stream, sink=ListSink(seen), workers=1, **options)
    eventually(lambda: emitter._run_once() or seen)
    assert seen == [[list(range(50)), 50 << 20]]


def length(window):
    return [[data['seq'] for data in window.data], sum(len(data['text']) for data in window.data)]


# --- windows


def test_fixed_windows_touch_and_hold_the_messages_of_their_time_and_empty_ones_come_too(stream):
    seen = Seen()
    with started(emitter_of(stream, interval=0.5, relaxed=False, sink=seen)):
        eventually(lambda: len(seen) >= 2)
        appended(stream, 1, 0, 5)
        eventually(lambda: seen.count() == 5)
        filled = len(seen)
        eventually(lambda: len(seen) >= filled + 2)
    prove(seen.messages(), {1: 5})
    assert {(window['end'] - window['start']).total_seconds() for window in seen} == {0.5}
    assert all(window['start'].microsecond in (0, 500_000) for window in seen)
    assert [window['number'] for window in seen] == list(range(1, len(seen) + 1))
    assert any(not window['seen'] for window in seen)
    prove_times(seen, [])


def test_fixed_windows_hold_the_messages_of_a_backlog_by_their_time(stream, db):
    seen = Seen()
    start = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(seconds=10)
    times = [start + timedelta(milliseconds=250 * i) for i in range(36)]  # every second one on a boundary
    write_at(db, 'test', times)
    emitter_of(stream, interval=0.5, relaxed=False, sink=seen)._run_once()
    prove(seen.messages(), {0: 36})
    prove_times(seen, times)
    assert [len(window['seen']) for window in seen[:18]] == [2] * 18


@pytest.mark.parametrize('hours', [-1, 1])
@pytest.mark.parametrize('options', [{'interval': 0.5, 'relaxed': False}, {'interval': 0.5}])
def test_messages_of_a_producer_whose_clock_is_wrong_come_now(stream, db, hours, options):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, **options)):
        for turn in range(3):
            wrong = datetime.now(timezone.utc) + timedelta(hours=hours, seconds=turn)
            write_at(db, 'test', [wrong] * 5, first=5 * turn)
            appended(stream, 1, 5 * turn, 5 * turn + 5)
            eventually(lambda: seen.count() == 10 * turn + 10, 5)  # noqa: B023
    prove(seen.messages(), {0: 15, 1: 15})


def test_a_relaxed_window_holds_all_since_the_last_one(stream):
    seen = Seen()
    with started(emitter_of(stream, interval=0.5, sink=seen)):
        for turn in range(3):
            appended(stream, 0, 100 * turn, 100 * turn + 100)
            eventually(lambda: seen.count() == 100 * turn + 100)  # noqa: B023
    prove(seen.messages(), {0: 300})
    assert all(window['start'] < window['end'] for window in seen)
    assert all(window['seen'] for window in seen)


# --- groups and consumers


def test_two_groups_each_get_every_message_and_records_stay_until_both_are_through(stream, db):
    one, two = Seen(), Seen()
    first, second = (emitter_of(stream, size=10, group=group, sink=sink) for group, sink in (('one', one), ('two', two)))
    assert first._run_once() == second._run_once() == 0
    appended(stream, 0, 0, 100)
    assert first._run_once() == 10
    assert mb.Stream.get_or_create('test', url=stream.target.url).buffer().count() == 1
    appended(stream, 0, 100, 120)
    assert second._run_once() == 12
    assert first._run_once() == 2
    assert db.buffer.count_documents({}) == 0
    for sink in (one, two):
        prove(sink.messages(), {0: 120})


def test_another_function_under_the_same_group_is_refused_by_name(stream):
    with started(emitter_of(stream, size=10)):
        eventually(lambda: owner_of(stream.target.db, 'test'))
        with pytest.raises(GroupConflictError, match='note'):
            emitter_of(stream, length, size=10)._run_once()
        with pytest.raises(GroupConflictError, match='CountWindow'):
            emitter_of(stream, size=11)._run_once()


def test_one_emitter_that_runs_in_two_forked_processes_leads_in_one_of_them(url, db):
    with running('-c', TWICE, url) as process:
        eventually(lambda: owner_of(db, 'test'))
        leaders = set()
        for turn in range(5):
            appended(mb.stream('test', url=url), 0, turn, turn + 1)
            eventually(lambda: seen_count(db) == turn + 1)  # noqa: B023
            leaders.add(owner_of(db, 'test'))
        epoch = db.group.find_one()['lease']['epoch']
    assert process.returncode is not None
    assert len(leaders) == epoch == 1


TWICE = """
import multiprocessing, os, sys
import minibatch as mb

db = mb.connectdb(sys.argv[1])

def process(window):
    return {'window': window.id, 'number': window.number, 'seen': [[d['source'], d['seq']] for d in window.data]}

class Seen:
    def put(self, result):
        mb.stream('test').target.db.seen.insert_one(dict(result))

emitter = mb.make_emitter('test', process, size=1, sink=Seen(), workers=1)
context = multiprocessing.get_context('fork')
children = [context.Process(target=emitter.run) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    child.join()
"""


# --- what stays


def test_nothing_stays_when_one_round_is_done(stream, db):
    appended(stream, 0, 0, 100)
    assert emitter_of(stream, size=10)._run_once() == 10
    assert stream.buffer().count() == stream.window(status='processed').count() == stream.window(status='open').count() == 0
    assert db.window_spans.count_documents({}) == 0


def test_with_keep_messages_and_windows_stay_marked_and_can_be_read(stream):
    for seq in range(30):
        stream.append({'source': 0, 'seq': seq})
    appended(stream, 0, 30, 100)
    assert emitter_of(stream, size=10, keep=True)._run_once() == 10
    assert stream.buffer(processed=True).count() == 31
    assert stream.buffer(processed=False).count() == 0
    windows = list(stream.window(processed=True).order_by('number'))
    prove([[data['source'], data['seq']] for window in windows for data in window.data], {0: 100})
    assert len(windows) == 10
    assert emitter_of(stream, size=10, keep=True)._run_once() == 0


# --- sinks


class ListSink:
    def __init__(self, results: list[Any]) -> None:
        self.put = results.append


class FailingSink:
    """Fails at the first attempt of each window."""

    def __init__(self) -> None:
        self.attempts: list[tuple[int, int]] = []
        self.seen = Seen()

    def put(self, result):
        self.attempts.append((result['number'], result['attempt']))
        if result['attempt'] == 1:
            raise OSError('the sink is full')
        self.seen.put(result)


def test_a_window_whose_sink_fails_is_tried_again_and_nothing_is_lost(stream, db):
    sink = FailingSink()
    appended(stream, 0, 0, 30)
    with started(emitter_of(stream, size=10, sink=sink)):
        eventually(lambda: sink.seen.count() == 30)
        assert db.window.find_one({'number': 1, 'attempts': 2, 'error': {'$regex': 'the sink is full'}})
        eventually(lambda: not db.buffer.count_documents({}))
    prove(sink.seen.messages(), {0: 30})
    assert sorted(sink.attempts) == [(number, attempt) for number in (1, 2, 3) for attempt in (1, 2)]


def test_a_window_whose_function_raises_is_tried_again_and_counts_its_attempts(stream):
    attempts = []

    def fail_twice(window):
        attempts.append(window.attempt)
        if window.attempt < 3:
            raise ValueError('not yet')

    appended(stream, 0, 0, 10)
    seen = []
    with started(emitter_of(stream, fail_twice, size=10, sink=ListSink(seen))):
        eventually(lambda: seen)
    assert attempts == [1, 2, 3]


@pytest.mark.parametrize('executor', [InThisThread, None])
@pytest.mark.parametrize(('make', 'expected'), [
    (lambda window: [], []), (lambda window: 0, 0), (lambda window: '', ''), (lambda window: {}, {}),
    (lambda window: None, [{'a': 1}]), (lambda window: window, [{'a': 1}]), (None, [{'a': 1}]),
])
def test_the_sink_gets_what_the_function_returned_or_else_the_data(stream, executor, make, expected):
    seen = []
    stream.append({'a': 1})
    assert emitter_of(stream, make, size=1, sink=ListSink(seen), executor=executor, max_workers=1)._run_once() == 1
    assert seen == [expected]


def test_without_a_sink_nothing_comes_back_from_the_workers(stream):
    stream.append({'a': 1})
    assert emitter_of(stream, lambda window: threading.Lock(), size=1, executor=None, workers=1)._run_once() == 1


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_own_window(stream, db):
    stream.append_many([{'a': 0}, {'a': 1}])
    seen = []

    def lock_or_one(window):
        return 1 if window.data[0]['a'] else threading.Lock()

    assert emitter_of(stream, lock_or_one, size=1, workers=1, executor=None, sink=ListSink(seen))._run_once() == 1
    assert seen[-1] == 1
    assert 'lock' in db.window.find_one({'status': 'open'})['error']
