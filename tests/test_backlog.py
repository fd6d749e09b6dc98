"""Backpressure: a stream takes so many messages that wait, and the next append blocks or raises."""

import threading
import time
from contextlib import contextmanager
from datetime import datetime, timezone

import pytest
from processes import Seen, appended, note, prove, prove_log, started, write_at
from servers import eventually

import minibatch as mb
from minibatch import backlog, clock, ledger, producer, store
from minibatch.backlog import count_backlog
from minibatch.errors import ArgumentError, BacklogFullError, ServerError
from minibatch.store import Span
from minibatch.testing import InlineExecutor

ENOUGH = 10**9


def emitter_of(stream, sink=None, size=10, **options):
    return mb.make_emitter(stream.name, note, stream=stream, sink=sink, size=size, executor=InlineExecutor, **options)


@contextmanager
def appending(stream, source, start, end):
    """Append messages in a thread; afterwards it must have come to its end without an error."""
    errors = []

    def append():
        try:
            appended(stream, source, start, end)
        except Exception as exc:
            errors.append(exc)

    thread = threading.Thread(target=append)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive()
    assert errors == []


# --- counting


def test_without_a_group_the_backlog_is_what_is_stored(url):
    stream = mb.stream('s', url=url)
    db = stream.target.majority
    assert count_backlog(db, 's', ENOUGH) == 0
    appended(stream, 0, 0, 30)
    write_at(db, 's', [clock.now()] * 5, source=1)
    assert count_backlog(db, 's', ENOUGH) == 35
    store.delete_records(db, 's', Span('producer1', 0, 3))
    assert count_backlog(db, 's', ENOUGH) == 32


def test_the_backlog_is_that_of_the_slowest_group(url):
    stream = mb.stream('s', url=url)
    fast, slow = emitter_of(stream, group='fast'), emitter_of(stream, group='slow')
    assert (fast._run_once(), slow._run_once()) == (0, 0)
    appended(stream, 0, 0, 50)
    assert fast._run_once() == 5
    assert count_backlog(stream.target.majority, 's', ENOUGH) == 50
    assert slow._run_once() == 5
    assert count_backlog(stream.target.majority, 's', ENOUGH) == 0


def test_messages_that_expired_unprocessed_take_no_room(url):
    stream = mb.stream('s', url=url)
    db = stream.target.majority
    ledger.take_lease(db, 's', 'g', {'token': '1'}, 60, '', {})
    write_at(db, 's', [clock.now()] * 50, source=1)
    assert count_backlog(db, 's', 10) == 50
    store.delete_records(db, 's', Span('producer1', 0, 48))
    assert count_backlog(db, 's', 10) == 2


def test_for_an_emitter_that_picks_messages_those_not_processed_count(url):
    stream = mb.stream('s', url=url)
    db = stream.target.majority
    ledger.take_lease(db, 's', 'g', {'token': '1'}, 60, '', {'picks': True})
    appended(stream, 0, 0, 5)
    write_at(db, 's', [clock.now()] * 5, source=1)
    store.mark_processed(db, 's', Span('producer1', 0, 2))
    assert count_backlog(db, 's', ENOUGH) == 8


def test_looking_for_the_starts_takes_one_step_of_the_index_a_producer(url, db):
    stream = mb.stream('s', url=url)
    for source in range(3):
        write_at(db, 's', [clock.now()] * 20, source=source)
    db.command('profile', 2)
    assert store.log_starts(stream.target.majority, 's') == dict.fromkeys(['producer0', 'producer1', 'producer2'], 0)
    db.command('profile', 0)
    (profiled,) = db.system.profile.find({'command.aggregate': 'buffer'})
    assert 'DISTINCT_SCAN' in profiled['planSummary']
    assert profiled['keysExamined'] <= 6


# --- on_full


def test_an_append_blocks_until_a_consumer_has_made_room(url, db):
    stream, seen = mb.stream('s', url=url, max_backlog=100), Seen()
    with appending(stream, 0, 0, 1000) as thread:
        eventually(lambda: store.count_messages(db, 's') == 100)
        assert thread.is_alive()
        with started(emitter_of(stream, seen)):
            eventually(lambda: seen.count() == 1000)
    prove(seen.messages(), {0: 1000})


