"""A consumer group in memory: its documents as they are stored, and a loop that can be killed at any write.

What it plans with, and what it finds again after a restart, is the code of the real one: emitter, `Log`, `Progress`.
"""
from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from minibatch import clock
from minibatch.progress import Claim, Log, Progress
from minibatch.store import Span
from minibatch.window import PlannedWindow

Messages = dict[str, list[tuple[int, Any]]]


class MemoryLog(Log):
    """The messages of producers, (created in ms, data) each."""

    def __init__(self, progress: Progress, messages: Messages) -> None:
        super().__init__(progress)
        self._messages = messages

    def look(self, now: int, ends: dict[str, int] | None = None) -> None:
        self.ends = ends or {producer: len(messages) for producer, messages in self._messages.items()}
        self.looked = clock.from_ms(now)

    def times(self, span: Span) -> Iterator[tuple[int, int, list[datetime]]]:
        for offset, created, _ in self.messages(span, None):
            yield offset, 1, [created]

    def messages(self, span: Span, names: list[str] | None) -> Iterator[tuple[int, datetime, Any]]:
        for offset in range(span.start, span.end):
            created, data = self._messages[span.producer][offset]
            yield offset, clock.from_ms(created), data


class MemoryGroup:
    """The documents of a group, and its consumer, which `restart` kills and starts again."""

    def __init__(self, emitter: PlannedWindow, messages: Messages) -> None:
        self.emitter, self.messages = emitter, messages
        self.windows: dict[int, dict[str, Any]] = {}  # those that are stored
        self.seen: dict[int, Claim] = {}  # all that were ever stored
        self.positions: dict[str, int] = {}
        self.group: dict[str, Any] = {'number': 0}
        self.restart()

    def restart(self) -> None:
        number = self.group['number']
        following = max(self.windows, default=number) + 1
        documents = [doc for n, doc in sorted(self.windows.items()) if n > number]
        marks = (self.group.get('frontier'), self.group.get('watermark'))
        self.progress = Progress.resume(
            documents, number, following, self.positions, *marks, follows=not self.emitter.assigns
        )
        self.log = MemoryLog(self.progress, self.messages)

    def plan(
        self, now: int, limit: int = 1000, ends: dict[str, int] | None = None, keep: int | None = None,
        end: bool = False,
    ) -> bool:  # fmt: skip
        """Look, plan, and claim; with `keep` only so many claims are stored, and then it is killed.

        With `end`, what is planned is what is left open.
        """
        self.log.look(now, ends)
        plan = self.emitter.finish if end else self.emitter.plan
        plans = plan(self.log, clock.from_ms(now), limit)
        for plan in plans[:keep]:
            claim = Claim.planned(plan, 's', 'g', self.progress.next_number, clock.from_ms(now))
            self.windows[claim.number] = claim.document('s', 'g', 1)
            self.seen[claim.number] = claim
            self.progress.claim(claim)
        if keep is not None and keep < len(plans):
            self.restart()
            return True
        self.log.claimed()
        return bool(plans) or self.log.more

    def run(self, now: int, **options: Any) -> None:
        """Plan all that is due, and finish it."""
        while self.plan(now, **options):
            pass
        self.finish()

    def end(self, now: int) -> None:
        """Emit what is open, as nothing more comes."""
        self.run(now)
        self.run(now, end=True)

    def finish(self, number: int | None = None) -> None:
        """Finish one window, or all, and let positions, number and deletion follow."""
        for each in [number] if number is not None else sorted(self.progress.open):
            self.windows[each]['status'] = 'processed'
            self.progress.finished(each)

    def follow(self) -> None:
        """Write the positions, then the number, then delete what is behind them."""
        moved = self.progress.moved()
        self.progress.written(moved)
        self.positions = {**self.positions, **moved}
        self.group = {'number': self.progress.number, **self.progress.marks}
        self.windows = {n: doc for n, doc in self.windows.items() if n > self.progress.number}
