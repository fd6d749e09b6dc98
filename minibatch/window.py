"""The emitters: which messages make a window.

`CountWindow`, `FixedTimeWindow` and `RelaxedTimeWindow` plan from what the log says of itself (how far each producer
has come, and when messages were created), without reading a message. With ``key`` or ``timestamp``, and in
`SlidingTimeWindow` and `SessionWindow`, messages are read, and assigned to windows (assign.py). Planning is pure: the
time is an argument.

A subclass of `WindowEmitter` of your own picks the messages itself, see there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cached_property
from types import EllipsisType
from typing import Any

from . import assign, clock, edges, kinds, messages
from .assign import Assigner, Grid, Message, Rule, Sessions, Stored, Waits
from .emitter import WindowEmitter
from .errors import ArgumentError
from .fields import BadMessage, Fields
from .marshaller import name_of
from .models import Stream, check_choice, check_options, check_whole_ms
from .progress import Log, WindowPlan
from .store import Span
from .unreadable import Unreadable

__all__ = [
    'CountWindow', 'FixedTimeWindow', 'PlannedWindow', 'RelaxedTimeWindow', 'SessionWindow', 'SlidingTimeWindow',
    'WindowEmitter',
]  # fmt: skip

logger = logging.getLogger(__name__)

CHUNK = 20_000
QUERY = 100  # messages that cost as much to read as the query for them
IDLE = 30.0
MAX_SLIDES = 1000
MAX_OPEN_WINDOWS = 10_000
MAX_ALL_BAD = 1000
WARN_PAUSE = timedelta(minutes=1)


class PlannedWindow(WindowEmitter):
    """What the emitters below have in common: windows by key and by event time, which read the messages.

    Args:
        key: the name of a field, 'a' or 'a.b', or a function of a message's data, called in this process: then there
            is a window for each key, a str, int, float, bool, datetime, ObjectId, or a tuple of those. A message
            without is a dead letter of its own.
        timestamp: the name of a field, or a function: the time of a message, a datetime (naive is UTC), seconds since
            1970, or a string in ISO 8601; a number in a string is none. A message without is a dead letter of its own.
        lateness: seconds by which messages may come late: the watermark stays so far behind the highest time.
        idle: seconds, 30 by default, after which a producer that sends nothing does not hold event time back; when all
            are silent, and event time has been that of the clock, it goes on by the clock. None for never: then each
            producer holds event time until it sends something.
        late: what becomes of messages that are later: 'drop', or a `Stream` which they are appended to.
        max_open_windows: how many windows may be open, 10,000 by default.
        overflow: what happens when there are more: 'close' emits the oldest one early, and what follows for it as
            another part; 'error' ends the consumer with `TooManyWindowsError`.
    """

    def __init__(
        self, stream_name: str, *, key: Any = None, timestamp: Any = None, lateness: float | None = None,
        late: Any = None, idle: float | EllipsisType | None = ..., max_open_windows: int | None = None,
        overflow: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        quiet = {} if idle is ... else {'idle': idle}
        kinds.check({**options, 'key': key, 'timestamp': timestamp, 'lateness': lateness, 'late': late, **quiet,
                     'max_open_windows': max_open_windows, 'overflow': overflow})  # fmt: skip
        check_choice('overflow', overflow or 'close', 'close', 'error')
        given: dict[str, Any] = {
            name: options.pop(name) for name in ('max_wait', 'slide', 'gap') if name in options
        }
        numbers = {**given, 'lateness': lateness, **quiet, 'max_open_windows': max_open_windows}
        check_options({name: value for name, value in numbers.items() if value is not None})
        super().__init__(stream_name, **options)
        if late not in (None, 'drop') and not isinstance(late, Stream):
            raise ArgumentError(f"late must be 'drop' or a Stream, which the late messages go to, not {late!r}")
        self.late = late if isinstance(late, Stream) else None
        self.refuse_circle('late', self.late)
        self.fields, self.event_time = Fields(key, timestamp), timestamp is not None
        self.assigns = key is not None or self.event_time or 'slide' in given or 'gap' in given
        if self.assigns and self.picks:
            raise ArgumentError(f'key, timestamp, slide and gap do not go with {type(self).__name__}, which picks '
                                f'messages itself')  # fmt: skip
        durations = {**given, 'lateness': lateness, **quiet, 'interval': self.interval}
        check_whole_ms({name: seconds for name, seconds in durations.items() if seconds is not None})
        self.wakes_on_append = self.wakes_on_append or self.event_time
        self._idle: float | None = quiet.get('idle', IDLE)
        self._lateness, self._most, self._strict = lateness or 0.0, max_open_windows, overflow == 'error'
        self._due: datetime | None = None
        self._warned = clock.EPOCH
        self._all_bad: int | None = None  # how many messages of a new group were bad, as long as no other was seen
        given.update(key=key, timestamp=timestamp, lateness=lateness, **quiet)
        self._described = ', '.join(
            f'{name}={name_of(value) if callable(value) else repr(value)}'
            for name, value in given.items()
            if value is not None or name in quiet
        )

    def describe(self) -> str:
        described = super().describe()
        return f'{described[:-1]}, {self._described})' if self._described else described

    def next_due(self) -> datetime | None:
        return self._due

    def time_of(self, message: messages.Message) -> datetime:
        time: int | None = self.fields.time(message.data)
        return message.created if time is None else clock.from_ms(time)

    def rule(self) -> Rule:
        """Which windows there are, if messages are read to put them into windows."""
        raise NotImplementedError

    def cut(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        """Plan from what the log says of itself."""
        raise NotImplementedError

    def rest(self, log: Log, now: datetime) -> list[WindowPlan]:
        """Plan, from what the log says of itself, what is not due yet."""
        raise NotImplementedError

    def plan(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        return self._assign(log, limit) if self.assigns else self.cut(log, clock.from_ms(clock.to_ms(now)), limit)

    def finish(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        if not self.assigns:
            return self.rest(log, clock.from_ms(clock.to_ms(now)))
        to = self._assigner(log)
        to.end()
        plans = self._take(to, log, limit)
        log.more = to.due > 0
        return plans

    def _assign(self, log: Log, limit: int) -> list[WindowPlan]:
        """Read on, and plan the windows that are due by what was read and by when the log was looked at."""
        to = self._assigner(log)
        now, left = clock.to_ms(log.looked), CHUNK
        to.hear(log.waiting(), now)
        while to.due < limit and left > 0 and (span := to.next_span(left)) is not None:
            to.read(span, self._messages(log, span), now)
            left -= max(span.end - span.start, QUERY)
        to.advance(now)
        self._warn(to, log.looked)
        return self._take(to, log, limit)

    def _take(self, to: Assigner, log: Log, limit: int) -> list[WindowPlan]:
        plans = [self._plan_of(bucket, to.rule.timed) for bucket in to.take(limit)]
        log.low, log.more = to.low(), to.due > 0 or to.next_span(1) is not None
        self._due = _time(to.next_end())
        return plans

    def _warn(self, to: Assigner, now: datetime) -> None:
        """Say, not too often, what its users should know of the windows."""
        if now - self._warned < WARN_PAUSE or not (to.parts or to.came_late or to.ahead):
            return
        self._warned = now
        if to.parts:
            logger.warning('%s: %d windows were emitted before their end: more are open than max_open_windows, or one '
                           'is open for so long that too much was read behind it', self.name, to.parts)  # fmt: skip
        if to.came_late:
            dropped = 'are dropped; late=, a stream, is where they can go'
            what = dropped if self.late is None else f'go to stream {self.late.name!r}'
            seconds = to.behind / 1000
            enough = self._lateness + (math.ceil(seconds) if seconds > 1 else seconds)
            logger.warning('%s: %d messages came when all their windows were closed, and %s. lateness=%.10g would have '
                           'waited for them, it is %.10g; the watermark is %s', self.name, to.came_late, what, enough,
                           self._lateness, _time(to.watermark))  # fmt: skip
        if to.ahead:
            logger.warning('%s: times of messages are up to %s after they were appended, and move no event time. Is it '
                           'local time? Naive datetimes are UTC', self.name, to.ahead * clock.MILLISECOND)  # fmt: skip
        to.parts = to.came_late = to.behind = to.ahead = 0

    def _assigner(self, log: Log) -> Assigner:
        if 'assigner' not in log.memory:
            log.memory['assigner'] = self._new_assigner(log)
        to: Assigner = log.memory['assigner']
        return to

    def _new_assigner(self, log: Log) -> Assigner:
        stored = [
            Stored(claim.spans, claim.key, self._end_of(claim), claim.part)
            for claim in log.found
        ]
        log.found = []
        new = log.progress.number == 0 and not stored and log.frontier is None
        self._all_bad = 0 if new else None
        frontier, watermark = (
            assign.NEVER if time is None else clock.to_ms(time) for time in (log.frontier, log.watermark)
        )
        return Assigner(
            self.rule(), event=self.event_time, lateness=_ms(self._lateness),
            idle=None if self._idle is None else _ms(self._idle),
            most=self._most or MAX_OPEN_WINDOWS, strict=self._strict, frontier=frontier, watermark=watermark,
            stored=stored,
        )  # fmt: skip

    def _end_of(self, claim: WindowPlan) -> int | None:
        """The end of a window that was claimed, if it is one of the same time."""
        return None if claim.end is None or claim.event != self.event_time else clock.to_ms(claim.end)

    def _plan_of(self, bucket: assign.Bucket, timed: bool) -> WindowPlan:
        timed = timed and bucket.end > assign.NEVER
        return WindowPlan(
            bucket.spans, _time(bucket.start) if timed else None, _time(bucket.end) if timed else None, bucket.key,
            _time(bucket.watermark), _time(bucket.frontier), bucket.late, bucket.bad, bucket.part, self.event_time,
        )  # fmt: skip

    def _messages(self, log: Log, span: Span) -> Iterator[Message]:
        last, ms = None, 0
        for offset, created, data in log.messages(span, self.fields.names):
            if created is not last:
                last, ms = created, clock.to_ms(created)
            try:
                if isinstance(data, Unreadable):
                    raise BadMessage(f'it cannot be read: {data["error"]}')
                time, key = self.fields.time(data), self.fields.key(data)
            except BadMessage as exc:
                self._all_bad = None if self._all_bad is None else self._all_bad + 1
                if (self._all_bad or 0) >= MAX_ALL_BAD:
                    raise ArgumentError(f'{exc}, as in all of the first {MAX_ALL_BAD:,} messages of '
                                        f'{self.stream_name!r}: check the options; the messages stay') from None
                yield Message(offset, ms, ms, bad=str(exc))
            else:
                self._all_bad = None
                yield Message(offset, ms, ms if time is None else time, key)


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else clock.from_ms(ms)


def _ms(seconds: float) -> int:
    """Seconds, which have been checked, in milliseconds."""
    return round(seconds * 1000)


class CountWindow(PlannedWindow):
    """Windows of exactly `size` messages, or, with `max_wait`, of what there is.

    Args:
        size: how many; without it, `interval` is taken as the number of messages.
        max_wait: seconds after which fewer are emitted, counted from when the oldest of them was created.
        options: those of `PlannedWindow` and `WindowEmitter`.
    """

    def __init__(
        self, stream_name: str, size: int | None = None, interval: float | None = None,
        max_wait: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        size = size if size is not None else 1 if interval is None else interval  # type: ignore[assignment]
        super().__init__(stream_name, size=size, max_wait=max_wait, **options)
        if interval is not None:
            check_options({'interval': interval})
            self.interval = interval
        self.max_wait = max_wait
        self._next_producer = ''

    def rule(self) -> Rule:
        return Waits(_ms(self.max_wait or 0), int(self.size or 1))

    def cut(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        waiting = log.waiting()
        # No producer waits for ever behind one that is faster than we are.
        waiting.sort(key=lambda span: (span.producer < self._next_producer, span.producer))
        size = int(self.size or 1)
        count = min(sum(span.end - span.start for span in waiting) // size, limit)
        plans: list[WindowPlan] = []
        spans: list[Span] = []
        need = size
        rest: list[Span] = []
        for producer, start, end in waiting:
            while start < end and len(plans) < count:
                cut = min(start + need, end)
                spans.append(Span(producer, start, cut))
                need -= cut - start
                start = cut
                if need == 0:
                    plans.append(WindowPlan(spans))
                    spans, need = [], size
                    self._next_producer = producer + '\0'
            if start < end:
                rest.append(Span(producer, start, end))
        if self.max_wait is not None and count < limit:
            self._due = self._oldest(log, rest, now) + timedelta(seconds=self.max_wait) if rest else None
            if self._due is not None and self._due <= now:
                plans.append(WindowPlan(rest))
                self._due = None
        return plans

    def rest(self, log: Log, now: datetime) -> list[WindowPlan]:
        waiting = log.waiting()
        return [WindowPlan(waiting, part=True)] if waiting else []

    def _oldest(self, log: Log, rest: list[Span], now: datetime) -> datetime:
        """When the oldest of these messages was created."""
        firsts: dict[str, tuple[int, datetime]] = {}
        for span in rest:
            start, created = log.memory.get(span.producer, (None, now))
            if start != span.start:
                created = edges.first_time(log, [span], now)
            firsts[span.producer] = span.start, created
        log.memory = dict(firsts)
        return min(created for _, created in firsts.values())


class RelaxedTimeWindow(PlannedWindow):
    """Every `interval` seconds a window of all messages since the last one.

    With `key`, the window of a key begins when its first message was created, and is due `interval` seconds later.
    """

    wakes_on_append = False

    def __init__(self, stream_name: str, interval: float | None = None, **options: Any) -> None:
        if options.get('size') is not None:
            raise ArgumentError(f'{type(self).__name__} has no size; interval=T says its seconds')
        super().__init__(stream_name, interval=interval, **options)
        if self.event_time and type(self) is RelaxedTimeWindow:
            raise ArgumentError('timestamp makes fixed windows, not relaxed ones; use FixedTimeWindow')

    def rule(self) -> Rule:
        return Waits(self._interval_ms)

    def cut(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        step = self._interval_ms * clock.MILLISECOND
        waiting = log.waiting()
        if log.frontier is None:
            log.frontier = edges.first_time(log, waiting, now)
        self._due = log.frontier + step
        if now < self._due or limit < 1:
            return []
        start, log.frontier = log.frontier, now
        self._due = now + step
        return [WindowPlan(waiting, start, now, frontier=now)] if waiting or self.emit_empty else []

    def rest(self, log: Log, now: datetime) -> list[WindowPlan]:
        waiting, start = log.waiting(), log.frontier
        if waiting:
            log.frontier = max(start or now, now)
        return [WindowPlan(waiting, start, log.frontier, frontier=log.frontier)] if waiting else []

    @cached_property
    def _interval_ms(self) -> int:
        seconds = self.interval or self.stream.interval
        if not seconds:
            raise ArgumentError(f'interval= is missing, the seconds between the windows of {self.stream_name!r}')
        return _ms(seconds) or 1


class FixedTimeWindow(RelaxedTimeWindow):
    """A window for every `interval` seconds, [start, start + interval), also if there is nothing in it.

    A message belongs to the window of the time it was created. If that window is closed, or a producer's clock goes
    backwards, it belongs to the next one; if the producer's clock is ahead, to that of the time it was first seen.

    With `timestamp` it belongs to the window of its own time, or is late. With it, or with `key`, there are no empty
    windows.
    """

    emits_empty = True

    def rule(self) -> Rule:
        return Grid(self._interval_ms, self._interval_ms)

    def cut(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        waiting = log.waiting()
        if log.frontier is None:
            log.frontier = clock.window_start(edges.first_time(log, waiting, now), self._interval_ms)
        plans: list[WindowPlan] = []
        while len(plans) < limit and (end := self._end_after(log.frontier)) <= now:
            start = log.frontier
            spans = [edges.cut(log, span, end, now) for span in waiting]
            rest = [span._replace(start=cut.end) for span, cut in zip(waiting, spans, strict=True)]
            waiting, spans = ([span for span in each if span.start < span.end] for each in (rest, spans))
            if spans or self.emit_empty:
                plans.append(WindowPlan(spans, start, end, frontier=end))
                log.frontier = end
            else:  # between messages of long ago there may be millions of intervals
                log.frontier = max(end, clock.window_start(edges.next_time(log, waiting, now), self._interval_ms))
        log.memory = {span.producer: log.memory[span.producer] for span in waiting if span.producer in log.memory}
        self._due = self._end_after(log.frontier)
        return plans

    def _end_after(self, frontier: datetime) -> datetime:
        """The next edge; a frontier between two was stored when the interval was another one."""
        return clock.window_start(frontier, self._interval_ms) + self._interval_ms * clock.MILLISECOND

    def rest(self, log: Log, now: datetime) -> list[WindowPlan]:
        waiting = log.waiting()
        return [WindowPlan(waiting, log.frontier, self._due, part=True)] if waiting else []


class SlidingTimeWindow(RelaxedTimeWindow):
    """Windows [k * slide, k * slide + interval), aligned to 1970: a message is in interval / slide of them.

    Args:
        interval: seconds, a multiple of `slide`.
        slide: seconds from the start of one window to that of the next one.
        options: those of `PlannedWindow` and `WindowEmitter`.
    """

    def __init__(self, stream_name: str, interval: float | None = None, slide: float | None = None, **options: Any):
        if interval is None or slide is None:
            raise ArgumentError('SlidingTimeWindow needs interval=T, how long a window is, and slide=S, how often one '
                                'begins')  # fmt: skip
        super().__init__(stream_name, interval=interval, slide=slide, **options)
        self._slide_ms = _ms(slide)
        if self._interval_ms % self._slide_ms:
            raise ArgumentError(f'interval must be a multiple of slide, and {interval:g} s is none of {slide:g} s')
        if self._interval_ms > MAX_SLIDES * self._slide_ms:
            raise ArgumentError(f'interval must be at most {MAX_SLIDES} slides, for a message is in as many windows')

        if self._most is not None and self._interval_ms > self._most * self._slide_ms:
            raise ArgumentError(f'max_open_windows={self._most} is too few for one message: it is in interval / slide '
                                f'= {self._interval_ms // self._slide_ms} windows')  # fmt: skip

    def rule(self) -> Rule:
        return Grid(self._interval_ms, self._slide_ms)


class SessionWindow(PlannedWindow):
    """Windows of messages less than `gap` seconds apart: [first, last + gap).

    Args:
        gap: seconds of silence that end a session.
        options: those of `PlannedWindow` and `WindowEmitter`.
    """

    wakes_on_append = False

    def __init__(self, stream_name: str, gap: float | None = None, **options: Any) -> None:
        if gap is None:
            raise ArgumentError('SessionWindow needs gap=G, the seconds of silence that end a session')
        super().__init__(stream_name, gap=gap, **options)
        self.gap = gap

    def describe(self) -> str:
        return f'SessionWindow({self._described})'

    def rule(self) -> Rule:
        return Sessions(_ms(self.gap))
