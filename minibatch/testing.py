"""Tools for tests: a function on windows without a server, a clock that is moved by hand, lists as source and sink.

What cuts the messages into windows here is what does it in a consumer; only the log it reads is a list.

Example:
    >>> from minibatch.testing import run
    >>> run(len, [{'a': 1}, {'a': 2}, {'a': 3}], size=2).results
    [2]
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import bson
from bson.raw_bson import RawBSONDocument

from . import api, functions, kinds, store
from .clock import aware, from_ms, now
from .emitter import WindowEmitter
from .encoding import encode
from .errors import ArgumentError, DataError
from .executors import InlineExecutor
from .fields import BadMessage, time_of
from .messages import Message, MessageWindow, window_of
from .models import Stream, check_options
from .progress import Claim, Log, Progress, WindowPlan
from .store import Span
from .worker import shown

__all__ = ['Bad', 'Emitted', 'InlineExecutor', 'ListSink', 'ListSource', 'ManualClock', 'Run', 'run']

NAME = 'minibatch.testing'
PRODUCER = 'test'
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
END_OF_TIME = datetime(9999, 1, 1, tzinfo=timezone.utc)
LIMIT = 1000
BATCH = 1000
WINDOW_OPTIONS = ('interval', 'size', 'emitter', 'relaxed', 'emit_empty', 'processfn', *kinds.OPTIONS)
CONSUMER_OPTIONS = {*inspect.signature(api.streaming).parameters, *api.EMITTER_OPTIONS, 'stream'} - {*WINDOW_OPTIONS}


class ManualClock:
    """A clock that stands still until it is moved, and never goes back.

    Args:
        start: a datetime (naive is UTC), seconds since 1970, or a string in ISO 8601; the year 2026 by default.

    Example:
        >>> clock = ManualClock('2026-01-31T12:00')
        >>> clock.advance(90)
        >>> clock.now()
        datetime.datetime(2026, 1, 31, 12, 1, 30, tzinfo=datetime.timezone.utc)
    """

    def __init__(self, start: Any = START) -> None:
        self._now = _time('start', start)

    def now(self) -> datetime:
        """The time, aware and in UTC."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.set(self._now + timedelta(seconds=seconds))

    def set(self, time: Any) -> None:
        """Let it be so late.

        Raises:
            ArgumentError: if it is later already.
        """
        later = _time('time', time)
        if later < self._now:
            raise ArgumentError(f'time must not go back, from {self._now.isoformat()} to {later.isoformat()}')
        self._now = later

    def __repr__(self) -> str:
        return f'ManualClock({self._now.isoformat()!r})'


class ListSource:
    """A source that appends the messages of a list, and is at its end then.

    Stopped before the end and started again it goes on where it was.

    Attributes:
        messages: the list.
        position: how many of them are stored.

    Example:
        >>> stream.attach(ListSource([{'a': 1}, {'a': 2}]), background=False)    # doctest: +SKIP
    """

    def __init__(self, messages: Iterable[dict[str, Any]]) -> None:
        self.messages, self.position = list(messages), 0
        self._cancelled = threading.Event()

    def stream(self, stream: Stream) -> None:
        """Append what is left of the list."""
        self._cancelled.clear()
        while self.position < len(self.messages) and not self._cancelled.is_set():
            self.position += stream.append_many(self.messages[self.position : self.position + BATCH])

    def cancel(self) -> None:
        """Make `stream` return before its next append."""
        self._cancelled.set()


class ListSink(list[Any]):
    """A sink that is the list of the results it was given.

    Example:
        >>> sink = ListSink()
        >>> sink.put({'mean': 1.5})
        >>> sink
        [{'mean': 1.5}]
    """

    def put(self, messages: Any) -> None:
        """Keep the result of a window."""
        self.append(messages)


class Emitted(NamedTuple):
    """A window, and its result as a sink is given it."""

    window: MessageWindow
    result: Any


class Bad(NamedTuple):
    """A message that is in no window, and why: its key or time is missing, or is none."""

    message: Message
    reason: str


