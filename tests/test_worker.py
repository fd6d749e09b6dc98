"""What a worker does with a task."""

import asyncio
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import psutil
import pytest
from processes import started
from servers import eventually

import minibatch as mb
from minibatch import clock, connection, functions, ledger, producer, store
from minibatch.backlog import Limits
from minibatch.connection import Target
from minibatch.encoding import encode
from minibatch.errors import WorkersError
from minibatch.executors import InlineExecutor
from minibatch.marshaller import Portable
from minibatch.models import Window
from minibatch.store import Span
from minibatch.testing import ListSink
from minibatch.worker import Pool, Task, Work


@pytest.fixture
def target(url, db):
    """A stream with 10 messages in a record batch, and 10 more one by one."""
    target = Target(url, db.name)
    store.ensure_indexes(target.db)
    write(target, 0, 10)
    for offset in range(10, 20):
        write(target, offset, 1)
    return target


def write(target, offset, n):
    datas = [encode({'v': v}) for v in range(offset, offset + n)]
    store.insert_records(target.db.buffer, [store.record_batch('s', 'a', offset, datas, [clock.now()] * n, [None] * n)])


def work(number, *spans):
    return Work(ledger.window_id('s', 'g', number), number, clock.now(), None, None, 1, [Span(*span) for span in spans])


def do(target, fn, *works, returns=True):
    return Task(target, 's', None if fn is None else Portable(fn), list(works), returns)()


def values(window):
    return [data['v'] for data in window.data]


def test_the_windows_of_a_task_each_get_their_messages(target):
    outcomes = do(target, values, work(1, ('a', 0, 3)), work(2, ('a', 3, 12)), work(3, ('a', 12, 20)))
    assert [outcome.value for outcome in outcomes] == [list(range(3)), list(range(3, 12)), list(range(12, 20))]


def test_the_windows_of_a_task_are_read_at_once(target, monkeypatch):
    reads = []
    real = store.read_records
    monkeypatch.setattr(store, 'read_records', lambda *args: reads.append(args[2]) or real(*args))
    do(target, values, *(work(i, ('a', i, i + 1)) for i in range(20)))
    assert reads == [Span('a', 0, 20)]


def test_windows_of_interleaved_messages_are_read_at_once(target, monkeypatch):
    reads = []
    real = store.read_records
    monkeypatch.setattr(store, 'read_records', lambda *args: reads.append(args[2]) or real(*args))
    works = [work(key, *(('a', at, at + 1) for at in range(key, 20, 4))) for key in range(4)]
    outcomes = do(target, values, *works)
    assert [outcome.value for outcome in outcomes] == [list(range(key, 20, 4)) for key in range(4)]
    assert reads == [Span('a', 0, 20)]


def test_what_a_function_does_to_a_message_is_not_seen_in_the_next_window_that_has_it(target):
    def double(window):
        for data in window.data:
            data['v'] *= 2
        return values(window)

    overlapping = work(1, ('a', 0, 4)), work(2, ('a', 2, 12)), work(3, ('a', 10, 12))
    outcomes = do(target, double, *overlapping)
    assert [outcome.value for outcome in outcomes] == [[0, 2, 4, 6], [v * 2 for v in range(2, 12)], [20, 22]]


def test_stretches_that_are_far_apart_are_read_one_by_one(target, monkeypatch):
    monkeypatch.setattr(store, 'NEAR', 2)
    outcomes = do(target, values, work(1, ('a', 1, 2), ('a', 4, 5), ('a', 8, 12)), work(2, ('a', 2, 3), ('a', 17, 18)))
    assert [outcome.value for outcome in outcomes] == [[1, 4, 8, 9, 10, 11], [2, 17]]


@pytest.mark.parametrize('result', [[], 0, '', {}, False])
def test_an_empty_result_is_a_result(target, result):
    (outcome,) = do(target, lambda window: result, work(1, ('a', 0, 3)))
    assert (outcome.value, outcome.error) == (result, '')


def test_none_and_a_window_mean_the_data_of_the_window(target):
    expected = [{'v': 0}, {'v': 1}]
    for fn in (lambda window: None, lambda window: window, lambda window: Window(stream='s', data=window.data), None):
        (outcome,) = do(target, fn, work(1, ('a', 0, 2)))
        assert outcome.value == expected


