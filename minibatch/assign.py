"""Which windows each message belongs to, where that takes reading it: keys, event time, sliding windows, sessions.

Pure: messages come in, windows that are due go out, and the time is an argument. Times are whole milliseconds since
1970. What must be the same after a restart is stored with the windows; the rest is found again by reading the log
from the positions, where everything begins that still has a window to come.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from .errors import TooManyWindowsError
from .fields import identity
from .store import Span

SINCE = 1_000  # messages are read that were created so long after `now`, the last look at the log
SKEW = 60_000
IDLE = 30_000
MAX_AHEAD = 1_000_000
MANY_PRODUCERS = 1000
MAX_TOGETHER = 10_000
NEVER = -(1 << 62)

Fresh = list[tuple['Message', Sequence[int | None]]]


class Message(NamedTuple):
    """What must be known of a message: its key, and its time, or in `bad` why it has none.

    Without event time, `time` is when it was created.
    """

    offset: int
    created: int
    time: int
    key: Any = None
    bad: str = ''


class Stored(NamedTuple):
    """A window that was claimed before a restart. `end` is None if it is none of time."""

    spans: list[Span]
    key: Any = None
    end: int | None = None
    part: bool = False


@dataclass(eq=False)
class Bucket:
    """A window as it fills: late messages and bad ones are windows of their own."""

    key: Any = None
    start: int = NEVER
    end: int = NEVER
    late: bool = False
    bad: str = ''
    part: bool = False  # emitted before its end, to make room
    n: int = 0
    watermark: int | None = None
    frontier: int | None = None
    runs: dict[str, list[int]] = field(default_factory=dict)  # by producer: from, to, from, to ...
    ident: Hashable = None
    is_open: bool = True
    given: bool = False  # to be claimed now
    into: Bucket | None = None  # the one it was merged into

    @property
    def spans(self) -> list[Span]:
        """Its messages, by producer and in order."""
        spans: list[Span] = []
        for producer, runs in self.runs.items():
            for start, end in sorted(zip(runs[::2], runs[1::2], strict=True)):
                if spans and spans[-1].producer == producer and spans[-1].end == start:
                    spans[-1] = spans[-1]._replace(end=end)
                else:
                    spans.append(Span(producer, start, end))
        return spans

    @property
    def root(self) -> Bucket:
        """The window that has its messages now."""
        return self if self.into is None else self.into.root


@dataclass
class Seen:
    """What is known of a producer."""

    read: int
    end: int
    low: int = -1  # what `Assigner.low` said last
    high: int | None = None  # the highest time read
    newest: int | None = None  # when the newest message read was created, by its producer's clock
    heard: int = NEVER  # when it was last seen to have appended something
    ahead: bool = False  # it has given times that cannot be
    pins: list[tuple[int, int, Bucket]] = field(default_factory=list)

    @property
    def last(self) -> int:
        """When it sent something last, as far as is known."""
        return self.heard if self.newest is None else max(self.newest, self.heard)


class Rule(Protocol):
    """Which windows there are. A rule has the open ones."""

    timed: bool
    """Whether its windows have a start and an end for the user."""

    copies: int
    """In how many windows a message is."""

    def put(self, to: Assigner, producer: str, fresh: Fresh, now: int) -> None:
        """Put messages that were read together into their windows; each with the ends of those which hold it."""

    def remove(self, bucket: Bucket) -> None:
        """This window is not open any more."""

    def frontier(self, watermark: int) -> int:
        """The watermark from which all decisions that are not stored come out the same again."""


class Grid:
    """Windows [k * slide, k * slide + interval); with slide == interval they touch."""

    timed = True

    def __init__(self, interval: int, slide: int) -> None:
        self._interval, self._slide, self.copies = interval, slide, interval // slide
        self._open: dict[tuple[Hashable, int], Bucket] = {}

    def put(self, to: Assigner, producer: str, fresh: Fresh, now: int) -> None:
        for message, held in fresh:
            ident = identity(message.key)
            floor = to.floor(ident)
            if held and not to.event:
                first = min(end for end in held if end is not None)  # where it was put when it was read first
            else:
                first = to.time(message, floor, now) // self._slide * self._slide + self._slide
            ends = [
                end
                for end in range(first, first + self._interval, self._slide)
                if end > floor and end not in held
            ]
            for end in ends:
                bucket = self._open.get((ident, end))
                if bucket is None:
                    bucket = Bucket(message.key, end - self._interval, end, ident=ident)
                    to.open(bucket)
                    self._open[ident, end] = bucket
                to.add(bucket, producer, message.offset)
            if not ends and not held:
                to.late(producer, message.offset)

    def remove(self, bucket: Bucket) -> None:
        del self._open[bucket.ident, bucket.end]

    def frontier(self, watermark: int) -> int:
        return watermark


class Sessions:
    """Windows [first, last + gap) of messages less than `gap` apart.

    Messages that are read together are put together first, so that their order does not matter.
    """

    timed = True
    copies = 1

    def __init__(self, gap: int) -> None:
        self._gap = gap
        self._open: dict[Hashable, list[Bucket]] = {}

    def put(self, to: Assigner, producer: str, fresh: Fresh, now: int) -> None:
        by_key: dict[Hashable, list[tuple[int, Message]]] = {}
        for message, held in fresh:
            if not held:
                ident = identity(message.key)
                time = to.time(message, to.floor(ident), now)
                by_key.setdefault(ident, []).append((time, message))
        for ident, timed in by_key.items():
            timed.sort(key=itemgetter(0))
            first = 0
            for after in range(1, len(timed) + 1):
                if after == len(timed) or timed[after][0] - timed[after - 1][0] >= self._gap:
                    self._merge(to, producer, ident, timed[first:after])
                    first = after

    def _merge(self, to: Assigner, producer: str, ident: Hashable, burst: list[tuple[int, Message]]) -> None:
        start, end = burst[0][0], burst[-1][0] + self._gap
        offsets = sorted(message.offset for _, message in burst)
        touching = [it for it in self._open.get(ident, ()) if it.start < end and start < it.end]
        if not touching and end <= to.floor(ident):
            for offset in offsets:
                to.late(producer, offset)
            return
        if touching:
            bucket = touching[0]
            for other in touching[1:]:
                self.remove(other)
                to.merge(other, bucket)
            to.resize(bucket, min(start, *(it.start for it in touching)), max(end, *(it.end for it in touching)))
        else:
            bucket = Bucket(burst[0][1].key, start, end, ident=ident)
            to.open(bucket)
            self._open.setdefault(ident, []).append(bucket)
        for offset in offsets:
            to.add(bucket, producer, offset)

    def remove(self, bucket: Bucket) -> None:
        self._open[bucket.ident].remove(bucket)
        if not self._open[bucket.ident]:
            del self._open[bucket.ident]

    def frontier(self, watermark: int) -> int:
        # Above it, the first message of an open session would be late if it were read again without the next one.
        starts = [bucket.start for open_ in self._open.values() for bucket in open_]
        return min([watermark, *starts])


class Waits:
    """One window a key, which is due `wait` after its oldest message was created, or when it has `size`."""

    copies = 1

    def __init__(self, wait: int, size: int | None = None) -> None:
        self._wait, self._size = wait, size
        self.timed = size is None
        self._open: dict[Hashable, Bucket] = {}

    def put(self, to: Assigner, producer: str, fresh: Fresh, now: int) -> None:
        for message, held in fresh:
            if held:
                continue
            ident, time = identity(message.key), min(message.created, now + SINCE)
            bucket = self._open.get(ident)
            if bucket is None:
                bucket = Bucket(message.key, time, time + self._wait, ident=ident)
                to.open(bucket)
                self._open[ident] = bucket
            elif time < bucket.start:
                to.resize(bucket, time, time + self._wait)
            to.add(bucket, producer, message.offset)
            if bucket.n == self._size:
                to.close(bucket)

    def remove(self, bucket: Bucket) -> None:
        del self._open[bucket.ident]

    def frontier(self, watermark: int) -> int:
        return watermark


class Held:
    """Which stored windows hold a message; asked for the messages of each producer in order.

    `ends` are the offsets after the last ones held.
    """

    def __init__(self, stored: Iterable[Stored]) -> None:
        self._coming: dict[str, list[tuple[int, int, int | None]]] = {}
        self._here: dict[str, list[tuple[int, int, int | None]]] = {}
        for window in stored:
            for span in window.spans:
                self._coming.setdefault(span.producer, []).append((span.start, span.end, window.end))
        self.ends = {producer: max(end for _, end, _ in runs) for producer, runs in self._coming.items()}
        for runs in self._coming.values():
            runs.sort(key=itemgetter(0), reverse=True)

    def at(self, producer: str, offset: int) -> Sequence[int | None]:
        """The ends of the windows that hold it."""
        coming = self._coming.get(producer)
        if coming is None:
            return ()
        here = [run for run in self._here.get(producer, ()) if run[1] > offset]
        while coming and coming[-1][0] <= offset:
            run = coming.pop()
            if run[1] > offset:
                here.append(run)
        self._here[producer] = here
        if not coming and not here:
            del self._coming[producer], self._here[producer]
        return [end for _, _, end in here]


class Assigner:
    """Puts messages into windows, and says which windows are due.

    Args:
        rule: which windows there are.
        event: whether messages have a time of their own; else it is when they were created, and none is late.
        lateness: how far the watermark stays behind the highest time.
        most: how many windows may be open.
        strict: whether more are an error; else the oldest is emitted early, and what follows for it is another part.
        frontier: that of the last claim, or `NEVER`.
        watermark: the highest that a window was claimed with, or `NEVER`.
        stored: the windows that were claimed, as far as they are not below all positions.
    """

    def __init__(
        self, rule: Rule, *, event: bool = False, lateness: int = 0, most: int = 10_000, strict: bool = False,
        frontier: int = NEVER, watermark: int = NEVER, stored: Iterable[Stored] = (),
    ) -> None:  # fmt: skip
        self.rule, self.event = rule, event
        self._lateness, self._most, self._strict = lateness, most, strict
        self.watermark, self._shown, self._marked = frontier, watermark, frontier
        self.parts = 0  # windows that were emitted early
        self.came_late = 0  # messages
        self.ahead = 0  # by how much times were in the future, at most
        self._together = max(min(most, MAX_TOGETHER) // 10 // rule.copies, 1)  # they must not be too many by themselves
        self._producers: dict[str, Seen] = {}
        self._order = count()
        self._ends: list[tuple[int, int, Bucket]] = []  # a heap; what was closed or resized since is skipped
        self._open = 0
        self._due: deque[Bucket] = deque()
        self._late: Bucket | None = None
        stored = list(stored)
        self._held = Held(stored)
        self._closed: dict[Hashable, int] = {}  # by key, what is stored beyond the frontier
        for _, key, end, part in stored:
            if end is not None and not part and end > frontier:
                ident = identity(key)
                self._closed[ident] = max(end, self._closed.get(ident, NEVER))

    # --- reading

    def hear(self, waiting: list[Span], now: int) -> None:
        """So far the producers have come."""
        for span in waiting:
            seen = self._producers.get(span.producer)
            if seen is None:
                seen = self._producers[span.producer] = Seen(span.start, span.end)
            elif span.end > seen.end:
                seen.heard = now
            seen.read, seen.end = max(seen.read, span.start), span.end

    def next_span(self, most: int) -> Span | None:
        """What to read next, at most so many messages: of the producer that is furthest behind in time."""
        unread = [name for name, seen in self._producers.items() if seen.read < seen.end]
        if not unread:
            return None
        name = min(unread, key=lambda name: NEVER if (high := self._producers[name].high) is None else high)
        seen = self._producers[name]
        return Span(name, seen.read, min(seen.end, seen.read + most))

    def read(self, span: Span, messages: Iterable[Message], now: int) -> None:
        """Take in the messages of a span, which continues what was read of the producer, and go on in time."""
        seen = self._producers[span.producer]
        fresh: Fresh = []
        for message in messages:
            held = self._held.at(span.producer, message.offset)
            seen.newest = max(min(message.created, now), NEVER if seen.newest is None else seen.newest)
            if message.bad:
                if not held:
                    self._aside(Bucket(bad=message.bad), span.producer, message.offset)
                continue
            if not self.event:
                seen.high = max(min(message.time, now), NEVER if seen.high is None else seen.high)
            elif message.time <= now + SKEW:
                seen.high = message.time if seen.high is None else max(message.time, seen.high)
            else:
                seen.ahead = True
                self.ahead = max(self.ahead, message.time - now)
            if None not in held:
                fresh.append((message, held))
                if len(fresh) == self._together:
                    self._put(span._replace(end=message.offset + 1), fresh, now)
                    fresh = []
        self._put(span, fresh, now)

    def _put(self, span: Span, fresh: Fresh, now: int) -> None:
        seen = self._producers[span.producer]
        seen.read = span.end
        self.rule.put(self, span.producer, fresh, now)
        while seen.read - self._low(seen) > MAX_AHEAD and (first := seen.pins[0][2].root).is_open:
            self._close_early(first, f'more than {MAX_AHEAD:,} messages were read behind the oldest of them')
        self.advance(now)

    def advance(self, now: int) -> None:
        """Move the watermark as far as what was read allows, and close the windows that end by then."""
        reached = self._event_time(now) if self.event else self._created_time(now)
        if reached > self.watermark and not self._reads_again():
            self.watermark = reached
            self._closed = {ident: end for ident, end in self._closed.items() if end > reached}
        while (bucket := self._oldest()) is not None and bucket.end <= self.watermark:
            self.close(bucket)
        self._forget(now)

    def _reads_again(self) -> bool:
        """Whether messages that stored windows hold are still to come: some may have other windows to come."""
        self._held.ends = {
            name: end
            for name, end in self._held.ends.items()
            if (seen := self._producers.get(name)) is not None and seen.read < min(end, seen.end)
        }
        return bool(self._held.ends)

    def _event_time(self, now: int) -> int:
        producers = self._producers.values()
        if any(seen.newest is None and seen.read < seen.end for seen in producers):
            return NEVER
        known = [seen for seen in producers if seen.newest is not None]
        active = [
            seen.high
            for seen in known
            if seen.high is not None and (seen.read < seen.end or now - seen.last < IDLE)
        ]
        if active:
            return min(active) - self._lateness
        # Nobody says what time it is, so it goes on by the clock; so it does if there are impossible times alone.
        idle = [
            (seen.last if seen.high is None else seen.high) + now - seen.last - IDLE
            for seen in known
            if seen.high is not None or seen.ahead
        ]
        return max(idle, default=NEVER) - self._lateness

    def _created_time(self, now: int) -> int:
        unread = [seen.high for seen in self._producers.values() if seen.read < seen.end]
        return min((NEVER if high is None else high for high in unread), default=now)

    def _forget(self, now: int) -> None:
        if len(self._producers) > MANY_PRODUCERS:
            idle = [
                name
                for name, seen in self._producers.items()
                if seen.read >= seen.end and now - seen.last > IDLE and seen.low == seen.read
            ]
            for name in idle[: -MANY_PRODUCERS // 2]:
                del self._producers[name]

    # --- what a rule calls

    def floor(self, ident: Hashable) -> int:
        """Up to when the windows of a key are closed."""
        return max(self.watermark, self._closed[ident]) if ident in self._closed else self.watermark

    def time(self, message: Message, floor: int, now: int) -> int:
        """The time of a message. Without event time it is neither late nor in the future."""
        return message.time if self.event else max(min(message.time, now + SINCE), floor)

    def open(self, bucket: Bucket) -> None:
        """Begin a window; if there are too many, the oldest one ends."""
        oldest = self._oldest() if self._open >= self._most else None
        if oldest is not None:
            self._close_early(oldest, f'max_open_windows={self._most:,} are open')
        self._open += 1
        heapq.heappush(self._ends, (bucket.end, next(self._order), bucket))

    def resize(self, bucket: Bucket, start: int, end: int) -> None:
        """Let a window begin or end at other times."""
        bucket.start = start
        if end != bucket.end:
            bucket.end = end
            heapq.heappush(self._ends, (end, next(self._order), bucket))

    def merge(self, other: Bucket, bucket: Bucket) -> None:
        """Make the messages of one window part of another one."""
        other.into, other.is_open = bucket, False
        self._open -= 1
        bucket.n += other.n
        for producer, runs in other.runs.items():
            bucket.runs.setdefault(producer, []).extend(runs)

    def add(self, bucket: Bucket, producer: str, offset: int) -> None:
        """Put a message into a window."""
        runs = bucket.runs.get(producer)
        if runs is None:
            runs = bucket.runs[producer] = []
            pin = (offset, next(self._order), bucket)
            heapq.heappush(self._producers[producer].pins, pin)
        if runs and runs[-1] == offset:
            runs[-1] += 1
        else:
            runs += (offset, offset + 1)
        bucket.n += 1

    def late(self, producer: str, offset: int) -> None:
        """All windows of this message are closed."""
        self.came_late += 1
        if self._late is None:
            self._late = Bucket(late=True, is_open=False)
        self.add(self._late, producer, offset)

    def close(self, bucket: Bucket) -> None:
        """A window is due."""
        self.rule.remove(bucket)
        self._open -= 1
        bucket.is_open = False
        self._emit(bucket)

    # --- what is due

    @property
    def due(self) -> int:
        """How many windows there are to claim."""
        return len(self._due) + (self._late is not None)

    def next_end(self) -> int | None:
        """When the next window is due, if time alone makes it so."""
        oldest = None if self.event else self._oldest()
        return None if oldest is None else oldest.end

    def take(self, limit: int) -> list[Bucket]:
        """At most `limit` of the windows that are due, to be claimed now, in this order.

        The last one has the frontier if none is left.
        """
        if self._late is not None:
            self._emit(self._late)
            self._late = None
        taken = [self._due.popleft() for _ in range(min(limit, len(self._due)))]
        for bucket in taken:
            bucket.given = True
        if taken and self.watermark > NEVER:
            left = min((bucket.end for bucket in self._due if bucket.end > NEVER), default=self.watermark + 1)
            frontier = self.rule.frontier(min(self.watermark, left - 1))
            if frontier >= self._marked:
                taken[-1].frontier = self._marked = frontier
        return taken

    def low(self) -> dict[str, int]:
        """For each producer the lowest offset that is not read, or whose message still has a window to come.

        Only those that have changed since it was asked last.
        """
        lows = {name: low for name, seen in self._producers.items() if (low := self._low(seen)) != seen.low}
        for name, low in lows.items():
            self._producers[name].low = low
        return lows

    def _low(self, seen: Seen) -> int:
        while seen.pins and seen.pins[0][2].root.given:
            heapq.heappop(seen.pins)
        return min(seen.read, seen.pins[0][0]) if seen.pins else seen.read

    def _aside(self, bucket: Bucket, producer: str, offset: int) -> None:
        bucket.is_open = False
        self.add(bucket, producer, offset)
        self._emit(bucket)

    def _emit(self, bucket: Bucket) -> None:
        if self.event:
            self._shown = max(self._shown, self.watermark)
            bucket.watermark = self._shown if self._shown > NEVER else None
        self._due.append(bucket)

    def _oldest(self) -> Bucket | None:
        while self._ends and not (self._ends[0][2].is_open and self._ends[0][2].end == self._ends[0][0]):
            heapq.heappop(self._ends)
        return self._ends[0][2] if self._ends else None

    def _close_early(self, bucket: Bucket, why: str) -> None:
        if self._strict:
            raise TooManyWindowsError(
                f"{why}, and overflow is 'error'. Let windows end sooner, use fewer keys, or give a larger "
                f"max_open_windows; with overflow='close' the oldest is emitted early, in parts"
            )
        bucket.part = bucket.end > self.watermark
        self.parts += 1
        self.close(bucket)
