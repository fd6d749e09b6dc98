"""Where fixed windows cut the log of each producer, by the times of creation alone."""

from __future__ import annotations

from datetime import datetime

from . import clock
from .progress import Log
from .store import Span

MAX_RUNS = 100_000


def cut(log: Log, span: Span, end: datetime, now: datetime) -> Span:
    """The messages of `span` that belong before `end`."""
    seen: _Seen = log.memory.setdefault(span.producer, _Seen(span.start))
    return span._replace(end=seen.cut(log, span, end, now))


def next_time(log: Log, waiting: list[Span], now: datetime) -> datetime:
    """The time of the first message behind what was cut, as far as it was read; else `now`."""
    seen: list[_Seen] = [log.memory[span.producer] for span in waiting]
    return min([now, *(each.next_time for each in seen if each.next_time is not None)])


class _Seen:
    """The times of the messages of one producer, read ahead of the windows: never backwards, never in the future."""

    def __init__(self, offset: int) -> None:
        self._until = offset
        self._runs: list[tuple[int, datetime]] = []  # (offset after the run, time of its messages)
        self._latest = clock.EPOCH

    @property
    def next_time(self) -> datetime | None:
        return self._runs[0][1] if self._runs else None

    def cut(self, log: Log, span: Span, end: datetime, now: datetime) -> int:
        if self._until < span.start:
            self._until, self._runs = span.start, []
        offset = span.start
        while True:
            for i, (after, time) in enumerate(self._runs):
                if time >= end:
                    del self._runs[:i]
                    return offset
                offset = max(offset, min(after, span.end))
            self._runs = []
            if self._until >= span.end or not self._read(log, span._replace(start=self._until), now):
                return span.end if self._until >= span.end else offset

    def _read(self, log: Log, span: Span, now: datetime) -> bool:
        before = self._until
        for offset, _, times in log.times(span):
            for after, time in enumerate(times, offset + 1):
                if self._until < after <= span.end:
                    self._latest = max(self._latest, min(clock.aware(time), now))
                    self._until = after
                    if self._runs and self._runs[-1][1] == self._latest:
                        self._runs[-1] = after, self._latest
                    else:
                        self._runs.append((after, self._latest))
            if len(self._runs) > MAX_RUNS:
                break
        return self._until > before


def first_time(log: Log, waiting: list[Span], now: datetime) -> datetime:
    """The creation time of the oldest message that waits, or `now`."""
    times = [times[0] for span in waiting for _, _, times in log.times(span._replace(end=span.start + 1))]
    return min([now, *map(clock.aware, times)])