def test_many_threads_that_append_one_by_one_block_too_and_all_arrive(url):
    stream, seen = mb.stream('s', url=url, max_backlog=20), Seen()

    def append(source):
        for seq in range(50):
            stream.append({'source': source, 'seq': seq})

    threads = [threading.Thread(target=append, args=(source,)) for source in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: count_backlog(stream.target.majority, 's', ENOUGH) >= 20)
    assert count_backlog(stream.target.majority, 's', ENOUGH) <= 24
    with started(emitter_of(stream, seen)):
        eventually(lambda: seen.count() == 200)
    for thread in threads:
        thread.join(10)
    prove(seen.messages(), dict.fromkeys(range(4), 50))


@pytest.mark.parametrize(('options', 'also'), [({'on_full': 'raise'}, ''), ({'timeout': 0.2}, 'also after 0.2 s')])
def test_what_a_full_stream_refuses_is_not_written_and_the_error_says_what_to_do(url, db, options, also):
    stream = mb.stream('s', url=url, max_backlog=10, **options)
    items = [{'source': 0, 'seq': seq} for seq in range(25)]
    with pytest.raises(BacklogFullError, match=rf"10 messages of stream 's'.*max_backlog=10.*{also}") as caught:
        stream.append_many(items)
    assert (caught.value.written, caught.value.queued) == (10, 0)
    assert isinstance(caught.value, ServerError)
    with pytest.raises(BacklogFullError, match='consumers') as single:
        stream.append(items[10])
    assert (single.value.written, single.value.queued) == (0, 0)
    stream.flush()
    prove_log(db, 's', {0: 10})
    emitter_of(stream, size=5)._run_once()
    eventually(lambda: accepted(stream, items[10]))
    assert store.count_messages(db, 's') == 1


def accepted(stream, item):
    try:
        stream.append(item)
    except BacklogFullError:
        return False
    return True


def test_a_batch_that_cannot_become_full_is_written_for_the_consumer_to_make_room(url):
    stream, seen = mb.stream('s', url=url, batchsize=100, linger=3600, max_backlog=10), Seen()
    with started(emitter_of(stream, seen)):
        for seq in range(50):
            stream.append({'source': 0, 'seq': seq})
        stream.flush()
        eventually(lambda: seen.count() == 50)
    prove(seen.messages(), {0: 50})


def test_with_a_batchsize_a_refused_message_was_not_taken(url, db, monkeypatch):
    monkeypatch.setattr(backlog, 'MIN_AGE', 0)
    stream = mb.stream('s', url=url, batchsize=100, linger=3600, max_backlog=10, on_full='raise')
    for seq in range(10):
        stream.append({'source': 0, 'seq': seq})
    with pytest.raises(BacklogFullError):
        stream.append({'source': 0, 'seq': 10})
    stream.flush()
    prove_log(db, 's', {0: 10})


def test_the_backlog_is_not_counted_at_each_append(url, monkeypatch):
    counts = []
    monkeypatch.setattr(producer, 'count_backlog', lambda *args: counts.append(args) or count_backlog(*args))
    stream = mb.stream('s', url=url, max_backlog=10**6)
    begun = time.monotonic()
    for seq in range(200):
        stream.append({'source': 0, 'seq': seq})
    assert 1 <= len(counts) <= 2 + time.monotonic() - begun


# --- options


def test_the_limit_is_known_to_all_who_open_the_stream(url):
    mb.stream('s', url=url, max_backlog=2, on_full='raise')
    other = mb.Stream.find('s', url=url)
    assert (other.max_backlog, other.on_full) == (2, 'raise')
    with pytest.raises(BacklogFullError):
        other.append_many([{}, {}, {}])
    assert mb.stream('s', url=url, on_full='block').max_backlog == 2


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'max_backlog': 0}, 'max_backlog must be a whole number from 1'),
        ({'max_backlog': 2.5}, 'max_backlog must be a whole number'),
        ({'max_backlog': 'many'}, 'max_backlog must be a number'),
        ({'max_backlog': 1, 'on_full': 'drop'}, "on_full must be 'block' or 'raise'"),
        ({'on_full': 'raise'}, 'on_full goes with max_backlog'),
        ({'timeout': 0}, 'timeout must be from'),
        ({'timeout': True}, 'timeout must be a number'),
    ],
)
def test_wrong_limits_are_refused_by_name_before_the_stream_is_made(url, db, options, named):
    with pytest.raises(ArgumentError, match=named):
        mb.stream('s', url=url, **options)
    assert db.stream.count_documents({}) == 0


def test_the_time_a_producer_gives_is_when_there_was_room(url):
    stream = mb.stream('s', url=url, max_backlog=10)
    appended(stream, 0, 0, 10)
    with appending(stream, 0, 10, 20):
        before = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
        emitter_of(stream)._run_once()
    assert stream.buffer().first().created >= before
