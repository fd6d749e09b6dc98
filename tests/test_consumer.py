"""Who may plan, start functions and call sinks."""

import os
import signal
import subprocess
import time
from concurrent.futures import Future

import pytest
from processes import family, gone, running, write_at
from pymongo.errors import AutoReconnect
from servers import eventually

import minibatch as mb
from minibatch import clock, lease, ledger, retention, signals, store
from minibatch.models import Buffer
from minibatch.window import WindowEmitter

LEASE = 0.5


class SlowerThanTheLease:
    """Runs a function at once, and takes longer to say so than the lease is valid."""

    def submit(self, fn):
        done, begun = Future(), time.monotonic()
        done.set_result(fn())
        eventually(lambda: time.monotonic() > begun + 2 * LEASE)
        return done


def test_a_consumer_whose_lease_ran_out_calls_no_sink_and_commits_nothing(url, db, monkeypatch):
    def lost(*args):
        raise AutoReconnect('lost')

    monkeypatch.setattr(ledger, 'renew_lease', lost)
    stream, results = mb.Stream.get_or_create('s', url=url), []
    stream.append({'a': 1})
    emitter = mb.make_emitter(
        's', len, size=1, stream=stream, lease=LEASE, executor=SlowerThanTheLease, sink=Sink(results)
    )
    with pytest.raises(AutoReconnect):
        emitter._run_once()
    assert results == []
    assert [doc['status'] for doc in db.window.find()] == ['open']
    monkeypatch.undo()
    assert mb.make_emitter('s', len, size=1, stream=stream, sink=Sink(results))._run_once() == 1
    assert results == [1]


class Sink:
    def __init__(self, results):
        self.put = results.append


class All(WindowEmitter):
    """Picks all messages there are, whoever they belong to."""

    def window_ready(self):
        self.found = list(Buffer.objects.no_cache().filter(processed=False))
        return bool(self.found), ()

    def query(self, *args):
        return self.found


def test_an_emitter_that_picks_messages_is_given_those_of_its_stream_only(url, db):
    mine, other = mb.Stream.get_or_create('mine', url=url), mb.Stream.get_or_create('other', url=url)
    mine.append_many([{'a': 1}, {'a': 2}])
    other.append_many([{'b': 1}, {'b': 2}])
    results = []
    emitter = mb.make_emitter('mine', lambda window: window.data, emitter=All, stream=mine, sink=Sink(results))
    assert emitter._run_once() == 1
    assert results == [[{'a': 1}, {'a': 2}]]
    assert [record.batch for record in other.buffer()] == [[{'b': 1}, {'b': 2}]]
    assert mine.buffer().count() == 0


def test_a_stop_does_not_wait_for_ever_for_a_function_that_hangs(url, db, monkeypatch):
    monkeypatch.setattr('minibatch.planner.STOP_TIMEOUT', 0.5)
    stream = mb.Stream.get_or_create('s', url=url)
    stream.append({'a': 1})
    emitter = mb.make_emitter('s', lambda window: time.sleep(3600), size=1, workers=1, stream=stream)
    emitter.start()
    eventually(lambda: db.window.find_one({'status': 'open'}), message='no window was claimed')
    emitter.stop()
    assert not emitter._thread.is_alive()
    assert db.window.count_documents({'status': 'open'}) == 1


def dies_on_zero(window):
    if window.data[0]['a'] == 0:
        os._exit(3)
    return window.data[0]['a']


def test_a_message_that_kills_its_worker_does_not_keep_the_others_from_being_processed(url, db):
    stream, results = mb.Stream.get_or_create('s', url=url), []
    stream.append_many({'a': i} for i in range(6))
    emitter = mb.make_emitter('s', dies_on_zero, size=1, workers=2, stream=stream, sink=Sink(results))
    emitter.start()
    try:
        eventually(lambda: sorted(results) == [1, 2, 3, 4, 5], message=f'only {results}')
        killer = {'number': 1, 'attempts': {'$gte': 2}}
        eventually(lambda: db.window.find_one(killer), message='it died alone, and that was not counted')
        assert db.window.count_documents({'number': {'$gt': 1}, 'attempts': {'$gt': 1}}) == 0
    finally:
        emitter.stop()


def test_one_round_tries_the_windows_of_a_worker_that_died_once_more_alone(url, db):
    stream, results = mb.Stream.get_or_create('s', url=url), []
    stream.append_many({'a': i} for i in range(6))
    emitter = mb.make_emitter('s', dies_on_zero, size=1, workers=2, stream=stream, sink=Sink(results))
    assert emitter._run_once() == 5
    assert sorted(results) == [1, 2, 3, 4, 5]
    assert [doc['attempts'] for doc in db.window.find({'status': 'open'})] == [2]


def test_a_consumer_in_a_thread_that_ends_with_an_error_says_so(url, caplog):
    class Wrong(WindowEmitter):
        def window_ready(self):
            return True

    emitter = mb.make_emitter('s', len, emitter=Wrong, url=url)
    emitter.start()
    emitter._thread.join(20)
    assert 'window_ready must return' in str(emitter.error)
    assert 'has ended' in caplog.text


