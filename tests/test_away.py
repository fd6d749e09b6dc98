"""While MongoDB is away a consumer says so, stops when it is told to, and goes on when MongoDB is back."""

import subprocess
import sys
import threading

import pytest
from processes import Seen, consumer, note, seen_count, started
from pymongo.errors import AutoReconnect
from servers import Mongod, eventually

import minibatch as mb
from minibatch import connection, lease, ledger, producer
from minibatch.errors import LeaseLostError
from minibatch.testing import InlineExecutor

PATIENT = '&serverSelectionTimeoutMS=600000'  # who waits for a server waits until the test has failed


@pytest.fixture(scope='module')
def server():
    with Mongod() as server:
        yield server


@pytest.fixture
def own(server):
    """A server that may be killed."""
    yield server
    if server.process is None:
        server.start()
    connection.disconnect()
    server.client.drop_database('test')


class Sink:
    """Kills the server, and then needs it."""

    def __init__(self, server, use):
        self.server, self.use, self.begun = server, use, threading.Event()

    def put(self, result):
        self.server.kill()
        self.begun.set()
        self.use()


def is_over(emitter):
    """Whether a consumer in a thread has ended, soon after it was told to."""
    emitter.stop(60)
    return not emitter._thread.is_alive()


def test_it_is_said_once_that_mongodb_is_away_and_once_that_it_is_back_and_nothing_that_is_not_true(own, caplog):
    stream, seen = mb.stream('s', url=own.url()), Seen()
    emitter = mb.make_emitter('s', note, stream=stream, size=1, lease=0.5, sink=seen, executor=InlineExecutor)
    with started(emitter):
        stream.append({'source': 0, 'seq': 0})
        eventually(lambda: seen.count() == 1)
        own.kill()
        eventually(lambda: 'MongoDB is away since' in caplog.text)
        own.start()
        eventually(lambda: 'MongoDB is back after' in caplog.text)
        stream.append({'source': 0, 'seq': 1})
        eventually(lambda: seen.count() == 2)
    told = [record.getMessage() for record in caplog.records if record.name == 'minibatch.away']
    assert [text.split(' since ')[0].split(' after ')[0] for text in told] == [
        's/default: MongoDB is away', 's/default: MongoDB is back',
    ]  # fmt: skip
    assert 'Connection refused' in told[0]
    assert 'taken over' not in caplog.text


def test_a_consumer_stops_at_the_first_sigterm_while_mongodb_is_away(own, tmp_path):
    url = own.url() + PATIENT
    mb.stream('s', url=url).append({'source': 0, 'seq': 0})
    with (tmp_path / 'log').open('w') as log, consumer(url, 's', size=1, workers=1, stdout=log) as process:
        eventually(lambda: seen_count(own.client.test) == 1)
        own.kill()
        process.terminate()
        assert process.wait(60) == 0


def test_a_consumer_that_waits_in_its_sink_for_mongodb_stops_when_it_is_told_to(own, caplog):
    stream = mb.stream('s', url=own.url() + PATIENT)
    sink = Sink(own, stream.target.db.buffer.find_one)
    emitter = mb.make_emitter('s', len, stream=stream, size=1, sink=sink, executor=InlineExecutor)
    emitter.start()
    stream.append({})
    assert sink.begun.wait(60)
    assert is_over(emitter)
    assert 's/default: stopped while MongoDB is away' in caplog.text


def test_a_consumer_whose_sink_is_a_stream_stops_while_mongodb_is_away_and_so_does_its_process(own, caplog):
    url = own.url() + PATIENT
    stream, out = mb.stream('s', url=url), mb.stream('out', url=url, timeout=600)
    sink = Sink(own, lambda: out.put({}))
    emitter = mb.make_emitter('s', len, stream=stream, size=1, sink=sink, executor=InlineExecutor)
    emitter.start()
    stream.append({})
    assert sink.begun.wait(60)
    assert is_over(emitter)
    ending = threading.Thread(target=producer.flush_all, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
    assert "messages of 'out' were not written" in caplog.text


def test_a_wait_that_was_not_ended_after_all_leaves_no_trap_for_profilers():
    program = """
import ctypes, sys, threading
from minibatch import connection
looks = iter([True, False])
connection._waits_for_server = lambda thread: next(looks)
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
connection.end_wait(thread.ident)
sys.setprofile(lambda *args: None)
(lambda: None)()
sys.setprofile(None)
print('went on')
"""
    done = subprocess.run([sys.executable, '-c', program], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('went on\n', '')


def test_a_thread_that_went_on_just_as_its_wait_was_to_be_ended_is_left_alone(monkeypatch):
    looks, blocked, done = iter([True, False]), threading.Lock(), []
    blocked.acquire()

    def work():
        done.append('begun')
        with blocked:
            done.append('went on')

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: done)
    monkeypatch.setattr(connection, '_waits_for_server', lambda thread: next(looks))
    connection.end_wait(thread.ident)
    blocked.release()
    thread.join(60)
    assert done == ['begun', 'went on']


def test_a_lease_that_has_run_out_is_renewed_as_long_as_nobody_has_taken_it(url, monkeypatch):
    def lost(*args):
        raise AutoReconnect('lost')

    target = mb.stream('s', url=url).target
    monkeypatch.setattr(ledger, 'renew_lease', lost)
    held = lease.take(target, 's', 'g', 0.2, 'one', {'fingerprint': 'f'})
    eventually(lambda: not held.valid)
    with pytest.raises(AutoReconnect, match='lost'):
        held.check()
    monkeypatch.undo()
    held.check()
    assert held.valid
    held.release(clean=False)
    other = lease.take(target, 's', 'g', 60, 'two', {'fingerprint': 'f'})
    with pytest.raises(LeaseLostError, match='Another consumer has taken over'):
        held.renew()
    with pytest.raises(LeaseLostError, match='Another consumer has taken over'):
        held.check()
    other.release(clean=True)


def test_what_is_known_of_a_server_that_is_away_has_no_secrets(own):
    where = mb.stream('s', url=own.url()).target
    assert not where.is_away
    own.kill()
    eventually(lambda: where.is_away)
    eventually(lambda: 'Connection refused' in where.why_away())
    hidden = connection.target(f'mongodb://ann:Connection@{own.address}/test?directConnection=true&connect=true')
    assert not hidden.is_away  # nobody has asked yet
    assert hidden.client
    eventually(lambda: '*** refused' in hidden.why_away())
