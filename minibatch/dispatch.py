"""Gives open windows to the executor, in order and in tasks of a good size, and takes back what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from . import signals, store
from .crew import Crew
from .delivery import Delivery
from .errors import PortabilityError, WorkersError
from .inbox import Inbox
from .job import Job
from .lease import Lease
from .marshaller import Portable
from .progress import Claim, Progress
from .worker import Outcome, Task, Work, cause_of_loss, failure

logger = logging.getLogger(__name__)

TASK_SECONDS = 0.05
TASK_WINDOWS = 200
TASK_MESSAGES = 20_000


class Dispatch:
    """What of the open windows is in the hands of the executor.

    Attributes:
        in_flight: tasks by their identity, each with its completion.
        busy: the numbers of the windows in them.
        gone: producers of messages that a worker did not find; who reads the log takes them.
    """

    def __init__(
        self, job: Job, crew: Crew, inbox: Inbox, taken: Lease, progress: Progress, delivery: Delivery
    ) -> None:  # fmt: skip
        self._job = job
        self._target = job.stream.target
        self._crew = crew
        self._inbox = inbox
        self._lease = taken
        self._progress = progress
        self._delivery = delivery

        self.in_flight: dict[int, tuple[Task, Any]] = {}
        self.busy: set[int] = set()
        self.gone: set[str] = set()
        self._alone: Claim | None = None
        self._late: dict[int, str] = {}  # windows that took too long, of the pool that broke just now

    def abandon(self) -> None:
        """Cancel what is still in flight, where that is possible."""
        for _, completion in self.in_flight.values():
            getattr(completion, 'cancel', lambda: None)()

    def forget_finished(self) -> None:
        """Drop the tasks that are done, whatever became of their windows."""
        for task, _ in self._inbox.finished():
            self.in_flight.pop(id(task), None)

    def dispatch(self, tried: set[int] | None = None) -> bool:
        """Give open windows to the executor, in order, several small ones in a task; in flight is bounded."""
        now = time.monotonic()
        busy = self.busy | self._delivery.busy | (tried or set())
        ready = [
            claim
            for number, claim in sorted(self._progress.open.items())
            if number not in busy and claim.not_before <= now
        ]
        started = self._set_aside([claim for claim in ready if claim.aside], tried)
        ready = [claim for claim in ready if not claim.aside]
        if self._job.ordered:
            ready = self._delivery.in_order(ready, len(self.busy))
        suspects = [claim for claim in ready if claim.suspect]
        if suspects and not self.in_flight:
            self._alone = suspects[0]
            ready = suspects[:1]
        elif suspects or self._alone is not None:
            return started  # a suspect runs with nothing beside it, so that only the guilty one dies again
        free = self._crew.at_once - len(self.in_flight)
        while ready and free > 0:
            claims = self._next_task(ready, free)
            ready, free = ready[len(claims) :], free - 1
            if tried is not None:
                tried.update(claim.number for claim in claims)
            self._start(claims)
            started = True
        return started

    def _set_aside(self, claims: list[Claim], tried: set[int] | None) -> bool:
        """Settle windows that no function is called for; returns whether there were any."""
        if tried is not None:
            tried.update(claim.number for claim in claims)
        if claims:
            self._delivery.set_aside(claims)
        return bool(claims)

    def _next_task(self, ready: list[Claim], free: int) -> list[Claim]:
        count = min(self.windows_per_task, -(-len(ready) // free))  # a share for each that waits for a task
        reach: dict[str, tuple[int, int]] = {}
        messages = _extend(reach, ready[0])
        most = max(TASK_MESSAGES, 2 * messages)
        for i, claim in enumerate(ready[1:count], 1):
            messages += _extend(reach, claim)
            if messages > most:
                return ready[:i]
        return ready[:count]

    @property
    def windows_per_task(self) -> int:
        """So many that a task takes a while."""
        seconds = self._crew.seconds_per_window
        return 1 if seconds is None else max(1, min(int(TASK_SECONDS / max(seconds, 1e-6)), TASK_WINDOWS))

    def _start(self, claims: list[Claim]) -> None:
        self._lease.check()
        claims = [claim for claim in claims if self._is_prepared(claim)]
        if not claims:
            return
        works = [Work.of(claim, self._job.picks) for claim in claims]
        job, crew = self._job, self._crew
        task = Task(self._target, job.stream_name, crew.function, works, job.forwards, crew.limit)
        if job.overrides('emit'):
            task.fn = Portable(job.emit)
            self._await(task, _Done(task()))
        else:
            self._await(task, crew.executor.submit(task))

    def _is_prepared(self, claim: Claim) -> bool:
        """Let an emitter that picks messages make what its function is called with; what it raises is an attempt."""
        if not (self._job.picks and claim.readable):
            return True
        try:
            claim.argument = self._job.prepare(claim.picked)
        except BaseException as exc:
            if signals.is_signal(exc):
                raise
            work = Work.of(claim, picked=True)
            task = Task(self._target, self._job.stream_name, None, [work], False)
            self._await(task, _Done([failure(work, exc, by_function=True)]))
            return False
        return True

    def _await(self, task: Task, completion: Any) -> None:
        completion.add_done_callback(lambda done: self._inbox.wake((task, done)))
        self.in_flight[id(task)] = task, completion
        self.busy.update(work.number for work in task.works)

    # --- settle

    def collect(self) -> bool:
        """Take the outcomes of finished tasks to where they belong; returns whether there were any."""
        self._late.clear()
        # All at once: what is not looked at because of an error on the way is no longer in flight either.
        finished = [item for item in self._inbox.finished() if self.in_flight.pop(id(item[0]), None)]
        outcomes = [outcome for task, completion in finished for outcome in self._outcomes(task, completion)]
        for outcome in outcomes:
            self.busy.discard(outcome.number)
            if outcome.missing:
                self._see_that_it_is_gone(outcome)
                self.gone.update(span.producer for span in self._progress.open[outcome.number].spans)
        return self._delivery.settle(outcomes) or bool(outcomes)

    def _see_that_it_is_gone(self, outcome: Outcome) -> None:
        """What a worker did not find must not be here either, else it has read another MongoDB."""
        spans = self._progress.open[outcome.number].spans
        if outcome.host:
            stored = sum(store.count_stored(self._target.majority, self._job.stream_name, span) for span in spans)
            found = sum(span.end - span.start for span in spans) - outcome.missing
            if stored > found:
                raise WorkersError(
                    f'a worker on {outcome.host} does not find {stored - found} messages of stream '
                    f'{self._job.stream_name!r} that are stored: {self._target!r} is another MongoDB there. '
                    f'Use a URL that means the same everywhere'
                )

    def _outcomes(self, task: Task, completion: Any) -> list[Outcome]:
        alone, self._alone = self._alone is not None, None
        try:
            outcomes: list[Outcome] = completion.result()
        except PortabilityError:  # no fault of these windows: the others would fail as well
            raise
        except BaseException as exc:  # the worker died, or the executor failed
            if signals.is_signal(exc):
                raise
            return self._lost(task, exc, alone)
        seconds = sum(outcome.seconds for outcome in outcomes) / len(outcomes)
        self._crew.measured(seconds)
        return outcomes

    def _lost(self, task: Task, exc: BaseException, alone: bool) -> list[Outcome]:
        """The windows of a worker that died: one that took too long is to blame, else one that ran alone."""
        limit = self._crew.limit
        if limit is not None:
            self._late.update(limit.exceeded())
        error, outcomes = cause_of_loss(exc), []
        for work in task.works:
            if limit is not None and work.number in self._late:
                late = f'TimeoutError: the function did not return within timeout={limit.seconds:g} s'
                outcomes.append(Outcome(work.number, error=late, traceback=self._late[work.number], by_function=True))
                continue
            self._progress.open[work.number].suspect = not self._late
            outcomes.append(Outcome(work.number, error=error, by_function=alone, lost=True))
        if not alone:
            logger.warning('%s: a worker was lost with %d windows, which are run again: %s', self._job.name,
                           len(task.works), error)  # fmt: skip
        return outcomes


def _extend(reach: dict[str, tuple[int, int]], claim: Claim) -> int:
    """Let `reach`, what is read of each producer, include a window; returns how many messages that is more."""
    more = 0
    for producer, start in claim.starts.items():
        end = claim.ends[producer]
        low, high = reach.get(producer, (start, start))
        reach[producer] = min(low, start), max(high, end)
        more += max(low - start, 0) + max(end - high, 0)
    return more


class _Done:
    """The completion of what has already been done."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        fn(self)
