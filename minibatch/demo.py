"""What ``minibatch demo`` does: measure this machine, stream that through windows, and count what arrived.

A thread appends measurements, a consumer with worker processes turns windows of them into documents of a collection,
and the main thread shows how it goes. In the end all is read back: each message has a number, and each document says
which numbers it saw.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import embedded, signals
from .api import make_emitter, stream
from .clock import now
from .connection import URL_VARIABLES, Target, masked, target
from .contrib.mongodb import MongoSink
from .messages import MessageWindow
from .models import Stream

RESULTS = 'demo_windows'
RUNS = 'demo_runs'
FORGOTTEN_AFTER = timedelta(days=1)
DRAIN_SECONDS = 30.0
SHOW_PAUSE = 0.1
SHOWN_WINDOWS = 8
SHOWN_MEASUREMENTS = 40
BARS = '▁▂▃▄▅▆▇█'
BAR_WIDTH = 8


class Meter:
    """Measures this machine."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._at, self._counters = time.monotonic(), _counters()

    def read(self, number: int) -> dict[str, Any]:
        """A message; it has what the counters gained since the one before, so that each window stands alone."""
        before, self._counters = self._counters, _counters()
        began, self._at = self._at, time.monotonic()
        return {
            'number': number,
            'cpu': psutil.cpu_percent(),
            'memory': psutil.virtual_memory().percent,
            'counters': self._counters,
            'gained': {name: value - before[name] for name, value in self._counters.items()},
            'seconds': self._at - began,
        }


def _counters() -> dict[str, int]:
    disk, net = psutil.disk_io_counters(), psutil.net_io_counters()  # None where there is nothing to count
    return {
        'read': disk.read_bytes if disk else 0,
        'written': disk.write_bytes if disk else 0,
        'received': net.bytes_recv if net else 0,
        'sent': net.bytes_sent if net else 0,
    }