class Run(list[Emitted]):
    """What `run` returns: a list of the windows with their results, in the order in which they were emitted.

    Attributes:
        late: the messages that came when all their windows were closed.
        bad: the messages whose key or time is missing or none, each with the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late: list[Message] = []
        self.bad: list[Bad] = []

    @property
    def windows(self) -> list[MessageWindow]:
        """The windows alone."""
        return [emitted.window for emitted in self]

    @property
    def results(self) -> list[Any]:
        """The results alone."""
        return [emitted.result for emitted in self]


def run(
    fn: Callable[[Any], Any] | None,
    messages: Iterable[Any],
    *,
    every: float = 1.0,
    clock: ManualClock | None = None,
    **window_options: Any,
) -> Run:
    """Call a function with the windows of some messages, in this process and without a server.

    The messages are appended one after the other, and windows are emitted when they are due, as a consumer would that
    is never slow. The end of the list is the end of the input: then time goes on until every message is emitted, and
    windows of event time that are open are emitted as they are.
    The last messages of ``size=N``, if they are fewer than N, are not, as on a stream; with ``max_wait=`` they are.

    Args:
        fn: the function. What it raises comes out of this call: nothing is tried again.
        messages: dicts, or pairs (when, dict) of when the message is appended, in that order: a datetime (naive is
            UTC), seconds since 1970, or a string in ISO 8601.
        every: seconds after the one before at which a message without a time is appended.
        clock: shows the time while this runs. A new one by default: it starts with the first message, if that says
            when, else in 2026, or, with `timestamp`, now, because times that are ahead of the clock are not believed.
        window_options: what says what a window is, as for `minibatch.streaming`: size, max_wait, interval, relaxed,
            slide, gap, key, timestamp, lateness, late, idle, emitter (a class of `minibatch.window`), emit_empty,
            processfn, max_open_windows, overflow.

    Raises:
        ArgumentError: as `minibatch.streaming` does, or naming the message.
        DataError: naming the message, and the key that MongoDB cannot store.

    Example:
        >>> def total(window):
        ...     return window.key, sum(data['n'] for data in window.data)
        >>> run(total, [{'of': 'a', 'n': 1}, {'of': 'b', 'n': 2}, {'of': 'a', 'n': 3}], interval=60, key='of').results
        [('a', 4), ('b', 2)]
    """
    check_options({'every': every})
    if isinstance(messages, (dict, str, bytes)) or not isinstance(messages, Iterable):
        raise ArgumentError(f'messages must be an iterable of dicts, not {type(messages).__name__}')
    group = _Group(_emitter(fn, window_options), clock, every)
    try:
        for i, message in enumerate(messages):
            group.append(*_parsed(i, message))
        group.end()
    finally:
        functions.close_loop()
    return group.run


def _emitter(fn: Callable[[Any], Any] | None, options: dict[str, Any]) -> WindowEmitter:
    for name in options:
        if name in CONSUMER_OPTIONS:
            raise ArgumentError(f'{name} is for a consumer of a stream, and here is none; run takes what says what a '
                                f'window is: {", ".join(WINDOW_OPTIONS)}')  # fmt: skip
    emitter = api.make_emitter(NAME, fn, executor=InlineExecutor, stream=Stream(name=NAME), **options)
    if emitter.picks:
        raise ArgumentError(f'emitter must be a class that plans; {type(emitter).__name__} asks MongoDB for messages')
    return emitter


def _parsed(i: int, message: Any) -> tuple[datetime | None, bytes]:
    """When a message is appended, if it says so, and how it is stored."""
    when, data = message if isinstance(message, tuple) and len(message) == 2 else (None, message)
    try:
        return None if when is None else _time('its time', when), encode(data)
    except (ArgumentError, DataError) as exc:
        raise type(exc)(f'messages[{i}]: {exc}') from None


def _time(name: str, value: Any) -> datetime:
    if isinstance(value, datetime):
        return aware(value).astimezone(timezone.utc)
    try:
        return from_ms(time_of(value))
    except BadMessage as exc:
        raise ArgumentError(f'{name} {exc}') from None


class _ListLog(Log):
    """The log of one producer, each message a document as it is stored."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.documents: list[RawBSONDocument] = []

    def append(self, raw: bytes, time: datetime) -> None:
        offset = len(self.documents)
        self.documents.append(store.record_batch(NAME, PRODUCER, offset, [raw], [time], [None]))
        self.ends = {PRODUCER: offset + 1}

    def read(self, span: Span) -> list[dict[str, Any]]:
        """The messages of a span, each time new objects, as from a server."""
        return [bson.decode(document.raw) for document in self.documents[span.start : span.end]]

    def times(self, span: Span) -> Iterator[tuple[int, int, list[datetime]]]:
        for record in self.read(span):
            yield record['offset'], 1, [record['created']]

    def messages(self, span: Span, names: list[str] | None) -> Iterator[tuple[int, datetime, Any]]:
        for record in self.read(span):
            yield record['offset'], record['created'], record['data']


