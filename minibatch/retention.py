"""What follows a commit, off the hot path: positions, progress, and the deletion of what no group needs."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from pymongo.client_session import ClientSession
from pymongo.errors import PyMongoError

from . import dead, ledger, store
from .connection import Target
from .lease import Lease
from .store import Span
from .text import plain

logger = logging.getLogger(__name__)

PAUSE = 0.25
CLOSE_TIMEOUT = 1.0
STRETCH = 50_000  # messages that are deleted at a time; more than a record batch has
READ_MARK_PAUSE = 1.0
PRUNE_PAUSE = 600.0
TRIM_PAUSE = 60.0
DEAD_KEPT = timedelta(days=30)
MAX_DEAD = 10_000


class Follower:
    """Writes how far a consumer group is, then deletes what is behind it, in a thread.

    In this order: positions; the number up to which all windows are finished; then windows and messages are
    deleted, or marked as processed where they are kept. A crash in between leaves something to delete, no more.
    """

    def __init__(self, target: Target, stream: str, group: str, taken: Lease, keep: bool) -> None:
        self._target, self._stream, self._group, self._keep = target, stream, group, keep
        self._lease, self._epoch, self._now = taken, taken.epoch, taken.now
        self._changed = threading.Condition()
        self._moved: dict[str, int] = {}
        self._number = self._written_number = self._deleted_number = 0
        self._marks: dict[str, datetime] = {}
        self._counts: Counter[str] = Counter()
        self._positions: dict[str, int] = {}
        self._cleaned: dict[str, int] = {}
        self._newly_cleaned: dict[str, int] = {}
        self._busy = self._closed = self._marked = False
        self._deadline = float('inf')  # of deletion
        self._error: Exception | None = None
        self._last = self._read_marked = 0.0
        self._pruned = self._trimmed = self._looked_for_expired = -PRUNE_PAUSE
        self._expired: set[str] = set()
        self._thread: threading.Thread | None = None

    def resume(self, positions: dict[str, int], cleaned: dict[str, int]) -> None:
        """These positions were written before, and what is behind them was cleaned up so far."""
        self._positions, self._cleaned = positions.copy(), cleaned.copy()

    def count(self, **counts: Any) -> None:
        """Add to the counters of the group."""
        with self._changed:
            self._counts.update(counts)

    def is_due(self) -> bool:
        """Whether enough time has passed since the last `follow`."""
        return time.monotonic() - self._last >= PAUSE

    def follow(self, moved: dict[str, int], number: int, marks: dict[str, datetime], wait: float | None) -> None:
        """Follow to these positions, and to this window number with its marks in time.

        With `wait` return when all is written and deleted. Deletion ends after so many seconds, and the next consumer
        goes on with it; with None it takes as long as it takes.

        Raises:
            LeaseLostError: if another consumer has taken over.
        """
        with self._changed:
            if self._error is not None and not isinstance(self._error, PyMongoError):
                raise self._error
            self._error = None
            self._last = time.monotonic()
            self._moved.update(moved)
            self._number, self._marks = number, marks
            self._deadline = time.monotonic() + wait if wait else float('inf')
            if self._thread is None:
                name = f'minibatch-follower-{self._stream}'
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            if wait != 0:
                self._wait(2 * wait if wait else float('inf'))
                if self._error is not None:
                    raise self._error

    def _wait(self, seconds: float) -> None:
        """Wait until all is written and deleted; not as long as MongoDB is away, when the thread may wait for that."""
        deadline = time.monotonic() + seconds
        while not self._error and (self._pending or self._busy) and time.monotonic() < deadline:
            if self._target.is_away:
                break
            self._changed.wait(PAUSE)

    def close(self) -> None:
        """Stop; what was not written is found out again by the next consumer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT)

    @property
    def _pending(self) -> bool:
        return bool(self._moved) or self._number > self._written_number or bool(self._counts)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    break
                moved, self._moved = self._moved, {}
                number, marks = self._number, self._marks
                counts, self._counts = self._counts, Counter()
                self._busy = True
            error: Exception | None = None
            try:
                with self._target.client.start_session(causal_consistency=True) as session:
                    self._write(moved, number, marks, counts, session)
                    self._written_number, moved, counts = number, {}, Counter()
                    self._retain(number, session)
            except Exception as exc:  # whatever it is, `follow` must not wait for ever
                error = exc
                logger.debug('could not follow', exc_info=True)
            with self._changed:
                self._busy, self._error = False, error
                if error is not None:
                    self._moved = {**moved, **self._moved}
                    self._counts.update(counts)
                self._changed.notify_all()
                if error is not None and not isinstance(error, PyMongoError):
                    return
                if error is not None:
                    self._changed.wait_for(lambda: self._closed, timeout=1.0)
        with suppress(PyMongoError):  # else the next one looks again
            self._note_cleaned()

    def _write(
        self, moved: dict[str, int], number: int, marks: dict[str, datetime], counts: Counter[str],
        session: ClientSession,
    ) -> None:  # fmt: skip
        db = self._target.majority
        ledger.write_positions(db, self._stream, self._group, self._epoch, moved)
        self._positions.update(moved)
        fields: dict[str, Any] = {'number': number, **marks}
        if 'windows' in counts:
            fields['committed'] = self._now()
        ledger.write_progress(db, self._stream, self._group, self._epoch, fields, dict(counts), session)

    def _retain(self, number: int, session: ClientSession) -> None:
        db = self._target.majority
        if not self._keep and number > self._deleted_number:
            ledger.delete_windows(db, self._stream, self._group, self._deleted_number + 1, number + 1)
            self._deleted_number = number
        self._forget_idle_producers()
        self._trim_dead()
        self._warn_of_expired_groups()
        limits, keep = ledger.released(db, self._stream, self._group, self._positions, session)
        if self._marked and not keep:  # what was marked is not kept any more
            self._cleaned.clear()
        self._marked = keep
        clean = store.mark_processed if keep else store.delete_records
        for producer, upto in limits.items():
            self._clean(clean, Span(producer, self._cleaned.get(producer, 0), upto), session)
        if time.monotonic() - self._read_marked > READ_MARK_PAUSE:
            store.touch_stream(db, self._stream, self._now())
            self._note_cleaned()
            self._read_marked = time.monotonic()

    def _clean(self, clean: Callable[..., int], span: Span, session: ClientSession) -> None:
        """Delete, or mark, the messages of a span, a stretch at a time."""
        db, (producer, at, end) = self._target.majority, span
        while at < end and time.monotonic() < self._deadline:
            self._lease.check()
            if end - at > STRETCH:  # there may be nothing for long
                first = store.first_kept(db, self._stream, producer, at, session)
                at = end - 1 if first is None else min(first, end - 1)
            reached = clean(db, self._stream, Span(producer, at, min(at + STRETCH, end)), session)
            self._cleaned[producer] = self._newly_cleaned[producer] = reached
            if reached <= at:
                break  # the rest is of a record batch that reaches beyond the end
            at = reached

    def _note_cleaned(self) -> None:
        ledger.write_cleaned(self._target.majority, self._stream, self._group, self._newly_cleaned)
        self._newly_cleaned = {}

    def _warn_of_expired_groups(self) -> None:
        if time.monotonic() - self._looked_for_expired < TRIM_PAUSE:
            return
        self._looked_for_expired = time.monotonic()
        expired = set(ledger.expired_groups(self._target.majority, self._stream))
        new, self._expired = expired - self._expired, expired
        for id_ in sorted(new):
            logger.warning('group %s has not been run for group_expiry: messages no longer wait for it', plain(id_))

    def _trim_dead(self) -> None:
        if time.monotonic() - self._trimmed < TRIM_PAUSE:
            return
        self._trimmed = time.monotonic()
        before = self._now() - DEAD_KEPT
        trimmed = dead.trim(self._target.majority, self._stream, self._group, before, MAX_DEAD)
        if trimmed:
            logger.warning('%s/%s: %d dead letters were older than %d days, or more than %d, and are gone',
                           plain(self._stream), plain(self._group), trimmed, DEAD_KEPT.days, MAX_DEAD)  # fmt: skip

    def _forget_idle_producers(self) -> None:
        if time.monotonic() - self._pruned < PRUNE_PAUSE:
            return
        self._pruned = time.monotonic()
        db, now = self._target.majority, self._now()
        alive = store.log_ends(db, self._stream)
        finished = ledger.finished_spans(db, self._stream, self._group, self._written_number)
        alive = {**{producer: spans[0].end for producer, spans in finished.items()}, **alive}
        self._lease.check()
        ledger.prune_positions(db, self._stream, self._group, alive, now)
        self._positions = {producer: at for producer, at in self._positions.items() if producer in alive}
        # What a repeated insert has brought back behind us is found from the start again.
        self._cleaned = {p: at for p, at in self._cleaned.items() if p in alive and (self._keep or at < alive[p])}
