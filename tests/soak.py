"""Runs producers and consumers for some minutes while faults happen, and proves that nothing was lost or doubled.

::

    make soak MINUTES=15                              # or: python tests/soak.py --minutes 15 --seed 1 --rate 1000

Three mongods on temporary folders; three producers; two consumers of group a, with an exactly-once sink; two of group
b, with a plain sink, a function that fails now and then, and poisoned messages, which become dead letters. Consumers,
workers, producers and mongods are killed, stopped and started again at random moments; at most one mongod is away at a
time. At the end everything drains, and every message is looked for. Exit code 1: something was lost, shown twice by the
exactly-once sink, or out of order, or a process ended by itself. Ctrl-C ends it early.
"""
from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bson import CodecOptions
from bson.raw_bson import RawBSONDocument
from processes import HEADINGS, SCRIPTS, Row, running, table, workers_of
from pymongo.errors import PyMongoError
from servers import Mongod, ReplicaSet, eventually

import minibatch as mb

LEASE = 3.0
OPTIONS: dict[str, dict[str, Any]] = {
    'a': {'size': 50, 'workers': 2, 'lease': LEASE},
    'b': {'interval': 0.1, 'relaxed': False, 'emit_empty': False, 'workers': 1, 'lease': LEASE},
}
DRAIN = 120.0
STOP = 60.0
RAW: Any = CodecOptions(document_class=RawBSONDocument)
FILLER = -1

Process = subprocess.Popen[str]


