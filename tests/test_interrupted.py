"""Appends that are interrupted: by Ctrl-C, by what the caller's iterable raises, by handlers that append themselves."""
from __future__ import annotations

import logging
import signal
import sys
import threading
from contextlib import contextmanager
from itertools import count

import pytest
from servers import Mongod, eventually

import minibatch as mb
from minibatch import backlog, embedded, producer
from minibatch.abc import SourceMessage
from minibatch.errors import DataError, ReentranceError
from minibatch.producer import HowFar, tell

OUT_OF_DISK_SPACE = 14031
NOT_INTERRUPTED = {HowFar.__exit__.__code__, HowFar.counts.fget.__code__, HowFar.__enter__.__code__, tell.__code__}


@pytest.fixture
def stream(url):
    return mb.stream('s', url=url)


def stored(db):
    docs = db.buffer.find({'stream': 's'}, sort=[('producer', 1), ('offset', 1)])
    return [data['seq'] for doc in docs for data in doc.get('batch') or [doc['data']]]


def failing(seqs, error):
    for seq in seqs:
        yield {'seq': seq}
    raise error


@contextmanager
def interrupted_at(moment, do):
    """Do something at the n-th moment, counted from 0, at which Python lets a signal interrupt producer.py: when a
    function of it begins, and when one that it calls, of C, has returned. The list has that moment if it came."""
    passed, came = count(), []

    def look(frame, event, arg):
        code = frame.f_code
        if code.co_filename != producer.__file__ or code in NOT_INTERRUPTED or event not in ('call', 'c_return'):
            return
        if next(passed) == moment:
            came.append(frame.f_lineno)
            sys.setprofile(None)
            do()

    sys.setprofile(look)
    try:
        yield came
    finally:
        sys.setprofile(None)


def ctrl_c():
    raise KeyboardInterrupt


# --- what is said of an append that ends early


@pytest.mark.parametrize('kind', [ValueError, KeyboardInterrupt, StopAsyncIteration, DataError])
@pytest.mark.parametrize('how', ['append_many', 'put'])
def test_what_an_iterable_raises_says_how_much_of_it_is_stored(stream, db, monkeypatch, how, kind):
    monkeypatch.setattr(producer, 'CHECKED_BYTES', 1000)
    tell(error := kind('mine'), 77, 77)
    with pytest.raises(kind) as caught:
        getattr(stream, how)(failing(range(100), error))
    assert caught.value is error
    assert 0 < error.written < 100
    assert error.queued == 0
    assert stored(db) == list(range(error.written))
    said = f'Of this append the first {error.written} messages are stored, and 0 stay queued'
    assert getattr(error, '__notes__', [said]) == [said]


def test_what_the_messages_of_a_source_raise_says_that_none_is_stored(stream, db):
    error = ValueError('mine')
    messages = (SourceMessage(data) for data in failing(range(10), error))
    with pytest.raises(ValueError, match='mine'):
        stream.producer('x').append_many(messages)
    assert (error.written, error.queued) == (0, 0)
    assert stored(db) == []


def test_results_that_a_stream_as_a_sink_has_stored_are_not_appended_again(stream, db, monkeypatch):
    monkeypatch.setattr(producer, 'CHECKED_BYTES', 1000)
    results = [[{'seq': seq}] for seq in range(100)]
    delivered = stream.put_many([*results, [{'seq': Unfit()}]], [None] * 101)
    assert 0 < delivered < 100
    assert stored(db) == list(range(delivered))


class Unfit:
    """What cannot be stored."""


def append_many(stream, seq):
    stream.append_many([{'seq': seq}, {'seq': seq + 1}])


def append(stream, seq):
    stream.append({'seq': seq})


# How it is called, how many messages a call has, how many of the calls do all that such a call may do, and the options.
WAYS = {'append': (append, 1, 1, {}), 'append_many': (append_many, 2, 1, {}),
        'batchsize': (append, 1, 6, {'batchsize': 3, 'linger': 3600})}  # fmt: skip


@pytest.mark.parametrize('how', WAYS)
def test_ctrl_c_at_any_moment_of_an_append_loses_nothing_doubles_nothing_and_says_what_is_stored(url, db, how):
    call, n, calls, options = WAYS[how]
    stream = mb.stream('s', url=url, **options)
    expected, interrupts, seq = [], 0, 0
    call(stream, -1)
    stream.clear()
    for moment in count():
        before = interrupts
        for _ in range(calls):
            seq, kept = seq + 10, n
            with interrupted_at(moment, ctrl_c):
                try:
                    call(stream, seq)
                except KeyboardInterrupt as exc:
                    kept = getattr(exc, 'written', 0) + getattr(exc, 'queued', 0)  # at its first moment it has none
                    interrupts += 1
            expected += range(seq, seq + kept)
        stream.flush()
        assert stored(db) == expected, f'interrupted at moment {moment}'
        if interrupts == before:
            break
    assert interrupts > 20
    for record in db.buffer.find():
        assert len(record.get('batch', ['data'])) == record['n'] == len(record.get('times', range(record['n'])))


