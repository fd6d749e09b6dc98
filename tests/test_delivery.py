"""What every consumer is promised, on a real MongoDB, while nothing fails."""
from __future__ import annotations

import concurrent.futures
import multiprocessing
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import Any

import bson
import pytest
from processes import (
    Seen,
    appended,
    consumer,
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
from minibatch import connection, store
from minibatch.errors import ArgumentError, GroupConflictError, PortabilityError
from minibatch.models import Buffer
from minibatch.testing import InlineExecutor
from minibatch.window import WindowEmitter


@pytest.fixture
def stream(url: str) -> mb.Stream:
    return mb.stream('test', url=url)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """connectdb, for this test only."""
    monkeypatch.setattr(connection, '_default', None)
    return mb.connectdb


def emitter_of(stream: mb.Stream, fn: Any = note, **options: Any) -> WindowEmitter:
    return mb.make_emitter(stream.name, fn, stream=stream, **{'executor': InlineExecutor, **options})


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


def test_short_windows_behind_a_message_of_60_days_ago_come_at_once(stream, db):
    now = datetime.now(timezone.utc)
    write_at(db, 'test', [now - timedelta(days=60), now - timedelta(days=1)])
    with consumer(stream.target.url, 'test', interval=0.1, relaxed=False, emit_empty=False, workers=1) as process:
        eventually(lambda: db.seen.count_documents({}) == 2)
        terminate(process)


@pytest.mark.parametrize('hours', [-1, 1])
@pytest.mark.parametrize('options', [{'interval': 0.5, 'relaxed': False}, {'interval': 0.5}])
def test_messages_of_a_producer_whose_clock_is_wrong_come_now(stream, db, hours, options):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, **options)):
        for turn in range(3):
            wrong = datetime.now(timezone.utc) + timedelta(hours=hours, seconds=turn)
            write_at(db, 'test', [wrong] * 5, first=5 * turn)
            appended(stream, 1, 5 * turn, 5 * turn + 5)
            eventually(lambda: seen.count() == 10 * turn + 10)  # noqa: B023
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
    first = emitter_of(stream, size=10, group='one', sink=one)
    second = emitter_of(stream, size=10, group='two', sink=two)
    assert first._run_once() == second._run_once() == 0
    appended(stream, 0, 0, 100)
    assert first._run_once() == 10
    assert stream.buffer().count() == 1
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


def test_one_emitter_that_runs_in_two_forked_processes_leads_in_one_of_them(url, db, tmp_path):
    log = tmp_path / 'log'
    with log.open('w') as stderr, running('-c', TWICE, url, stderr=stderr):
        eventually(lambda: 'standing by' in log.read_text() or 'taken over' in log.read_text())
        appended(mb.stream('test', url=url), 0, 0, 10)
        eventually(lambda: seen_count(db) == 10)
        assert db.group.find_one()['lease']['epoch'] == 1


