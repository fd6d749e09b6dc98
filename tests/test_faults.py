"""What must hold when processes are killed, stopped or forked, and when connections and servers are lost."""
from __future__ import annotations

import itertools
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from processes import (
    SCRIPTS,
    History,
    Seen,
    appended,
    command,
    consumer,
    family,
    gone,
    is_stopped,
    kill,
    note,
    owner_of,
    producer,
    prove,
    prove_log,
    prove_once,
    prove_times,
    prove_windows,
    running,
    seen_count,
    started,
    terminate,
    windows_seen,
    workers_of,
    write_at,
)
from pymongo.errors import AutoReconnect
from servers import Mongod, Proxy, ReplicaSet, eventually

import minibatch as mb
from minibatch import ledger
from minibatch.contrib.mongodb import MongoSink
from minibatch.testing import InlineExecutor

COMMIT_ONCE = 'commit_with or commit_all_with'  # of one window, or of as many as are done by now
# Every write of the consumer's loop. The first death leaves a lease behind, as the fence needs one to be called.
WRITES = ('claim_windows', 'take_lease', 'fence', 'adopt_windows', 'commit_windows', COMMIT_ONCE, 'write_positions',
          'write_progress', 'delete_windows', 'delete_records', 'renew_lease')


@pytest.fixture
def stream(url: str) -> mb.Stream:
    return mb.stream('faults', url=url)