class Soak:
    """The processes, by name, and what happens to them."""

    def __init__(
        self, servers: ReplicaSet, folder: Path, log: IO[str], rate: float, seed: int, stack: ExitStack
    ) -> None:
        self.servers, self.folder, self.log, self.rate, self.stack = servers, folder, log, rate, stack
        self.url, self.db = servers.url('soak'), servers.client['soak']
        self.processes: dict[str, Process] = {}
        self.faults: Counter[str] = Counter()
        self.errors: list[str] = []
        self.over = threading.Event()
        self.sources = itertools.count()
        self.lost: list[tuple[str, int, int]] = []
        kinds = {
            'processes': [self.kill_consumer, self.stop_consumer, self.freeze_consumer, self.kill_worker,
                          self.kill_producer],
            'servers': [self.kill_mongod, self.step_down, self.freeze_mongod],
        }  # fmt: skip
        self.injectors = [
            threading.Thread(target=self.inject, args=(random.Random(f'{seed} {name}'), faults), name=name)
            for name, faults in kinds.items()
        ]

    # --- processes

    def start(self, name: str) -> None:
        """Start the producer or consumer of this name: p0, or a0, the first of group a."""
        if name[0] == 'p':
            source = next(self.sources)
            args = ('soak_produce.py', self.url, str(source), str(self.rate / 3), f'{self.folder}/source-{source}')
        else:
            args = ('soak_consume.py', self.url, name[0], f'{self.folder}/calls-{name[0]}',
                    json.dumps(OPTIONS[name[0]]))
        script = running(str(SCRIPTS / args[0]), *args[1:], stdout=self.log, stderr=self.log, start_new_session=True)
        self.processes[name] = self.stack.enter_context(script)

    @contextmanager
    def replaced(self, names: str, rng: random.Random) -> Iterator[Process]:
        """One of some processes, which is to end in this block; a moment later another one starts in its place."""
        name = rng.choice([name for name in self.processes if name[0] in names])
        process = self.processes.pop(name)
        yield process
        process.wait(STOP)
        self.over.wait(rng.uniform(0, 2))
        self.start(name)

    def watch(self) -> None:
        """Start again, and report, what has ended by itself."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None and self.processes.get(name) is process:
                self.errors.append(f'{name} has ended by itself with code {process.returncode}')
                self.start(name)

    # --- faults

    def inject(self, rng: random.Random, faults: list[Callable[[random.Random], None]]) -> None:
        """Let one fault after the other happen."""
        while not self.over.wait(rng.uniform(1, 5)):
            fault = rng.choice(faults)
            try:
                fault(rng)
            except Exception as exc:
                self.errors.append(f'{fault.__name__}: {type(exc).__name__}: {exc}')
            self.faults[fault.__name__.replace('_', ' ')] += 1

    def kill_consumer(self, rng: random.Random) -> None:
        with self.replaced('ab', rng) as process:
            process.kill()

    def stop_consumer(self, rng: random.Random) -> None:
        with self.replaced('ab', rng) as process:
            self.stop(process)

    def stop(self, process: Process) -> None:
        """End a consumer in the clean way; one that has no workers yet may not know of signals."""
        clean = bool(workers_of(process))
        process.terminate()
        code = process.wait(STOP)
        assert code == 0 or not clean, f'a consumer ended with code {code} after SIGTERM'

    def freeze_consumer(self, rng: random.Random) -> None:
        process = self.processes[rng.choice([name for name in self.processes if name[0] in 'ab'])]
        process.send_signal(signal.SIGSTOP)
        self.over.wait(LEASE + rng.uniform(-1, 3))
        process.send_signal(signal.SIGCONT)

    def kill_worker(self, rng: random.Random) -> None:
        consumers = [process for name, process in self.processes.items() if name[0] in 'ab']
        workers = [worker for process in consumers for worker in workers_of(process)]
        if workers:
            rng.choice(workers).kill()

    def kill_producer(self, rng: random.Random) -> None:
        with self.replaced('p', rng) as process:
            process.kill()

    def kill_mongod(self, rng: random.Random) -> None:
        member = rng.choice(self.servers.members)
        member.kill()
        self.over.wait(rng.uniform(0, 4))
        member.start()
        self.await_health(member)

    def step_down(self, rng: random.Random) -> None:
        self.servers.step_down(3)

    def freeze_mongod(self, rng: random.Random) -> None:
        member = rng.choice(self.servers.members)
        member.pause()
        self.over.wait(rng.uniform(1, 6))
        member.resume()
        self.await_health(member)

    def await_health(self, member: Mongod) -> None:
        """Wait until a member serves again, so that no two are away at a time."""
        def is_healthy() -> bool:
            with suppress(PyMongoError):
                hello = member.client.admin.command('hello')
                return bool(hello['isWritablePrimary'] or hello['secondary'])
            return False
        eventually(is_healthy, 60, f'{member.address} does not come back')

    # --- the run

    def run(self, seconds: float) -> None:
        """Let faults happen for so long, then let everything drain."""
        for name in ('p0', 'p1', 'p2', 'a0', 'a1', 'b0', 'b1'):
            self.start(name)
        for injector in self.injectors:
            injector.start()
        started = time.monotonic()
        try:
            with suppress(KeyboardInterrupt):
                for tick in range(1, int(seconds) + 1):
                    time.sleep(max(started + tick - time.monotonic(), 0))
                    self.watch()
                    if tick % 10 == 0:
                        print(self.progress(time.monotonic() - started), flush=True)
        finally:
            self.over.set()
        for injector in self.injectors:
            injector.join()
        for name in [name for name in self.processes if name[0] == 'p']:
            self.processes.pop(name).kill()
        print(f'draining, at most {DRAIN:.0f} s', flush=True)
        self.drain()
        for process in self.processes.values():
            self.stop(process)

    def progress(self, elapsed: float) -> str:
        done = {'a': '?', 'b': '?'}
        with suppress(PyMongoError):
            done.update({doc['group']: f'{doc.get("messages", 0):,}' for doc in self.db.group.find({'stream': 'soak'})})
        appended = sum(acknowledged for _, acknowledged in self.counts().values())
        return (f'{elapsed:4.0f} s  appended {appended:,}  processed by a {done["a"]}, by b {done["b"]}  '
                f'faults {self.faults.total()}  errors {len(self.errors)}')

    def drain(self) -> None:
        """Wait until no message is left; further ones fill the last windows of group a up."""
        filler = mb.stream('soak', url=self.url)
        left = {'$or': [{'data.source': {'$gte': 0}}, {'batch.source': {'$gte': 0}}]}
        started = time.monotonic()
        with suppress(KeyboardInterrupt):
            while waiting := self.db.buffer.count_documents(left):
                if time.monotonic() > started + DRAIN:
                    self.errors.append(f'{waiting} record batches are left after {DRAIN:.0f} s')
                    return
                filler.append_many({'source': FILLER, 'seq': 0, 'poisoned': False} for _ in range(50))
                time.sleep(1)
        print(f'drained in {time.monotonic() - started:.0f} s', flush=True)

    # --- the proof

    def counts(self) -> dict[int, tuple[int, int]]:
        """How many messages each source has begun to append, and how many are acknowledged."""
        files = self.folder.glob('source-*')
        found = {int(file.name.split('-')[1]): struct.unpack('<qq', file.read_bytes() or bytes(16)) for file in files}
        return {source: (begun, acknowledged) for source, (begun, acknowledged) in found.items()}

    def prove(self, group: str, scenario: str) -> Row:
        """Look for every message in the sink of a group."""
        counts = self.counts()
        row = Row(scenario, sum(acknowledged for _, acknowledged in counts.values()), 0)
        shown = {source: bytearray(begun) for source, (begun, _) in counts.items()}
        highest: dict[int, int] = defaultdict(int)
        for doc in self.db[group].find(sort=[('number', 1), ('_id', 1)]):
            row.windows += 1
            for source, start, end in doc['ranges']:
                if source == FILLER:
                    continue
                again = sum(map(bool, shown[source][start:end]))
                row.doubled += again
                row.ordered &= bool(again) or start >= highest[source]
                highest[source] = max(highest[source], end)
                shown[source][start:end] = b'\1' * (end - start)
        for source, seqs in self.dead(group).items():
            for seq in seqs:
                row.doubled += shown[source][seq]
                shown[source][seq] = 1
        for source, (_, acknowledged) in counts.items():
            kept = max(acknowledged, shown[source].rfind(1) + 1)  # of what was in flight a part may be there
            row.lost += shown[source].count(0, 0, kept)
            self.lost += [(group, source, seq) for seq in range(kept) if not shown[source][seq]]
        row.repeated = self.called_again(group)
        return row

    def dead(self, group: str) -> dict[int, list[int]]:
        """The messages of dead letters, by source; each of them must have a poisoned one."""
        found = defaultdict(list)
        for window in self.db.window.find({'group': group, 'status': 'failed'}):
            copies = self.db.dead.find({'_id': {'$gte': f'{window["_id"]}+', '$lt': f'{window["_id"]},'}})
            datas = [data for copy in copies for data in copy.get('batch') or [copy['data']]]
            self.faults[f'(dead letters of {group})'] += 1
            if group == 'a' or not any(data['poisoned'] for data in datas):
                self.errors.append(f'a dead letter without need: {window["_id"]}: {window.get("error")}')
            for data in datas:
                if data['source'] != FILLER:
                    found[data['source']].append(data['seq'])
        return found

    def keep_evidence(self) -> None:
        """Write down what was lost, and all that the servers have done, and what they have taken back."""
        (self.folder / 'lost').write_text('\n'.join(map(str, self.lost)))
        with open(self.folder / 'oplog.bson', 'wb') as file:
            oplog = self.servers.client.local.get_collection('oplog.rs', RAW)
            for operation in oplog.find({'ns': {'$regex': '^soak|^admin'}}):
                file.write(operation.raw)
        for i, member in enumerate(self.servers.members):
            for name in ('rollback', 'mongod.log'):
                found = Path(str(member.home), name)
                if found.exists():
                    copy = shutil.copytree if found.is_dir() else shutil.copy
                    copy(found, self.folder / f'{name}-{i}')

    def called_again(self, group: str) -> int:
        """How many messages the function was given again."""
        called: set[str] = set()
        again = 0
        with open(self.folder / f'calls-{group}') as file:
            for line in file:
                number, count = line.split()
                again += int(count) if number in called else 0
                called.add(number)
        return again


def main() -> int:
    parser = argparse.ArgumentParser(description='Producers and consumers under random faults, and a proof.')
    parser.add_argument('--minutes', type=float, default=1.0)
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument('--rate', type=float, default=1000.0, help='messages a second')
    args = parser.parse_args()
    print(f'seed {args.seed}, {args.minutes:g} minutes, {args.rate:g} messages/s', flush=True)
    folder = Path(tempfile.mkdtemp(prefix='minibatch-soak-'))
    with ReplicaSet() as servers, open(folder / 'log', 'a') as log, ExitStack() as stack:
        soak = Soak(servers, folder, log, args.rate, args.seed, stack)
        soak.run(args.minutes * 60)
        rows = [soak.prove('a', 'group a, exactly-once sink'), soak.prove('b', 'group b, plain sink')]
        if soak.lost:
            soak.keep_evidence()
    print(table(HEADINGS, [row.cells() for row in rows]))
    print(table(['fault', 'times'], [[name, str(times)] for name, times in sorted(soak.faults.items())]))
    failed = soak.errors or rows[0].doubled or any(row.lost or not row.ordered for row in rows)
    if not failed:
        shutil.rmtree(folder)
        return 0
    print('\n'.join([*soak.errors, f'FAILED, seed {args.seed}; what the processes said is in {folder}/log']))
    return 1


if __name__ == '__main__':
    sys.exit(main())
