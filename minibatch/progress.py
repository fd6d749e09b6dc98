"""How far a consumer group is: what is planned, open and finished. Pure bookkeeping, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .store import Span


@dataclass
class Claim:
    """A window that is claimed and not yet committed."""

    id: str
    number: int
    spans: list[Span]
    created: datetime
    start: datetime | None = None
    end: datetime | None = None
    attempts: int = 1
    not_before: float = 0.0
    failures: int = 0
    suspect: bool = False  # it was in the hands of a worker that died
    replay: bool = False  # it was a dead letter
    tried: int = 0  # attempts before the replay
    committed: bool = False  # its sink has committed it, with its results
    picked: list[Any] = field(default_factory=list)
    query_args: Any = ()
    argument: Any = None

    @property
    def n(self) -> int:
        return sum(span.end - span.start for span in self.spans)


class Progress:
    """The windows and positions of one consumer group, as its planner knows them.

    Args:
        number: every window up to this number is finished.
        next_number: the number of the next window.
        positions: below them every message of the producer is finished.
        frontier: up to when time windows are finished.
    """

    def __init__(self, number: int, next_number: int, positions: dict[str, int], frontier: datetime | None) -> None:
        self.number, self.next_number = number, next_number
        self.planned = dict(positions)
        self.frontier = frontier
        self.open: dict[int, Claim] = {}
        self._finished: dict[int, datetime | None] = {}
        self._written = dict(positions)

    def claim(self, claim: Claim) -> None:
        """A window was planned, or was found open at the start."""
        self.open[claim.number] = claim
        if claim.replay:
            return  # the position has passed it long ago
        self.next_number = max(self.next_number, claim.number + 1)
        self._plan(claim.spans)

    def finished(self, number: int, spans: Iterable[Span] = (), end: datetime | None = None) -> None:
        """A window was committed, now or earlier, or its number was never used."""
        claim = self.open.pop(number, None)
        if claim is not None and claim.replay:
            return
        self._plan(spans)
        self._finished[number] = claim.end if claim is not None else end
        while self.number + 1 in self._finished:
            self.number += 1
            closed = self._finished.pop(self.number)
            if closed is not None:
                self.frontier = closed

    def skip_to(self, producer: str, offset: int) -> int:
        """There is nothing below `offset` any more; returns how many messages that leaves out."""
        skipped = offset - self.planned.get(producer, offset)
        self.planned[producer] = max(offset, self.planned.get(producer, 0))
        return max(skipped, 0)

    def moved(self) -> dict[str, int]:
        """The positions that are no longer as `written` says: below them everything is finished."""
        positions = dict(self.planned)
        for claim in self._in_turn():
            for span in claim.spans:
                positions[span.producer] = min(positions[span.producer], span.start)
        return {producer: at for producer, at in positions.items() if self._written.get(producer, 0) < at}

    def written(self, positions: dict[str, int]) -> None:
        """These positions will be written."""
        self._written.update(positions)

    def forget(self, alive: Iterable[str]) -> None:
        """Drop producers that have no messages and no open window."""
        needed = {*alive, *(span.producer for claim in self._in_turn() for span in claim.spans)}
        done = [p for p, at in self.planned.items() if p not in needed and self._written.get(p) == at]
        for producer in done:
            del self.planned[producer], self._written[producer]

    def _in_turn(self) -> list[Claim]:
        return [claim for claim in self.open.values() if not claim.replay]

    def _plan(self, spans: Iterable[Span]) -> None:
        for span in spans:
            self.planned[span.producer] = max(span.end, self.planned.get(span.producer, 0))
