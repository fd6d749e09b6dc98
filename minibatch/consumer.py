"""Who consumes: one of any number of processes leads, the others stand by."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from pymongo.errors import PyMongoError

from . import connection, functions, lease, ledger, signals
from .away import AwayWatch
from .connection import Target, is_passing, reason_of
from .crew import Crew
from .errors import GroupConflictError, LeaseLostError
from .inbox import Inbox
from .job import Job
from .lease import Lease
from .marshaller import Portable, name_of
from .planner import Planner
from .worker import Processed

logger = logging.getLogger(__name__)

STAND_BY_PAUSE = 0.5
CONNECTION_PAUSE = 1.0
END_TIMEOUT = 60.0


class Consumer:
    """Runs the windows of a job, as one of any number of consumers of its group."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.inbox = Inbox()
        self.crew = Crew(job, _function_of(job))
        self._token = lease.new_token()
        self._standing_by = False

    @property
    def _token_here(self) -> str:
        return f'{self._token}-{os.getpid()}'  # a forked child is another consumer

    def run(self, until_done: bool = False) -> None:
        """Process windows until told to stop, or until all is done."""
        handled = signals.handled(self.job.stop_soon, signals.end_at_once, within=END_TIMEOUT)
        with handled, self._things(), self._patience() as where:
            while not self.should_stop():
                if where.is_away:
                    self.inbox.wait(CONNECTION_PAUSE)
                    continue
                try:
                    planner = self._lead()
                    if planner is None:
                        self.inbox.wait(STAND_BY_PAUSE)
                    else:
                        with planner:
                            planner.run(until_done)
                        self.inbox.finished()
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
                    self.inbox.wait(CONNECTION_PAUSE)

    @contextmanager
    def _patience(self) -> Iterator[Target]:
        """Meanwhile it is said when MongoDB, which this gives, is away; it is waited for until this is to stop."""
        where = self.job.stream.target

        def is_told_to_stop() -> bool:
            return self.job.is_told_to_stop

        with AwayWatch(str(self), where, is_told_to_stop), connection.until(is_told_to_stop):
            yield where

    def should_stop(self) -> bool:
        """Whether a signal, `stop`, or the emitter says so; users override the emitter's method."""
        return self.job.is_told_to_stop or self.job.should_stop()

    def run_once(self) -> int:
        """Process what is due; returns how many windows were committed."""
        with self._executor():
            planner = self._lead()
            if planner is None:
                return 0
            with planner:
                return planner.run_once()

    def __str__(self) -> str:
        return self.job.name

    def _lead(self) -> Planner | None:
        job = self.job
        target = job.stream.target
        for other in ledger.groups_of(target.majority, job.stream_name):
            if other['group'] != job.group and (job.picks or other.get('picks')):
                raise GroupConflictError(
                    f'stream {job.stream_name!r} has the consumer groups {job.group!r} and {other["group"]!r}, '
                    f'and one of them picks messages itself: it must be the only one'
                )
        what = f'{name_of(job.emitfn)} with {job.describe()}' if job.emitfn else job.describe()
        fields = {'fingerprint': what, 'keep': job.keep, 'picks': job.picks, 'workers': self.crew.workers}
        taken = lease.take(target, job.stream_name, job.group, job.lease, self._token_here, fields)
        if isinstance(taken, Lease):
            self._standing_by = False
            return Planner(self.job, self.crew, self.inbox, taken, self.should_stop)
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

    def _executor(self) -> AbstractContextManager[None]:
        return self.crew.opened(self.job.stream.target)


def _function_of(job: Job) -> Portable | None:
    """The function as it travels, with what `processfn` makes for it, unless that is made here."""
    fn = job.emitfn
    if job.processfn is not None and not job.picks:
        fn = Processed(job.processfn, fn)
    return Portable(fn) if fn is not None else None