def after(seconds: float, *processes: subprocess.Popen[str]) -> None:
    """Let a random time pass, in which none of the processes ends."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))


def done(process: subprocess.Popen[str], db: Any, end: int) -> None:
    """Wait until this consumer leads, and all messages were seen and deleted."""
    eventually(lambda: owner_of(db, 'faults') == process.pid, message='does not lead')
    eventually(lambda: db.buffer.count_documents({}) == 0, 40, 'messages were not deleted')
    assert seen_count(db) == end


def test_a_consumer_killed_at_random_moments_loses_nothing_and_repeats_only_open_windows(url, db, stream, rng):
    history, open_at_kill, end = History(db), set(), 0
    for _ in range(20):
        appended(stream, 0, end, end + 500)
        end += 500
        with consumer(url, 'faults', once=True, work=0.001, size=10, workers=2) as process:
            if rng.random() < 0.8:
                eventually(lambda: db.seen.find_one({'planner': process.pid}))
            after(rng.uniform(0, 0.5), process)
            kill(process)
        open_at_kill |= {doc['_id'] for doc in db.window.find({'status': 'open'})}
    with consumer(url, 'faults', once=True, size=10, workers=2) as process:
        done(process, db, end)
        terminate(process)
    prove_once(db, 'planner killed 20 times', {0: end}, again=open_at_kill)
    history.prove()


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_consumer_killed_at_any_write_of_its_loop_loses_nothing(url, db, stream, when):
    history, end = History(db), 0
    for name in WRITES:
        appended(stream, 0, end, end + 100)
        end += 100
        options = {'once': name == COMMIT_ONCE, 'size': 10, 'workers': 1, 'lease': 1.5}
        with consumer(url, 'faults', interrupt=('SIGKILL', when, name, 1), **options) as process:
            assert process.wait(60) == -signal.SIGKILL, f'not killed {when} {name}'
    with consumer(url, 'faults', size=10, workers=1) as process:
        done(process, db, end)
        terminate(process)
    prove_windows(db, {0: end})
    history.prove()


def test_a_consumer_which_picks_messages_loses_nothing_when_it_is_killed_at_a_write(url, db, stream):
    end = 0
    options = {'picks': True, 'interval': 10, 'workers': 1}
    for name in ('unbatch', 'claim_windows', 'commit_windows', 'touch_stream', 'write_progress', 'delete_windows'):
        for when in ('before', 'after'):
            appended(stream, 0, end, end + 40)
            end += 40
            with consumer(url, 'faults', interrupt=('SIGKILL', when, name, 1), **options) as process:
                assert process.wait(60) == -signal.SIGKILL, f'not killed {when} {name}'
    with consumer(url, 'faults', **options) as process:
        eventually(lambda: seen_count(db) == end // 2, message=f'{end // 2} messages not all seen')
        eventually(lambda: db.buffer.count_documents({}) == end // 2)
        terminate(process)
    seen = [seq for times in windows_seen(db).values() for _, seq in times[0]['seen']]
    assert seen == list(range(0, end, 2))


@pytest.mark.parametrize(('when', 'name'), [
    ('before', 'claim_windows'), ('after', 'claim_windows'), ('before', 'commit_windows'), ('after', 'commit_windows'),
    ('before', 'write_positions'), ('before', 'write_progress'), ('before', 'delete_records'), ('after', COMMIT_ONCE),
])
def test_a_planner_stopped_at_a_write_changes_nothing_when_it_wakes(url, db, stream, when, name):
    history = History(db)
    appended(stream, 0, 0, 400)
    options = {'once': name == COMMIT_ONCE, 'size': 10, 'workers': 1, 'lease': 1.5}
    with consumer(url, 'faults', work=0.02, interrupt=('SIGSTOP', when, name, 2), **options) as zombie:
        eventually(lambda: is_stopped(zombie))
        assert seen_count(db) < 400
        with consumer(url, 'faults', **options) as successor:
            eventually(lambda: seen_count(db) == 400)
            eventually(lambda: not db.buffer.count_documents({}))
            zombie.send_signal(signal.SIGCONT)
            appended(stream, 0, 400, 500)
            eventually(lambda: seen_count(db) == 500)
            terminate(zombie)
            assert owner_of(db, 'faults') == successor.pid
            terminate(successor)
    prove_windows(db, {0: 500})
    if name == COMMIT_ONCE:
        prove_once(db, 'planner stopped inside a transaction', {0: 500})
    history.prove()


def test_planners_stopped_at_random_moments_change_nothing_when_they_wake(url, db, stream, rng):
    history, end = History(db), 0
    options = {'once': True, 'size': 10, 'workers': 1, 'lease': 1.0, 'work': 0.001}
    open_at_stop = set()
    with consumer(url, 'faults', **options) as first, consumer(url, 'faults', **options) as second:
        for _ in range(6):
            appended(stream, 0, end, end + 1000)
            end += 1000
            pid = eventually(lambda: owner_of(db, 'faults'))
            zombie, successor = (first, second) if pid == first.pid else (second, first)
            after(rng.uniform(0, 0.5), zombie)
            zombie.send_signal(signal.SIGSTOP)
            open_at_stop |= {doc['_id'] for doc in db.window.find({'status': 'open'})}
            eventually(lambda: owner_of(db, 'faults') == successor.pid)  # noqa: B023
            zombie.send_signal(signal.SIGCONT)
            eventually(lambda: seen_count(db) == end, 40, f'{end} messages not all seen')  # noqa: B023
            assert zombie.poll() is None
        terminate(first)
        terminate(second)
    prove_once(db, 'planner stopped beyond its lease 6 times', {0: end}, again=open_at_stop)
    history.prove()


def test_workers_killed_at_random_moments_lose_nothing_and_only_their_windows_run_again(url, db, stream, rng):
    appended(stream, 0, 0, 4000)
    open_at_kill = set()
    with consumer(url, 'faults', once=True, work=0.01, size=10, workers=2) as process:
        for _ in range(6):
            before = seen_count(db)
            eventually(lambda: seen_count(db) > before)  # noqa: B023
            after(rng.uniform(0, 0.3), process)
            rng.choice(workers := eventually(lambda: workers_of(process))).kill()
            gone(workers)  # they end together, and others take their place
            open_at_kill |= {doc['_id'] for doc in db.window.find({'status': 'open'})}
        done(process, db, 4000)
        terminate(process)
    prove_once(db, 'worker killed 6 times', {0: 4000}, again=open_at_kill)


def test_what_a_producer_killed_in_a_call_was_told_is_there_and_what_it_was_not_is_there_once_or_not(url, db, rng):
    told = {}
    with consumer(url, 'faults', once=True, interval=0.1, workers=1) as process:
        for source in range(8):
            with producer(url, 'faults', source, 10**6, stdout=subprocess.PIPE) as producing:
                lines = [producing.stdout.readline()]
                after(rng.uniform(0, 0.3), producing)
                kill(producing)
                told[source] = int([*lines, *producing.stdout.readlines()][-1])
        eventually(lambda: not db.buffer.count_documents({}), message='messages were not deleted')
        terminate(process)
    counts = dict.fromkeys(told, 0)
    for doc in db.seen.find():
        for source, seq in doc['seen']:
            counts[source] = max(counts[source], seq + 1)
    assert all(told[source] <= counts[source] <= told[source] + 1500 for source in told), (told, counts)
    prove_once(db, 'producer killed in append_many 8 times', counts, again=set())


def test_consumers_that_join_and_leave_lose_nothing_and_repeat_nothing(url, db, stream, rng):
    end = 0
    with ExitStack() as stack:
        def join():
            process = stack.enter_context(consumer(url, 'faults', once=True, work=0.001, size=10, workers=1))
            eventually(lambda: workers_of(process), message='no workers')  # then it takes signals
            return process

        group = [join(), join()]
        eventually(lambda: owner_of(db, 'faults'))
        for _ in range(4):
            appended(stream, 0, end, end + 1000)
            end += 1000
            after(rng.uniform(0.3, 0.8), *group)
            terminate(group.pop(rng.randrange(2)))
            group.append(join())
        eventually(lambda: seen_count(db) == end, 40, f'{end} messages not all seen')
        eventually(lambda: not db.buffer.count_documents({}), message='messages were not deleted')
        for process in group:
            terminate(process)
    prove_once(db, 'two consumers, one replaced 4 times', {0: end}, again=set())


class EveryThirdFails:
    """A sink in front of another one: every third call fails, in turn before and after it was passed on."""

    def __init__(self, sink):
        self.sink, self.calls = sink, itertools.count(1)

    def put(self, messages):
        raise AssertionError('it is an exactly-once sink')

    def put_once(self, messages, window):
        call = next(self.calls)
        if call % 6 == 3:
            raise ConnectionError('before')
        self.sink.put_once(messages, window)
        if call % 6 == 0:
            raise ConnectionError('after')


def test_a_sink_that_fails_every_third_time_shows_every_message_once(url, db, stream):
    def process(window):
        db.seen.insert_one(result := note(window))
        return [{'source': source, 'seq': seq, 'window': window.id} for source, seq in result['seen']]

    appended(stream, 0, 0, 300)
    sink = EveryThirdFails(MongoSink(db.once, exactly_once=True))
    emitter = mb.make_emitter('faults', process, stream=stream, size=10, executor=InlineExecutor, sink=sink)
    with started(emitter):
        eventually(lambda: not db.buffer.count_documents({}), message='messages were not deleted')
    prove_once(db, 'sink fails every third call', {0: 300})


@pytest.mark.parametrize('trouble', ['raise', 'exit'])
def test_a_message_at_which_the_function_always_fails_becomes_a_dead_letter_and_the_rest_goes_on(
    url, db, stream, trouble
):
    appended(stream, 0, 0, 400)
    options = {'size': 10, 'workers': 2, 'max_attempts': 3, 'keep': True}
    with consumer(url, 'faults', once=True, trouble={trouble: [155]}, **options) as process:
        eventually(lambda: not db.window.count_documents({'status': 'open'}) and db.window.count_documents({}) == 40)
        terminate(process)
    assert [(doc['number'], doc['attempts']) for doc in db.window.find({'status': 'failed'})] == [(16, 3)]
    assert db.window.distinct('attempts', {'status': 'processed'}) == [1], 'neighbours are blamed'
    assert [seq for doc in db.dead.find() for seq in (data['seq'] for data in doc['batch'])] == list(range(150, 160))
    what = {'raise': 'raises', 'exit': 'kills its worker'}[trouble]
    prove_once(db, f'function {what} at one message, 3 attempts', {0: 400}, dead={(0, n) for n in range(150, 160)})


def test_a_consumer_whose_clock_is_an_hour_wrong_puts_messages_into_the_right_windows(url, db, stream):
    end = 0
    for clock in (-3600, 3600, 0):
        options = {'interval': 0.5, 'relaxed': False, 'keep': True, 'workers': 1}
        with consumer(url, 'faults', once=True, clock=clock, **options) as process:
            eventually(lambda: owner_of(db, 'faults') == process.pid)
            for seq in range(end, end + 40):
                stream.append({'source': 0, 'seq': seq})
                after(0.05, process)
            end += 40
            eventually(lambda: seen_count(db) == end)  # noqa: B023
            terminate(process)
    created = [doc['created'] for doc in db.buffer.find().sort('offset', 1)]
    windows = [times[0] for times in windows_seen(db).values()]
    for before, window in itertools.pairwise(windows):
        assert before['end'] == window['start']
    for window in windows:
        for _, seq in window['seen']:  # what is stored late, on a busy machine, is in a later one
            assert window['start'] - timedelta(seconds=5) <= created[seq] < window['end']
    prove_once(db, 'clock of the consumer an hour slow, an hour fast', {0: end}, again=set())


def test_a_function_that_does_not_let_go_of_the_interpreter_does_not_lose_the_lease(url, db, stream):
    appended(stream, 0, 0, 200)
    options = {'once': True, 'size': 10, 'workers': 2, 'lease': 1.0}
    with consumer(url, 'faults', trouble={'hold': [55, 56, 75]}, **options) as first:
        eventually(lambda: owner_of(db, 'faults') == first.pid)
        with consumer(url, 'faults', **options) as second:
            done(first, db, 200)
            terminate(second)
        terminate(first)
    assert db.seen.distinct('planner') == [first.pid]
    assert db.group.find_one()['lease']['epoch'] == 1
    prove_once(db, 'function holds the interpreter, lease 1 s', {0: 200}, again=set())


def test_the_next_consumer_takes_over_at_once_from_one_that_was_killed_or_stopped(url, db, stream):
    options = {'size': 10, 'workers': 1, 'lease': 60.0}
    with consumer(url, 'faults', **options) as first:
        eventually(lambda: owner_of(db, 'faults') == first.pid)
        with consumer(url, 'faults', **options) as second, consumer(url, 'faults', **options) as third:
            appended(stream, 0, 0, 100)
            eventually(lambda: seen_count(db) == 100)
            assert db.seen.distinct('planner') == [first.pid]
            kill(first)
            pid = eventually(lambda: {second.pid, third.pid} & {owner_of(db, 'faults')}, 40).pop()
            leading, standing_by = (second, third) if pid == second.pid else (third, second)
            appended(stream, 0, 100, 200)
            eventually(lambda: seen_count(db) == 200)
            terminate(leading)
            appended(stream, 0, 200, 300)
            eventually(lambda: seen_count(db) == 300)
            assert owner_of(db, 'faults') == standing_by.pid
            terminate(standing_by)
    prove_windows(db, {0: 300})


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_windows_in_flight_and_gives_up_the_lease(url, db, stream, number):
    appended(stream, 0, 0, 400)
    options = {'size': 10, 'workers': 2, 'lease': 60.0}
    with consumer(url, 'faults', work=0.2, say=True, stdout=subprocess.PIPE, **options) as process:
        started = [process.stdout.readline() for _ in range(3)]
        terminate(process, number)
        started += process.stdout.readlines()
    assert sorted(started) == sorted(f'{doc["window"]}\n' for doc in db.seen.find())
    assert len(started) < 40
    assert db.group.find_one()['lease']['expires'] == datetime(1970, 1, 1)
    with consumer(url, 'faults', **options) as process:
        eventually(lambda: seen_count(db) == 400)
        terminate(process)
    prove_windows(db, {0: 400})
    assert db.seen.count_documents({}) == 40


def test_a_second_signal_ends_the_consumer_at_once_and_loses_nothing(url, db, stream):
    appended(stream, 0, 0, 400)
    options = {'once': True, 'size': 10, 'workers': 2}
    with consumer(url, 'faults', work=60, say=True, stdout=subprocess.PIPE, **options) as process:
        assert process.stdout.readline()
        workers = family(process)
        process.send_signal(signal.SIGTERM)
        after(1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5)
        gone(workers)
    open_at_end = {doc['_id'] for doc in db.window.find({'status': 'open'})}
    with consumer(url, 'faults', **options) as process:
        done(process, db, 400)
        terminate(process)
    prove_once(db, 'second SIGTERM while the function runs', {0: 400}, again=open_at_end)


def test_workers_end_by_themselves_when_the_consumer_is_killed_in_the_middle_of_a_window(url, db, stream):
    appended(stream, 0, 0, 10)
    with consumer(url, 'faults', work=30, say=True, stdout=subprocess.PIPE, size=5, workers=2) as process:
        assert process.stdout.readline()
        assert len(family(process)) >= 2
        kill(process)


def test_threads_and_forked_children_append_through_the_handles_of_their_parent(url, db):
    with running(str(SCRIPTS / 'fork.py'), url) as process:
        assert process.wait(60) == 0
    children = [f'{kind}{i}' for kind in ('fork', 'process') for i in range(3)]
    threads = [f'{child}.{i}' for child in children for i in range(2)] + [f'parent.{i}' for i in range(4)]
    prove_log(db, 'single', dict.fromkeys(threads, 100))
    prove_log(db, 'batched', dict.fromkeys(['parent', *children], 50))


@pytest.mark.parametrize('options', ['', '&retryWrites=false'])
def test_an_insert_whose_reply_was_lost_is_there_once(mongod, url, db, options):
    with Proxy(mongod.port) as proxy:
        lost = proxy.url(db.name) + options
        single, many = mb.stream('single', url=lost), mb.stream('many', url=lost)
        batched = mb.stream('batched', url=lost, batchsize=100, linger=60)
        for i in range(3):
            happened = proxy.cut_reply(command('insert', 'buffer'))
            single.append({'source': 0, 'seq': i})
            assert happened.wait(10)
            happened = proxy.cut_reply(command('insert', 'buffer'))
            appended(many, 0, i * 3500, (i + 1) * 3500)
            assert happened.wait(10)
            happened = proxy.cut_reply(command('insert', 'buffer'))
            for seq in range(i * 150, (i + 1) * 150):
                batched.append({'source': 0, 'seq': seq})
            batched.flush()
            assert happened.wait(10)
    prove_log(db, 'single', {0: 3})
    prove_log(db, 'many', {0: 10500})
    prove_log(db, 'batched', {0: 450})


@pytest.mark.parametrize('options', ['', '&retryWrites=false'])
def test_appends_wait_while_connections_are_refused_and_cut(mongod, url, db, options):
    with Proxy(mongod.port) as proxy:
        stream = mb.stream('cut', url=f'{proxy.url(db.name)}&serverSelectionTimeoutMS=200{options}')
        threads = [threading.Thread(target=append_one_by_one, args=(stream, source, 100)) for source in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            before = db.buffer.count_documents({})
            eventually(lambda: db.buffer.count_documents({}) > before + 20)  # noqa: B023
            proxy.refuse()
            proxy.cut()
            eventually(lambda: stream.target.is_away)
            proxy.allow()
        for thread in threads:
            thread.join(30)
    prove_log(db, 'cut', dict.fromkeys(range(4), 100))


@pytest.mark.parametrize(('verb', 'collection'), [
    ('findAndModify', 'group'), ('insert', 'window'), ('update', 'window'), ('update', 'position'), ('update', 'group'),
    ('delete', 'window'), ('delete', 'buffer'),
])
def test_a_consumer_goes_on_when_the_reply_to_one_of_its_writes_was_lost(mongod, url, db, verb, collection):
    seen, history = Seen(), History(db)
    with Proxy(mongod.port) as proxy:
        stream = mb.stream('faults', url=f'{proxy.url(db.name)}&retryWrites=false')
        appended(stream, 0, 0, 500)
        emitter = mb.make_emitter('faults', note, stream=stream, size=10, executor=InlineExecutor, sink=seen, lease=2.0)
        happened = proxy.cut_reply(command(verb, collection))
        with started(emitter):
            assert happened.wait(10)
            appended(stream, 0, 500, 1000)
            eventually(lambda: seen.count() == 1000)
            eventually(lambda: not db.buffer.count_documents({}), message='messages stay behind')
    prove(seen.messages(), {0: 1000})
    history.prove()


def test_fixed_windows_stay_right_when_the_connection_is_lost_while_they_are_claimed(url, db, monkeypatch):
    seen, errors, claim_windows = Seen(), [AutoReconnect('lost')], ledger.claim_windows

    def lossy(*args):
        if errors:
            raise errors.pop()
        claim_windows(*args)

    monkeypatch.setattr(ledger, 'claim_windows', lossy)
    stream = mb.stream('faults', url=url)
    start = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(seconds=20)
    times = [start + timedelta(seconds=0.1 * i) for i in range(100)]
    write_at(db, 'faults', times)
    emitter = mb.make_emitter(
        'faults', note, stream=stream, interval=1.0, relaxed=False, executor=InlineExecutor, sink=seen
    )
    with started(emitter):
        eventually(lambda: seen.count() == 100)
    assert not errors
    prove_times(seen, times)


def keep_up(url, db, scenario, faults):
    """A producer and a consumer go on while faults happen to the server, and what they did is right."""
    stream, stop, count = mb.stream('faults', url=url), threading.Event(), itertools.count()

    def produce():
        while not stop.is_set():
            appended(stream, 0, seq := 5 * next(count), seq + 1)
            for more in range(seq + 1, seq + 5):
                stream.append({'source': 0, 'seq': more})

    producing = threading.Thread(target=produce)
    with consumer(url, 'faults', once=True, size=5, workers=1, lease=2.0) as process:
        producing.start()
        try:
            for fault in faults:
                before = seen_count(db)
                eventually(lambda: seen_count(db) > before + 100, 40)  # noqa: B023
                fault(process)
        finally:
            stop.set()
            producing.join(60)
        end = 5 * next(count)
        eventually(lambda: seen_count(db) == end, 40, f'{end} messages not all seen')
        eventually(lambda: not db.buffer.count_documents({}), message='messages were not deleted')
        terminate(process)
    prove_once(db, scenario, {0: end})


def test_what_mongodb_acknowledged_survives_its_death_and_both_sides_go_on(rng):
    with Mongod() as server:
        def restarted(process):
            after(rng.uniform(0, 0.3), process)
            server.kill()
            server.start()

        keep_up(server.url('test'), server.client['test'], 'mongod killed 3 times', [restarted] * 3)


def test_what_three_mongods_acknowledged_survives_the_loss_of_their_primary_and_both_sides_go_on(rng):
    with ReplicaSet() as servers:
        def stepped_down(process):
            after(rng.uniform(0, 0.3), process)
            servers.step_down(3)

        def killed(process):
            after(rng.uniform(0, 0.3), process)
            primary = servers.primary
            primary.kill()
            primary.start()

        keep_up(servers.url('test'), servers.client['test'], 'primary of three stepped down 3 times, was killed once',
                [stepped_down, stepped_down, killed, stepped_down])


def append_one_by_one(stream: mb.Stream, source: int, count: int) -> None:
    for seq in range(count):
        stream.append({'source': source, 'seq': seq})
