"""Consumers and producers as real processes, and the proof that what they saw is right."""
from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import bson
import psutil
from pymongo.database import Database
from servers import eventually

import minibatch as mb
from minibatch import store
from minibatch.window import WindowEmitter

SCRIPTS = Path(__file__).parent / 'scripts'
# Of the random moments; in the environment, so that all processes of a run have the same.
SEED = int(os.environ.setdefault('FAULTS_SEED', str(random.SystemRandom().randrange(10**6))))


@contextmanager
def running(*args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python program, ended with all that it started when the block is left."""
    environment = {**os.environ, 'PYTHONPATH': str(Path(mb.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, *args], text=True, env=environment, **options) as process:
        try:
            yield process
        finally:
            started = family(process)
            process.kill()
            process.wait(10)
            for child in started:
                if is_alive(child):
                    child.kill()


def consumer(
    url: str, stream: str, *, once: bool = False, work: float = 0.0, say: bool = False, trouble: Any = None,
    clock: float = 0.0, picks: bool = False, interrupt: Any = None, stdout: Any = None, **options: Any,
) -> Any:
    """scripts/consume.py with options of streaming.

    Args:
        once: whether calls of the function are noted in `seen`, and messages go through an exactly-once sink to
            `once`; else a plain sink notes in `seen` what it is given.
        work: seconds which the function takes.
        say: whether the function prints the id of its window when it begins.
        trouble: what the function does at which messages: {'raise', 'exit' or 'hold': [seq, ...]}; hold keeps the
            interpreter for 3 seconds.
        clock: seconds by which the clock of the process is wrong.
        picks: whether the emitter is one which picks the messages with an even `seq`.
        interrupt: [signal, 'before' or 'after', a function of the store, which call].
    """
    config = {'url': url, 'stream': stream, 'once': once, 'work': work, 'say': say, 'trouble': trouble or {},
              'clock': clock, 'picks': picks, 'interrupt': interrupt, 'options': options}
    return running(str(SCRIPTS / 'consume.py'), json.dumps(config), stdout=stdout)


def producer(url: str, stream: str, source: int, count: int, stdout: Any = subprocess.DEVNULL) -> Any:
    """scripts/produce.py."""
    return running(str(SCRIPTS / 'produce.py'), url, stream, str(source), str(count), stdout=stdout)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What a process has started, as far as it still runs."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes of a consumer that run now."""
    def is_worker(child: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return is_alive(child) and 'popen_loky_posix' in str(child.cmdline())
        return False
    return [child for child in family(process) if is_worker(child)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_stopped(process: subprocess.Popen[str]) -> bool:
    """Whether a process was stopped by SIGSTOP."""
    assert process.poll() is None, f'ended with code {process.returncode} instead'
    return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process; none of what it had started stays."""
    workers = family(process)
    process.kill()
    process.wait(10)
    gone(workers)


def gone(workers: list[psutil.Process]) -> None:
    # One that has only begun to start notices when it has imported what it needs.
    eventually(lambda: not any(map(is_alive, workers)), 15, f'some outlive their parent: {workers}')


def terminate(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> None:
    """Stop a consumer in the clean way: exit code 0, and none of what it had started stays."""
    workers = family(process)
    process.send_signal(number)
    assert process.wait(20) == 0
    gone(workers)


def note(window: mb.MessageWindow) -> dict[str, Any]:
    """A function for consumers: what it saw, as `Seen` and the collection `seen` have it."""
    seen = [[data['source'], data['seq']] for data in window.data]
    place = {'window': window.id, 'number': window.number, 'start': window.start, 'end': window.end}
    return {**place, 'attempt': window.attempt, 'seen': seen}


class Seen(list[dict[str, Any]]):
    """A sink in this process, for the results of `note`."""

    put = list.append

    def messages(self) -> list[list[Any]]:
        """The messages of each window once, by the numbers of the windows."""
        windows = {result['number']: result['seen'] for result in self}
        return [message for number in sorted(windows) for message in windows[number]]

    def count(self) -> int:  # type: ignore[override]
        return len(self.messages())


@contextmanager
def started(emitter: WindowEmitter) -> Iterator[WindowEmitter]:
    """Run a consumer in a thread of this process."""
    emitter.start()
    try:
        yield emitter
    finally:
        emitter.stop()
    assert emitter._thread
    assert not emitter._thread.is_alive(), 'does not stop'


def command(verb: str, collection: str) -> bytes:
    """How a command begins on the wire."""
    return b'\x02%b\x00%b%b\x00' % (verb.encode(), struct.pack('<i', len(collection) + 1), collection.encode())


def write_at(
    db: Database[dict[str, Any]], stream: str, times: list[datetime], source: Any = 0, first: int = 0
) -> None:
    """Write one message for each time, as a producer would whose clock showed it."""
    records = []
    for seq, time in enumerate(times, first):
        data = bson.encode({'source': source, 'seq': seq})
        records.append(store.record_batch(stream, f'producer{source}', seq, [data], [time], [None]))
    assert store.insert_records(db.buffer, records) == (len(records), '')


def prove_times(windows: list[dict[str, Any]], times: list[datetime]) -> None:
    """Every message of source 0 is in the window of its time, the windows touch, and none is there twice."""
    for before, window in pairwise(windows):
        assert before['end'] == window['start']
    for window in windows:
        for source, seq in window['seen']:
            assert source or window['start'] <= times[seq] < window['end'], f'message {seq} is in the wrong window'


def prove_log(db: Database[dict[str, Any]], stream: str, counts: dict[Any, int]) -> None:
    """What `prove` says, of the messages as they are stored, and the offsets of each producer have no gap."""
    ends: dict[str, int] = defaultdict(int)
    seen = []
    for doc in db.buffer.find({'stream': stream}, sort=[('producer', 1), ('offset', 1)]):
        assert doc['offset'] == ends[doc['producer']], 'a gap in the offsets, or one used twice'
        ends[doc['producer']] += doc['n']
        seen += [[data['source'], data['seq']] for data in doc.get('batch') or [doc['data']]]
    prove(seen, counts)


def appended(stream: Any, source: int, start: int, end: int) -> None:
    """Append the messages `start` to `end` of a source."""
    stream.append_many({'source': source, 'seq': seq} for seq in range(start, end))


def seen_count(db: Database[dict[str, Any]]) -> int:
    """How many different messages were seen in windows."""
    once = {'$group': {'_id': '$window', 'n': {'$first': {'$size': '$seen'}}}}
    return sum(doc['n'] for doc in db.seen.aggregate([once]))


def windows_seen(db: Database[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All that was seen of each window, by its id; a window is the same at each attempt."""
    windows = defaultdict(list)
    for doc in db.seen.find(sort=[('number', 1), ('_id', 1)]):
        windows[doc['window']].append(doc)
    for times in windows.values():
        assert all(doc['seen'] == times[0]['seen'] for doc in times), f'not the same at each attempt: {times}'
    return dict(windows)


@dataclass
class Row:
    """What a fault did: messages that were lost, given to the function or shown by the sink again, and the order."""

    scenario: str
    messages: int
    windows: int
    lost: int = 0
    repeated: int = 0  # at the function
    doubled: int = 0  # in the sink
    ordered: bool = True

    def cells(self) -> list[str]:
        counts = (self.messages, self.windows, self.lost, self.repeated, self.doubled)
        return [self.scenario, *map(str, counts), 'kept' if self.ordered else 'BROKEN']


HEADINGS = ['scenario', 'messages', 'windows', 'lost', 'function again', 'sink again', 'order']
FAULTS: list[Row] = []  # what the tests of this run found; conftest.py prints it


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Plain text with aligned columns; the first is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for row in [headings, ['-' * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append('  '.join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return '\n'.join(lines)


def compare(row: Row, seen: list[list[Any]], counts: dict[Any, int], dead: Set[tuple[Any, int]] = frozenset()) -> int:
    """Add to a row what is lost, and whether the order is broken; returns how many messages are there again.

    `counts` says how many messages each source had, `dead` which of them are not to be there.
    """
    sequences = defaultdict(list)
    for source, seq in seen:
        sequences[source].append(seq)
    assert set(sequences) <= set(counts), f'messages of nobody: {set(sequences) - set(counts)}'
    again = 0
    for source, total in counts.items():
        got = sequences[source]
        missing = {seq for seq in range(total) if (source, seq) not in dead}.symmetric_difference(got)
        first = list(dict.fromkeys(got))
        row.lost += len(missing)
        row.ordered &= first == sorted(first)
        again += len(got) - len(first)
    return again


def prove(seen: list[list[Any]], counts: dict[Any, int]) -> None:
    """Nothing is lost, nothing is there twice, and the messages of each source are in order."""
    row = Row('', sum(counts.values()), 0)
    row.doubled = compare(row, seen, counts)
    assert row == Row('', row.messages, 0), row


def prove_windows(db: Database[dict[str, Any]], counts: dict[Any, int]) -> None:
    """What `prove` says, of the windows in the collection `seen`."""
    prove([message for times in windows_seen(db).values() for message in times[0]['seen']], counts)


def prove_once(
    db: Database[dict[str, Any]], scenario: str, counts: dict[Any, int], *, dead: Set[tuple[Any, int]] = frozenset(),
    again: Set[str] | None = None, most: int = 0,
) -> None:
    """What consumers with an exactly-once sink did is right; it becomes a row of the table.

    Args:
        dead: the messages (source, seq) that are to be dead letters.
        again: the windows that the function may have been given more than once, None for any.
        most: how many windows it may have been given again at most, if not 0.
    """
    calls = windows_seen(db)
    row = Row(scenario, sum(counts.values()), len(calls))
    FAULTS.append(row)
    in_two = compare(row, [message for times in calls.values() for message in times[0]['seen']], counts)
    repeated = {id_: len(times) - 1 for id_, times in calls.items() if len(times) > 1}
    row.repeated = in_two + sum(times * len(calls[id_][0]['seen']) for id_, times in repeated.items())
    shown = [[doc['source'], doc['seq']] for doc in db.once.find(sort=[('window', 1), ('_id', 1)])]
    row.doubled = compare(row, shown, counts, dead)
    assert not in_two, f'{in_two} messages in more than one window'
    assert (row.lost, row.doubled, row.ordered) == (0, 0, True), row
    assert again is None or set(repeated) <= again, f'given to the function again without need: {repeated}'
    assert not most or sum(repeated.values()) <= most, f'more than {most} windows again: {repeated}'


def owner_of(db: Database[dict[str, Any]], stream: str) -> int:
    """The process that has the lease, or had it last."""
    doc = db.group.find_one({'stream': stream, 'group': 'default'}) or {}
    return int(doc.get('lease', {}).get('owner', {}).get('pid', 0))


class History:
    """All changes of the bookkeeping of a database, from when it was made."""

    def __init__(self, db: Database[dict[str, Any]]) -> None:
        self._db = db
        changes = [{'$match': {'operationType': {'$in': ['insert', 'update']}}}]
        self._events = db.watch(changes, max_await_time_ms=200)

    def prove(self) -> None:
        """No window was committed twice or claimed by a former leader, and nothing went backwards."""
        self._db.end.insert_one({})
        committed: set[str] = set()
        latest: dict[tuple[str, str], int] = defaultdict(int)

        def onward(what: str, value: int) -> None:
            assert value >= latest[what, id_], f'{what} of {id_} went back from {latest[what, id_]} to {value}'
            latest[what, id_] = value

        while (event := eventually(self._events.try_next))['ns']['coll'] != 'end':
            collection, id_ = event['ns']['coll'], event['documentKey']['_id']
            changed = event.get('fullDocument') or event['updateDescription']['updatedFields']
            if collection == 'window' and changed.get('status') == 'processed':
                assert id_ not in committed, f'window {id_} was committed twice'
                committed.add(id_)
            if collection == 'window' and changed.get('status') == 'open':
                id_ = changed['stream']
                onward('the epoch of the claims', changed['epoch'])
            if collection == 'position' and 'offset' in changed:
                onward('the offset', changed['offset'])
            if collection == 'group' and 'number' in changed:
                onward('the number', changed['number'])
        self._events.close()
        assert committed, 'no window was committed'