@pytest.fixture(scope='module')
def own():
    """A server that may be stopped, and whose inserts can be made to fail."""
    with Mongod('--setParameter', 'enableTestCommands=1') as server:
        yield server


@pytest.mark.integration
def test_ctrl_c_while_mongodb_does_not_answer_says_what_stays_queued_and_that_is_stored_once(own):
    stream = mb.stream('s', url=own.url('paused'), timeout=60)
    own.pause()

    def interrupt():
        eventually(lambda: stream._producer._in_flight)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt) as caught:
            stream.append_many([{'seq': 0}, {'seq': 1}])
    finally:
        own.resume()
    assert (caught.value.written, caught.value.queued) == (0, 2)
    stream.flush()
    assert stored(own.client['paused']) == [0, 1]


# --- handlers that append


@pytest.mark.parametrize('how', ['append', 'batchsize'])
def test_a_handler_that_appends_at_any_moment_of_an_append_never_waits_for_it_nor_comes_between(url, db, how):
    call, _, calls, options = WAYS[how]
    stream = mb.stream('s', url=url, timeout=3600, **options)
    told, appended = [], []

    def handler():
        try:
            stream.append({'seq': -1})
            appended.append(-1)
            stream.flush()
        except ReentranceError as exc:
            told.append(exc)

    seqs = []
    for moment in count():
        came = []
        for _ in range(calls):
            seqs.append(len(seqs))
            with interrupted_at(moment, handler) as here:
                call(stream, seqs[-1])
            came += here
        if not came:
            break
    stream.flush()
    assert "stream 's' is being appended to by this very thread" in str(told[0])
    found = stored(db)
    assert [seq for seq in found if seq >= 0] == seqs
    assert [seq for seq in found if seq < 0] == appended


def test_a_logging_handler_that_appends_what_the_append_itself_logs_is_told(url, db):
    stream = mb.stream('s', url=url, timeout=3600)
    told = []

    class Handler(logging.Handler):
        def emit(self, record):
            try:
                stream.append({'seq': -1})
            except ReentranceError as exc:
                told.append(exc)

    log = logging.getLogger('pymongo.command')
    level, handler = log.level, Handler()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        stream.append({'seq': 0})
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert told
    assert stored(db) == [0]


@pytest.mark.integration
def test_a_logging_handler_that_waits_for_a_thread_which_logs_waits_no_longer_than_mongodb(own):
    stream = mb.stream('s', url=own.url('logs'), batchsize=2, linger=3600, timeout=3600)
    fail = {'failCommands': ['insert'], 'errorCode': OUT_OF_DISK_SPACE, 'blockConnection': True, 'blockTimeMS': 500}
    own.client.admin.command('configureFailPoint', 'failCommand', mode={'times': 2}, data=fail)

    class Handler(logging.Handler):
        def emit(self, record):
            if record.name == 'test':
                stream.append({'seq': record.msg})

    def log():
        for seq in range(4):
            if seq == 2:
                eventually(lambda: stream._producer._in_flight)  # in another thread
            logging.getLogger('test').error(seq)

    root, handler = logging.getLogger(), Handler()
    root.addHandler(handler)
    try:
        logs = threading.Thread(target=log, daemon=True)
        logs.start()
        logs.join(20)
        assert not logs.is_alive()
    finally:
        root.removeHandler(handler)
    stream.flush()
    assert stored(own.client['logs']) == [0, 1, 2, 3]


def test_a_handler_that_comes_while_room_is_counted_is_told(url, db, monkeypatch):
    stream = mb.stream('s', url=url, max_backlog=10, timeout=3600)
    told, count_backlog = [], producer.count_backlog

    def counted(*args):
        with pytest.raises(ReentranceError) as caught:
            stream.append({'seq': -1})
        told.append(caught.value)
        return count_backlog(*args)

    monkeypatch.setattr(producer, 'count_backlog', counted)
    monkeypatch.setattr(backlog, 'MAX_AGE', 0)
    stream.append({'seq': 0})
    assert told
    assert stored(db) == [0]


def test_an_iterable_may_append_to_the_stream_that_it_is_appended_to(stream, db):
    def items():
        for seq in range(3):
            stream.append({'seq': seq})
            yield {'seq': seq + 10}

    assert stream.append_many(items()) == 3
    assert sorted(stored(db)) == [0, 1, 2, 10, 11, 12]


def test_a_handler_that_needs_the_embedded_mongodb_while_it_is_started_is_told(tmp_path):
    by_itself = pytest.raises(ReentranceError, match='by this very thread')
    with embedded._locked(tmp_path), by_itself, embedded._locked(tmp_path):
        pass
    with embedded._locked(tmp_path):
        pass
