"""The loop of a consumer group: plan, claim, dispatch, work, sink, commit, retain; see docs/architecture.rst.

The order is what the guarantees rest on. A window is stored before it is dispatched, and a commit comes after the
function and the sink; positions follow commits, and messages are deleted below positions. Whatever dies wherever,
the next planner finds the open windows and does them again under the same ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from . import clock, ledger, store
from .connection import using
from .errors import LeaseLostError
from .lease import Adoption, Lease
from .marshaller import Portable
from .models import Buffer, Stream
from .producer import new_id
from .progress import Claim, Progress
from .retention import Follower
from .store import Span
from .wakeup import listener
from .worker import Outcome, Task, Work

if TYPE_CHECKING:
    from .consumer import Consumer

logger = logging.getLogger(__name__)

TICK = 0.1
LOOK_PAUSES = 0.002, 1.0
LOOK_PAUSE_UNTOLD = 0.05
LOOK_PAUSE_BUSY = 0.05
ADOPTION_PAUSE = 1.0
LISTEN_BUSY = 2.0
TASK_SECONDS = 0.05
TASK_WINDOWS = 200
TASK_MESSAGES = 20_000
CLAIM_WINDOWS = 1000
MAX_OPEN = 5000
RETRY_PAUSES = 0.2, 30.0
STOP_TIMEOUT = 30.0


class Planner:
    """The loop of the consumer that has the lease, from taking it to giving it up."""

    def __init__(self, consumer: Consumer, taken: Lease) -> None:
        self.consumer, self.emitter, self.lease = consumer, consumer.emitter, taken
        self.stream: Stream = self.emitter.stream
        self.target = self.stream.target
        self.name, self.group, self.epoch = self.emitter.stream_name, self.emitter.group, taken.epoch
        self.progress = Progress(0, 1, {}, None)
        self.follower = Follower(self.target, self.name, self.group, self.epoch, self.emitter.keep)
        self._adoption = Adoption(self.target, self.name, new_id)
        self._ends: dict[str, int] = {}
        self._begun: set[str] = set()  # producers whose next message is known to be stored
        self._in_flight: dict[int, Task] = {}
        self._dispatched: set[int] = set()
        self._committed = 0
        self._look_at = self._adopt_at = 0.0
        self._look_pause = LOOK_PAUSES[0]
        self._rested = 0.0
        self._listening = False
        self._unbatched: dict[str, int] = {}
        self._ended_well = self._drains = False
        self._alone: Claim | None = None

    def __enter__(self) -> Planner:
        with ExitStack() as stack:
            stack.callback(lambda: self.lease.release(clean=self._ended_well and not self._in_flight))
            if self.emitter.picks:  # it asks the models for its messages
                stack.enter_context(using(self.target, self.name))
            stack.callback(self.follower.close)
            stack.callback(self._drain)
            stack.callback(listener(self.target).remove, self)
            self._recover()
            if self.emitter.source is not None:
                stack.callback(self.stream.stop)
                self._tend_source()
            self._on_exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._ended_well = kind is None
        self._drains = kind is not None and issubclass(kind, Exception)
        self._on_exit.close()

    def _drain(self) -> None:
        """After an error, let tasks in flight come to their end: this process may soon do their windows again."""
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._drains and self._in_flight and time.monotonic() < deadline:
            self.consumer.wait(TICK)
            for task, _ in self.consumer.finished_tasks():
                self._in_flight.pop(id(task), None)

    # --- the loop

    def run(self) -> None:
        """Process windows until told to stop, then finish what is in flight."""
        while not self.consumer.should_stop():
            if not self._turn():
                self._rest()
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._in_flight and time.monotonic() < deadline:
            self.consumer.wait(TICK)
            self._collect()
        if self._in_flight:
            logger.warning('%s: %d tasks not finished in %g s; their windows stay open', self.consumer,
                           len(self._in_flight), STOP_TIMEOUT)  # fmt: skip
        self._follow(wait=True)

    def run_once(self) -> int:
        """Process what is due now, each window once; returns how many were committed."""
        now = self.lease.now()
        self._look()
        tried: set[int] = set()
        while True:
            self._plan(now)
            self._dispatch(tried)
            if not self._in_flight:
                break
            self.consumer.wait(TICK)
            self._collect()
            for number, claim in self.progress.open.items():
                if claim.suspect and claim.failures == 1 and number not in self._dispatched:
                    tried.discard(number)  # its worker died; once more, alone
        self._follow(wait=True)
        return self._committed

    def _turn(self) -> bool:
        """One round of the loop; returns whether there was anything to do."""
        collected = self._collect()
        self._tend_source()
        now = self.lease.now()
        due = self.emitter.next_due()
        if time.monotonic() >= self._look_at or (due is not None and now >= due):
            self._look()  # after `now`: what was stored before a window closes must be seen
        planned = self._plan(now)
        dispatched = self._dispatch()
        self._follow()
        if self._listening and time.monotonic() - self._rested > LISTEN_BUSY:
            listener(self.target).remove(self)
            self._listening = False
        return collected or planned or dispatched

    def _rest(self) -> None:
        """Wait for a task to finish, an append, the next window to be due, or the next look at the log."""
        if self.emitter.picks and self.emitter.overrides('sleep') and not self._in_flight:
            self.emitter.sleep()
            self._look_at = 0.0
            return
        self._rested = time.monotonic()
        if not self._listening and self.emitter.wakes_on_append:
            listener(self.target).add(self, self.name, self._appended)
            self._listening = True
            self._look_at = 0.0
        until = [self._look_at - time.monotonic(), TICK]
        due = self.emitter.next_due()
        if due is not None:
            until.append((due - self.lease.now()).total_seconds())
        until += [claim.not_before - time.monotonic() for claim in self.progress.open.values() if claim.not_before]
        self.consumer.wait(max(min(until), 0.001))

    def _tend_source(self) -> None:
        """Start the source; a slow one that was told to end may still be running, so this is asked again."""
        source = self.emitter.source
        if source is not None and self.stream.wants_source(source):
            self.stream.attach(source)

    def _appended(self) -> None:
        self._look_at, self._look_pause = 0.0, LOOK_PAUSES[0]
        self.consumer.wake()

    # --- recover

    def _recover(self) -> None:
        """Take over: fence off the predecessor, adopt its open windows, and go on from where it was."""
        db, doc = self.target.majority, self.lease.doc
        number = int(doc['number'])
        following = ledger.next_number(db, self.name, self.group, number + 1)
        if not doc['clean']:
            following = ledger.fence(db, self.name, self.group, self.epoch, following, self.lease.now())
        windows = ledger.adopt_windows(db, self.name, self.group, self.epoch, number + 1, following)
        ledger.sweep_windows(db, self.name, self.group, number, self.lease.now())
        positions = ledger.read_positions(db, self.name, self.group)
        frontier = doc.get('frontier') and clock.aware(doc['frontier'])
        self.progress = Progress(number, following, positions, frontier)
        known = {window['number'] for window in windows}
        for missing in range(number + 1, following):
            if missing not in known:
                self.progress.finished(missing)
        for window in windows:
            start, end = (window.get(key) and clock.aware(window[key]) for key in ('start', 'end'))
            if window['status'] == 'open':
                self.progress.claim(self._claim_of(window, start, end))
                continue
            self.progress.finished(window['number'], window['spans'], end)
            if self.emitter.picks:  # its messages may not have been acknowledged
                self.emitter.commit(self._claim_of(window, start, end).picked, None)
        ends = [clock.aware(window['end']) for window in windows if window.get('end')]
        if self.progress.frontier is not None:
            ends.append(self.progress.frontier)
        self.log = LogView(self, max(ends, default=None))
        self.follower.resume(positions, ledger.read_cleaned(db, self.name, self.group))

    def _claim_of(self, window: dict[str, Any], start: Any, end: Any) -> Claim:
        claim = Claim(
            window['_id'], window['number'], window['spans'], clock.aware(window['created']), start, end,
            int(window.get('attempts', 1)),
        )  # fmt: skip
        if self.emitter.picks:
            docs = store.read_documents(self.target.majority, self.name, claim.spans)
            claim.picked = [Buffer._from_son(doc) for doc in docs]
            claim.argument = self.emitter.prepare(claim.picked)
        return claim

    # --- plan and claim

    def _look(self) -> None:
        """See how far the producers have come."""
        db = self.target.majority
        if time.monotonic() >= self._adopt_at and not self.emitter.picks:
            self._adoption.run()
            self._adopt_at = time.monotonic() + ADOPTION_PAUSE
        before, self._ends = self._ends, store.log_ends(db, self.name)
        for producer, end in self._ends.items():
            if producer not in self._begun:
                self._begun.add(producer)
                planned = self.progress.planned.get(producer, 0)
                first = store.first_kept(db, self.name, producer, planned) if planned < end else None
                if first is not None:
                    self._expired(self.progress.skip_to(producer, first))
        if len(self.progress.planned) > 2 * len(self._ends) + 100:
            self.progress.forget(self._ends)
            self._begun.intersection_update(self._ends)
        self._look_at = time.monotonic() + self._pause_after_look(news=self._ends != before)

    def _pause_after_look(self, news: bool) -> float:
        """Short while messages come, growing while none do, up to what the change stream allows."""
        if not self.emitter.wakes_on_append:
            return LOOK_PAUSES[1]  # it looks when a window is due
        longest = LOOK_PAUSES[1] if listener(self.target).is_open else LOOK_PAUSE_UNTOLD
        self._look_pause = LOOK_PAUSES[0] if news else min(self._look_pause * 2, longest)
        return LOOK_PAUSE_BUSY if self._in_flight else self._look_pause

    def _plan(self, now: datetime) -> bool:
        """Claim the windows that are due, as many as are needed to keep the executor busy."""
        if not self.lease.valid:
            raise LeaseLostError
        per_task = self._windows_per_task(CLAIM_WINDOWS)
        wanted = min(self.consumer.at_once * per_task, CLAIM_WINDOWS)
        failing = sum(1 for claim in self.progress.open.values() if claim.not_before)
        limit = min(
            wanted - (len(self.progress.open) - len(self._dispatched) - failing), MAX_OPEN - len(self.progress.open)
        )
        if self.emitter.picks:
            plans = self._picked() if not self.progress.open else []
        else:
            plans = self.emitter.plan(cast(Any, self.log), now, limit) if limit > wanted // 2 else []
        if not plans:
            return False
        claims = [
            Claim(
                ledger.window_id(self.name, self.group, number), number, plan.spans, now, plan.start, plan.end,
                picked=plan.picked, query_args=plan.query_args, argument=plan.argument,
            )
            for number, plan in enumerate(plans, self.progress.next_number)
        ]  # fmt: skip
        ledger.claim_windows(self.target.majority, [self._document(claim) for claim in claims], self.epoch)
        for claim in claims:
            self.progress.claim(claim)
        return True

    def _picked(self) -> list[Any]:
        """The next window of an emitter that picks messages, which must lie in the log one by one."""
        self._unbatch()
        try:
            plan = self.emitter.pick()
        except Exception:
            if not self._unbatch():  # else a record batch came in between, which the emitter cannot read
                raise
            plan = self.emitter.pick()
        return [] if plan is None else [plan]

    def _unbatch(self) -> int:
        db, count = self.target.majority, self._adoption.run()
        for producer, end in store.log_ends(db, self.name).items():
            count += store.unbatch(db, Span(producer, self._unbatched.get(producer, 0), end), self.name)
            self._unbatched[producer] = end
        return count

    def _document(self, claim: Claim) -> dict[str, Any]:
        doc = {
            '_id': claim.id,
            'stream': self.name,
            'group': self.group,
            'number': claim.number,
            'spans': [list(span) for span in claim.spans],
            'n': claim.n,
            'status': 'open',
            'epoch': self.epoch,
            'attempts': claim.attempts,
            'created': claim.created,
            'processed': False,
        }
        if self.emitter.picks:
            doc['picked'] = True
        return {**doc, 'start': claim.start, 'end': claim.end} if claim.end else doc

    # --- dispatch

    def _dispatch(self, tried: set[int] | None = None) -> bool:
        """Give open windows to the executor, in order, several small ones in a task; in flight is bounded."""
        now = time.monotonic()
        ready = [
            claim
            for number, claim in sorted(self.progress.open.items())
            if number not in self._dispatched and claim.not_before <= now and (tried is None or number not in tried)
        ]
        suspects = [claim for claim in ready if claim.suspect]
        if suspects and not self._in_flight:
            self._alone = suspects[0]
            ready = suspects[:1]
        elif suspects or self._alone is not None:
            return False  # a suspect runs with nothing beside it, so that only the guilty one dies again
        started = False
        while ready and len(self._in_flight) < self.consumer.at_once:
            claims = self._next_task(ready)
            ready = ready[len(claims) :]
            if tried is not None:
                tried.update(claim.number for claim in claims)
            self._start(claims)
            started = True
        return started

    def _next_task(self, ready: list[Claim]) -> list[Claim]:
        count = self._windows_per_task(len(ready))
        claims, messages = [ready[0]], ready[0].n
        for claim in ready[1:count]:
            messages += claim.n
            if messages > TASK_MESSAGES:
                break
            claims.append(claim)
        return claims

    def _windows_per_task(self, ready: int) -> int:
        """So many that a task takes a while, not so many that a worker has nothing to do."""
        seconds = self.consumer._seconds_per_window
        if seconds is None:
            return 1
        fair = -(-ready // self.consumer.at_once)
        return max(1, min(int(TASK_SECONDS / max(seconds, 1e-6)), fair, TASK_WINDOWS))

    def _start(self, claims: list[Claim]) -> None:
        if not self.lease.valid:
            raise LeaseLostError
        works = [
            Work(
                claim.id, claim.number, claim.created, claim.start, claim.end, claim.attempts, claim.spans,
                claim.argument, self.emitter.picks,
            )
            for claim in claims
        ]  # fmt: skip
        returns = self.emitter.forwardfn is not None or self.emitter.overrides('forward')
        task = Task(self.target, self.name, self.consumer._fn, works, returns)
        if self.emitter.overrides('emit'):
            task.fn = Portable(self.emitter.emit)
            self.consumer.wake((task, _Done(task())))
        else:
            completion = self.consumer.executor.submit(task)
            completion.add_done_callback(lambda done: self.consumer.wake((task, done)))
        self._in_flight[id(task)] = task
        self._dispatched.update(claim.number for claim in claims)

    # --- sink and commit

    def _collect(self) -> bool:
        """Take the outcomes of finished tasks through sink and commit."""
        committed: list[Claim] = []
        failed: dict[int, Outcome] = {}
        # All at once: what is not looked at because of an error on the way is no longer in flight either.
        finished = [item for item in self.consumer.finished_tasks() if self._in_flight.pop(id(item[0]), None)]
        for task, completion in finished:
            outcomes, self._alone = self._outcomes(task, completion), None
            for outcome in outcomes:
                self._dispatched.discard(outcome.number)
                claim = self.progress.open[outcome.number]
                if not outcome.error and (outcome.skipped or self._forward(claim, outcome)):
                    committed.append(claim)
                    if outcome.missing:
                        self._expired(outcome.missing)
                        self._begun.difference_update(span.producer for span in claim.spans)
                    continue
                failed[outcome.number] = outcome
        if committed:
            self._commit(committed)
        if failed:
            self._retry(failed)
        return bool(committed or failed)

    def _outcomes(self, task: Task, completion: Any) -> list[Outcome]:
        try:
            outcomes: list[Outcome] = completion.result()
        except Exception as exc:  # the worker died, or the executor failed; no function is to blame
            for work in task.works:
                self.progress.open[work.number].suspect = True
            error = f'{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ""}'
            return [Outcome(work.number, error=error, by_function=self._alone is not None) for work in task.works]
        seconds = sum(outcome.seconds for outcome in outcomes) / len(outcomes)
        known = self.consumer._seconds_per_window
        self.consumer._seconds_per_window = seconds if known is None else 0.7 * known + 0.3 * seconds
        return outcomes

    def _forward(self, claim: Claim, outcome: Outcome) -> bool:
        """Give a result to the sink; a sink that fails makes the window a failed one."""
        if not self.lease.valid:
            raise LeaseLostError
        try:
            if self.emitter.forwardfn is not None or self.emitter.overrides('forward'):
                self.emitter.forward(outcome.value)
            return True
        except Exception as exc:
            logger.debug('sink failed', exc_info=True)
            outcome.error, outcome.by_function = f'sink: {type(exc).__name__}: {exc}', True
            return False

    def _commit(self, claims: list[Claim]) -> None:
        ledger.commit_windows(self.target.majority, [claim.id for claim in claims], self.epoch)
        for claim in claims:
            if self.emitter.picks:
                self.emitter.commit(claim.picked, claim.argument)
                self.emitter.timestamp(claim.query_args)
            self.progress.finished(claim.number)
            self.follower.count(windows=1, messages=claim.n)
        self._committed += len(claims)

    def _retry(self, failed: dict[int, Outcome]) -> None:
        """Windows that failed stay open, and are tried again after a pause that grows."""
        errors = {}
        for number, outcome in failed.items():
            claim = self.progress.open[number]
            shortest, longest = RETRY_PAUSES
            pause = min(shortest * 2 ** min(claim.failures, 20), longest)
            if claim.suspect and not claim.failures:
                pause = 0.0  # to be run alone, at once
            claim.failures += 1
            claim.not_before = time.monotonic() + pause
            trace = f'\n{outcome.traceback}' if outcome.traceback else ''
            logger.error(
                'window %s failed (attempt %d), next attempt in %.1f s: %s%s',
                claim.id, claim.attempts, pause, outcome.error, trace,
            )  # fmt: skip
            if outcome.by_function:
                claim.attempts += 1
                errors[claim.id] = outcome.error
            if self.emitter.picks:
                self.emitter.undo(claim.picked, claim.argument)
        if errors:
            ledger.retry_windows(self.target.majority, errors, self.epoch)

    def _expired(self, count: int) -> None:
        if count:
            logger.warning('%s: %d messages had expired before they were processed', self.consumer, count)
            self.follower.count(expired_unprocessed=count)

    # --- retain

    def _follow(self, wait: bool = False) -> None:
        """Let positions and deletions follow the commits, in the background."""
        if self.emitter.picks:
            self.follower.follow({}, self.progress.number, self.progress.frontier, wait)
            return
        if wait or self.follower.is_due():
            moved = self.progress.moved()
            self.progress.written(moved)
            self.follower.follow(moved, self.progress.number, self.progress.frontier, wait)


class LogView:
    """What the emitter sees of the log; see `minibatch.window.Log`."""

    def __init__(self, planner: Planner, frontier: datetime | None) -> None:
        self._planner = planner
        self.frontier = frontier
        self.memory: dict[str, Any] = {}

    def waiting(self) -> list[Span]:
        planned = self._planner.progress.planned
        spans = (Span(producer, planned.get(producer, 0), end) for producer, end in self._planner._ends.items())
        return [span for span in spans if span.start < span.end]

    def times(self, span: Span) -> Iterator[tuple[int, int, list[datetime]]]:
        return store.read_times(self._planner.target.majority, self._planner.name, span)


class _Done:
    """The completion of what has already been done."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value
