"""How far a consumer group is: what is planned, open and finished, and what its emitter sees of the log.

Pure bookkeeping, no I/O: what a restart finds again is a function of the documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from . import clock, ledger
from .fields import stored_key
from .store import Doc, Span

TIMES = ('start', 'end', 'watermark', 'frontier')
MAX_UNMARKED = 10_000  # finished windows that are kept because no frontier says that they are closed
MARKS = ('late', 'bad', 'part', 'event')


@dataclass
class WindowPlan:
    """A window that is due. `query_args` and `argument` belong to emitters that pick messages."""

    spans: list[Span]
    start: datetime | None = None
    end: datetime | None = None
    key: Any = None
    watermark: datetime | None = None
    frontier: datetime | None = None  # with this window everything up to then is planned
    late: bool = False  # its messages came when their windows were closed
    bad: str = ''  # why its message has no window
    part: bool = False  # it was emitted before its end, and may be followed by another part
    event: bool = False  # its times are those of the messages
    picked: list[Any] = field(default_factory=list)
    query_args: Any = ()
    argument: Any = None
    readable: bool = True

    @cached_property
    def n(self) -> int:
        """How many messages it has."""
        return sum(span.end - span.start for span in self.spans)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The lowest offset of each producer."""
        return {span.producer: span.start for span in sorted(self.spans, reverse=True)}

    @cached_property
    def ends(self) -> dict[str, int]:
        """The offset after the highest one of each producer."""
        return {span.producer: span.end for span in sorted(self.spans)}


@dataclass
class Claim(WindowPlan):
    """A window that is claimed and not yet committed."""

    id: str = ''
    number: int = 0
    created: datetime = clock.EPOCH
    attempts: int = 1
    not_before: float = 0.0
    failures: int = 0
    failing_since: float = 0.0  # when its sink failed first
    suspect: bool = False  # it was in the hands of a worker that died
    replay: bool = False  # it was a dead letter
    tried: int = 0  # attempts before the replay
    committed: bool = False  # its sink has committed it, with its results
    in_function: float = 0.0  # seconds, of the last attempt
    newest: datetime | None = None  # when its newest message was created, as its worker has seen
    missing: int = 0  # how many of its messages had expired

    @property
    def aside(self) -> bool:
        """Whether the function is not called for it: it is late, or has no window, and nobody asked for a replay."""
        return not self.replay and (self.late or bool(self.bad))

    @classmethod
    def planned(cls, plan: WindowPlan, stream: str, group: str, number: int, now: datetime) -> Claim:
        """The claim of a window with the next number."""
        claim = cls(plan.spans, id=ledger.window_id(stream, group, number), number=number, created=now)
        vars(claim).update(vars(plan))
        return claim

    @classmethod
    def stored(cls, doc: Doc) -> Claim:
        """The claim that a window document, with all its spans, says."""
        values: dict[str, Any] = {name: clock.aware(doc[name]) for name in TIMES if doc.get(name)}
        values.update((name, doc[name]) for name in MARKS if name in doc)
        return cls(
            doc['spans'], **values, key=stored_key(doc.get('key')), id=doc['_id'], number=doc['number'],
            created=clock.aware(doc['created']), attempts=int(doc.get('attempts', 1)),
            replay=doc['status'] == 'replay', tried=int(doc.get('tried', 0)),
        )  # fmt: skip

    def document(self, stream: str, group: str, epoch: int) -> Doc:
        """The window document of this claim."""
        doc = {
            '_id': self.id,
            'stream': stream,
            'group': group,
            'number': self.number,
            'spans': self.spans,
            'n': self.n,
            'status': 'open',
            'epoch': epoch,
            'attempts': self.attempts,
            'created': self.created,
            'processed': False,
        }
        if self.key is not None:
            doc['key'] = list(self.key) if isinstance(self.key, tuple) else self.key
        for name in (*TIMES, *MARKS):
            if value := getattr(self, name):
                doc[name] = value
        return doc


