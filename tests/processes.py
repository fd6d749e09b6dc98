"""Consumers and producers as real processes, and the proof that what they saw is right."""
from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
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
    url: str, stream: str, *, work: float = 0.0, say: bool = False, picks: bool = False, interrupt: Any = None,
    stdout: Any = None, **options: Any,
) -> Any:
    """scripts/consume.py with options of streaming.

    Args:
        work: seconds which the function takes.
        say: whether the function prints the id of its window when it begins.
        picks: whether the emitter is one which picks the messages with an even `seq`.
        interrupt: [signal, 'before' or 'after', a function of the store, which call].
    """
    config = {'url': url, 'stream': stream, 'work': work, 'say': say, 'picks': picks, 'interrupt': interrupt}
    return running(str(SCRIPTS / 'consume.py'), json.dumps({**config, 'options': options}), stdout=stdout)


def producer(url: str, stream: str, source: int, count: int) -> Any:
    """scripts/produce.py."""
    return running(str(SCRIPTS / 'produce.py'), url, stream, str(source), str(count))


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What a process has started, as far as it still runs."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


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
    eventually(lambda: not any(map(is_alive, workers)), 5, 'workers outlive their parent')


def terminate(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> None:
    """Stop a consumer in the clean way: exit code 0, and none of what it had started stays."""
    workers = family(process)
    process.send_signal(number)
    assert process.wait(20) == 0
    gone(workers)


class InThisThread:
    """An executor that has done it when submit returns."""

    def submit(self, fn: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn())
        except Exception as exc:
            future.set_exception(exc)
        return future


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


def prove(seen: list[list[Any]], counts: dict[Any, int]) -> None:
    """Nothing is lost, nothing is there twice, and the messages of each source are in order."""
    sequences = defaultdict(list)
    for source, seq in seen:
        sequences[source].append(seq)
    for source, count in counts.items():
        got = sequences.pop(source, [])
        lost, more = set(range(count)) - set(got), len(got) - len(set(got))
        assert not lost, f'{len(lost)} messages of {source} lost, the first is {min(lost)}'
        assert not more, f'{more} messages of {source} in more than one window'
        assert got == list(range(count)), f'messages of {source} out of order'
    assert not sequences, f'messages of nobody: {list(sequences)}'


def prove_windows(db: Database[dict[str, Any]], counts: dict[Any, int]) -> None:
    """What `prove` says, of the windows in the collection `seen`."""
    prove([message for times in windows_seen(db).values() for message in times[0]['seen']], counts)


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
