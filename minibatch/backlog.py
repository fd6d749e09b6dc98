"""Backpressure: how many messages wait in a stream, and how many more a producer may append.

The limit is a soft one. Each producer counts the backlog now and then and adds what it has appended since, so what
others append is known up to a second later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pymongo
from pymongo.errors import PyMongoError

from . import ledger, store
from .connection import LEAST_TIMEOUT, reason_of
from .errors import UnreachableError
from .settings import Settings
from .store import DB, Span

logger = logging.getLogger(__name__)

TIMEOUT = 60.0
MAX_AGE = 1.0
MIN_AGE = 0.05


@dataclass(frozen=True)
class Limits:
    """What an append keeps to.

    Args:
        timeout: seconds to wait for room, and then again for MongoDB to confirm.
        settings: what the stream says, which may change; without them any number may wait.
    """

    timeout: float = TIMEOUT
    settings: Settings | None = None

    @property
    def max_backlog(self) -> int | None:
        """How many messages may wait to be processed, None for any number."""
        return None if self.settings is None else self.settings.max_backlog

    @property
    def on_full(self) -> str:
        """'block' to wait for room, 'raise' not to."""
        return 'block' if self.settings is None else self.settings.on_full


def count_backlog(db: DB, stream: str, enough: int) -> int:
    """How many messages the slowest consumer group has not finished; without any group, how many are stored.

    The log is not read, only its ends. What was deleted unprocessed is left out, unless even with it the count is
    below `enough`. Messages without an offset are counted when they have one.
    """
    ends = store.log_ends(db, stream)
    groups = ledger.groups_that_hold(db, stream)
    if any(group.get('picks') for group in groups):  # it is the only one, and has no positions
        return store.count_unprocessed(db, stream)
    positions = [ledger.read_positions(db, stream, group['group']) for group in groups]
    most = max((_behind(ends, at) for at in positions), default=enough)
    if most < enough:
        return most
    starts = store.log_starts(db, stream)
    kept = {producer: end for producer, end in ends.items() if producer in starts}
    above = [{producer: max(at.get(producer, 0), starts[producer]) for producer in kept} for at in positions or [{}]]
    left = [_unfinished(db, stream, group, kept, at) for group, at in zip(groups, above, strict=False)]
    return max(left, default=_behind(kept, above[0]))


def _behind(ends: Mapping[str, int], positions: Mapping[str, int]) -> int:
    return sum(max(end - positions.get(producer, 0), 0) for producer, end in ends.items())


def _unfinished(
    db: DB, stream: str, group: Mapping[str, Any], ends: Mapping[str, int], positions: Mapping[str, int]
) -> int:
    """How many messages from these positions on are in no window that the group has finished."""
    finished = ledger.finished_spans(db, stream, group['group'], int(group['number']))
    ahead = [Span(producer, positions[producer], end) for producer, end in ends.items()]
    left = (gap for span in ahead for gap in store.gaps(span, finished.get(span.producer, ())))
    return sum(gap.end - gap.start for gap in left)


class Room:
    """The room left in a stream, as far as one producer can tell.

    Args:
        count: counts the backlog, given how much is enough to know.
    """

    def __init__(self, count: Callable[[int], int]) -> None:
        self._count = count
        self._lock = threading.RLock()
        self._backlog = 0
        self._counted = float('-inf')

    @property
    def counting(self) -> bool:
        """Whether this very thread takes room, and was interrupted."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def take(self, wanted: int, limits: Limits, deadline: float) -> int:
        """Take room for at most `wanted` messages; returns for how many there was.

        Raises:
            UnreachableError: if MongoDB has not said by `deadline`, in monotonic time, how many messages wait.
        """
        most = limits.max_backlog
        if most is None:
            return wanted
        try:
            if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise UnreachableError('another append waits to know how many messages wait')
            age = time.monotonic() - self._counted
            if age > MAX_AGE or (age > MIN_AGE and self._backlog + wanted > most):
                self._recount(limits, deadline)
                most = limits.max_backlog
            taken = wanted if most is None else max(min(wanted, most - self._backlog), 0)
            self._backlog += taken
            return taken
        finally:
            if self.counting:  # not if it did not get it, nor if Ctrl-C came before that
                self._lock.release()

    def describe(self, stream: str, limits: Limits, waited: bool) -> str:
        """Why there is no room, also after it was `waited` for, and what to do."""
        also = f', also after {limits.timeout:g} s' if waited else ''
        return (
            f'{self._backlog:,} messages of stream {stream!r} wait to be processed, max_backlog={limits.max_backlog} '
            f'allows no more{also}. See that its consumers run and keep up, or open it with a larger max_backlog, '
            f'which must be more than a window holds; then try again'
        )

    def _recount(self, limits: Limits, deadline: float) -> None:
        """Count again, by the limit that holds now: another process may have set or unset it."""
        try:
            with pymongo.timeout(max(deadline - time.monotonic(), LEAST_TIMEOUT)):
                if limits.settings is not None:
                    limits.settings.read()
                if limits.max_backlog is not None:
                    self._backlog = self._count(limits.max_backlog)
        except PyMongoError as exc:
            if time.monotonic() >= deadline or exc.timeout:
                raise UnreachableError(reason_of(exc)) from exc
            # the append itself will find out what is wrong
            warn(logger, 'the backlog could not be counted, trying again: %s', exc)
        self._counted = time.monotonic()


_saying: list[threading.Thread] = []


def warn(logger: logging.Logger, text: str, *args: Any) -> None:
    """Log from a thread of its own, and not at all while the last such warning has not been taken.

    What is logged while others wait for us must not wait for them: a handler of logging that appends may be one of
    them, and keeps all others from logging meanwhile.
    """
    if any(thread.is_alive() for thread in _saying):
        return
    thread = threading.Thread(target=logger.warning, args=(text, *args), name='minibatch-log', daemon=True)
    _saying[:] = [thread]
    try:
        thread.start()
    except RuntimeError:  # at the end of the process
        logger.warning(text, *args)
