"""Which windows each message belongs to, where that takes reading it: keys, event time, sliding windows, sessions.

Pure: messages come in, windows that are due go out, and the time is an argument. Times are whole milliseconds since
1970. What must be the same after a restart is stored with the windows; the rest is found again by reading the log
from the positions, where everything begins that still has a window to come.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from .errors import TooManyWindowsError
from .fields import identity
from .store import Span

SINCE = 1_000  # messages are read that were created so long after `now`, the last look at the log
SKEW = 60_000  # clocks differ by no more
MAX_AHEAD = 1_000_000
MANY_PRODUCERS = 1000
FORGOTTEN = 30_000
NEVER = -(1 << 62)
FOREVER = 1 << 62

Held = Sequence[int | None]  # the ends of the stored windows that hold a message; None if one is none of time


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
    born: int = 0  # its place in the order in which they were begun
    opens: int = FOREVER  # at this watermark, read again, its first message would be late
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
    high: int = NEVER  # the highest time read that can be
    newest: int = NEVER  # when the newest message read was created, by its producer's clock
    lead: int = FOREVER  # by how much its times are after those of creation, at least
    heard: int = NEVER  # when it was last seen to have appended something
    awake: int = NEVER  # until when it is not taken for idle
    ahead: bool = False  # it has given times that cannot be
    pins: list[tuple[int, int, Bucket]] = field(default_factory=list)

    @property
    def is_unread(self) -> bool:
        """Whether it has messages that are to be read."""
        return self.read < self.end

    @property
    def behind(self) -> int:
        """By how much its clock is behind, as all its times are after those of creation."""
        return max(self.lead, 0) if self.lead < FOREVER else 0

    @property
    def last(self) -> int:
        """When it sent something last, as far as is known."""
        return max(self.newest + self.behind, self.heard)


class Rule(Protocol):
    """Which windows there are. A rule has the open ones."""

    timed: bool
    """Whether its windows have a start and an end for the user."""

    def put(self, to: Assigner, producer: str, message: Message, held: Held, now: int) -> None:
        """Put a message into its windows, but not again into those which hold it."""

    def remove(self, bucket: Bucket) -> None:
        """This window is not open any more."""

    def limit(self) -> int:
        """The watermark at which messages of a window that is open now would be late, if they were read again."""


class Grid:
    """Windows [k * slide, k * slide + interval); with slide == interval they touch."""

    timed = True

    def __init__(self, interval: int, slide: int) -> None:
        self._interval, self._slide = interval, slide
        self._open: dict[tuple[Hashable, int], Bucket] = {}

    def put(self, to: Assigner, producer: str, message: Message, held: Held, now: int) -> None:
        ident = identity(message.key)
        floor = to.floor(ident)
        if held and not to.event:
            first = min(end for end in held if end is not None)  # where it was put when it was read first
        else:
            first = to.time(message, floor, now) // self._slide * self._slide + self._slide

        is_late = not held
        for end in range(first, first + self._interval, self._slide):
            if end > floor and end not in held:
                bucket = self._open.get((ident, end))
                if bucket is None:
                    bucket = Bucket(message.key, end - self._interval, end, ident=ident)
                    to.open(bucket)
                    self._open[ident, end] = bucket
                to.add(bucket, producer, message.offset)
                is_late = False
        if is_late:
            to.late(producer, message.offset, first + self._interval - self._slide)

    def remove(self, bucket: Bucket) -> None:
        del self._open[bucket.ident, bucket.end]

    def limit(self) -> int:
        return FOREVER  # they end after the watermark


class Sessions:
    """Windows [first, last + gap) of messages less than `gap` apart."""

    timed = True

    def __init__(self, gap: int) -> None:
        self._gap = gap
        self._open: dict[Hashable, list[Bucket]] = {}

    def put(self, to: Assigner, producer: str, message: Message, held: Held, now: int) -> None:
        if held:
            return
        ident = identity(message.key)
        floor = to.floor(ident)
        start = to.time(message, floor, now)
        end = start + self._gap

        touching = [it for it in self._open.get(ident, ()) if it.start < end and start < it.end]
        if touching:
            bucket = touching[0]
            for other in touching[1:]:
                self.remove(other)
                to.merge(other, bucket)
            if start < bucket.start:
                bucket.start = start
            if end > bucket.end:
                bucket.end = end
            if len(bucket.runs) > 1 or producer not in bucket.runs:  # read again, any of them may be the first
                bucket.opens = min(bucket.opens, bucket.start + self._gap)
        elif end > floor:
            bucket = Bucket(message.key, start, end, ident=ident)
            to.open(bucket)
            self._open.setdefault(ident, []).append(bucket)
        else:
            to.late(producer, message.offset, end)
            return
        to.add(bucket, producer, message.offset)

    def remove(self, bucket: Bucket) -> None:
        self._open[bucket.ident].remove(bucket)
        if not self._open[bucket.ident]:
            del self._open[bucket.ident]

    def limit(self) -> int:
        return min((bucket.opens for open_ in self._open.values() for bucket in open_), default=FOREVER)


class Waits:
    """One window a key, which is due `wait` after its oldest message was created, or when it has `size`."""

    def __init__(self, wait: int, size: int | None = None) -> None:
        self._wait, self._size = wait, size
        self.timed = size is None
        self._open: dict[Hashable, Bucket] = {}

    def put(self, to: Assigner, producer: str, message: Message, held: Held, now: int) -> None:
        if held:
            return
        ident, time = identity(message.key), min(message.created, now + SINCE)
        bucket = self._open.get(ident)
        if bucket is None:
            bucket = Bucket(message.key, time, time + self._wait, ident=ident)
            to.open(bucket)
            self._open[ident] = bucket
        elif time < bucket.start:
            to.shift(bucket, time, time + self._wait)
        to.add(bucket, producer, message.offset)
        if bucket.n == self._size:
            to.close(bucket)

    def remove(self, bucket: Bucket) -> None:
        del self._open[bucket.ident]

    def limit(self) -> int:
        return FOREVER


class Index:
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

    def forget(self, producers: Mapping[str, Seen]) -> None:
        """Drop from `ends` the producers of which all that is held was read again."""
        if self.ends:
            self.ends = {
                name: end
                for name, end in self.ends.items()
                if (seen := producers.get(name)) is not None and seen.read < min(end, seen.end)
            }

    def at(self, producer: str, offset: int) -> Held:
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

    The watermark moves with each message, in the order of its producer's log. So the windows of one producer depend
    on its messages alone, and not on how many of them were read together.

    Args:
        rule: which windows there are.
        event: whether messages have a time of their own; else it is when they were created, and none is late.
        lateness: how far the watermark stays behind the highest time.
        idle: after how long a silent producer does not hold the watermark; None for never.
        most: how many windows may be open.
        strict: whether more are an error; else the oldest is emitted early, and what follows for it is another part.
        frontier: that of the last claim, or `NEVER`.
        watermark: the highest that a window was claimed with, or `NEVER`.
        stored: the windows that were claimed, as far as they are not below all positions.
    """

    def __init__(
        self, rule: Rule, *, event: bool = False, lateness: int = 0, idle: int | None = None, most: int = 10_000,
        strict: bool = False, frontier: int = NEVER, watermark: int = NEVER, stored: Iterable[Stored] = (),
    ) -> None:  # fmt: skip
        self.rule, self.event = rule, event
        self._lateness, self._idle = lateness, FOREVER if idle is None else idle
        self._most, self._strict = most, strict
        self.watermark, self._shown, self._marked = frontier, watermark, frontier
        self.parts = 0  # windows that were emitted early
        self.came_late = 0  # messages
        self.behind = 0  # by how much more they were late than is allowed, at most
        self.ahead = 0  # by how much times were after those of creation, at most
        self._since = FOREVER  # when this was told the time first
        self._producers: dict[str, Seen] = {}
        self._unread: dict[str, Seen] = {}
        self._unseen: dict[str, None] = {}  # those of which nothing was read yet
        self._order = count()
        self._ends: list[tuple[int, int, Bucket]] = []  # a heap, with each open window once, at its end or before it
        self._open = 0
        self._due: deque[Bucket] = deque()
        self._late: Bucket | None = None
        stored = list(stored)
        self._held = Index(stored)
        self._closed: dict[Hashable, int] = {}  # by key, what is stored beyond the frontier
        for _, key, end, part in stored:
            if end is not None and not part and end > frontier:
                ident = identity(key)
                self._closed[ident] = max(end, self._closed.get(ident, NEVER))

    # --- reading

    def hear(self, waiting: list[Span], now: int) -> None:
        """So far the producers have come."""
        self._since = min(self._since, now)
        for span in waiting:
            seen = self._producers.get(span.producer)
            if seen is None:
                seen = self._producers[span.producer] = Seen(span.start, span.end)
                self._unseen[span.producer] = None
            elif span.end > seen.end:
                seen.heard = now
                seen.awake = seen.last + self._idle
            self._so_far(span.producer, seen, max(seen.read, span.start), span.end)

    def _so_far(self, producer: str, seen: Seen, read: int, end: int) -> None:
        seen.read, seen.end = read, end
        if read < end:
            self._unread[producer] = seen
        else:
            self._unread.pop(producer, None)
            self._unseen.pop(producer, None)

    def next_span(self, most: int) -> Span | None:
        """What to read next, at most so many messages: of the producer that is furthest behind in time."""
        if not self._unread:
            return None
        name = next(iter(self._unseen), None) or min(self._unread, key=lambda name: self._unread[name].high)
        seen = self._unread[name]
        return Span(name, seen.read, min(seen.end, seen.read + most))

    def read(self, span: Span, messages: Iterable[Message], now: int) -> None:
        """Take in the messages of a span, which continues what was read of the producer, and go on in time."""
        producer, seen = span.producer, self._producers[span.producer]
        self._unseen.pop(producer, None)
        high, newest, credible = seen.high, seen.newest, SKEW + seen.behind
        others, until = NEVER, NEVER
        for message in messages:
            created = min(message.created, now)
            if created > newest:
                if newest > NEVER and created - newest >= self._idle:
                    self._pass_silence(seen, created)
                newest = seen.newest = created
            held = self._held.at(producer, message.offset)
            if message.bad:
                if not held:
                    self._aside(Bucket(bad=message.bad), producer, message.offset)
                continue

            lead = message.time - created
            if lead > credible and self.event:
                seen.ahead, self.ahead = True, max(self.ahead, lead)
            elif message.time > high:
                if newest >= until:
                    others, until = self._others(seen, newest)
                high = seen.high = message.time if self.event else max(created, high)
                self._reach(min(high, others) - self._lateness)
            if lead < seen.lead:
                seen.lead = lead
                credible = SKEW + seen.behind
            if None not in held:
                self.rule.put(self, producer, message, held, now)
        self._so_far(producer, seen, span.end, seen.end)
        seen.awake = seen.last + self._idle
        while seen.read - self._low(seen) > MAX_AHEAD and (first := seen.pins[0][2].root).is_open:
            self._close_early(first, f'more than {MAX_AHEAD:,} messages were read behind the oldest of them')

    def advance(self, now: int) -> None:
        """Move the watermark as far as what was read allows, and close the windows that end by then."""
        self._held.forget(self._producers)
        self._reach(self._event_time(now) if self.event else self._created_time(now))
        self._close_due()
        self._forget(now)

    def end(self) -> None:
        """Close the windows that are open: nothing more is to come for now. Time does not go on by that."""
        while (bucket := self._oldest()) is not None:
            bucket.part = True
            self.close(bucket)

    # --- time

    def _reach(self, time: int) -> None:
        # Without event time, messages that stored windows hold would not find their other windows, which are to come.
        if time > self.watermark and (self.event or not self._held.ends):
            self.watermark = time
            if self._closed:
                self._closed = {ident: end for ident, end in self._closed.items() if end > time}
            self._close_due()

    def _close_due(self) -> None:
        while (bucket := self._oldest()) is not None and bucket.end <= self.watermark:
            self.close(bucket)

    def _event_time(self, now: int) -> int:
        if self._unseen:
            return NEVER
        known = self._producers.values()
        at = min((seen.newest for seen in self._unread.values()), default=now)  # a backlog is not silence
        holding = [seen.high for seen in known if seen.high > NEVER and (at < seen.awake or seen.read < seen.end)]
        if holding:
            return min(holding) - self._lateness
        if self._unread:
            return NEVER
        alone = not any(seen.high > NEVER for seen in known) and any(seen.ahead for seen in known)
        by_the_clock = self._clock_time(now, lambda seen: max(seen.last, self._since))
        return max(by_the_clock, now - self._idle - self._lateness if alone else NEVER)

    def _clock_time(self, at: int, last: Callable[[Seen], int]) -> int:
        """How far silence moves the watermark: not at all where event time is not about that of the clock."""
        if self._idle == FOREVER:
            return NEVER
        near = max(SKEW, self._lateness)
        follows = [seen for seen in self._producers.values() if seen.newest - near <= seen.high]
        times = (seen.high + at - last(seen) - self._idle for seen in follows if seen.high > NEVER)
        return max(times, default=NEVER) - self._lateness

    def _pass_silence(self, reading: Seen, at: int) -> None:
        """Until this message came all were silent, as a consumer would have seen that was not behind."""
        others = (seen for seen in self._producers.values() if seen is not reading)
        if self.event and not any(seen.is_unread or at - seen.newest < self._idle for seen in others):
            self._reach(self._clock_time(at, lambda seen: seen.newest))

    def _created_time(self, now: int) -> int:
        return min((seen.high for seen in self._unread.values()), default=now)

    def _others(self, reading: Seen, at: int) -> tuple[int, int]:
        """The lowest time of the other producers that hold the watermark, and until when that is so."""
        low, until = FOREVER, FOREVER
        if self._unseen:
            return NEVER, FOREVER
        for seen in (self._producers if self.event else self._unread).values():
            if seen is reading or not (seen.read < seen.end or at < seen.awake):
                continue
            if seen.high < low and (seen.high > NEVER or not self.event):
                low = seen.high
            if seen.awake < until and seen.read == seen.end:
                until = seen.awake
        return low, until

    def _forget(self, now: int) -> None:
        if len(self._producers) > MANY_PRODUCERS:
            pause = max(FORGOTTEN, self._idle)
            idle = [
                name
                for name, seen in self._producers.items()
                if not seen.is_unread and now - seen.last > pause and seen.low == seen.read
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
        bucket.opens, bucket.born = bucket.end, next(self._order)
        heapq.heappush(self._ends, (bucket.end, bucket.born, bucket))

    def shift(self, bucket: Bucket, start: int, end: int) -> None:
        """Let a window begin and end earlier. One that grows need not say so."""
        bucket.start, bucket.end = start, end
        heapq.heappush(self._ends, (end, bucket.born, bucket))

    def merge(self, other: Bucket, bucket: Bucket) -> None:
        """Make the messages of one window part of another one."""
        other.into, other.is_open = bucket, False
        self._open -= 1
        bucket.n += other.n
        bucket.opens = min(bucket.opens, other.opens)
        bucket.start, bucket.end = min(bucket.start, other.start), max(bucket.end, other.end)
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

    def late(self, producer: str, offset: int, end: int) -> None:
        """All windows of this message are closed, the last of which ended then."""
        self.came_late += 1
        self.behind = max(self.behind, self.watermark - end + 1)
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
        """At most `limit` of the windows that are due, to be claimed now, in this order."""
        if self._late is not None:
            self._emit(self._late)
            self._late = None
        taken = [self._due.popleft() for _ in range(min(limit, len(self._due)))]
        if self.watermark > NEVER:
            self._mark(taken)
        for bucket in taken:
            bucket.given = True
        return taken

    def _mark(self, taken: list[Bucket]) -> None:
        """Let each window say up to which watermark everything is decided that is not stored, when it is."""
        left = min([self.watermark + 1, self.rule.limit(), *(bucket.opens for bucket in self._due)])
        for bucket in reversed(taken):
            bucket.frontier = left - 1
            left = min(left, bucket.opens)
        for bucket in taken:
            if bucket.frontier is not None and bucket.frontier >= self._marked:
                self._marked = bucket.frontier
            else:
                bucket.frontier = None

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
        while self._ends:
            end, born, bucket = self._ends[0]
            if bucket.is_open and end == bucket.end:
                return bucket
            if bucket.is_open and end < bucket.end:  # it has grown
                heapq.heapreplace(self._ends, (bucket.end, born, bucket))
            else:
                heapq.heappop(self._ends)
        return None

    def _close_early(self, bucket: Bucket, why: str) -> None:
        if self._strict:
            raise TooManyWindowsError(
                f"{why}, and overflow is 'error'. Let windows end sooner, use fewer keys, or give a larger "
                f"max_open_windows; with overflow='close' the oldest is emitted early, in parts"
            )
        bucket.part = bucket.end > self.watermark
        self.parts += 1
        self.close(bucket)