def test_without_a_sink_nothing_comes_back(target):
    (outcome,) = do(target, lambda window: threading.Lock(), work(1, ('a', 0, 2)), returns=False)
    assert (outcome.value, outcome.error) == (None, '')


def test_a_function_that_raises_fails_its_own_window_only(target):
    def fn(window):
        if window.number == 2:
            raise KeyError('lost')
        return window.number

    first, second, third = do(target, fn, *(work(i, ('a', i, i + 1)) for i in (1, 2, 3)))
    assert (first.value, third.value) == (1, 3)
    assert second.error == "KeyError: 'lost'"
    assert 'in fn' in second.traceback
    assert 'worker.py"' not in second.traceback.replace('test_worker.py"', '')
    assert second.by_function


def test_a_function_that_exits_is_a_failure(target):
    (outcome,) = do(target, lambda window: exit(3), work(1, ('a', 0, 1)))
    assert outcome.error.startswith('SystemExit')


def test_a_result_that_cannot_be_pickled_fails_its_own_window_only(target):
    fn = Portable(lambda window: threading.Lock() if window.number == 1 else 'fine')
    task = pickle.loads(pickle.dumps(Task(target, 's', fn, [work(1, ('a', 0, 1)), work(2, ('a', 1, 2))], True)))
    first, second = task()
    assert 'cannot be pickled' in first.error
    assert second.value == 'fine'


def test_messages_that_were_deleted_are_counted_as_missing(target):
    store.delete_records(target.majority, 's', Span('a', 0, 10))
    (outcome,) = do(target, values, work(1, ('a', 5, 15)))
    assert (outcome.value, outcome.missing) == (list(range(10, 15)), 5)


def test_a_window_whose_messages_are_all_gone_does_not_reach_the_function(target):
    store.delete_records(target.majority, 's', Span('a', 0, 10))
    (outcome,) = do(target, lambda window: 1 / 0, work(1, ('a', 0, 5)))
    assert (outcome.error, outcome.missing) == ('', 5)


def test_messages_that_a_new_primary_does_not_see_yet_are_read_when_it_does(target, monkeypatch):
    read, reads = store.read_records, []

    def not_yet(db, stream, span, session=None):
        reads.append(session)
        return [] if session is None else read(db, stream, span, session)

    monkeypatch.setattr(store, 'read_records', not_yet)
    (outcome,) = do(target, values, work(1, ('a', 0, 10)))
    assert (outcome.value, outcome.missing) == (list(range(10)), 0)
    assert reads[-1].operation_time is not None, 'without it the session may see less than was written'


def test_a_pool_whose_workers_died_is_made_anew(target):
    with Pool(1, None) as pool:
        died = pool.submit(lambda: os._exit(1))
        with pytest.raises(Exception, match='terminated'):
            died.result()
        assert pool.submit(os.getpid).result() != os.getpid()


def test_ctrl_c_reaches_the_parent_only(target):
    import signal

    with Pool(1, None) as pool:
        handler = pool.submit(lambda: signal.getsignal(signal.SIGINT)).result()
    assert handler == signal.SIG_IGN


def test_workers_have_ended_when_the_pool_is_closed(target):
    with Pool(2, None) as pool:
        pid = pool.submit(os.getpid).result()
    eventually(lambda: not psutil.pid_exists(pid), message='the worker lives on')


class Abroad(InlineExecutor):
    """Its workers find another database at the same address, as those of another machine may at localhost."""

    def submit(self, fn):
        task = pickle.loads(pickle.dumps(fn))
        task.target = Target(task.target.url, task.target.dbname + '_abroad')
        return super().submit(task)


@pytest.fixture
def abroad(url, db):
    """Append messages in the other database, as if they were the first ones of the stream here."""
    name = f'{db.name}_abroad'

    def append(count):
        mb.stream('s', url=url.replace(db.name, name)).append_many({'v': v} for v in range(count))
        db.client[name].buffer.update_many({}, {'$set': {'producer': db.buffer.find_one()['producer']}})
    yield append
    db.client.drop_database(name)