def rates(messages: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What the counters gained per second, over the time which these messages cover."""
    messages = list(messages)
    seconds = sum(message['seconds'] for message in messages)
    return {name: sum(m['gained'][name] for m in messages) / seconds for name in messages[0]['gained']}


def summarise(window: MessageWindow) -> Any:
    """The window function, called in the worker processes."""
    messages = window.data
    if not messages:
        return []
    cpu, memory = ([message[name] for message in messages] for name in ('cpu', 'memory'))
    return {
        'stream': window.stream,
        'window': window.number,
        'start': window.start,
        'end': window.end,
        'cpu': {'mean': sum(cpu) / len(cpu), 'max': max(cpu)},
        'memory': {'mean': sum(memory) / len(memory), 'max': max(memory)},
        'rates': rates(messages),
        'numbers': [message['number'] for message in messages],
        'worker': os.getpid(),
    }


class Feeder:
    """Appends measurements in a thread, at a steady rate."""

    def __init__(self, into: Stream, rate: float) -> None:
        self._stream, self._pause = into, 1 / rate
        self._stop = threading.Event()
        self.appended = 0  # acknowledged; their numbers are 0 to here
        self.recent: deque[dict[str, Any]] = deque(maxlen=SHOWN_MEASUREMENTS)
        self.thread = _Thread(self._run)

    def _run(self) -> None:
        meter, due = Meter(), time.monotonic() + self._pause
        while not self._stop.wait(max(due - time.monotonic(), 0)):
            message = meter.read(self.appended)
            self._stream.append(message)
            self.appended += 1
            self.recent.append(message)
            due += self._pause

    def stop(self) -> None:
        """End it when the append under way is acknowledged."""
        self._stop.set()
        self.thread.join()


class _Thread(threading.Thread):
    """A thread that keeps the error it ended with."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = run
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._call()
        except Exception as exc:
            self.error = exc


class Recorder:
    """A sink that passes results on to another, and remembers what to show of them."""

    def __init__(self, sink: MongoSink) -> None:
        self._sink = sink
        self.windows = self.messages = 0
        self.results: list[dict[str, Any]] = []

    def put(self, messages: Any) -> None:
        """Deliver a result, then count it."""
        self._sink.put(messages)
        if messages:
            self.results = sorted([*self.results, messages], key=lambda result: result['window'])[-SHOWN_WINDOWS:]
            self.messages += len(messages['numbers'])
        self.windows += 1


@dataclass(frozen=True)
class Tally:
    """What is found in MongoDB at the end of a run."""

    appended: int
    processed: int
    windows: int
    lost: int
    duplicates: int
    results: list[dict[str, Any]]


def tally(where: Target, name: str, acknowledged: int) -> Tally:
    """Compare what was acknowledged with the log and with the results, both read back from MongoDB."""
    log = stream(name, url=where.url)
    results = list(where.db[RESULTS].find({'stream': name}).sort('window', 1))
    stored = {message['number'] for record in log.buffer(offset__gte=0) for message in record.batch or [record.data]}
    seen = Counter(number for result in results for number in result['numbers'])
    expected = stored.union(range(acknowledged))
    return Tally(
        appended=len(stored),
        processed=len(seen),
        windows=log.window(status='processed').count(),
        lost=len(expected - (stored & seen.keys())),
        duplicates=sum(seen.values()) - len(seen),
        results=results,
    )


def remove_old_runs(where: Target) -> None:
    """Delete the streams and results of earlier runs: those that ended, and those that must have died."""
    db = where.majority
    for run in db[RUNS].find():
        if run['ended'] or run['began'].replace(tzinfo=timezone.utc) < now() - FORGOTTEN_AFTER:
            for collection in ('buffer', 'window', 'window_spans', 'position', 'group', RESULTS):
                db[collection].delete_many({'stream': run['_id']})
            db.stream.delete_one({'name': run['_id']})
            db[RUNS].delete_one({'_id': run['_id']})


class Demo:
    """One run; `run` returns the exit code."""

    def __init__(self, url: str | None, seconds: float, rate: float, window: float, workers: int) -> None:
        self._url, self._seconds, self._rate = url, seconds, rate
        self._window, self._workers = window, workers
        self._embedded = not url and not any(os.environ.get(name) for name in URL_VARIABLES)
        self._interrupted = threading.Event()
        self._streaming = self._draining = False
        self._console = Console(highlight=False)

    def run(self) -> int:
        """Stream for a while, drain, and sum up; 1 if messages were lost or something failed."""
        with signals.handled(self._interrupt, self._insist):
            where = self._connect()
            remove_old_runs(where)
            began = now()
            self.name = f'demo-{began.astimezone():%Y%m%d-%H%M%S}-{os.getpid()}'
            where.majority[RUNS].insert_one({'_id': self.name, 'began': began, 'ended': False})
            try:
                self._streaming = True
                errors = self._stream(where)
                self._streaming = False
                found = tally(where, self.name, self.feeder.appended)
            finally:
                where.majority[RUNS].replace_one({'_id': self.name}, {'began': began, 'ended': True})
        self._sum_up(found)
        for error in errors:
            print(f'error: {type(error).__name__}: {error}', file=sys.stderr)
        return 1 if found.lost or errors else 0

    def _connect(self) -> Target:
        if self._embedded:
            server = embedded.start()
            where = target(server.url)
            place = f'embedded, in {server.home}'
        else:
            where = target(self._url)
            place = f'at {masked(where.url)}'
        where.check()
        version = where.client.server_info()['version']
        self._console.print(f'MongoDB {version}, {place}', soft_wrap=True, markup=False)
        return where

    def _stream(self, where: Target) -> list[Exception]:
        """Feed and process until the time is over or Ctrl-C, and until all is processed; returns what failed."""
        self.recorder = Recorder(MongoSink(where.client[where.dbname][RESULTS]))
        log = stream(self.name, url=where.url)
        # Kept, so that the summary can count them.
        emitter = make_emitter(
            self.name, summarise, stream=log, interval=self._window, relaxed=False, keep=True, workers=self._workers,
            sink=self.recorder,
        )  # fmt: skip
        consumer = _Thread(emitter.run)
        self.feeder = Feeder(log, self._rate)
        threads = (consumer, self.feeder.thread)
        self.ends = time.monotonic() + self._seconds
        with self._view() as show:
            for thread in threads:
                thread.start()
            try:
                self._wait(show, lambda: any(thread.error for thread in threads), self.ends)
                self.feeder.stop()
                self._draining = True
                self._interrupted.clear()
                deadline = time.monotonic() + self._window + DRAIN_SECONDS
                self._wait(show, lambda: consumer.error or self.recorder.messages >= self.feeder.appended, deadline)
            finally:
                self.feeder.stop()
                emitter.stop()
                consumer.join(DRAIN_SECONDS)
            show()
        return [thread.error for thread in threads if thread.error is not None]

    def _wait(self, show: Callable[[], None], done: Callable[[], object], deadline: float) -> None:
        while not done() and time.monotonic() < deadline and not self._interrupted.wait(SHOW_PAUSE):
            show()

    def _interrupt(self) -> None:
        """Feed no more, and process what was fed; end the demo if nothing was streamed yet."""
        if not self._streaming:
            raise KeyboardInterrupt
        if not self._draining:
            self._interrupted.set()

    def _insist(self, number: int) -> None:
        """Do not wait for the last windows."""
        self._interrupted.set()
        if not self._streaming:
            raise KeyboardInterrupt

    # --- what is seen

    @contextmanager
    def _view(self) -> Iterator[Callable[[], None]]:
        """A function that shows how it goes: a live table in a terminal, else a line for each window."""
        console = self._console
        if console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith('utf'):
            with Live(self._table(), console=console, auto_refresh=False) as live:
                yield lambda: live.update(self._table(), refresh=True)
            return
        last = -1

        def show() -> None:
            nonlocal last
            for result in self.recorder.results:
                if result['window'] > last:
                    last = result['window']
                    print(plain_line(result), flush=True)

        yield show

    def _table(self) -> Group:
        title = f'stream {self.name}, windows of {self._window:g} s'
        table = Table(title=title, title_justify='left', box=None, padding=(0, 2, 0, 0))
        for heading in ('window', 'msgs', 'cpu %', 'max', '', 'mem %', 'disk B/s', 'net B/s', 'worker'):
            table.add_column(heading, justify='left' if heading in ('window', '') else 'right', no_wrap=True)
        for result in self.recorder.results:
            table.add_row(*self._row(result))
        for _ in range(SHOWN_WINDOWS - len(self.recorder.results)):
            table.add_row()
        return Group(table, self._now(), self._counts())

    def _row(self, result: dict[str, Any]) -> list[str]:
        cpu = result['cpu']
        return [
            clock_time(result['start']),
            str(len(result['numbers'])),
            f'{cpu["mean"]:.0f}',
            f'{cpu["max"]:.0f}',
            (BARS[-1] * round(cpu['mean'] / 100 * BAR_WIDTH)).ljust(BAR_WIDTH),
            f'{result["memory"]["mean"]:.1f}',
            amount(result['rates']['read'] + result['rates']['written']),
            amount(result['rates']['received'] + result['rates']['sent']),
            str(result['worker']),
        ]

    def _now(self) -> Text:
        recent = list(self.feeder.recent)
        if not recent:
            return Text('starting ...')
        flow = rates(recent[-int(max(self._rate, 1)) :])
        cpu = ''.join(BARS[min(int(m['cpu'] / 100 * len(BARS)), len(BARS) - 1)] for m in recent)
        return Text(
            f'cpu   {recent[-1]["cpu"]:3.0f} %   {cpu}\n'
            f'memory {recent[-1]["memory"]:2.0f} %\n'
            f'disk    {amount(flow["read"])}B/s read, {amount(flow["written"])}B/s written\n'
            f'net     {amount(flow["received"])}B/s in, {amount(flow["sent"])}B/s out',
        )

    def _counts(self) -> Text:
        left = self.ends - time.monotonic()
        if self.feeder.thread.is_alive():
            state = f'{left:.0f} s left, Ctrl-C ends it'
        else:
            state = 'done' if self.recorder.messages >= self.feeder.appended else 'the last window is not over yet'
        return Text(
            f'{self.feeder.appended} messages appended, {self.recorder.messages} processed '
            f'in {self.recorder.windows} windows ({state})',
            style='bold',
        )

    def _sum_up(self, found: Tally) -> None:
        print('\nRead back from MongoDB')
        for result in found.results[-3:]:
            print(f'  {plain_line(result)}')
        for what in ('appended', 'processed', 'lost'):
            print(f'  {"messages " + what:<19}{getattr(found, what):>6}')
        print(f'  {"duplicates":<19}{found.duplicates:>6}')
        print(f'  {"windows processed":<19}{found.windows:>6}')
        print('\nTry next' if self._embedded else '\nTry next, with MINIBATCH_MONGO_URL set to your URL')
        print("  >>> import minibatch as mb\n  >>> mb.stream('test').append({'a': 1})")
        print("  >>> mb.streaming('test', lambda window: print(window.data), size=1)    # Ctrl-C ends it")
        if self._embedded:
            print('  $ minibatch server status')
        sys.stdout.flush()


def plain_line(result: dict[str, Any]) -> str:
    """A window in one line."""
    cpu, memory, flow = result['cpu'], result['memory'], result['rates']
    return (
        f'window {clock_time(result["start"])}  {len(result["numbers"]):3d} messages'
        f'  cpu {cpu["mean"]:3.0f} % (max {cpu["max"]:3.0f})  memory {memory["mean"]:.1f} %'
        f'  disk {amount(flow["read"] + flow["written"])}B/s  net {amount(flow["received"] + flow["sent"])}B/s'
        f'  worker {result["worker"]}'
    )


def amount(value: float) -> str:
    """A number of bytes, short: 950, 1.2 k, 3.4 M."""
    for unit in ('', 'k', 'M'):
        if value < 1000:
            return f'{value:.1f} {unit}' if unit else f'{value:.0f} '
        value /= 1000
    return f'{value:.1f} G'


def clock_time(at: datetime) -> str:
    """The local time of day of a datetime that is aware, or naive and in UTC as MongoDB returns it."""
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).astimezone().strftime('%H:%M:%S')