class _Group:
    """A consumer group whose log, windows and time are in memory."""

    def __init__(self, emitter: WindowEmitter, clock: ManualClock | None, every: float) -> None:
        self._emitter, self._clock, self._every = emitter, clock, timedelta(seconds=every)
        self._event_time = bool(getattr(emitter, 'event_time', False))
        self._progress = Progress(0, 1, {}, follows=not emitter.assigns)
        self._log = _ListLog(self._progress)
        self.run = Run()

    def append(self, when: datetime | None, raw: bytes) -> None:
        """Let it be `when`, append a message, and emit what is due on the way and then."""
        count = len(self._log.documents)
        if self._clock is None:
            self._clock = ManualClock(when or (now() if self._event_time else START))
        if when is None:
            when = self._clock.now() + self._every if count else self._clock.now()
        if when < self._clock.now():
            raise ArgumentError(f'messages[{count}]: it is appended at {when.isoformat()}, when it is later already; '
                                f'put messages in the order of their arrival')  # fmt: skip
        if count:
            self._wait(self._clock, when)
        self._clock.set(when)
        self._log.append(raw, when)
        self._plan(self._clock)

    def _wait(self, clock: ManualClock, until: datetime) -> None:
        while (due := self._emitter.next_due()) is not None and due <= until:
            clock.set(max(due, clock.now()))
            self._plan(clock)
        clock.set(until)
        self._plan(clock)

    def end(self) -> None:
        """Let time go on until nothing is left but what waits for more messages, or a later time in them."""
        while self._clock is not None and self._log.waiting() and self._clock.now() < END_OF_TIME:
            due = self._emitter.next_due()
            if due is None:
                break
            self._wait(self._clock, due)
        if self._clock is not None and self._event_time:
            self._claim(self._emitter.finish, self._clock)

    def _plan(self, clock: ManualClock) -> None:
        """Emit all windows that are due."""
        self._log.looked = clock.now()
        while self._claim(self._emitter.plan, clock) or self._log.more:
            pass

    def _claim(self, plan: Callable[..., list[WindowPlan]], clock: ManualClock) -> bool:
        claims = []
        for planned in plan(self._log, clock.now(), LIMIT):
            claim = Claim.planned(planned, NAME, self._emitter.group, self._progress.next_number, clock.now())
            self._progress.claim(claim)
            claims.append(claim)
        self._log.claimed()
        for claim in claims:
            self._do(claim)
        return bool(claims)

    def _do(self, claim: Claim) -> None:
        records = [(span, self._log.read(span)) for span in claim.spans]
        window = window_of(claim.document(NAME, self._emitter.group, 1), NAME, records)
        if claim.late:
            self.run.late += window.messages
        elif claim.bad:
            self.run.bad.append(Bad(window.messages[0], claim.bad))
        else:
            self.run.append(Emitted(window, self._call(window)))
        self._progress.finished(claim.number)

    def _call(self, window: MessageWindow) -> Any:
        own = self._emitter.overrides('emit')
        fn = self._emitter.emit if own else self._emitter._consumer.crew.function
        return shown(None if fn is None else functions.call(fn, window), window)