@pytest.mark.parametrize('there', [None, 5])
def test_a_worker_that_reads_another_mongodb_ends_its_consumer_and_no_message_is_lost(url, abroad, there):
    stream = mb.stream('s', url=url)
    stream.append_many({'v': v} for v in range(10))
    if there:
        abroad(there)
    emitter = mb.make_emitter('s', len, stream=stream, size=10, executor=Abroad())
    with pytest.raises(WorkersError, match=r'does not find (5|10) messages .* is another MongoDB there'):
        emitter.run(blocking=False)
    assert not stream.group().expired
    seen = []
    mb.make_emitter('s', lambda window: seen.extend(window.data), stream=stream, size=10, executor='inline').run(
        blocking=False
    )
    assert seen == [{'v': v} for v in range(10)]


def test_each_thread_of_a_worker_means_the_database_of_the_consumer_that_it_works_for(target):
    begun, go = threading.Event(), threading.Event()
    there = Target(target.url, 'another')

    def first(window):
        begun.set()
        assert go.wait(20)
        return connection.target().dbname

    def sent(default, fn):
        task = Task(target, 's', Portable(fn), [work(1, ('a', 0, 10))], True)
        task.default, task.remote = default, True
        return task

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(sent(target, first))
        assert begun.wait(20)
        two = threads.submit(sent(there, lambda window: connection.target().dbname)).result()
        go.set()
        assert [outcome.value for outcome in [*one.result(), *two]] == [target.dbname, 'another']


def test_models_in_a_worker_mean_the_database_that_their_parent_opened_first(target, monkeypatch):
    connection.disconnect()
    mb.stream('s', url=target.url)
    sent = pickle.dumps(Task(target, 's', Portable(lambda window: mb.Buffer.objects.count()), [work(1)], True))
    connection.disconnect()  # as a worker begins
    monkeypatch.setenv('MINIBATCH_MONGO_URL', 'mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=1')
    assert [outcome.value for outcome in pickle.loads(sent)()] == [11]


@pytest.mark.parametrize('remote', [True, False])
@pytest.mark.parametrize('kind', ['plain', 'async', 'generator'])
def test_a_window_is_done_when_what_its_function_has_queued_is_stored(target, remote, kind):
    out = mb.stream('out', url=target.url, batchsize=100, linger=1000)

    def plain(window):
        out.append({'v': 1})

    async def later(window):
        await asyncio.sleep(0)
        out.append({'v': 1})

    def generator(window):
        yield out.append({'v': 1})

    fn = {'plain': plain, 'async': later, 'generator': generator}[kind]
    task = Task(target, 's', Portable(fn), [work(1, ('a', 0, 5)), work(2, ('a', 5, 10))], False)
    task = pickle.loads(pickle.dumps(task)) if remote else task
    assert [outcome.error for outcome in task()] == ['', '']
    assert [doc.n for doc in out.buffer()] == [2]


def test_windows_fail_if_what_their_functions_have_queued_cannot_be_stored(target, monkeypatch):
    monkeypatch.setattr(producer, '_registry', {})  # else the process waits for it at its end
    away = mb.Stream(name='away').bound_to(Target('mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=50', 'db'))
    away._batchsize, away._limits = 100, Limits(timeout=0.1)

    def fn(window):
        away.append({'v': 1})
        return 1 / (values(window)[0])

    zero, five = do(target, fn, work(1, ('a', 0, 5)), work(2, ('a', 5, 10)))
    assert 'ZeroDivisionError' in zero.error
    assert ('UnconfirmedError' in five.error, five.by_function) == (True, False)


def test_an_executor_of_ones_own_is_given_no_more_than_workers_says(url):
    stream, meeting, met, sink = mb.stream('s', url=url), threading.Barrier(2), [], ListSink()
    stream.append_many({'v': v} for v in range(100))

    def fn(window):
        with suppress(threading.BrokenBarrierError):
            meeting.wait(1)  # for another call at the same time
            met.append(window.number)
        return window.data[0]['v']

    with ThreadPoolExecutor(4) as threads:
        mb.make_emitter('s', fn, stream=stream, size=1, executor=threads, workers=1, sink=sink).run(blocking=False)
    assert met == []
    assert sink == list(range(100))


