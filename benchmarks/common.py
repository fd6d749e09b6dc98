"""What the benchmarks share: how large a run is, the server, messages, other processes, repeats, and the table."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import Any

import bson

import minibatch as mb
from minibatch import connection, store

MESSAGE = {'name': 'sensor', 'x': 1.5}
BATCH = 1000  # messages in a record batch
STEP = {True: 20_000, False: 5000}  # messages a hand-written loop reads and deletes at once: of record batches, singles
SIZES = {'quick': (0.02, 1), 'short': (0.3, 3), 'full': (1.0, 5)}  # how many of the messages, how many repeats
PATIENCE = 300.0  # seconds until a benchmark that makes no end has failed

PROCESSES = multiprocessing.get_context(
    'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
)
PROCESSES.set_forkserver_preload(['minibatch'])
_streams = count(1)


@dataclass(frozen=True)
class Given:
    """How large a run is: 'quick' shows that it works, 'short' is for a look, 'full' for figures to quote."""

    size: str

    @property
    def repeat(self) -> int:
        return SIZES[self.size][1]

    def some(self, *values: Any) -> tuple[Any, ...]:
        """All of them, in a quick run the first and the last."""
        return (values[0], values[-1]) if self.size == 'quick' else values

    def count(self, full: int, step: int = BATCH) -> int:
        """So many of the messages of a full run, a multiple of `step`."""
        return max(round(full * SIZES[self.size][0] / step), 1) * step


@dataclass(frozen=True)
class Case:
    """What is measured, and what it is compared with.

    Args:
        name: as the table has it.
        run: measures once, and returns {figure: value}. The name of a figure ends with its unit.
        against: the name of a case above it, a floor most times; or {figure: what it is to reach}; or None for what
            is itself the floor of others.
    """

    name: str
    run: Callable[[], dict[str, float]]
    against: str | dict[str, float] | None = None


@dataclass(frozen=True)
class Row:
    """One figure of a case, as results.json has it; `floor` and `ratio` are None if it is not compared."""

    case: str
    figure: str
    value: float
    against: str
    floor: float | None
    ratio: float | None


class Server:
    """A database of its own on the server, dropped at the end; both sides write as the URL says: w: majority."""

    def __init__(self, url: str | None, name: str) -> None:
        mb.connectdb(url, f'minibatch_benchmark_{name}')
        self.target = connection.current()
        self.place = self.target.url, self.target.dbname  # for `connectdb` in another process
        self.db = self.target.db
        self.write_concern = self.db.write_concern.document['w']
        self.version = self.target.client.server_info()['version']

    def __enter__(self) -> Server:
        self.target.client.drop_database(self.target.dbname)
        return self

    def __exit__(self, *exc: object) -> None:
        self.target.client.drop_database(self.target.dbname)

    def stream(self, **options):
        """A stream nothing was appended to yet."""
        return mb.stream(f'benchmark-{next(_streams)}', **options)

    def collection(self, index=True):
        """An empty collection for the floor, with the index that the log has."""
        collection = self.db[f'floor_{next(_streams)}']
        if index:
            collection.create_index([('stream', 1), ('producer', 1), ('offset', 1)], unique=True)
        return collection


# --- messages


def message(number):
    return {'v': number, **MESSAGE}


def record(offset, messages, producer='floor'):
    """A document like those of the log, of one message or several."""
    content = {'data': messages[0]} if len(messages) == 1 else {'batch': messages}
    head = {'stream': 'floor', 'producer': producer, 'offset': offset, 'n': len(messages), 'processed': False}
    return {**head, **content}


def fill(stream, number, batch):
    """A backlog, as record batches, or one message a document as `append` writes them."""
    if batch:
        stream.append_many(map(message, range(number)))
        return
    now = datetime.now(timezone.utc)
    for first in range(0, number, BATCH):
        records = [
            store.record_batch(stream.name, 'benchmark', offset, [bson.encode(message(offset))], [now], [None])
            for offset in range(first, min(first + BATCH, number))
        ]
        assert store.insert_records(stream.target.db.buffer, records) == (len(records), '')


def check_stored(collection, number, **query):
    """Each of the messages 0 to `number` is stored once: their count and their sum are right."""
    values = {'$sum': ['$data.v', {'$sum': '$batch.v'}]}
    total = {'$group': {'_id': None, 'n': {'$sum': '$n'}, 'v': {'$sum': values}}}
    found = next(collection.aggregate([{'$match': {'offset': {'$gte': 0}, **query}}, total]), {'n': 0, 'v': 0})
    assert (found['n'], found['v']) == (number, sum_of(number)), f'{found["n"]} of {number} stored, or not each once'


def sum_of(number):
    return number * (number - 1) // 2


def summed(window):
    return len(window), sum(data['v'] for data in window.data)


# --- consumers


class Totals:
    """A sink that adds up what `summed` returns, and tells when it has seen `number` messages."""

    def __init__(self, number):
        self.number, self.messages, self.total = number, 0, 0
        self.complete = threading.Event()
        self.first = self.last = 0.0
        self.before = 0

    def put(self, result):
        self.messages += result[0]
        self.total += result[1]
        if not self.first:
            self.first, self.before = time.perf_counter(), self.messages
        if self.messages >= self.number and not self.last:
            self.last = time.perf_counter()
            self.complete.set()

    def wait(self):
        assert self.complete.wait(PATIENCE), f'{self.messages} of {self.number} after {PATIENCE:g} seconds'

    @property
    def rate(self):
        """Messages a second, from the first result to the last."""
        return (self.number - self.before) / (self.last - self.first)

    def check(self):
        assert (self.messages, self.total) == (self.number, sum_of(self.number)), 'not each message once'


@contextmanager
def consuming(*emitters):
    """Run consumers, each in a thread; they must come to a good end."""
    for emitter in emitters:
        emitter.start()
    try:
        yield
    finally:
        in_threads([emitter.stop for emitter in emitters])
    for emitter in emitters:
        assert emitter.error is None, emitter.error


def by_hand(stream, number, batch, readers=1):
    """The first messages of a log read in order and summed, by as many threads, then deleted, in bulk.

    Returns:
        Seconds of the reading, and of the deleting.
    """
    buffer = stream.target.db.buffer
    producer = buffer.find_one({'stream': stream.name, 'offset': {'$gte': 0}})['producer']
    log, step, sums = {'stream': stream.name, 'producer': producer}, STEP[batch], []
    spans = [{'offset': {'$gte': first, '$lt': min(first + step, number)}, **log} for first in range(0, number, step)]

    def read():
        seen = total = 0
        for span in spans:
            for found in buffer.find(span, batch_size=5000).sort('offset', 1):
                messages = found['batch'] if 'batch' in found else [found['data']]
                seen += len(messages)
                total += sum(data['v'] for data in messages)
        sums.append((seen, total))

    def delete():
        for span in spans:
            buffer.delete_many(span)

    reading = timed(in_threads, [read] * readers)
    assert sums == [(number, sum_of(number))] * readers, 'not each message once'
    return reading, timed(delete)


# --- threads, processes, time


def timed(fn, *args):
    began = time.perf_counter()
    fn(*args)
    return time.perf_counter() - began


def in_threads(works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_process(fn, *args):
    """What `fn` returns in a process of its own."""
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        return pool.submit(fn, *args).result(PATIENCE)


def in_processes(processes, prepare, *args):
    """Seconds that as many processes take, from when all are ready. `prepare(number, *args)` returns what each does."""
    barrier = PROCESSES.Barrier(processes + 1, timeout=PATIENCE)
    children = [PROCESSES.Process(target=_child, args=(barrier, prepare, i, args), daemon=True)
                for i in range(processes)]
    for child in children:
        child.start()
    barrier.wait()
    seconds = timed(barrier.wait)
    for child in children:
        child.join()
        assert child.exitcode == 0, f'a process ended with code {child.exitcode}'
    return seconds


def _child(barrier, prepare, number, args):
    try:
        work = prepare(number, *args)
        barrier.wait()
        work()
        barrier.wait()
    except BaseException:
        barrier.abort()
        raise


# --- repeats, and the table


def compare(cases: list[Case], repeat: int) -> list[Row]:
    """Run the cases in turn, `repeat` times, and return the medians, each compared with those of its own rounds."""
    reached: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for turn in range(1, repeat + 1):
        for case in cases:
            began = time.perf_counter()
            figures = case.run()
            reached[case.name].append(figures)
            shown = ', '.join(f'{number_text(value)} {figure}' for figure, value in figures.items())
            print(f'  {turn}/{repeat}  {time.perf_counter() - began:5.1f} s  {case.name}: {shown}', flush=True)
    return [row for case in cases for row in _rows(case, reached)]


def _rows(case: Case, reached: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    rounds = reached[case.name]
    for figure in rounds[0]:
        values = [figures[figure] for figures in rounds]
        if isinstance(case.against, str):
            against, floors = case.against, [figures.get(figure) for figures in reached[case.against]]
        else:
            against, floors = 'target', [(case.against or {}).get(figure)] * len(rounds)
        if None in floors:
            yield Row(case.name, figure, statistics.median(values), '', None, None)
            continue
        # Each with the floor of its own round, so that a noisy neighbour slows both.
        ratios = [value / floor for value, floor in zip(values, floors, strict=True)]
        floor = statistics.median(floors)
        yield Row(case.name, figure, statistics.median(values), against, floor, statistics.median(ratios))


def number_text(value: float) -> str:
    """Three digits that matter, and all those before the point."""
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


def ratio_text(value: float) -> str:
    return f'{value:.2f}' if value >= 0.1 else f'{value:.1g}'


def print_table(title: str, rows: list[Row]) -> None:
    cells = [('', 'figure', 'reached', 'floor', 'ratio', 'compared with')]
    for above, row in zip([None, *rows], rows, strict=False):
        name = '' if above is not None and above.case == row.case else row.case
        floor = '' if row.floor is None else number_text(row.floor)
        ratio = '' if row.ratio is None else ratio_text(row.ratio)
        cells.append((name, row.figure, number_text(row.value), floor, ratio, row.against))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f'\n{title}\n')
    for line in cells:
        aligned = [cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
                   for i, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print('  '.join(aligned).rstrip())
    print(flush=True)
