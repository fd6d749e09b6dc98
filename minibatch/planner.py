"""The loop of a consumer group: plan, claim, dispatch, settle, retain; see docs/architecture.rst.

The order is what the guarantees rest on. A window is stored before it is dispatched, and a commit comes after the
function and the sink; positions follow commits, and messages are deleted below positions. Whatever dies wherever,
the next planner finds the open windows and does them again under the same ids.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from typing import Any

from bson.errors import InvalidBSON

from . import clock, dead, ledger, signals, store
from .connection import using
from .crew import Crew
from .delivery import Delivery
from .dispatch import Dispatch
from .errors import WorkersError
from .inbox import TICK, Inbox
from .job import Job
from .lease import Adoption, Lease
from .models import Buffer, Stream
from .producer import new_id
from .progress import Claim, Progress, WindowPlan
from .reading import LogView
from .retention import Follower
from .stall import StallWatch
from .store import Span
from .wakeup import listener

logger = logging.getLogger(__name__)

LOOK_PAUSES = 0.002, 1.0
REPLAY_PAUSE = 1.0
LOOK_PAUSE_UNTOLD = 0.05
MANY = 100  # producers; what goes through all of them, in vain, is done again only after so many times as long:
PAUSES_PER_LOOK = 100.0, 20.0  # told of appends, and untold
PAUSES_PER_PLAN = 100.0
LOOK_PAUSE_BUSY = 0.01
ADOPTION_PAUSE = 1.0
LISTEN_RATE = 1000.0
CLAIM_WINDOWS = 1000
MAX_OPEN = 5000
STOP_TIMEOUT = 30.0
FOLLOW_TIMEOUT = 5.0
SOURCE_TIMEOUT = 10.0
AWAY_TIMEOUT = 1.0
WORKERS_TIMEOUT = 60.0
WORKERS_PATIENCE = 5.0
SOURCE_ERROR_KEPT = 1000


class _Stopped(Exception):
    """Told to stop while it was looking or planning: what it knows is incomplete, and nothing of it was claimed."""


class Planner:
    """The loop of the consumer that has the lease, from taking it to giving it up."""

    def __init__(
        self, job: Job, crew: Crew, inbox: Inbox, taken: Lease, should_stop: Callable[[], bool]
    ) -> None:  # fmt: skip
        self.job, self.lease = job, taken
        self._crew, self._inbox, self._should_stop = crew, inbox, should_stop
        self.stream: Stream = job.stream
        self.target = self.stream.target
        self.name, self.group, self.epoch = self.job.stream_name, self.job.group, taken.epoch
        self.progress = Progress(0, 1, {})
        self.follower = Follower(self.target, self.name, self.group, taken, self.job.keep)
        self._adoption = Adoption(self.target, self.name, new_id)
        self._news: deque[dict[str, Any]] = deque()
        self._begun: set[str] = set()  # producers whose next message is known to be stored
        self._plan_at = 0.0  # when to plan again, unless there is something new
        self._new = self._unfollowed = True  # for the next plan; and for what follows the commits
        self._look_at = self._adopt_at = self._replay_at = 0.0
        self._look_pause = LOOK_PAUSES[0]
        self._listening = False
        self._has_room = True  # for more claims
        self._at_end = self._finishing = False  # of an input that ends
        self.done = False
        self._heard, self._heard_since = 0, 0.0
        self._unbatched: dict[str, int] = {}
        self._ended_well = self._drains = False
        self._may_stop = False  # in the middle of planning
        self._workers_missed: float | None = None
        self._source_error = ''  # as the group's document has it

    def __enter__(self) -> Planner:
        with ExitStack() as stack:
            stack.callback(lambda: self.lease.release(clean=self._ended_well and not self._dispatch.in_flight))
            if self.job.picks:  # it asks the models for its messages
                stack.enter_context(using(self.target, self.name))
            stack.callback(self.follower.close)
            self._recover()
            stack.callback(self._dispatch.abandon)
            stack.callback(self._drain)
            stack.callback(listener(self.target).remove, self)
            stack.callback(self.delivery.close)
            stack.enter_context(self._stall_watch())
            if self.job.source is not None:
                stack.callback(lambda: self.stream.stop(AWAY_TIMEOUT if self.target.is_away else SOURCE_TIMEOUT))
                self._tend_source()
            self._on_exit = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *trace: object) -> None:
        self._ended_well = error is None
        self._drains = error is not None and not signals.is_signal(error)
        self._on_exit.close()

    def _stall_watch(self) -> StallWatch:
        def report(seconds: float | None) -> None:
            since = None if seconds is None else self.lease.now() - timedelta(seconds=seconds)
            ledger.note(self.target.majority, self.name, self.group, self.epoch, stalled=since)

        def look() -> tuple[int, int]:
            return 0 if self.target.is_away else len(self.progress.open), self.delivery.finished

        return StallWatch(self.job.name, self.target, self.job.stall_after, look, report)

    def _drain(self) -> None:
        """After an error, let tasks in flight come to their end: this process may soon do their windows again."""
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._drains and self._dispatch.in_flight and time.monotonic() < deadline:
            if self.job.is_told_to_stop:
                return
            self._inbox.wait(TICK)
            self._dispatch.forget_finished()

    # --- the loop

    def run(self, until_done: bool = False) -> None:
        """Process windows until told to stop, then finish what is in flight; or until all is `done`."""
        self._may_stop = True
        with suppress(_Stopped):
            while not (self.done or self._should_stop()):
                if self.target.is_away:
                    self._inbox.wait(TICK)
                    continue
                if until_done and not self._at_end:
                    self._see_the_end()
                if not self._turn() and not self._finish():
                    self._rest()
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._is_under_way and time.monotonic() < deadline and not self.target.is_away:
            self._inbox.wait(TICK)
            self._collect()
        if self.target.is_away:
            return
        if self._dispatch.in_flight:
            logger.warning('%s: %d tasks not finished in %g s; their windows stay open', self.job.name,
                           len(self._dispatch.in_flight), STOP_TIMEOUT)  # fmt: skip
        self._follow(wait=FOLLOW_TIMEOUT)

    def check_stop(self) -> None:
        """Called in whatever takes long between two turns of the loop: raises if it is told to stop."""
        if self._may_stop and self._should_stop():
            raise _Stopped

    @property
    def _is_under_way(self) -> bool:
        """Whether windows are with the executor, or being delivered."""
        return bool(self._dispatch.in_flight) or self.delivery.under_way

    def _see_the_end(self) -> None:
        """Look for the last time, if nobody is known who will still append."""
        source, feeders = self.job.source, self.job.fed_by
        if all(feeder.is_set() for feeder in feeders) and (source is None or self.stream.has_ended(source)):
            self._look(self.lease.now())
            self._at_end = True

    def _finish(self) -> bool:
        """When all is done up to the end, emit what is open, and when that is done, too, be done."""
        if not self._at_end or self.progress.open or self._is_under_way:
            return False
        self.done, self._finishing = self._finishing, True
        return True

    def run_once(self) -> int:
        """Process what is due now, each window once; returns how many were committed."""
        now = self.lease.now()
        self._look(now)
        tried: set[int] = set()
        while True:
            self._wait_for_workers()
            self._take_replays()
            planned = self._plan(now)
            self._dispatch.dispatch(tried)
            under_way = self._is_under_way
            if not (planned or under_way or self._collect()):  # else results that were held are delivered now
                break
            self._inbox.wait(TICK if under_way else 0)
            self._collect()
            for number, claim in self.progress.open.items():
                if claim.suspect and claim.failures == 1 and number not in self._dispatch.busy:
                    tried.discard(number)  # its worker died; once more, alone
        self._follow(wait=None)
        return self.delivery.committed

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + WORKERS_TIMEOUT
        while not (self._crew.at_once or self._dispatch.in_flight):
            if time.monotonic() > deadline:
                executor = self._crew.executor
                raise WorkersError(f'{executor!r} has had no workers that fit for {WORKERS_TIMEOUT:g} s; start some')
            self._inbox.wait(TICK)

    def _miss_workers(self) -> None:
        """Say once that there are no workers, when there were none for a while."""
        if self._crew.at_once:
            self._workers_missed = None
        elif self._workers_missed is None:
            self._workers_missed = time.monotonic() + WORKERS_PATIENCE
        elif time.monotonic() > self._workers_missed:
            logger.warning('%s: waiting for workers, %r has none that fit', self.job.name, self._crew.executor)
            self._workers_missed = float('inf')

    def _turn(self) -> bool:
        """One round of the loop; returns whether there was anything to do."""
        self.lease.check()
        collected = self._collect()
        self._miss_workers()
        self._tend_source()
        self._hear()
        now = self.log.looked if self._at_end else self.lease.now()
        due = self._next_due()
        is_due = due is not None and now >= due
        if not self._at_end and (time.monotonic() >= self._look_at or is_due):
            self._look(now)  # after `now`: what was stored before a window closes must be seen
        self._take_replays()
        self._new = self._new or collected or is_due or self._at_end
        self._unfollowed = self._unfollowed or self._new
        planned = self._plan_anew(now)
        dispatched = self._dispatch.dispatch()
        self._follow()
        return collected or planned or dispatched

    def _rest(self) -> None:
        """Wait for a task to finish, an append, the next window to be due, or the next look at the log."""
        if self.job.picks and self.job.overrides('sleep') and not self._is_under_way:
            self.job.sleep()
            self._look_at = 0.0
            return
        if not self._listening and self.job.wakes_on_append:
            listener(self.target).add(self, self.name, self._appended)
            self._listening = True
            self._heard, self._heard_since = 0, time.monotonic()
            self._look_at = 0.0
        until = [self._look_at - time.monotonic(), TICK]
        due = self._next_due()
        if due is not None:
            until.append((due - self.lease.now()).total_seconds())
        now = time.monotonic()
        until += [claim.not_before - now for claim in self.progress.open.values() if claim.not_before > now]
        self._inbox.wait(max(min(until), 0.001))

    def _next_due(self) -> datetime | None:
        return self.job.next_due() if self._has_room and not self._at_end else None

    def _tend_source(self) -> None:
        """Start the source, and note how it is; one that was told to end may still run, so this is asked again."""
        source = self.job.source
        if source is None:
            return
        if self.stream.wants_source(source):
            self.stream.attach(source)
        if (error := self.stream.source_failure[:SOURCE_ERROR_KEPT]) != self._source_error:
            ledger.note(self.target.majority, self.name, self.group, self.epoch, source_error=error or None)
            self._source_error = error

    def _appended(self, record: dict[str, Any]) -> None:
        self._news.append(record)
        self._inbox.wake()

    def _hear(self) -> None:
        """Take note of what was appended; where that is not what follows on what is known, look at the log."""
        seconds = time.monotonic() - self._heard_since
        if self._listening and seconds > 1:
            if self._heard > LISTEN_RATE * seconds:  # to look is cheaper, and there will be something to do
                listener(self.target).remove(self)
                self._listening = False
                self._look_at = 0.0
            self._heard, self._heard_since = 0, time.monotonic()
        while self._news and not self._at_end:
            record = self._news.popleft()
            self._heard += 1
            producer, offset = record.get('producer', ''), record.get('offset')
            known = self.log.ends.get(producer)
            if known is None or offset is None or offset > known or self.job.picks:
                self._look_at, self._look_pause = 0.0, LOOK_PAUSES[0]
            else:
                self.log.ends[producer] = max(known, offset + record.get('n', 1))
                self._new = True

    # --- recover

    def _recover(self) -> None:
        """Take over: fence off the predecessor, adopt its open windows, and go on from where it was."""
        db, doc = self.target.majority, self.lease.doc
        number = int(doc['number'])
        self._finish_what_was_decided(doc, number)
        with self.target.client.start_session(causal_consistency=True) as session:
            store.see_all(db, self.name, session)
            following = ledger.next_number(db, self.name, self.group, number + 1, session)
            self.lease.check()
            if not doc['clean']:
                following = ledger.fence(db, self.name, self.group, self.epoch, following, self.lease.now())
                store.see_all(db, self.name, session)
            windows = ledger.adopt_windows(db, self.name, self.group, self.epoch, number + 1, following, session)
            started = doc.get('started') or doc.get('reset') or (number and not doc.get('deleted'))
            positions = ledger.read_positions(db, self.name, self.group, session)
            if not started:
                positions = self._first_positions(positions)
        ledger.sweep_windows(db, self.name, self.group, number, self.lease.now())
        dead.sweep(db, self.name, self.group, self.job.keep)
        self.progress = Progress.resume(
            windows, number, following, positions, *self._marks(doc, windows), follows=not self.job.assigns
        )
        self.delivery = Delivery(
            self.job, self.target, self.lease, self.progress, self.follower, self._inbox.wake
        )
        self._dispatch = Dispatch(self.job, self._crew, self._inbox, self.lease, self.progress, self.delivery)
        if self.job.picks:
            for claim in self.progress.found:
                self._pick_again(claim)
                if claim.number not in self.progress.open:  # its messages may not have been acknowledged
                    self.job.commit(claim.picked, None)
        self.log = LogView(self.target, self.name, self.progress, self.check_stop, self.delivery.expired)
        self.follower.resume(positions, ledger.read_cleaned(db, self.name, self.group))

    def _marks(self, doc: dict[str, Any], windows: list[dict[str, Any]]) -> list[datetime | None]:
        """The frontier and the watermark, if they are of the time that the windows are of now."""
        event = self.job.event_time
        for window in windows:
            if window.get('event', False) != event:
                window.pop('frontier', None)
        if doc.get('event', False) != event:
            ledger.begin_time(self.target.majority, self.name, self.group, self.epoch, event)
            return [None, None]
        return [doc.get(name) and clock.aware(doc[name]) for name in ('frontier', 'watermark')]

    def _finish_what_was_decided(self, doc: dict[str, Any], number: int) -> None:
        """What the predecessor, or whoever administers the group, has left half done."""
        db = self.target.majority
        if doc.get('sessions'):
            ledger.end_sessions(db, self.name, self.group, self.epoch, doc['sessions'], doc['clean'])
        if doc.get('deleted'):
            ledger.clear_group(db, self.name, self.group, self.epoch, number)
        if doc.get('reset'):
            ledger.finish_reset(db, self.name, self.group, self.epoch, doc['reset'])
        if doc.get('stalled') or doc.get('source_error'):
            ledger.note(db, self.name, self.group, self.epoch, stalled=None, source_error=None)

    def _first_positions(self, positions: dict[str, int]) -> dict[str, int]:
        """Where a new group begins."""
        db = self.target.majority
        # A zombie of a group that was deleted may still write positions of its own.
        if self.job.start_at == 'latest' or self.lease.doc.get('deleted'):
            positions = ledger.offsets_at(db, self.name, self.job.start_at)
            ledger.write_positions(db, self.name, self.group, self.epoch, positions)
        ledger.start_group(db, self.name, self.group, self.epoch)
        return positions

    def _pick_again(self, claim: Claim) -> None:
        """The messages of a window that a former leader has claimed."""
        db = self.target.majority
        replay = claim.replay and claim.number in self.progress.open
        docs = dead.copies(db, claim.id) if replay else store.read_documents(db, self.name, claim.spans)
        claim.picked = [Buffer._from_son(doc) for doc in docs]
        claim.readable = not any('unreadable' in doc for doc in docs)

    # --- plan and claim

    def _look(self, now: datetime) -> None:
        """See how far the producers have come; `now` is before that."""
        db = self.target.majority
        if time.monotonic() >= self._adopt_at and not self.job.picks:
            self._adoption.run()
            self._adopt_at = time.monotonic() + ADOPTION_PAUSE
        begun, before, ends = time.monotonic(), self.log.ends, store.log_ends(db, self.name)
        self.log.ends, self.log.looked = ends, now
        took = time.monotonic() - begun
        self._begin([producer for producer in ends if producer not in self._begun])
        if len(self.progress.planned) > 2 * len(ends) + 100:
            self.progress.forget(ends)
            self._begun.intersection_update(ends)
        self._new = self._new or ends != before
        pause, many = self._pause_after_look(news=ends != before), len(ends) > MANY and ends == before
        told = not self.job.wakes_on_append or self._is_told
        self._look_at = time.monotonic() + max(pause, took * PAUSES_PER_LOOK[not told] if many else 0.0)

    def _begin(self, producers: list[str]) -> None:
        """Leave out what is no longer stored of producers that were not looked at yet."""
        db, planned, ends = self.target.majority, self.progress.planned, self.log.ends
        starts = store.log_starts(db, self.name) if len(producers) > MANY else {}
        for producer in producers:
            self.check_stop()
            self._begun.add(producer)
            at = planned.get(producer, 0)
            first = starts.get(producer)
            if first is None and at < ends[producer]:
                first = store.first_kept(db, self.name, producer, at)
            if first is not None and at < ends[producer]:
                self._skip_to(producer, max(first, at))

    def _skip_to(self, producer: str, first: int) -> None:
        if first > self.progress.planned.get(producer, 0):  # what was before it is deleted, or not to be seen yet
            db = self.target.majority
            with self.target.client.start_session(causal_consistency=True) as session:
                store.see_all(db, self.name, session)
                planned = self.progress.planned.get(producer, 0)
                first = store.first_kept(db, self.name, producer, planned, session) or first
        skipped = self.progress.skip_to(producer, first)
        if skipped:
            self.delivery.expired(skipped)

    def _take_replays(self) -> None:
        room = max(self._crew.at_once // 2, 1) - sum(claim.replay for claim in self.progress.open.values())
        if room < 1 or time.monotonic() < self._replay_at:
            return
        windows = dead.take_replays(self.target.majority, self.name, self.group, self.epoch, room)
        if len(windows) < room:  # else there may be more
            self._replay_at = time.monotonic() + REPLAY_PAUSE
        for window in windows:
            claim = Claim.stored(window)
            self.progress.claim(claim)
            if self.job.picks:
                self._pick_again(claim)

    def _pause_after_look(self, news: bool) -> float:
        """Short while messages come, growing while none do, up to what the change stream allows."""
        if not self.job.wakes_on_append:
            return LOOK_PAUSES[1]  # it looks when a window is due
        if self._is_told:
            self._look_pause = min(self._look_pause * 2, LOOK_PAUSES[1])
            return self._look_pause
        self._look_pause = LOOK_PAUSES[0] if news else min(self._look_pause * 2, LOOK_PAUSE_UNTOLD)
        return LOOK_PAUSE_BUSY if self._dispatch.in_flight else self._look_pause

    @property
    def _is_told(self) -> bool:
        """Whether the change stream tells of what is appended."""
        return self._listening and listener(self.target).is_open

    def _plan_anew(self, now: datetime) -> bool:
        """Plan, but with many producers not again and again in vain; returns what `_plan` does."""
        if not self._new and time.monotonic() < self._plan_at:
            return False
        begun = time.monotonic()
        planned = self._plan(now)
        many = len(self.log.ends) > MANY and not self.job.picks
        took = time.monotonic() - begun if many else 0.0
        self._new = planned
        self._plan_at = time.monotonic() + took * PAUSES_PER_PLAN
        return planned

    def _plan(self, now: datetime) -> bool:
        """Claim the windows that are due, as many as are needed to keep the executor busy; returns whether there were
        any, or there is more to read."""
        self.lease.check()
        wanted = min(self._crew.at_once * self._dispatch.windows_per_task, CLAIM_WINDOWS)
        busy = self._dispatch.busy | self.delivery.busy
        new = [claim for claim in self.progress.open.values() if not claim.replay]
        waiting = sum(1 for claim in new if not claim.not_before and claim.number not in busy)
        limit = min(wanted - waiting, MAX_OPEN - len(new))
        self._has_room = limit > wanted // 2
        if self.job.picks:
            plans = self._picked() if not (new or self._finishing) else []
        elif self._has_room:
            plan = self.job.finish if self._finishing else self.job.plan
            plans = plan(self.log, now, limit)
        else:
            return False
        self._claim(plans, now)
        return bool(plans) or self.log.more

    def _claim(self, plans: list[WindowPlan], now: datetime) -> None:
        claims = [
            Claim.planned(plan, self.name, self.group, number, now)
            for number, plan in enumerate(plans, self.progress.next_number)
        ]
        documents = [claim.document(self.name, self.group, self.epoch) for claim in claims]
        if self.job.picks:
            documents = [{**doc, 'picked': True} for doc in documents]
        if documents:
            ledger.claim_windows(self.target.majority, documents, self.epoch)
        for claim in claims:
            self.progress.claim(claim)
        self.log.claimed()

    def _picked(self) -> list[WindowPlan]:
        """The next window of an emitter that picks messages, which must lie in the log one by one."""
        self._unbatch()
        try:
            plan = self.job.pick()
        except Exception as exc:
            if isinstance(exc, InvalidBSON) and (unreadable := self._unreadable()):
                return unreadable
            if not self._unbatch():  # else a record batch came in between, which the emitter cannot read
                raise
            plan = self.job.pick()
        return [] if plan is None else [plan]

    def _unreadable(self) -> list[WindowPlan]:
        """Windows that are dead letters, of each message that keeps an emitter from reading those it picks from."""
        docs = store.unreadable_messages(self.target.majority, self.name)
        return [
            WindowPlan(
                [Span(doc['producer'], doc['offset'], doc['offset'] + 1)], bad='it cannot be read',
                picked=[Buffer._from_son(doc)],
            )
            for doc in docs
        ]  # fmt: skip

    def _unbatch(self) -> int:
        db, count = self.target.majority, self._adoption.run()
        for producer, end in store.log_ends(db, self.name).items():
            count += store.unbatch(
                db, Span(producer, self._unbatched.get(producer, 0), end), self.name, self.check_stop
            )
            self._unbatched[producer] = end
        return count

    def _collect(self) -> bool:
        """Settle the finished tasks; returns whether there were any."""
        collected = self._dispatch.collect()
        self._begun -= self._dispatch.gone
        self._dispatch.gone.clear()
        return collected

    # --- retain

    def _follow(self, wait: float | None = 0.0) -> None:
        """Let positions and deletions follow the commits, in the background; see `Follower.follow`."""
        if self.job.picks:
            self.follower.follow({}, self.progress.number, self.progress.marks, wait)
            return
        if wait != 0 or (self._unfollowed and self.follower.is_due()):
            moved, number = self.progress.moved(), self.progress.number
            self.progress.written(moved)
            self.follower.follow(moved, self.progress.number, self.progress.marks, wait)
            self._unfollowed = bool(moved) or self.progress.number != number