# --- stopping in the middle of what takes long


@pytest.mark.parametrize(('what', 'options'), [
    ('first_kept', {'size': 100}),
    ('read_times', {'interval': 0.001, 'relaxed': False, 'emit_empty': False}),
    ('read_messages', {'interval': 0.001, 'key': 'source'}),
])  # fmt: skip
def test_a_consumer_that_is_told_to_stop_reads_no_more_of_the_log(url, db, monkeypatch, what, options):
    calls, real = [], getattr(store, what)

    def read(*args):
        calls.append(args)
        emitter._stop = True
        return real(*args)

    monkeypatch.setattr(store, what, read)
    emitter = mb.make_emitter('s', len, stream=mb.stream('s', url=url), executor='inline', **options)
    for source in range(3):
        write_at(db, 's', [clock.now()] * 2, source)
    emitter.run()
    assert len(calls) == 1
    assert db.window.count_documents({}) == 0


def test_a_consumer_that_is_told_to_stop_takes_no_more_record_batches_apart(url, db):
    class Half(All):
        def should_stop(self):
            return db.buffer.count_documents({'n': 1}) > 0

        def window_ready(self):
            raise AssertionError('it was told to stop')

    stream = mb.stream('s', url=url)
    for _ in range(3):
        stream.append_many([{'a': 1}, {'a': 2}])
    mb.make_emitter('s', len, stream=stream, emitter=Half, executor='inline').run()
    assert db.buffer.count_documents({'n': 2}) == 2


def test_what_is_not_deleted_when_a_consumer_must_stop_is_deleted_by_the_next_one(url, db, monkeypatch):
    real = store.delete_records

    def delete(*args):
        if seconds:
            follower._deadline = 0.0  # the seconds have passed
        return real(*args)

    monkeypatch.setattr(retention, 'STRETCH', 3)
    monkeypatch.setattr(store, 'delete_records', delete)
    target = mb.stream('s', url=url).target
    write_at(db, 's', [clock.now()] * 10, first=5)
    for seconds, left in [(60.0, 7), (None, 0)]:
        held = lease.take(target, 's', 'g', 10, 'me', {'fingerprint': 'f'})
        follower = retention.Follower(target, 's', 'g', held, keep=False)
        follower.resume({}, ledger.read_cleaned(target.majority, 's', 'g'))
        follower.follow({'producer0': 15}, 0, {}, wait=seconds)
        follower.close()
        held.release(clean=True)
        assert ledger.read_positions(target.majority, 's', 'g') == {'producer0': 15}
        assert db.buffer.count_documents({}) == left


# --- the end is bounded, whatever a function does

HOLDS = """import asyncio, threading, time
import minibatch as mb
from minibatch import consumer, executors, planner, signals, worker
planner.STOP_TIMEOUT = executors.CLOSE_TIMEOUT = worker.END_TIMEOUT = 0.2
consumer.END_TIMEOUT = signals.LAST_RESORT = 1.0

def waits(window):
    print('begun', flush=True)
    threading.Event().wait()

def swallows(window):
    print('begun', flush=True)
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

async def awaits(window):
    print('begun', flush=True)
    await asyncio.Event().wait()

def leaves_a_thread(window):
    threading.Thread(target=threading.Event().wait, daemon=False).start()
    print('begun', flush=True)

mb.streaming('s', FN, size=1, workers=1, executor='EXECUTOR', url='URL')
print('end')
"""


@pytest.mark.parametrize(
    ('executor', 'fn', 'code'),
    [
        ('threads', 'waits', 0), ('threads', 'awaits', 0), ('processes', 'waits', 0), ('processes', 'swallows', 0),
        ('processes', 'leaves_a_thread', 0), ('inline', 'waits', 143), ('inline', 'awaits', 143),
        ('inline', 'swallows', 143),
    ],
)  # fmt: skip
def test_one_sigterm_ends_a_consumer_whatever_its_function_does(url, tmp_path, executor, fn, code):
    script = tmp_path / 'holds.py'
    script.write_text(HOLDS.replace('FN', fn).replace('EXECUTOR', executor).replace('URL', url))
    mb.stream('s', url=url).append({'a': 1})
    with running(str(script), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == 'begun\n'
        started = family(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == code
        assert process.stdout.read() == ('' if code else 'end\n')
        gone(started)


def test_a_second_ctrl_c_ends_a_consumer_whose_function_is_run_inline(url, tmp_path):
    script = tmp_path / 'holds.py'
    held = HOLDS.replace('consumer.END_TIMEOUT', 'never').replace('FN', 'waits').replace('EXECUTOR', 'inline')
    script.write_text(held.replace('URL', url))
    mb.stream('s', url=url).append({'a': 1})
    with running(str(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == 'begun\n'
        process.send_signal(signal.SIGINT)
        first = time.monotonic()
        eventually(lambda: time.monotonic() - first > 2 * signals.SAME_SIGNAL)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
        assert 'KeyboardInterrupt' in process.stderr.read()
    (window,) = mb.stream('s', url=url).window()
    assert (window.status, window.attempts) == ('open', 1), 'it counts as an attempt that failed'
