"""Who consumes: one of any number of processes leads, the others stand by; executors and signals."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pymongo.errors import PyMongoError

from . import connection, executors, functions, lease, ledger, signals
from .abc import Executor
from .away import AwayWatch
from .connection import Target, is_passing, reason_of
from .errors import GroupConflictError, LeaseLostError
from .lease import Lease
from .marshaller import Portable, name_of
from .planner import TICK, Planner
from .worker import Limit, Pool, Processed, Task

if TYPE_CHECKING:
    from .window import WindowEmitter

logger = logging.getLogger(__name__)

STAND_BY_PAUSE = 0.5
CONNECTION_PAUSE = 1.0
END_TIMEOUT = 60.0


class Consumer:
    """Runs the windows of an emitter, as one of any number of consumers of its group."""

    executor: Executor
    limit: Limit | None = None

    def __init__(self, emitter: WindowEmitter) -> None:
        self.emitter = emitter
        self._token = lease.new_token()
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._arrived: list[Any] = []
        fn = emitter.emitfn
        if emitter.processfn is not None and not emitter.picks:
            fn = Processed(emitter.processfn, fn)
        self._fn = Portable(fn) if fn is not None else None
        self._seconds_per_window: float | None = None
        self._holds_back = True  # whether the executor itself runs no more at once than it was made for
        self._standing_by = False

    @property
    def _token_here(self) -> str:
        return f'{self._token}-{os.getpid()}'  # a forked child is another consumer

    @property
    def _workers(self) -> int:
        return self.emitter.max_workers or os.cpu_count() or 1

    @property
    def at_once(self) -> int:
        """How many tasks the executor is given at once."""
        most: int | None = getattr(self.executor, 'workers', None)  # see `minibatch.abc.BoundedExecutor`
        if most is not None:
            return min(2 * most, self.emitter.max_workers or 2 * most)
        if self._holds_back:
            return 2 * self._workers
        return self.emitter.max_workers or 2 * self._workers  # it may run all that it is given at once

    def wake(self, item: Any = None) -> None:
        """Make the loop look at once; `item` is a task with its completion, or nothing."""
        self._inbox.put(item)

    def check_portable(self) -> None:
        """Raise `PortabilityError` if the function cannot be sent to a worker process."""
        if self._fn is not None:
            self._fn.check()

    def run(self, until_done: bool = False) -> None:
        """Process windows until told to stop, or until all is done."""
        handled = signals.handled(self._stop_soon, signals.end_at_once, within=END_TIMEOUT)
        with handled, self._things(), self._patience() as where:
            while not self.should_stop():
                if where.is_away:
                    self.wait(CONNECTION_PAUSE)
                    continue
                try:
                    planner = self._lead()
                    if planner is None:
                        self.wait(STAND_BY_PAUSE)
                    else:
                        with planner:
                            planner.run(until_done)
                        self.finished_tasks()
                        if planner.done:
                            logger.info('%s: all is processed', self)
                            return
                except LeaseLostError as exc:
                    logger.warning('%s: %s', self, exc)
                except PyMongoError as exc:
                    if not is_passing(exc):
                        raise
                    if not where.is_away:  # which is said already
                        logger.warning('%s: trying again after: %s', self, reason_of(exc))
                    connection.heal(where.client, exc)
                    self.wait(CONNECTION_PAUSE)

    @contextmanager
    def _patience(self) -> Iterator[Target]:
        """Meanwhile it is said when MongoDB, which this gives, is away; it is waited for until this is to stop."""
        where = self.emitter.stream.target

        def is_told_to_stop() -> bool:
            return self.emitter._stop

        with AwayWatch(str(self), where, is_told_to_stop), connection.until(is_told_to_stop):
            yield where

    def should_stop(self) -> bool:
        """Whether a signal, `stop`, or the emitter says so; users override the emitter's method."""
        return self.emitter._stop or self.emitter.should_stop()

    def run_once(self) -> int:
        """Process what is due; returns how many windows were committed."""
        with self._executor():
            planner = self._lead()
            if planner is None:
                return 0
            with planner:
                return planner.run_once()

    def wait(self, seconds: float = TICK) -> None:
        """Wait until woken, at most so long."""
        with suppress(Empty):
            self._arrived.append(self._inbox.get(timeout=max(seconds, 0)))

    def finished_tasks(self) -> list[tuple[Task, Any]]:
        """Tasks whose completion has arrived, each with it."""
        with suppress(Empty):
            while True:
                self._arrived.append(self._inbox.get_nowait())
        arrived, self._arrived = self._arrived, []
        return [item for item in arrived if item is not None]

    def __str__(self) -> str:
        return self.emitter.name

    def _lead(self) -> Planner | None:
        emitter = self.emitter
        target = emitter.stream.target
        for other in ledger.groups_of(target.majority, emitter.stream_name):
            if other['group'] != emitter.group and (emitter.picks or other.get('picks')):
                raise GroupConflictError(
                    f'stream {emitter.stream_name!r} has the consumer groups {emitter.group!r} and {other["group"]!r}, '
                    f'and one of them picks messages itself: it must be the only one'
                )
        what = f'{name_of(emitter.emitfn)} with {emitter.describe()}' if emitter.emitfn else emitter.describe()
        workers = getattr(self.executor, 'workers', self._workers)
        fields = {'fingerprint': what, 'keep': emitter.keep, 'picks': emitter.picks, 'workers': workers}
        taken = lease.take(target, emitter.stream_name, emitter.group, emitter.lease, self._token_here, fields)
        if isinstance(taken, Lease):
            self._standing_by = False
            return Planner(self, taken)
        if not self._standing_by:
            logger.info('%s: standing by for process %s on %s', self, taken['pid'], taken['host'])
            self._standing_by = True
        return None

    # --- what it runs on

    @contextmanager
    def _things(self) -> Iterator[None]:
        """What this consumer has for itself until it ends: an executor, and maybe an event loop for its sink."""
        try:
            with self._executor():
                yield
        finally:
            functions.close_loop()

    @contextmanager
    def _executor(self) -> Iterator[None]:
        """Open the executor, and close it if it was made here."""
        given = self.emitter.executor
        self._holds_back = given is None or executors.takes_workers(given)
        if given is None:
            with self._limit(), Pool(self._workers, self._fn, self.emitter.stream.target) as self.executor:
                yield
        else:
            with executors.opened(given, self._workers) as self.executor:
                yield

    @contextmanager
    def _limit(self) -> Iterator[None]:
        if self.emitter.timeout is None:
            yield
            return
        with TemporaryDirectory(prefix='minibatch-', ignore_cleanup_errors=True) as folder:
            self.limit = Limit(self.emitter.timeout, folder)
            yield

    def _stop_soon(self) -> None:
        """Stop the loop after what is in flight."""
        self.emitter._stop = True
        self.wake()

