"""Dask as executor: on a LocalCluster of two processes, and on a scheduler and workers that are killed."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from functools import partial

import bson
import cloudpickle
import psutil
import pytest
import servers
from dask.distributed import Client, Status
from processes import consumer, kill, prove_once, seen_count, started, terminate
from pymongo import MongoClient
from servers_dask import Cluster, Meter, complete, local_cluster, nothing_left

import minibatch as mb
from minibatch import clock, marshaller, store
from minibatch.contracts import ExecutorContract
from minibatch.contrib.dask import DaskExecutor, WorkerLostError
from minibatch.errors import ArgumentError, PortabilityError
from minibatch.testing import ListSink

eventually = partial(servers.eventually, timeout=60)  # a cluster takes its time on a machine that is busy
for module in (sys.modules[__name__], servers):
    cloudpickle.register_pickle_by_value(module)  # the workers cannot import it


@pytest.fixture(scope='module')
def pair():
    with local_cluster() as pair:
        yield pair


@pytest.fixture
def address(pair):
    return complete(pair)


@pytest.fixture
def executor(address):
    executor = DaskExecutor(address)
    yield executor
    executor.shutdown()


@pytest.fixture
def client(address):
    with Client(address, set_as_default=False) as client:
        yield client


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as cluster:
        yield cluster


async def loop_of(window):
    return [os.getpid(), threading.get_ident()]


def raises_any(window):
    raise asyncio.CancelledError('why')


@pytest.fixture
def stream(url):
    with mb.stream('s', url=url) as stream:
        yield stream


def pid_of(window):
    return [os.getpid()]


class Pid:
    def __call__(self):
        return os.getpid()


class Sleep:
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        time.sleep(self.seconds)
        return os.getpid()


class TestDask(ExecutorContract):
    @pytest.fixture(autouse=True)
    def servers(self, url, address, client):
        self.url, self.address = url, address

    def make(self):
        return DaskExecutor(self.address)


# --- arguments


def test_the_scheme_of_dask_is_registered_and_nothing_connects_before_it_must():
    assert mb.make_emitter('s', len, size=1, executor='dask://127.0.0.1:1').executor == 'dask://127.0.0.1:1'


@pytest.mark.parametrize('address', ['dask://127.0.0.1', 'dask://host:abc', '', 'host:8786', 'dask://', None, 7])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ArgumentError, match='scheduler must be an address like dask://host:8786'):
        DaskExecutor(address)


@pytest.mark.parametrize('resources', [{'GPU': 0}, {'GPU': 'one'}, ['GPU'], 'GPU', 1])
def test_resources_are_numbers(resources):
    with pytest.raises(ArgumentError, match='resources'):
        DaskExecutor('dask://host:8786', resources=resources)


def test_a_timeout_is_refused_beside_dask():
    with pytest.raises(ArgumentError, match='timeout'):
        mb.make_emitter('s', len, size=1, executor='dask://host:8786', timeout=3)


def test_a_scheduler_that_is_not_there_is_an_error_with_its_address(stream, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.dask.CONNECT_TIMEOUT', 0.5)
    before = threads_of_clients()
    emitter = mb.make_emitter('s', len, stream=stream, size=1, executor='dask://127.0.0.1:1')
    with pytest.raises(ConnectionError, match=r'no Dask scheduler answers at tcp://127\.0\.0\.1:1:'):
        emitter.run(blocking=False)
    assert threads_of_clients() == before


def test_without_distributed_it_says_what_to_install():
    program = "import sys; sys.modules['dask'] = None; import minibatch.contrib.dask"
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert "pip install '.[dask]'" in done.stderr


# --- what goes where


def test_an_address_is_all_a_consumer_needs(stream, address, client):
    sink = ListSink()
    stream.append_many({'i': i} for i in range(100))
    mb.make_emitter('s', pid_of, stream=stream, size=5, sink=sink, executor=address.replace('tcp', 'dask')).run(
        blocking=False
    )
    workers = set(client.run(os.getpid).values())
    assert len(sink) == 20
    assert {pid for (pid,) in sink} == workers
    nothing_left(client)


def test_a_function_on_a_cluster_appends_to_the_stream_it_refers_to(stream, db, executor):
    out = mb.stream('out', url=stream.target.url, batchsize=100, linger=1000)
    mb.connectdb(stream.target.url.replace(db.name, f'{db.name}_unused'))
    stream.append_many({'i': i} for i in range(20))
    emitter = mb.make_emitter(
        's', lambda window: out.append({'i': len(window)}), stream=stream, size=5, executor=executor
    )
    emitter.run(blocking=False)
    assert sum(record.n for record in out.buffer()) == 4
    assert f'{db.name}_unused' not in db.client.list_database_names()


def test_async_functions_run_in_one_event_loop_of_each_thread_and_whatever_is_raised_is_an_attempt(
    stream, address, client
):
    sink, options = ListSink(), {'size': 1, 'workers': 1, 'executor': address.replace('tcp', 'dask'), 'keep': True}
    stream.append_many({'i': i} for i in range(4))
    mb.make_emitter('s', loop_of, stream=stream, sink=sink, **options).run(blocking=False)
    assert len(sink) == 4
    threads = sum(client.nthreads().values())
    assert len(set(map(tuple, sink))) <= threads
    options.update(max_attempts=1, group='raises')
    mb.make_emitter('s', raises_any, stream=stream, sink=ListSink(), **options).run(blocking=False)
    assert {dead.error for dead in stream.dead_letters()} == {'CancelledError: why'}


def test_a_client_says_where_the_scheduler_is_and_may_be_closed(address):
    with Client(address, set_as_default=False) as client:
        executor = DaskExecutor(client)
        assert executor.submit(Pid()).result() != os.getpid()
    assert executor.submit(Pid()).result() != os.getpid()
    executor.shutdown()


def test_a_client_as_executor_keeps_the_promises_and_is_not_closed(stream, address, client, monkeypatch):
    monkeypatch.setattr(client, 'submit', None)
    before, sink = threads_of_clients(), ListSink()
    stream.append_many({'i': i} for i in range(10))
    mb.make_emitter('s', pid_of, stream=stream, size=1, sink=sink, executor=client).run(blocking=False)
    assert {pid for (pid,) in sink} <= set(client.run(os.getpid).values())
    assert len(sink) == 10
    assert threads_of_clients() == before


def test_a_client_that_is_closed_is_refused(address):
    with Client(address, set_as_default=False) as client:
        pass
    with pytest.raises(ArgumentError, match='a Client that is connected'):
        DaskExecutor(client)


def test_calls_are_in_order_with_one_worker(stream, executor):
    sink = ListSink()
    stream.append_many({'i': i} for i in range(40))

    def seen(window):
        time.sleep(0.02 if window.number % 2 else 0)
        return window.number

    mb.make_emitter('s', seen, stream=stream, size=1, workers=1, sink=sink, executor=executor).run(blocking=False)
    assert sink == list(range(1, 41))


def test_each_worker_gets_two_tasks_a_thread_and_no_more(executor, client):
    assert executor.workers == 2
    done = [executor.submit(Sleep(0.2)) for _ in range(10)]
    seen = [0]
    while not all(completion.done() for completion in done):
        seen += map(len, client.processing().values())  # of each worker; what is done may be known there for a while
    assert max(seen) == 2
    assert len({completion.result() for completion in done}) == 2


@pytest.mark.parametrize('batch', [True, False])
def test_a_task_with_a_hundred_thousand_messages_is_small(stream, batch, executor):
    fill(stream, 100_000, batch)
    sizes, submit = [], executor.submit
    executor.submit = lambda task: sizes.append(len(task.packed(False))) or submit(task)
    sink = ListSink()
    mb.make_emitter('s', len, stream=stream, size=100_000, sink=sink, executor=executor).run(blocking=False)
    assert sink == [100_000]
    assert len(sizes) == 1
    assert sizes[0] < 2000


def fill(stream, number, batch):
    if batch:
        stream.append_many({'i': i, 'pad': 'x' * 50} for i in range(number))
        return
    now = clock.now()
    for first in range(0, number, 1000):
        records = [store.record_batch('s', 'p', offset, [bson.encode({'i': offset})], [now], [None])
                   for offset in range(first, first + 1000)]  # fmt: skip
        store.insert_records(stream.target.db.buffer, records)


def test_neither_messages_nor_results_nor_the_function_again_cross_the_scheduler(stream, cluster):
    ballast = os.urandom(500_000)

    def result(window):
        return [data['pad'] for data in window.data] if ballast else None

    with Meter(cluster.port) as meter:
        cluster.start_workers(1, scheduler=meter.address)
        executor, sink = DaskExecutor(meter.address), ListSink()
        assert executor.submit(Pid()).result()
        before = meter.bytes
        stream.append_many({'i': i, 'pad': 'x' * 100} for i in range(100_000))
        mb.make_emitter('s', result, stream=stream, size=5000, sink=sink, executor=executor).run(blocking=False)
        crossed = meter.bytes - before
        executor.shutdown()
    assert sum(map(len, sink)) == 100_000
    # The function goes through the proxy twice for each of the first two tasks: to the scheduler, and to the worker.
    assert crossed < 4 * len(ballast) + 500_000


def test_a_worker_that_has_forgotten_the_function_is_sent_it_again(stream, executor, client):
    sink = ListSink()
    emitter = mb.make_emitter('s', pid_of, stream=stream, size=1, sink=sink, executor=executor)
    with started(emitter):
        for count in (10, 20):
            stream.append_many({'i': i} for i in range(10))
            eventually(lambda count=count: len(sink) == count)
            client.run(forget)
    assert not stream.dead_letters()


def forget():
    marshaller._loaded.clear()


def test_a_worker_keeps_so_many_functions_and_no_more(monkeypatch):
    monkeypatch.setattr(marshaller, '_loaded', OrderedDict())
    portables = [marshaller.Portable(lambda i=i: i) for i in range(2 * marshaller.MAX_LOADED)]
    assert [pickle.loads(pickle.dumps(portable))() for portable in portables] == list(range(len(portables)))
    assert len(marshaller._loaded) == marshaller.MAX_LOADED


def test_the_password_of_the_url_is_in_no_key_log_or_event(mongod, url, cluster):
    name, secret = url.rpartition('/')[2].partition('?')[0], 'verysecret'
    mongod.client[name].command('createUser', 'me', pwd=secret, roles=['readWrite'])
    with_password = url.replace('mongodb://', f'mongodb://me:{secret}@')
    cluster.start_workers(1)

    def fails(window):
        raise ValueError('oops')

    with mb.stream('s', url=with_password) as stream:
        stream.append_many({'i': i} for i in range(3))
        executor = DaskExecutor(cluster.address)
        emitter = mb.make_emitter('s', fails, stream=stream, size=1, executor=executor, max_attempts=1)
        emitter.run(blocking=False)
        assert len(stream.dead_letters()) == 3
        raises = partial(max, [1, 2], key=secret)  # Dask logs what it runs when it raises, down to 1000 characters
        assert isinstance(completion_error(executor.submit(raises)), TypeError)
        with cluster.asked() as client:
            said = [str(client.get_events()), str(client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks))]
        executor.shutdown()
    eventually(lambda: 'Compute Failed' in cluster.log, message='the test needs what Dask logs of a failed task')
    for text in (*said, cluster.log, repr(executor)):
        assert secret not in text
    mongod.client[name].command('dropUser', 'me')


def test_a_function_that_workers_cannot_load_ends_the_consumer(stream, executor, tmp_path, monkeypatch):
    (tmp_path / 'only_here.py').write_text('def fn(window): return 1')
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    stream.append({'i': 1})
    emitter = mb.make_emitter('s', only_here.fn, stream=stream, size=1, executor=executor)
    with pytest.raises(PortabilityError, match=r"cannot be loaded .* No module named 'only_here'"):
        emitter.run(blocking=False)
    assert stream.target.db.window.find_one()['attempts'] == 1


@pytest.fixture
def without(tmp_path):
    """A PYTHONPATH on which minibatch is not found."""
    folder = tmp_path / 'without'
    folder.mkdir()
    (folder / 'minibatch.py').write_text('raise ImportError("this is not minibatch")')
    return str(folder)


def test_a_worker_without_minibatch_ends_the_consumer_which_says_what_to_install(stream, cluster, without, caplog):
    cluster.path = without
    cluster.start_workers(1)
    stream.append_many({'i': i} for i in range(10))
    with pytest.raises(PortabilityError, match=r'this is not minibatch\. Install minibatch, and what the func'):
        mb.make_emitter('s', len, stream=stream, size=1, executor=cluster.address).run(blocking=False)
    assert {window['status'] for window in stream.target.db.window.find()} == {'open'}
    assert 'a worker was lost' not in caplog.text


@pytest.mark.parametrize('direct', [True, False])
def test_a_scheduler_needs_no_minibatch(direct, stream, cluster, without):
    path, cluster.path = cluster.path, without
    cluster.end_scheduler()
    cluster.start_scheduler()
    cluster.path = path
    cluster.start_workers(1)
    executor, sink = DaskExecutor(cluster.address, direct=direct), ListSink()
    stream.append_many({'i': i} for i in range(10))
    mb.make_emitter('s', len, stream=stream, size=1, sink=sink, executor=executor).run(blocking=False)
    assert sink == [1] * 10
    executor.shutdown()


def test_a_function_that_cannot_be_sent_fails_alone_also_after_it_has_waited(executor):
    lock = threading.Lock()
    busy = [executor.submit(Sleep(0.2)) for _ in range(8)]
    refused = executor.submit(partial(Sleep, lock))
    others = [executor.submit(Pid()) for _ in range(4)]
    assert isinstance(refused.exception(60), TypeError)
    assert all(completion.result(60) for completion in busy + others)


def test_what_is_raised_like_the_loss_of_a_connection_is_no_loss(executor, monkeypatch):
    take_back = DaskExecutor._take_back

    def thoroughly(executor, run):
        client = run.sent.client
        taken = take_back(executor, run)
        client.sync(asyncio.sleep, 0)  # it has let go of the task
        return taken

    monkeypatch.setattr(DaskExecutor, '_take_back', thoroughly)
    assert isinstance(executor.submit(partial(open, '/nowhere')).exception(30), FileNotFoundError)


def completion_error(completion):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        completion.result()
    return raised.value


def test_resources_choose_the_workers(cluster):
    cluster.start_workers(1)
    cluster.start_workers(1, '--resources', 'GPU=2')
    executor = DaskExecutor(cluster.address, resources={'GPU': 1})
    assert executor.workers == 1
    pids = {completion.result() for completion in [executor.submit(Sleep(0.05)) for _ in range(6)]}
    assert pids == {cluster.workers[1].pid}
    none = DaskExecutor(cluster.address, resources={'GPU': 3})
    assert none.workers == 0
    for each in (executor, none):
        each.shutdown()


# --- a cluster that changes


def test_a_task_that_kills_its_worker_runs_once_and_is_lost(executor, client, db):
    completion = executor.submit(Dies(str(db.client.address), db.name))
    assert isinstance(completion_error(completion), WorkerLostError)
    client.wait_for_workers(2)
    assert executor.submit(Pid()).result()
    assert db.died.count_documents({}) == 1, 'Dask has run it again'
    nothing_left(client)


class Dies:
    def __init__(self, address, name):
        self.url, self.name = address, name

    def __call__(self):
        host, port = eval(self.url)
        with MongoClient(host, port, directConnection=True) as client:
            client[self.name].died.insert_one({})
        os._exit(1)


def test_workers_that_come_get_tasks_and_those_that_are_retired_lose_none(stream, cluster, caplog):
    cluster.start_workers(1)
    executor, sink = DaskExecutor(cluster.address), ListSink()

    def work(window):
        time.sleep(0.05)
        return os.getpid(), window.attempt

    def pids():
        return {pid for pid, _ in sink[-4:]}

    with started(mb.make_emitter('s', work, stream=stream, size=1, sink=sink, executor=executor)):
        stream.append_many({'i': i} for i in range(300))
        eventually(lambda: sink)
        assert executor.workers == 1
        cluster.start_workers(1)
        eventually(lambda: executor.workers == 2)
        eventually(lambda: len(pids()) == 2)
        with cluster.asked() as client:
            (first,) = [at for at, pid in client.run(os.getpid).items() if pid == cluster.workers[0].pid]
            client.retire_workers([first])
        eventually(lambda: executor.workers == 1)
        eventually(lambda: len(sink) == 300)
    assert {attempt for _, attempt in sink} == {1}
    assert 'a worker was lost' not in caplog.text
    executor.shutdown()


def test_what_a_worker_has_not_begun_when_it_is_paused_goes_to_others(cluster, db, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.dask.PAUSED_PAUSE', 0.0)
    cluster.start_workers(1, '--memory-limit', '0')  # so that Dask does not resume it
    executor = DaskExecutor(cluster.address)
    first, second = executor.submit(Waits(db.client.address, db.name)), executor.submit(Pid())
    eventually(lambda: db.begun.count_documents({}))
    with cluster.asked() as client:
        client.run(pause)
    cluster.start_workers(1)
    assert second.result(60) == cluster.workers[1].pid
    db.go.insert_one({})
    assert first.result(60) == cluster.workers[0].pid
    assert db.begun.count_documents({}) == 1
    executor.shutdown()


class Waits:
    def __init__(self, address, name):
        self.address, self.name = address, name

    def __call__(self):
        with MongoClient(*self.address, directConnection=True) as client:
            client[self.name].begun.insert_one({})
            eventually(client[self.name].go.find_one)
        return os.getpid()


async def pause(dask_worker):
    dask_worker.status = Status.paused


def test_a_consumer_waits_while_there_is_no_worker(stream, cluster):
    executor, sink = DaskExecutor(cluster.address), ListSink()
    stream.append_many({'i': i} for i in range(20))
    with started(mb.make_emitter('s', pid_of, stream=stream, size=1, sink=sink, executor=executor)):
        cluster.start_workers(1)
        eventually(lambda: len(sink) == 20)
    executor.shutdown()


def test_a_connection_that_is_lost_costs_no_attempt_and_makes_nobody_suspect(stream, cluster, caplog):
    cluster.start_workers(2)
    with Meter(cluster.port) as meter:
        executor, sink = DaskExecutor(meter.address), ListSink()

        def work(window):
            time.sleep(0.05)
            return window.number, window.attempt

        with started(mb.make_emitter('s', work, stream=stream, size=1, sink=sink, executor=executor)):
            stream.append_many({'i': i} for i in range(100))
            for count in (10, 30):
                eventually(lambda count=count: len(sink) > count)
                meter.cut()
            eventually(lambda: len(sink) >= 100)
        executor.shutdown()
    assert sorted(sink) == [(number, 1) for number in range(1, 101)]
    assert 'a worker was lost' not in caplog.text


@pytest.fixture
def clients(monkeypatch):
    """The clients that executors have begun to make; each waits for the event `may_connect`."""
    made = Made()

    class Counted(Client):
        def __init__(self, *args, **options):
            made.begun += 1
            assert made.may_connect.wait(60)
            super().__init__(*args, **{**options, 'timeout': made.timeout})
            made.append(self)

    monkeypatch.setattr('minibatch.contrib.dask.Client', Counted)
    monkeypatch.setattr('minibatch.contrib.dask.LOOK_PAUSE', 0.1)
    return made


class Made(list):
    def __init__(self):
        self.begun, self.timeout, self.may_connect = 0, 2.0, threading.Event()
        self.may_connect.set()


def threads_of_clients():
    return {thread for thread in threading.enumerate() if thread.name.startswith(('IO loop', 'minibatch-dask'))}


@pytest.fixture
def orphan(cluster, clients):
    """An executor whose scheduler has been killed."""
    with cluster.asked():
        executor = DaskExecutor(cluster.address)
        assert executor.workers == 0
    cluster.end_scheduler()
    clients.timeout = 0.2
    yield executor
    executor.shutdown()


def test_an_outage_of_the_scheduler_uses_up_neither_threads_nor_descriptors(orphan, clients):
    eventually(lambda: clients.begun > 2)
    threads, descriptors = threading.active_count(), psutil.Process().num_fds()
    eventually(lambda: clients.begun > 10)
    assert threading.active_count() < threads + 4
    assert psutil.Process().num_fds() < descriptors + 8


def test_a_client_that_connects_after_shutdown_is_closed(orphan, cluster, clients, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.dask.CLOSE_TIMEOUT', 0.5)
    clients.may_connect.clear()
    begun = clients.begun
    eventually(lambda: clients.begun > begun)
    orphan.shutdown()
    cluster.start_scheduler()
    with cluster.asked():
        clients.timeout = 60
        clients.may_connect.set()
        eventually(lambda: len(clients) == 2)
    eventually(lambda: [client.status for client in clients] == ['closed', 'closed'])
    eventually(lambda: 'minibatch-dask' not in {thread.name for thread in threading.enumerate()})


def test_what_workers_had_that_are_lost_together_with_their_scheduler_has_not_failed(cluster, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.dask.LOSS_PAUSE', 30.0)
    cluster.start_workers(1)
    executor = DaskExecutor(cluster.address)
    runs = [executor.submit(Sleep(0.5)) for _ in range(3)]
    cluster.workers[0].kill()
    eventually(lambda: executor.workers == 0)
    cluster.end_scheduler()
    cluster.start_scheduler()
    cluster.start_workers(1)
    assert {run.result(60) for run in runs} == {cluster.workers[1].pid}
    executor.shutdown()


# --- faults: what is killed with -9


@pytest.fixture
def running(url, db, cluster):
    """A consumer with an exactly-once sink, and 600 messages in windows of 3."""
    with mb.stream('s', url=url) as stream:
        stream.append_many({'source': 0, 'seq': seq} for seq in range(600))
    return lambda: consumer(url, 's', once=True, work=0.02, size=3, executor=cluster.address, lease=2)


def attempts_of(db):
    return {doc['attempt'] for doc in db.seen.find()}


def test_a_worker_is_killed(running, db, cluster):
    cluster.start_workers(3)
    with running() as process:
        for worker in cluster.workers[:2]:
            count = seen_count(db)
            eventually(lambda count=count: seen_count(db) > count + 30)
            worker.send_signal(signal.SIGKILL)
            left = [doc['_id'] for doc in db.window.find({'status': 'open'})]
            eventually(lambda left=left: not db.window.find_one({'_id': {'$in': left}, 'status': 'open'}))
        eventually(lambda: db.once.count_documents({}) == 600)
        terminate(process)
    prove_once(db, 'kill -9 of two Dask workers', {0: 600})
    assert attempts_of(db) == {1}
    assert not db.window.count_documents({'status': 'failed'})
    with cluster.asked() as client:
        nothing_left(client)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_the_scheduler_is_ended_and_a_new_one_takes_its_address(number, running, db, cluster):
    cluster.start_workers(2)
    with running() as process:
        for _ in range(2):
            count = seen_count(db)
            eventually(lambda count=count: seen_count(db) > count + 30)
            cluster.end_scheduler(number)
            eventually(lambda: all(worker.poll() is not None for worker in cluster.workers))
            cluster.start_scheduler()
            cluster.start_workers(2)
        eventually(lambda: db.once.count_documents({}) == 600)
        terminate(process)
    prove_once(db, f'{number.name} of the Dask scheduler, twice', {0: 600})
    assert attempts_of(db) == {1}


def test_a_consumer_is_killed_and_its_tasks_do_no_harm(running, db, cluster):
    cluster.start_workers(2)
    with running() as process:
        eventually(lambda: seen_count(db) > 60)
        kill(process)
    with cluster.asked() as client:
        nothing_left(client)
    with running() as process:
        eventually(lambda: db.once.count_documents({}) == 600)
        terminate(process)
    prove_once(db, 'kill -9 of a consumer with Dask', {0: 600}, most=50)
    assert attempts_of(db) == {1}
    with cluster.asked() as client:
        nothing_left(client)


def test_a_consumer_that_is_interrupted_leaves_no_task(running, db, cluster):
    cluster.start_workers(1)
    with running() as process:
        eventually(lambda: seen_count(db) > 10)
        terminate(process, signal.SIGINT)
        with cluster.asked() as client:
            nothing_left(client)


def test_shutdown_cancels_what_has_not_come_back(executor, client):
    before = threads_of_clients()
    done = [executor.submit(Sleep(0.2)) for _ in range(20)]
    assert threads_of_clients() - before
    executor.shutdown()
    assert all(completion.cancelled() for completion in done)
    assert threads_of_clients() == before
    nothing_left(client)