class Arriving(InlineExecutor):
    """Its workers come when it was asked for them a few times."""

    def __init__(self, asked):
        self.asked = asked

    @property
    def workers(self):
        self.asked -= 1
        return int(self.asked < 0)


def test_one_run_waits_for_workers_that_are_about_to_come(url):
    stream, sink = mb.stream('s', url=url), ListSink()
    stream.append_many({'v': v} for v in range(10))
    emitter = mb.make_emitter('s', len, stream=stream, size=5, executor=Arriving(3), sink=sink)
    emitter.run(blocking=False)
    assert sink == [5, 5]


def test_one_run_without_any_worker_says_so(url, monkeypatch):
    monkeypatch.setattr('minibatch.planner.WORKERS_TIMEOUT', 0.3)
    stream = mb.stream('s', url=url)
    stream.append({'v': 0})
    with pytest.raises(WorkersError, match=r'has had no workers that fit for 0\.3 s'):
        mb.make_emitter('s', len, stream=stream, size=1, executor=Arriving(10**9)).run(blocking=False)


def test_a_consumer_says_that_it_waits_for_workers(url, monkeypatch, caplog):
    monkeypatch.setattr('minibatch.planner.WORKERS_PATIENCE', 0.2)
    stream = mb.stream('s', url=url)
    stream.append({'v': 0})
    with started(mb.make_emitter('s', len, stream=stream, size=1, executor=Arriving(10**9))):
        eventually(lambda: 'waiting for workers' in caplog.text)


class WordlessError(Exception):
    def __str__(self):
        raise RuntimeError('no text')


class Strict:
    """A sink that takes nothing."""

    def put(self, result):
        raise ValueError('not this: \udcff')


@pytest.mark.parametrize('executor', ['inline', 'processes'])
@pytest.mark.parametrize(('error', 'said'), [
    (WordlessError(), 'WordlessError: (its text cannot be had: RuntimeError)'),
    (ValueError('bad \udcff text'), 'ValueError: bad \\udcff text'), (None, 'sink: ValueError: not this: \\udcff'),
])
def test_whatever_an_error_says_its_window_becomes_a_dead_letter(url, executor, error, said):
    def fn(window):
        if error is not None:
            raise error

    stream = mb.stream('s', url=url)
    stream.append({'v': 0})
    mb.make_emitter(
        's', fn, stream=stream, size=1, executor=executor, workers=1, max_attempts=1, sink=Strict()
    ).run(blocking=False)
    (dead,) = stream.dead_letters()
    assert dead.error == said


def test_a_function_that_fails_on_what_another_mongodb_has_is_not_to_blame(url, abroad):
    def whole(window):
        assert len(window.data) == 5

    stream = mb.stream('s', url=url)
    stream.append_many({'v': v} for v in range(5))
    abroad(4)
    emitter = mb.make_emitter('s', whole, stream=stream, size=5, executor=Abroad(), max_attempts=1)
    with pytest.raises(WorkersError, match='does not find 1 messages'):
        emitter.run(blocking=False)
    assert not stream.dead_letters()


# --- what functions leave and start


@pytest.mark.parametrize('method', [None, *multiprocessing.get_all_start_methods()])
def test_a_function_can_start_processes_in_every_way(method):
    def starts(method):
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            (length,) = pool.map(len, ['ab'])
        process = context.Process(target=len, args=('ab',))
        process.start()
        process.join()
        return length, process.exitcode

    with Pool(1, None) as pool:
        assert pool.submit(partial(starts, method)).result(60) == (2, 0)


def leaves_a_thread():
    import threading

    threading.Thread(target=threading.Event().wait).start()
    return os.getpid()


def test_a_pool_ends_also_when_a_function_has_left_a_thread(monkeypatch, caplog):
    monkeypatch.setattr('minibatch.worker.END_TIMEOUT', 0.5)
    with Pool(2, None) as pool:
        pid = pool.submit(leaves_a_thread).result(60)
    eventually(lambda: not psutil.pid_exists(pid), message='the worker lives on')
    assert 'workers did not end' in caplog.text


