"""What becomes of a window after its function: sink and commit, or retries and a dead letter."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, cast

from bson import Binary
from pymongo import MongoClient
from pymongo.client_session import ClientSession
from pymongo.errors import PyMongoError

from . import connection, dead, functions, ledger, metrics, producer, signals, store
from .abc import BulkSink, ExactlyOnceSink, WindowCommit
from .beside import Beside
from .connection import Target
from .errors import ArgumentError, LeaseLostError, ServerError, WindowFailedError
from .job import Job
from .lease import Lease
from .progress import Claim, Progress
from .retention import Follower
from .text import plain, plain_lines
from .worker import Outcome, Work, load

logger = logging.getLogger(__name__)

RETRY_PAUSES = 0.25, 60.0
RETRY_GROWTH = 4.0
MAX_HELD = 500
SINK_PATIENCE = 3600.0
MAX_TRACEBACK = 20_000
MAX_ERROR = 2_000


class Delivery:
    """Settles the outcomes of windows: sink, then commit; or the attempt counted, and at last a dead letter."""

    def __init__(
        self, job: Job, target: Target, taken: Lease, progress: Progress, follower: Follower,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._job, self._target, self._lease = job, target, taken
        self._progress, self._follower = progress, follower
        self._commits = Beside('minibatch-commit', target, self._commit, wake)
        self._late = Beside('minibatch-late', target, self._pass_all_on, wake)
        sink = None if job.overrides('forward') else job.sink
        self._once = sink if isinstance(sink, ExactlyOnceSink) else None
        self._bulk = sink if isinstance(sink, BulkSink) else None
        self.held: dict[int, Outcome] = {}  # results that wait for the windows before them
        self._sessions: set[Binary] = set()
        self.committed = 0
        self.finished = 0

    @property
    def busy(self) -> set[int]:
        """The numbers of the windows whose results wait for others before them, or for their commit."""
        return self.held.keys() | self._commits.numbers | self._late.numbers

    @property
    def under_way(self) -> bool:
        """Whether windows are being committed, or late messages passed on."""
        return bool(self._commits or self._late)

    def close(self) -> None:
        """Commit what waits for it; what fails is done again by the next consumer."""
        self._late.close(wait=False)
        self._commits.close(wait=True)

    def in_order(self, ready: list[Claim], dispatched: int) -> list[Claim]:
        """Those that may be dispatched: so few results wait for the window before them, and that one always may."""
        first = min((number for number, claim in self._progress.open.items() if not claim.replay), default=None)
        room = MAX_HELD - len(self.held) - dispatched
        return [claim for i, claim in enumerate(ready) if i < room or claim.replay or claim.number == first]

    def settle(self, outcomes: list[Outcome]) -> bool:
        """Take outcomes through sink and commit, or to the next attempt; returns whether there were any.

        Raises:
            LeaseLostError: if another consumer has taken over.
            WindowFailedError: if a window has failed for good and the consumer is to stop then.
        """
        done, _ = self._commits.take_done() or ([], None)
        self._committed(done)
        passed_on = self._settle_late()
        committed: list[Claim] = []
        failed: dict[int, Outcome] = {}
        run: list[tuple[Claim, Outcome]] = []
        for outcome in outcomes:
            claim = self._progress.open[outcome.number]
            if outcome.error:
                failed[outcome.number] = outcome
            elif self._job.ordered and not claim.replay:
                self.held[outcome.number] = outcome
            else:
                run.append((claim, outcome))
        self._deliver_all(run, committed, failed)
        in_order = self._next_in_order()
        for claim, outcome in in_order[self._deliver_all(in_order, committed, failed) :]:
            if claim.number not in failed:
                self.held[claim.number] = outcome  # behind one that failed
        self._commits.add(committed)
        if failed:
            self._retry(failed)
        return bool(done or committed or failed) or passed_on

    def _next_in_order(self) -> list[tuple[Claim, Outcome]]:
        """Take the results that wait for no window before them off those held."""
        run: list[tuple[Claim, Outcome]] = []
        delivered = self._commits.numbers if self.held else set()
        for number, claim in sorted(self._progress.open.items()) if self.held else ():
            if claim.replay or number in delivered:
                continue
            if number not in self.held:
                break
            run.append((claim, self.held.pop(number)))
        return run

    def _deliver_all(
        self, run: list[tuple[Claim, Outcome]], committed: list[Claim], failed: dict[int, Outcome]
    ) -> int:
        """Give results to the sink; returns how many it took. In order, one that fails is the last."""
        taken = self._deliver_many(run, committed)
        for claim, outcome in run[taken:]:
            if self._deliver(claim, outcome, committed, failed):
                taken += 1
            elif self._job.ordered and not claim.replay:
                break
        return taken

    def _deliver_many(self, run: list[tuple[Claim, Outcome]], committed: list[Claim]) -> int:
        """Give results to the sink many at a time, if it takes them so; returns how many it took."""
        taken = 0
        while self._bulk is not None and len(run) - taken > 1 and not any(outcome.skipped for _, outcome in run):
            self._lease.check()
            windows = [self._commit_of(claim) for claim, _ in run[taken:]]
            try:
                with producer.Flushed():
                    count = functions.call(self._bulk.put_many, [outcome.value for _, outcome in run[taken:]], windows)
                if not (isinstance(count, int) and 0 <= count <= len(windows)):
                    raise TypeError(f'put_many must return how many results it took, not {count!r}')
            except LeaseLostError:
                raise
            except BaseException as exc:
                if signals.is_signal(exc):
                    raise
                logger.debug('sink failed', exc_info=True)
                break
            for (claim, outcome), window in zip(run[taken : taken + count], windows, strict=False):
                claim.committed = window.done
                self._delivered(claim, outcome, committed)
            taken += count
            if not count:
                break
        return taken

    def _deliver(
        self, claim: Claim, outcome: Outcome, committed: list[Claim], failed: dict[int, Outcome]
    ) -> bool:
        """Give a result to the sink; a sink that fails makes the window a failed one."""
        self._lease.check()
        try:
            if not outcome.skipped:
                self._forward(claim, outcome)
        except LeaseLostError:
            raise
        except BaseException as exc:
            if signals.is_signal(exc):
                raise
            logger.debug('sink failed', exc_info=True)
            connection.heal(self._target.client, exc)  # the sink may use the same one
            outcome.error = f'sink: {store.in_words(exc)}'
            outcome.by_function = not _is_matter_of_time(exc, claim)
            failed[outcome.number] = outcome
            return False
        self._delivered(claim, outcome, committed)
        return True

    def _delivered(self, claim: Claim, outcome: Outcome, committed: list[Claim]) -> None:
        if outcome.missing:
            self.expired(outcome.missing)
        claim.in_function, claim.newest, claim.missing = outcome.in_function, outcome.newest, outcome.missing
        committed.append(claim)

    def _forward(self, claim: Claim, outcome: Outcome) -> None:
        if self._once is not None:
            window = self._commit_of(claim)
            functions.call(self._once.put_once, outcome.value, window)
            claim.committed = window.done
        elif self._job.forwards:
            with producer.Flushed():
                functions.call(self._job.forward, outcome.value, keep=False)

    def _commit_of(self, claim: Claim) -> _Commit:
        return _Commit(self._target, claim.id, self._lease.epoch, self._note_session)

    def _note_session(self, session: Binary) -> None:
        if session not in self._sessions:
            db, job = self._target.majority, self._job
            ledger.note_session(db, job.stream_name, job.group, self._lease.epoch, session)
            self._sessions.add(session)

    def expired(self, count: int) -> None:
        """Count messages that were deleted before they were processed, and say so."""
        logger.warning('%s: %d messages had expired before they were processed', self._job.name, count)
        self._follower.count(expired_unprocessed=count)

    # --- what no function is called for

    def set_aside(self, claims: list[Claim]) -> None:
        """Make a dead letter of each bad message, and let late ones go where they belong."""
        bad = [claim for claim in claims if claim.bad]
        for claim in bad:
            logger.error('a message belongs to no window, %s: dead letter %s', plain(claim.bad), plain(claim.id))
        self._late.add([claim for claim in claims if claim.late])
        self._stop_or_bury({claim.number: Outcome(claim.number, error=claim.bad) for claim in bad})

    def _settle_late(self) -> bool:
        """Commit the late messages that have been passed on; returns whether there were any."""
        if (done := self._late.take_done()) is None:
            return False
        claims, failed = done
        self._commits.add([claim for claim in claims if claim.number not in failed])
        if failed:
            self._retry(failed)
        return True

    def _pass_all_on(self, claims: list[Claim]) -> dict[int, Outcome]:
        """Append late messages to the stream for them; returns those for which that failed."""
        failed: dict[int, Outcome] = {}
        for claim in claims:
            try:
                self._pass_on(claim)
            except (LeaseLostError, PyMongoError):
                raise
            except Exception as exc:
                error, counts = f'late: {store.in_words(exc)}', not _is_matter_of_time(exc, claim)
                failed[claim.number] = Outcome(claim.number, error=error, by_function=counts)
        return failed

    def _pass_on(self, claim: Claim) -> None:
        """Append late messages to the stream for them."""
        job, late = self._job, self._job.late
        if late is None:
            return
        self._lease.check()
        window = load(self._target, job.stream_name, Work.of(claim))
        late.append_aside(
            (message.data, {'stream': job.stream_name, 'producer': message.producer, 'offset': message.offset,
                            'time': job.time_of(message)})
            for message in window.messages
        )  # fmt: skip

    # --- commit

    def _commit(self, claims: list[Claim]) -> None:
        ids = [claim.id for claim in claims if not claim.committed]
        if ids:
            ledger.commit_windows(self._target.majority, ids, self._lease.epoch)

    def _committed(self, claims: list[Claim]) -> None:
        now = self._lease.now()
        for claim in claims:
            if claim.picked and not claim.replay:
                self._job.commit(claim.picked, claim.argument)
                self._job.timestamp(claim.query_args)
            self._progress.finished(claim.number)
            self._follower.count(**{'late': claim.n} if claim.aside else self._counts(claim, now))
        replayed = [claim.id for claim in claims if claim.replay]
        if replayed:
            dead.drop(self._target.majority, replayed, windows=not self._job.keep)
        self.committed += sum(not claim.aside for claim in claims)
        self.finished += len(claims)

    def _counts(self, claim: Claim, now: datetime) -> dict[str, float]:
        """What a processed window adds to the counters of its group."""
        counts: dict[str, float] = {'windows': 1, 'messages': claim.n - claim.missing}
        if claim.newest is None:  # nothing was left of it, so no function was called
            return counts
        latency = max((now - claim.newest).total_seconds(), 0.0)
        return {**counts, **metrics.observed(function=claim.in_function, sizes=claim.n, latency=latency)}

    # --- fail

    def _retry(self, failed: dict[int, Outcome]) -> None:
        """Count the attempts of windows that failed, and let them wait; the last one makes a dead letter."""
        errors: dict[str, str] = {}
        final: dict[int, Outcome] = {}
        for number, outcome in failed.items():
            claim = self._progress.open[number]
            last = outcome.by_function and claim.attempts - claim.tried >= self._job.max_attempts
            pause = 0.0 if last else _pause(claim)
            what = 'no attempt is left' if last else f'next attempt in {pause:.1f} s'
            why = plain_lines(f'{outcome.error}\n{outcome.traceback}'.rstrip())
            level = logging.DEBUG if outcome.lost and not outcome.by_function else logging.ERROR
            logger.log(level, 'window %s failed (attempt %d), %s: %s', plain(claim.id), claim.attempts, what, why)
            claim.failures += 1
            claim.not_before = time.monotonic() + pause
            if last:
                final[number] = outcome
            elif outcome.by_function:
                claim.attempts += 1
                errors[claim.id] = outcome.error[:MAX_ERROR]
            if claim.picked and not claim.replay and not last:
                self._job.undo(claim.picked, claim.argument)
        self._follower.count(retried=len(failed) - len(final))
        if errors:
            ledger.retry_windows(self._target.majority, errors, self._lease.epoch)
        if final:
            self._stop_or_bury(final)

    def _stop_or_bury(self, final: dict[int, Outcome]) -> None:
        """Make dead letters of windows; or, if that is what the user wants, stop, unless they were dead letters."""
        claims = [self._progress.open[number] for number in final]
        stopping = [claim for claim in claims if self._job.on_error == 'stop' and not claim.replay]
        self._bury([claim for claim in claims if claim.replay or not stopping], final)
        if stopping:
            raise WindowFailedError(
                f'window {stopping[0].id} has failed {stopping[0].attempts} times, and on_error is stop; '
                f'the last error was {final[stopping[0].number].error}'
            )

    def _bury(self, claims: list[Claim], final: dict[int, Outcome]) -> None:
        if not claims:
            return
        db, now, fields = self._target.majority, self._lease.now(), {}
        for claim in claims:
            if not claim.replay:
                dead.keep(db, self._job.stream_name, self._job.group, claim.id, claim.spans, now)
            fields[claim.id] = _epitaph(claim, final[claim.number], now)
        processed = dead.fail(db, fields, self._lease.epoch)
        for claim in claims:
            if claim.id in processed:
                dead.drop(db, [claim.id], windows=False)
                self._committed([claim])
                continue
            if claim.picked and not claim.replay:
                self._job.commit(claim.picked, claim.argument)
            self._progress.finished(claim.number)
            self._follower.count(failed=1)
            self.finished += 1


def _epitaph(claim: Claim, outcome: Outcome, now: datetime) -> dict[str, Any]:
    error, trace = outcome.error[:MAX_ERROR], outcome.traceback[-MAX_TRACEBACK:]
    return {'error': error, 'traceback': trace, 'failed': now, 'attempts': claim.attempts}


def _is_matter_of_time(exc: BaseException, claim: Claim) -> bool:
    """Whether a sink failed because it is full, or not reachable. For an hour; then it may be the window after all."""
    claim.failing_since = claim.failing_since or time.monotonic()
    if time.monotonic() - claim.failing_since > SINK_PATIENCE:
        return False
    passing = isinstance(exc, PyMongoError) and connection.is_passing(exc)
    return passing or isinstance(exc, (ServerError, ConnectionError, TimeoutError))


def _pause(claim: Claim) -> float:
    """Seconds until the next attempt: growing, and not the same for all that failed at the same moment."""
    if claim.suspect and not claim.failures:
        return 0.0  # to be run alone, at once
    shortest, longest = RETRY_PAUSES
    pause = min(shortest * RETRY_GROWTH ** min(claim.failures, 20), longest)
    return pause * random.uniform(0.5, 1.0)  # noqa: S311  (protects nothing)


class _Commit:
    """See `minibatch.abc.WindowCommit`."""

    def __init__(self, target: Target, id: str, epoch: int, note_session: Callable[[Binary], None]) -> None:
        self._target, self.id, self._epoch, self._note_session = target, id, epoch, note_session
        self.done = False

    def joins(self, client: MongoClient[Any]) -> bool:
        return connection.same_replica_set(self._target.client, client)

    def commit(self, session: ClientSession) -> bool:
        self._note_session(session.session_id['id'])
        db = session.client[self._target.dbname]
        committed = ledger.commit_with(db, self.id, self._epoch, session)
        if committed is None:
            if ledger.is_unfinished(self._target.majority, self.id, self._epoch):
                raise ArgumentError('the sink is on another MongoDB than the stream, so they cannot commit together')
            raise LeaseLostError
        self.done = True
        return committed

    def commit_all(self, windows: Sequence[WindowCommit], session: ClientSession) -> bool:
        self._note_session(session.session_id['id'])
        db = session.client[self._target.dbname]
        committed = ledger.commit_all_with(db, [window.id for window in windows], self._epoch, session)
        for window in windows:
            cast(_Commit, window).done = committed
        return committed
