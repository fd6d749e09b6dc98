"""What ``executor=`` may say, and every executor through the public suite; that for Dask is in contrib/test_dask.py."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import EntryPoint
from unittest import SkipTest

import loky
import pytest
from processes import started
from servers import eventually

import minibatch as mb
from minibatch import executors
from minibatch.contracts import ExecutorContract
from minibatch.errors import ArgumentError, PortabilityError
from minibatch.executors import InlineExecutor, Threads
from minibatch.testing import ListSink
from minibatch.worker import Pool


@pytest.fixture
def stream(url):
    with mb.stream('s', url=url) as stream:
        yield stream


# --- the suite


class Suite(ExecutorContract):
    @pytest.fixture(autouse=True)
    def server(self, url):
        self.url = url


class TestInline(Suite):
    remote = False

    def make(self):
        return InlineExecutor()


class TestThreads(Suite):
    remote = False

    def make(self):
        return ThreadPoolExecutor(2)


class TestOwnThreads(Suite):
    remote = False

    def make(self):
        return Threads(2)


class TestProcesses(Suite):
    def make(self):
        return Pool(2, None)

    def close(self, executor):
        executor.__exit__(None)


class TestLoky(Suite):
    recovers = False

    def make(self):
        return loky.ProcessPoolExecutor(2)

    def close(self, executor):
        executor.shutdown(kill_workers=True)


class Forgetful(InlineExecutor):
    """Loses every tenth callable."""

    count = 0

    def submit(self, fn):
        self.count += 1
        return Future() if self.count % 10 == 0 else super().submit(fn)


class Lazy(ThreadPoolExecutor):
    """Runs what it was given after it was closed."""

    def shutdown(self):
        super().shutdown(wait=False)


class Modest(ThreadPoolExecutor):
    """Says that it does less at once than it does."""

    workers = 2


class Confused(Pool):
    """Gives another result than that of the callable."""

    def submit(self, fn):
        done = Future()
        super().submit(fn).add_done_callback(
            lambda sent: done.set_exception(sent.exception()) if sent.exception() else done.set_result('another')
        )
        return done


class Deceived(Pool):
    """Says that a worker which died has done its work."""

    def submit(self, fn):
        done = Future()
        super().submit(fn).add_done_callback(lambda sent: done.set_result(None if sent.exception() else sent.result()))
        return done


DIES = 'test_a_worker_that_dies_is_an_exception_and_what_comes_next_is_run'


@pytest.mark.parametrize(
    ('make', 'test', 'options'),
    [
        (Forgetful, 'test_consumers_give_each_message_once_to_their_own_function_whatever_it_is', {'remote': False}),
        (lambda: Modest(3), 'test_no_more_run_at_once_than_it_says_and_all_that_wait_come_to_run', {}),
        (lambda: Lazy(2), 'test_nothing_begins_after_it_is_closed', {}),
        (lambda: Deceived(2, None), DIES, {}),
        (lambda: Confused(2, None), DIES, {'recovers': False}),
    ],
)
def test_an_executor_that_breaks_the_contract_is_found_out(make, test, options, url, monkeypatch):
    monkeypatch.setattr('minibatch.contracts.PATIENCE', 3.0)
    monkeypatch.setattr('minibatch.planner.STOP_TIMEOUT', 1.0)
    contract = ExecutorContract()
    vars(contract).update(url=url, make=make, **options)
    with pytest.raises(AssertionError):
        getattr(contract, test)()


@pytest.mark.parametrize(
    'test', [DIES, 'test_a_window_that_kills_its_workers_is_a_dead_letter_and_those_beside_it_are_not']
)
def test_what_is_not_for_an_executor_is_skipped(test):
    with pytest.raises(SkipTest):
        getattr(TestInline(), test)()


# --- names and addresses


def where_it_runs(stream, executor):
    sink = ListSink()
    stream.append({'a': 1})
    place = mb.make_emitter('s', lambda window: [os.getpid(), threading.current_thread().name], stream=stream, size=1,
                            workers=1, sink=sink, executor=executor)  # fmt: skip
    place.run(blocking=False)
    (((pid, thread),),) = [sink]
    return pid == os.getpid(), thread == threading.current_thread().name


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('inline', (True, True)), ('threads', (True, False)), ('processes', (False, True)), (None, (False, True))],
)
def test_an_executor_has_a_name(stream, name, expected):
    assert where_it_runs(stream, name) == expected


def test_threads_and_inline_take_functions_that_cannot_be_sent():
    lock = threading.Lock()
    for name in ('threads', 'inline'):
        assert mb.make_emitter('s', lambda window: lock, size=1, executor=name)
    with pytest.raises(PortabilityError, match='lock'):
        mb.make_emitter('s', lambda window: lock, size=1, executor='processes')


def test_a_timeout_goes_with_processes_only():
    assert mb.make_emitter('s', len, size=1, executor='processes', timeout=5).timeout == 5
    with pytest.raises(ArgumentError, match='timeout'):
        mb.make_emitter('s', len, size=1, executor='threads', timeout=5)


@pytest.mark.parametrize('given', ['ray://host:10001', 'process', 'dask', 'dask:host', 'dask://', ''])
def test_a_name_or_scheme_that_is_not_known_is_refused_with_those_that_are(given):
    with pytest.raises(ArgumentError) as refused:
        mb.make_emitter('s', len, size=1, executor=given)
    for part in ('executor', "'inline'", "'threads'", "'processes'", '.[dask]', repr(given)):
        assert part in str(refused.value)


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(ArgumentError) as refused:
        mb.make_emitter('s', len, size=1, executor='ray://me:secret@host:1')
    assert 'secret' not in str(refused.value)


class Elsewhere(InlineExecutor):
    """An executor of a third party."""

    opened, closed = [], []

    def __init__(self, address):
        self.opened.append(address)

    def shutdown(self):
        self.closed.append(self)


@pytest.fixture
def registered(monkeypatch):
    """A package that has registered an executor for addresses."""
    entry = EntryPoint('elsewhere', f'{__name__}:Elsewhere', 'minibatch.executors')
    monkeypatch.setattr(executors, 'entry_points', lambda group: [entry] if group == 'minibatch.executors' else [])
    monkeypatch.setattr(Elsewhere, 'opened', [])
    monkeypatch.setattr(Elsewhere, 'closed', [])


def test_a_package_can_register_an_executor_for_addresses(stream, registered):
    made = mb.make_emitter('s', len, stream=stream, size=1, executor='elsewhere://there')
    assert not Elsewhere.opened, 'opened before it is needed'
    assert made.executor == 'elsewhere://there'
    assert where_it_runs(stream, 'elsewhere://there') == (True, True)
    assert Elsewhere.opened == ['elsewhere://there']
    assert len(Elsewhere.closed) == 1


def test_a_client_of_dask_is_for_the_executor_that_takes_its_addresses(stream, registered, monkeypatch):
    class Client:
        pass

    monkeypatch.setattr(Client, '__module__', 'distributed.client')
    monkeypatch.setattr(executors, 'CLIENTS', {'distributed': 'elsewhere'})
    client = Client()
    assert where_it_runs(stream, client) == (True, True)
    assert Elsewhere.opened == [client]
    assert len(Elsewhere.closed) == 1


def test_a_function_that_cannot_be_sent_to_an_address_is_refused_at_once(registered):
    lock = threading.Lock()
    with pytest.raises(PortabilityError, match='lock'):
        mb.make_emitter('s', lambda window: lock, size=1, executor='elsewhere://there')


# --- how much at once


class Held(InlineExecutor):
    """Begins nothing by itself, and can do as much at once as `workers` says."""

    def __init__(self, workers):
        self.workers, self.given = workers, []

    def submit(self, fn):
        self.given.append((fn, Future()))
        return self.given[-1][1]

    def do(self):
        given, self.given = self.given, []
        for fn, done in given:
            if not done.cancelled():
                done.set_result(fn())
        return len(given)


@pytest.mark.parametrize(('workers', 'at_once'), [(None, 6), (1, 1), (4, 4), (100, 6)])
def test_an_executor_is_given_twice_what_it_does_at_once_or_what_workers_says(stream, workers, at_once):
    held, sink = Held(0), ListSink()
    stream.append_many({'i': i} for i in range(50))
    with started(mb.make_emitter('s', len, stream=stream, size=1, executor=held, sink=sink, workers=workers)):
        held.workers = 3
        eventually(lambda: len(held.given) == at_once)
        held.workers = 0
        held.do()
        eventually(lambda: len(sink) == at_once)
    assert len(sink) == at_once, 'it was given more than it could do'


def test_what_is_in_flight_when_a_consumer_ends_is_cancelled(stream, monkeypatch):
    monkeypatch.setattr('minibatch.planner.STOP_TIMEOUT', 0.2)
    held = Held(2)
    stream.append_many({'i': i} for i in range(50))
    with started(mb.make_emitter('s', len, stream=stream, size=1, executor=held)):
        eventually(lambda: len(held.given) == 4)
    assert [done.cancelled() for _, done in held.given] == [True] * 4