def test_a_signal_while_workers_end_kills_those_that_do_not():
    workers = []

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def interrupt_end(executor):
        eventually(lambda: executor._flags.shutdown)
        os.kill(os.getpid(), signal.SIGUSR1)

    def run():
        with Pool(1, None) as pool:
            workers.append(psutil.Process(pool.submit(leaves_a_thread).result(60)))
            threading.Thread(target=interrupt_end, args=(pool._executor,)).start()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        eventually(lambda: not workers[0].is_running(), message='the worker lives on')
    finally:
        signal.signal(signal.SIGUSR1, before)
        with suppress(psutil.NoSuchProcess):
            workers[0].kill()


def test_a_worker_ends_by_itself_when_a_function_has_left_a_pool_of_processes_open(monkeypatch, caplog):
    def leaves_a_pool():
        from concurrent.futures import ProcessPoolExecutor

        multiprocessing.current_process().held = pool = ProcessPoolExecutor(1)
        return pool.submit(os.getpid).result()

    monkeypatch.setattr('minibatch.worker.END_TIMEOUT', 30)
    with Pool(1, None) as pool:
        pid = pool.submit(leaves_a_pool).result(60)
    eventually(lambda: not psutil.pid_exists(pid), message='the process of the pool lives on')
    assert 'workers did not end' not in caplog.text


def test_the_event_loop_of_a_worker_is_closed_when_it_ends(tmp_path):
    async def leaves_a_task(path):
        async def hold():
            try:
                await asyncio.Event().wait()
            finally:
                with open(path, 'w') as file:
                    file.write('cleaned up')

        asyncio.current_task().held = asyncio.create_task(hold())
        await asyncio.sleep(0)

    with Pool(1, None) as pool:
        pool.submit(partial(functions.call, partial(leaves_a_task, tmp_path / 'seen'))).result(60)
    assert (tmp_path / 'seen').read_text() == 'cleaned up'


STARTS = """import minibatch as mb
import minibatch.testing
from minibatch.testing import ListSource

def work(window):
    import lazy
    return [emitter._thread is not None, round_done, attached, lazy.emitter._thread is not None]

stream = mb.stream('other')
stream.append({'v': 0})
emitter = mb.make_emitter('s', work, size=1, workers=1, sink=mb.testing.ListSink())
emitter.start()
done = mb.testing.ListSink()
mb.make_emitter('other', len, size=1, executor='inline', sink=done).run(blocking=False)
round_done = bool(done)
source = ListSource([{'v': 1}])
stream.attach(source, background=False)
attached = bool(source.position)
"""
LAZY = """import minibatch as mb
emitter = mb.make_emitter('s', len, size=1, executor='inline')
emitter.start()
"""


def test_what_a_module_starts_at_its_top_level_is_not_started_by_a_worker_that_imports_it(url, tmp_path, monkeypatch):
    (tmp_path / 'starts_consumers.py').write_text(STARTS)
    (tmp_path / 'lazy.py').write_text(LAZY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    import starts_consumers as module

    try:
        assert (module.round_done, module.attached) == (True, True), 'but here it is'
        mb.stream('s').append({'v': 0})
        eventually(lambda: module.emitter.sink, 30)
        assert module.emitter.sink == [[False, False, False, False]]
    finally:
        module.emitter.stop()
        sys.modules.pop('starts_consumers')


def test_a_process_that_is_spawned_and_imports_a_module_for_its_target_starts_no_consumer(url, tmp_path, monkeypatch):
    (tmp_path / 'spawned.py').write_text(LAZY + 'def target(queue): queue.put(emitter._thread is not None)\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    import spawned

    try:
        context = multiprocessing.get_context('spawn')
        queue = context.Queue()
        process = context.Process(target=spawned.target, args=(queue,))
        process.start()
        assert queue.get(timeout=30) is False
        process.join(30)
        assert spawned.emitter._thread.is_alive(), 'but here it is'
    finally:
        spawned.emitter.stop()
        sys.modules.pop('spawned')