TWICE = """
import logging, multiprocessing, sys
import minibatch as mb

logging.basicConfig(level=logging.INFO)
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
    assert stream.buffer().count() == stream.window(status__ne='void').count() == 0
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
    """Fails at the first attempt of each window, and waits at later ones until it may go on."""

    def __init__(self) -> None:
        self.attempts: list[tuple[int, int]] = []
        self.may_go_on = threading.Event()
        self.seen = Seen()

    def put(self, result):
        self.attempts.append((result['number'], result['attempt']))
        if result['attempt'] == 1:
            raise OSError('the sink is full')
        assert self.may_go_on.wait(60)
        self.seen.put(result)


def test_a_window_whose_sink_fails_is_tried_again_and_nothing_is_lost(stream, db):
    sink = FailingSink()
    appended(stream, 0, 0, 30)
    with started(emitter_of(stream, size=10, sink=sink)):
        eventually(
            lambda: db.window.find_one({'number': 1, 'attempts': 2, 'error': {'$regex': 'the sink is full'}})
        )
        sink.may_go_on.set()
        eventually(lambda: sink.seen.count() == 30 and not db.buffer.count_documents({}))
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


@pytest.mark.parametrize('executor', [InlineExecutor, None])
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


# --- where the function runs


def double(window):
    return [2 * data['a'] for data in window.data]


@pytest.mark.parametrize('make', [
    lambda: concurrent.futures.ThreadPoolExecutor,
    lambda: concurrent.futures.ThreadPoolExecutor(2),
    lambda: concurrent.futures.ProcessPoolExecutor,
    lambda: concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn')),
    lambda: InlineExecutor,
    InlineExecutor,
    lambda: None,
], ids=['threads', 'threads made', 'processes', 'processes made', 'inline', 'inline made', 'default'])
def test_any_executor_runs_functions_lambdas_and_builtins(stream, make):
    for fn, expected in ((double, [2, 4]), (lambda window: [7 * data['a'] for data in window.data], [7, 14]), (len, 2)):
        seen = []
        stream.append_many([{'a': 1}, {'a': 2}])
        executor = make()
        assert emitter_of(stream, fn, size=2, executor=executor, sink=ListSink(seen))._run_once() == 1
        assert seen == [expected]
        if isinstance(executor, concurrent.futures.Executor):
            executor.shutdown()


def test_a_function_that_cannot_travel_is_refused_at_once_naming_the_variable(stream):
    held = threading.Lock()
    with pytest.raises(PortabilityError, match="'held'"):
        mb.make_emitter('test', lambda window: held.locked(), stream=stream, size=1)
    script = 'import threading\nlock = threading.Lock()\ndef process(window): lock.locked()'
    names: dict[str, Any] = {'__name__': '__main__'}
    exec(script, names)  # as a script, whose functions travel by value
    with pytest.raises(PortabilityError, match="'lock'"):
        mb.streaming('test', names['process'], stream=stream, size=1)


THREE_LINES = """import minibatch as mb
@mb.streaming('test', size=2)
def process(window): print(window.data)
"""


@pytest.mark.parametrize('blocking', [True, False])
def test_a_script_of_three_lines_is_not_run_by_its_workers(stream, tmp_path, monkeypatch, blocking):
    monkeypatch.setenv('MINIBATCH_MONGO_URL', stream.target.url)
    script = tmp_path / 'script.py'
    script.write_text(THREE_LINES.replace('2)', f'2, blocking={blocking})') + 'print("end")\n')
    stream.append_many({'a': a} for a in range(5))
    with running(str(script), stdout=subprocess.PIPE) as process:
        lines = []
        if blocking:
            lines += [process.stdout.readline(), process.stdout.readline()]
            terminate(process)
        lines += process.stdout.readlines()
        assert process.wait(10) == 0
    assert sorted(lines[:2]) == ["[{'a': 0}, {'a': 1}]\n", "[{'a': 2}, {'a': 3}]\n"]
    assert lines[2:] == ['end\n']


def test_a_print_is_a_function_for_windows(stream, capfd):
    stream.append({'a': 1})
    assert emitter_of(stream, print, size=1, executor=None, workers=1)._run_once() == 1
    assert capfd.readouterr().out == '<window test/default/000000000001 with 1 messages>\n'


def test_a_function_in_a_worker_appends_to_another_stream_of_the_connected_database(url, db):
    with running('-c', CHAINED, url) as process:
        assert process.wait(30) == 0
    assert [doc['data']['a'] for doc in db.buffer.find({'stream': {'$in': ['second', 'third']}})] == [1, 1]


CHAINED = """
import os, sys
import minibatch as mb

os.environ['MINIBATCH_MONGOD'] = '/does/not/exist'  # there is no embedded server to fall back to
mb.connectdb(sys.argv[1])
third = mb.stream('third')

def process(window):
    mb.stream('second').append(window.data[0])
    third.append(window.data[0])