class Progress:
    """The windows and positions of one consumer group, as its planner knows them.

    Args:
        number: every window up to this number is finished, and all positions are behind its messages.
        next_number: the number of the next window.
        positions: below them every message of the producer is finished.
        frontier: up to when windows are finished.
        watermark: the highest a window of a number up to `number` had.
        follows: whether windows follow on each other in the log of each producer. Else whoever plans says what is
            `planned`, and windows may be finished which the positions have not passed.
    """

    def __init__(
        self, number: int, next_number: int, positions: dict[str, int], frontier: datetime | None = None,
        watermark: datetime | None = None, follows: bool = True,
    ) -> None:  # fmt: skip
        self.number, self.next_number = number, next_number
        self.planned = dict(positions)
        self.frontier, self.watermark = frontier, watermark
        self.open: dict[int, Claim] = {}
        self.found: list[Claim] = []
        self._follows = follows
        self._above: dict[str, list[Span]] = {}  # claimed before the start, behind what is not
        self._finished: dict[int, WindowPlan] = {}
        self._written = dict(positions)
        self._passed = number  # up to it windows are finished, and behind all positions
        self._ends: list[datetime] = []  # of those above `number`, as far as they are above the frontier, too

    @classmethod
    def resume(cls, windows: list[Doc], *place: Any, **options: Any) -> Progress:
        """The progress that the documents of the windows after `number` say; the rest is as for the class."""
        progress = cls(*place, **options)
        progress.found = [Claim.stored(doc) for doc in windows]
        found = {claim.number for claim in progress.found}
        for number in range(progress.number + 1, progress.next_number):
            if number not in found:
                progress.finished(number)
        for claim, doc in zip(progress.found, windows, strict=True):
            if doc['status'] == 'open':
                progress.claim(claim)
            else:
                progress.finished(claim.number, claim)
        return progress

    def claim(self, claim: Claim) -> None:
        """A window was planned, or was found open at the start."""
        self.open[claim.number] = claim
        if claim.replay:
            return  # the position has passed it long ago
        self.next_number = max(self.next_number, claim.number + 1)
        if self._follows:
            self._plan(claim.spans)

    def plan_to(self, low: dict[str, int]) -> None:
        """All windows of the messages below these offsets are claimed."""
        for producer, offset in low.items():
            at = max(offset, self.planned.get(producer, 0))
            if producer in self._above:
                for span in sorted(self._above[producer]):
                    if span.start <= at:
                        at = max(span.end, at)
                        self._above[producer].remove(span)
            self.planned[producer] = at

    def finished(self, number: int, window: WindowPlan | None = None) -> None:
        """A window was committed, now or, with `window`, earlier; without it its number was never used."""
        claim = self.open.pop(number, None)
        if claim is not None and claim.replay:
            return
        done = claim or window or WindowPlan([])
        if self._follows and claim is None:
            self._plan(done.spans)
        self._finished[number] = done
        self._advance()

    @property
    def marks(self) -> dict[str, datetime]:
        """The frontier and the watermark, as far as there are any."""
        both = {'frontier': self.frontier, 'watermark': self.watermark}
        return {name: time for name, time in both.items() if time is not None}

    def _advance(self) -> None:
        while (done := self._finished.get(self._passed + 1)) is not None:
            if not self._follows and any(self._written.get(p, 0) < end for p, end in done.ends.items()):
                break  # what it holds must be known after a restart
            self._passed += 1
            if done.end is not None and not done.part:
                self._ends.append(done.end)
            if done.frontier is not None:
                self._ends = [end for end in self._ends if end > done.frontier]
            # That a window is closed must be known, too: by its document, or by a frontier.
            if self._follows or not self._ends or self._passed - self.number > MAX_UNMARKED:
                for number in range(self.number + 1, self._passed + 1):
                    self._settle(number)
                self._ends = []

    def _settle(self, number: int) -> None:
        done, self.number = self._finished.pop(number), number
        self.frontier = done.frontier or self.frontier
        self.watermark = max(filter(None, (done.watermark, self.watermark)), default=None)

    def skip_to(self, producer: str, offset: int) -> int:
        """There is nothing below `offset` any more; returns how many messages that leaves out."""
        skipped = offset - self.planned.get(producer, offset)
        self.plan_to({producer: offset})
        return max(skipped, 0)

    def moved(self) -> dict[str, int]:
        """The positions that are no longer as `written` says: below them everything is finished."""
        positions = dict(self.planned)
        for claim in self._in_turn():
            for producer, start in claim.starts.items():
                positions[producer] = min(positions.get(producer, 0), start)
        return {producer: at for producer, at in positions.items() if self._written.get(producer, 0) < at}

    def written(self, positions: dict[str, int]) -> None:
        """These positions will be written."""
        self._written.update(positions)
        self._advance()

    def forget(self, alive: Iterable[str]) -> None:
        """Drop producers that have no messages and no open window."""
        needed = {*alive, *(producer for claim in self._in_turn() for producer in claim.starts)}
        needed.update(producer for done in self._finished.values() for producer in done.ends)
        done = [p for p, at in self.planned.items() if p not in needed and self._written.get(p) == at]
        for producer in done:
            del self.planned[producer], self._written[producer]

    def _in_turn(self) -> list[Claim]:
        return [claim for claim in self.open.values() if not claim.replay]

    def _plan(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span.start <= self.planned.get(span.producer, 0):
                self.plan_to({span.producer: span.end})
            else:
                self._above.setdefault(span.producer, []).append(span)


class Log(ABC):
    """What an emitter sees of a stream, from what its group has planned on.

    Attributes:
        ends: the offset after the last message of each producer, as of `looked`.
        looked: a time (of the server) before `ends` were read: what was stored by then is known.
        frontier: up to when windows were planned; emitters move it.
        watermark: the highest that a window was claimed with.
        found: the windows that were claimed before the start, as far as the positions have not passed them.
        low: set by emitters whose windows do not follow on each other in the log: when the windows that were planned
            last are claimed, all windows of the messages below these offsets are.
        more: set by them, whether there is more to read now.
        memory: what the emitter remembers. It is empty when the lease is taken anew, because what was planned last may
            not have been claimed.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress, self.found = progress, progress.found
        marks: tuple[WindowPlan | Progress, ...] = (progress, *progress.found)
        self.frontier = next((mark.frontier for mark in reversed(marks) if mark.frontier), None)
        self.watermark = max((mark.watermark for mark in marks if mark.watermark), default=None)
        self.ends: dict[str, int] = {}
        self.looked = clock.EPOCH
        self.low: dict[str, int] = {}
        self.more = False
        self.memory: dict[str, Any] = {}

    def waiting(self) -> list[Span]:
        """What is not planned, of each producer that has something, by the names of the producers."""
        planned = self.progress.planned
        spans = (Span(producer, planned.get(producer, 0), end) for producer, end in self.ends.items())
        return [span for span in spans if span.start < span.end]

    def claimed(self) -> None:
        """What was planned last is claimed."""
        self.progress.plan_to(self.low)
        self.low = {}

    @abstractmethod
    def times(self, span: Span) -> Iterator[tuple[int, int, list[datetime]]]:
        """(offset, n, creation times) of the first record batches of a span."""

    @abstractmethod
    def messages(self, span: Span, names: list[str] | None) -> Iterator[tuple[int, datetime, Any]]:
        """(offset, creation time, data) of the messages of a span that are stored; of the data these fields, or all."""
