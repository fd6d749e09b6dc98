"""What must hold when processes are killed, stopped or forked, and when connections and servers are lost."""
from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import threading
from typing import Any

import psutil
import pytest
from processes import (
    History,
    appended,
    consumer,
    gone,
    family,
    is_stopped,
    kill,
    owner_of,
    prove,
    prove_windows,
    seen_count,
    terminate,
    windows_seen,
)
from pymongo import MongoClient
from servers import Mongod, Proxy, eventually

import minibatch as mb
from minibatch.consumer import Consumer

# Every write of the consumer's loop, in the order of the loop.
WRITES = ('take_lease', 'fence', 'adopt_windows', 'claim_windows', 'commit_windows', 'write_positions', 'write_progress',
          'delete_windows', 'delete_records', 'renew_lease')
SEED = random.SystemRandom().randrange(10**6)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random moments; the seed is printed when a test fails."""
    print(f'seed {SEED}')
    return random.Random(f'{SEED} {request.node.name}')


@pytest.fixture
def stream(url: str) -> mb.Stream:
    return mb.stream('faults', url=url)


def test_a_consumer_killed_at_random_moments_loses_nothing_and_repeats_only_open_windows(url, db, stream, rng):
    history, open_at_kill, end = History(db), set(), 0
    for _ in range(10):
        appended(stream, 0, end, end + 2000)
        end += 2000
        with consumer(url, 'faults', work=0.001, size=10, workers=2) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.3, 1.5))
            kill(process)
        open_at_kill |= {doc['_id'] for doc in db.window.find({'status': 'open'})}
    with consumer(url, 'faults', size=10, workers=2) as process:
        eventually(lambda: seen_count(db) == end, message=f'{end} messages not all seen')
        terminate(process)
    prove_windows(db, {0: end})
    repeated = {id_ for id_, times in windows_seen(db).items() if len(times) > 1}
    assert repeated <= open_at_kill
    history.prove()
    assert db.buffer.count_documents({}) == 0


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_consumer_killed_at_any_write_of_its_loop_loses_nothing(url, db, stream, when):
    history, end = History(db), 0
    for name in WRITES:
        appended(stream, 0, end, end + 100)
        end += 100
        with consumer(url, 'faults', interrupt=('SIGKILL', when, name, 1), size=10, workers=1, lease=0.4) as process:
            assert process.wait(20) == -signal.SIGKILL, f'not killed {when} {name}'
    with consumer(url, 'faults', size=10, workers=1) as process:
        eventually(lambda: seen_count(db) == end, message=f'{end} messages not all seen')
        terminate(process)
    prove_windows(db, {0: end})
    history.prove()


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('name', ['claim_windows', 'commit_windows', 'write_positions', 'write_progress', 'delete_records'])
def test_a_planner_stopped_at_a_write_changes_nothing_when_it_wakes(url, db, stream, when, name):
    history = History(db)
    appended(stream, 0, 0, 300)
    options = {'size': 10, 'workers': 1, 'lease': 1.0}
    with consumer(url, 'faults', interrupt=('SIGSTOP', when, name, 1), **options) as zombie:
        eventually(lambda: is_stopped(zombie))
        with consumer(url, 'faults', work=0.005, **options) as successor:
            eventually(lambda: db.seen.count_documents({'planner': successor.pid}) > 3)
            zombie.send_signal(signal.SIGCONT)
            appended(stream, 0, 300, 400)
            eventually(lambda: seen_count(db) == 400, message='400 messages not all seen')
            terminate(zombie)
            assert owner_of(db, 'faults') == successor.pid
            terminate(successor)
    prove_windows(db, {0: 400})
    history.prove()


def test_planners_stopped_at_random_moments_change_nothing_when_they_wake(url, db, stream, rng):
    history, end = History(db), 0
    options = {'size': 10, 'workers': 1, 'lease': 1.0, 'work': 0.001}
    with consumer(url, 'faults', **options) as first, consumer(url, 'faults', **options) as second:
        for _ in range(6):
            appended(stream, 0, end, end + 3000)
            end += 3000
            pid = eventually(lambda: owner_of(db, 'faults'))
            zombie, successor = (first, second) if pid == first.pid else (second, first)
            with pytest.raises(subprocess.TimeoutExpired):
                zombie.wait(rng.uniform(0, 0.5))
            zombie.send_signal(signal.SIGSTOP)
            eventually(lambda: owner_of(db, 'faults') == successor.pid)  # noqa: B023
            zombie.send_signal(signal.SIGCONT)
            eventually(lambda: seen_count(db) == end, message=f'{end} messages not all seen')  # noqa: B023
            assert zombie.poll() is None
        terminate(first)
        terminate(second)
    prove_windows(db, {0: end})
    history.prove()