mb.stream('first').append({'a': 1})
mb.streaming('first', process, size=1, workers=1, blocking=False)
"""


# --- stopping


@pytest.mark.parametrize('make', [
    lambda: multiprocessing.get_context('spawn').Queue(), queue.Queue,
])
def test_a_true_item_in_the_queue_stops_the_loop(stream, make):
    items = make()
    seen = Seen()
    thread = threading.Thread(target=emitter_of(stream, size=1, queue=items, sink=seen).run)
    thread.start()
    try:
        items.put(False)
        appended(stream, 0, 0, 5)
        eventually(lambda: seen.count() == 5)
    finally:
        items.put(True)
        thread.join(20)
    assert not thread.is_alive()


def test_should_stop_can_be_overridden_and_stop_still_stops(stream):
    seen = Seen()
    emitter = emitter_of(stream, size=1, sink=seen)
    emitter.should_stop = lambda: len(seen) >= 3
    appended(stream, 0, 0, 3)
    emitter.run()
    assert len(seen) == 3
    emitter.should_stop = lambda: False
    with started(emitter):
        appended(stream, 0, 3, 6)
        eventually(lambda: seen.count() == 6)


def test_the_flag_stops_the_loop_and_start_starts_it_again(stream):
    seen = Seen()
    emitter = emitter_of(stream, size=1, sink=seen)
    for turn in range(3):
        emitter.start()
        appended(stream, 0, turn, turn + 1)
        eventually(lambda: seen.count() == turn + 1)  # noqa: B023
        with pytest.raises(ArgumentError, match='started already'):
            emitter.start()
        emitter._stop = True
        eventually(lambda: not emitter._thread.is_alive())


# --- messages of old


def old(number, processed=False):
    return {'stream': 'test', 'data': {'source': 0, 'seq': number}, 'processed': processed,
            'created': datetime(2020, 1, 1, tzinfo=timezone.utc)}


def test_a_database_of_the_old_format_is_read_to_the_end_in_order_while_more_comes(url, db, connect):
    db.stream.insert_one({'name': 'test', 'status': 'open', 'created': datetime(2020, 1, 1, tzinfo=timezone.utc),
                          'interval': 10, 'last_read': datetime(2020, 1, 1, tzinfo=timezone.utc)})
    db.buffer.insert_many([old(-1, processed=True) for _ in range(10)])
    db.buffer.insert_many([old(seq) for seq in range(2500)])
    seen = Seen()
    stream = mb.stream('test', url=url)
    connect(url)
    with started(emitter_of(stream, size=10, sink=seen)):
        eventually(lambda: seen.count() > 100)
        db.buffer.insert_many([old(seq) for seq in range(2500, 2800)])
        appended(stream, 1, 0, 100)
        for seq in range(2800, 2900):
            Buffer(stream='test', data={'source': 0, 'seq': seq}).save()
        eventually(lambda: seen.count() == 3000)
        eventually(lambda: db.buffer.count_documents({}) == 10)
    prove(seen.messages(), {0: 2900, 1: 100})


# --- several servers


def test_two_databases_work_side_by_side_in_one_process(url, standalone_url):
    streams = [mb.stream('test', url=each) for each in (url, standalone_url)]
    seen = [Seen(), Seen()]
    with ExitStack() as stack:
        for stream, sink in zip(streams, seen, strict=True):
            stack.enter_context(started(emitter_of(stream, size=10, sink=sink, keep=True)))
        for source, stream in enumerate(streams):
            appended(stream, source, 0, 100)
        eventually(lambda: seen[0].count() == seen[1].count() == 100)
    for source, stream in enumerate(streams):
        prove(seen[source].messages(), {source: 100})
        first = stream.window().order_by('number').first()
        assert first.data == [{'source': source, 'seq': seq} for seq in range(10)]
        assert stream.buffer().first().modify(processed=False)
        assert stream.buffer(processed=False).count() == 1
        stream.buffer().first().delete()
        first.delete()
        assert (stream.buffer().count(), stream.window().count()) == (0, 9)
        stream.window().delete()
        assert stream.window().count() == 0


def test_a_standalone_server_has_all_the_basics(standalone_url):
    stream = mb.stream('test', url=standalone_url)
    seen = Seen()
    with started(emitter_of(stream, size=10, executor=None, sink=seen, max_workers=1)):
        appended(stream, 0, 0, 50)
        eventually(lambda: seen.count() == 50)
        for seq in range(50, 100):
            stream.append({'source': 0, 'seq': seq})
        eventually(lambda: seen.count() == 100)
    prove(seen.messages(), {0: 100})
    assert stream.buffer().count() == 0


# --- emitters which pick messages


class SortedWindow(WindowEmitter):
    """Windows of `interval` even values, in their order."""

    def window_ready(self):
        found = Buffer.objects.no_cache().filter(processed=False)
        self._data = [obj for obj in sorted(found, key=lambda obj: obj.data['value']) if obj.data['value'] % 2 == 0]
        self._data = self._data[:self.interval]
        return len(self._data) == self.interval, ()

    def query(self, *args):
        return self._data


VALUES = [5, 8, 2, 4, 9, 0, 6, 1, 3, 7]


@pytest.mark.parametrize('executor', [InlineExecutor, None])
@pytest.mark.parametrize('how', ['single', 'batch', 'two producers'])
def test_an_emitter_picks_messages_out_of_order(stream, db, connect, standalone_url, executor, how):
    connect(standalone_url)  # the default is another database
    if how == 'single':
        for value in VALUES:
            stream.append({'value': value})
    if how == 'batch':
        stream.append_many({'value': value} for value in VALUES)
    if how == 'two producers':
        stream.append_many({'value': value} for value in VALUES[:5])
        append_as_another(db, VALUES[5:])
    seen = []
    emitter = emitter_of(stream, data_of, emitter=SortedWindow, interval=2, executor=executor, sink=ListSink(seen),
                         max_workers=1)
    with started(emitter):
        eventually(lambda: len(seen) == 2)
        stream.append({'value': 10})
        eventually(lambda: len(seen) == 3)
    assert seen == [[{'value': 0}, {'value': 2}], [{'value': 4}, {'value': 6}], [{'value': 8}, {'value': 10}]]
    assert sorted(obj.data['value'] for obj in stream.buffer()) == [1, 3, 5, 7, 9]
    assert stream.buffer(processed=True).count() == 0


def data_of(window):
    return window.data


def append_as_another(db, values):
    now = datetime.now(timezone.utc)
    datas = [bson.encode({'value': value}) for value in values]
    record = store.record_batch('test', 'another', 0, datas, [now] * len(datas), [None] * len(datas))
    assert store.insert_records(db.buffer, [record]) == (1, '')


def test_an_emitter_which_picks_marks_messages_with_keep(stream):
    seen = []
    stream.append_many({'value': value} for value in VALUES)
    emitter = emitter_of(stream, data_of, emitter=SortedWindow, interval=2, keep=True, sink=ListSink(seen))
    with started(emitter):
        eventually(lambda: len(seen) == 2)
        eventually(lambda: stream.buffer(processed=True).count() == 4)
    assert stream.buffer().count() == 10
    assert stream.window(processed=True).count() == 2


def test_beside_an_emitter_which_picks_there_is_no_other_group(stream):
    emitter_of(stream, emitter=SortedWindow, interval=2)._run_once()
    with pytest.raises(GroupConflictError):
        emitter_of(stream, size=2, group='another')._run_once()


def test_an_emitter_which_picks_does_not_pick_after_another_group(stream):
    emitter_of(stream, size=2, group='another')._run_once()
    with pytest.raises(GroupConflictError):
        emitter_of(stream, emitter=SortedWindow, interval=2)._run_once()


# --- first results


def test_the_first_window_reaches_the_sink_of_the_default_pool(stream):
    times = []

    class Stopwatch:
        def put(self, result):
            times.append(time.perf_counter() - began)
            emitter._stop = True

    appended(stream, 0, 0, 1)
    emitter = emitter_of(stream, size=1, executor=None, sink=Stopwatch())
    began = time.perf_counter()
    emitter.run()
    print(f'first result after {times[0]:.3f} s, stopped after {time.perf_counter() - began:.3f} s')
    assert len(times) == 1
