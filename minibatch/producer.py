"""The append side: one writer per process and stream, shared by all handles and threads.

A producer has its own offsets 0, 1, 2 ... and exactly one ordered insert in flight. Threads queue what they append,
and the next insert carries all that is queued (group commit). After an unclear result (a lost connection) the
producer stays at that insert, same documents, until it is resolved, so that nothing is lost and nothing doubled.

What a caller was told stays queued is never dropped: it stays at the head of the queue, and nothing passes it.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import bson
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from . import clock, connection, settings, store
from .backlog import TIMEOUT, Limits, Room, count_backlog, warn
from .connection import Target, is_passing, masked, reason_of
from .encoding import Codec, codec_of, encode, encode_both
from .errors import (
    BacklogFullError,
    DataError,
    MinibatchError,
    ReentranceError,
    ServerError,
    UnconfirmedError,
    UnreachableError,
)

logger = logging.getLogger(__name__)

RECORD_MESSAGES = 1000
RECORD_BYTES = 1 << 20
INSERT_BYTES = 16 << 20
CHECKED_BYTES = 64 << 20
RETRY_PAUSES = (0.1, 1.0)
ROOM_PAUSES = (0.05, 0.5)
THREAD_IDLE = 1.0
WAIT = 1.0  # seconds after which who waits looks by itself
RENEWED = 12 * 3600.0  # seconds; less than positions of idle producers are kept
UNLIMITED = Limits()

_registry: dict[tuple[Target, str], Producer] = {}
_queued_on: ContextVar[set[Producer] | None] = ContextVar('minibatch_queued_on', default=None)
_registry_lock = threading.RLock()


class Failure(NamedTuple):
    """Why messages are not stored."""

    kind: type[ServerError]
    reason: str

    def error(self, written: int, queued: int) -> ServerError:
        """The error for one caller, which says what became of its messages."""
        said = [f'the first {written:,} messages of this call are stored'] if written else []
        if queued:
            said.append(f'{queued:,} stay queued and are sent again first; flush() waits for them')
        error = self.kind('. '.join([self.reason, *(said or ['Nothing of this call was written'])]))
        error.written, error.queued = written, queued
        return error


class Entry:
    """Messages of one call, on their way."""

    def __init__(
        self, datas: list[bytes], times: list[datetime], meta: list[RawBSONDocument | None], stays: bool = False
    ) -> None:
        self.datas, self.times, self.meta = datas, times, meta
        self.stays = stays  # whether it stays queued after a failure: its caller has returned, or was told so
        self.timeout = 0.0  # how long its caller waits for it
        self.written = 0
        self.failure: Failure | None = None

    @property
    def left(self) -> int:
        return len(self.datas) - self.written

    @property
    def settled(self) -> bool:
        return self.failure is not None or len(self.datas) == self.written


NOTHING = Entry([], [], [])


class HowFar:
    """How far one append is: whatever ends it early, also Ctrl-C and what the caller's iterable raises, says so."""

    def __init__(self) -> None:
        self._before, self._entry = 0, NOTHING

    def begin(self, entry: Entry) -> None:
        """These messages are next."""
        self._before, self._entry = self._before + self._entry.written, entry

    @property
    def counts(self) -> tuple[int, int]:
        """How many messages are stored, and how many after those stay queued."""
        entry, written = self._entry, self._entry.written  # once: another thread may write the rest at this moment
        return self._before + written, len(entry.datas) - written if entry.stays else 0

    def __enter__(self) -> HowFar:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is not None:
            written, queued = self.counts
            tell(exc, written, queued)
            if (written or queued) and not isinstance(exc, MinibatchError) and hasattr(exc, 'add_note'):
                exc.add_note(f'Of this append the first {written:,} messages are stored, and {queued:,} stay queued')


def tell(exc: BaseException, written: int, queued: int) -> None:
    """Say on an exception of any kind how far an append was."""
    vars(exc).update(written=written, queued=queued)


class Sent(NamedTuple):
    """A record batch in flight: of which entry, up to which of its messages, and up to which offset."""

    entry: Entry
    record: RawBSONDocument
    end: int
    offset: int


class Producer:
    """The one writer of this process to a stream; get it with `producer_of`."""

    def __init__(self, target: Target, stream: str) -> None:
        self.target, self.stream, self._codec = target, stream, codec_of(target)
        self.id = new_id()
        self._offset = 0
        self._used = time.time()
        self._lock = threading.RLock()
        self._is_ours: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._condition = threading.Condition(self._lock)
        self.gave_up = False  # told to stop while MongoDB was away, who appended has not waited for it
        self.inherited = False  # by a forked child, which has producers of its own
        self._queue: deque[Entry] = deque()
        self._in_flight: list[Sent] = []
        self._collection: Collection[Any] | None = None
        self._unclear = False  # whether an attempt at what is in flight may have been applied without our knowing
        self._writing = 0  # the thread that does
        self._partial: Entry | None = None
        self._partial_due = 0.0
        self._behind: Entry | None = None  # the last record batch that was full
        self._thread: threading.Thread | None = None
        self._room = Room(self._count_backlog)

    def append(self, data: Any, meta: Any = None, limits: Limits = UNLIMITED) -> None:
        """Append one message and return when it is acknowledged."""
        with HowFar() as far:
            raw, frozen = encode_both(data, meta, self._codec)
            self._take_room(1, limits, far)
            self._deliver(Entry([raw], [clock.now()], [frozen]), limits.timeout, far)

    def append_later(
        self, data: Any, meta: Any, batchsize: int, linger: float, limits: Limits = UNLIMITED
    ) -> None:
        """Append one message to the record batch being filled, which is written when full, or after `linger` seconds.

        It is written while the next one is filled. The append that fills that one waits for it.
        """
        partial, at = None, store.MAX_BATCH
        try:
            raw, frozen = encode_both(data, meta, self._codec)
            if limits.max_backlog is not None:
                self._take_room(1, limits, HowFar())
            if (queued_on := _queued_on.get()) is not None:
                queued_on.add(self)
            if self._is_ours():
                self._refuse_reentrance()
            with self._lock:
                partial = self._partial
                if partial is None:
                    partial = self._partial = Entry([], [], [], stays=True)
                    partial.timeout = limits.timeout
                    self._partial_due = time.monotonic() + linger
                    self._start_thread()
                at = len(partial.datas)
                # Side by side, whenever Ctrl-C comes. The message is appended when its data is.
                partial.times[at:] = (clock.now(),)
                partial.meta[at:] = (frozen,)
                partial.datas.append(raw)
            if at + 1 >= batchsize and (failure := self._write_behind(limits.timeout)):
                raise failure.error(written=0, queued=1)
        except BaseException as exc:
            tell(exc, 0, int(partial is not None and len(partial.datas) > at))
            raise

    def append_each(self, messages: Iterable[tuple[Any, Any]], limits: Limits = UNLIMITED) -> None:
        """Append messages, each with its meta, as record batches; they are acknowledged when this returns."""
        with HowFar() as far:
            pairs = [encode_both(data, meta, self._codec) for data, meta in messages]
            self._append_all([raw for raw, _ in pairs], [frozen for _, frozen in pairs], limits, far)

    def append_many(self, items: Iterable[Any], limits: Limits = UNLIMITED) -> int:
        """Append messages as record batches; returns how many when all are acknowledged."""
        with HowFar() as far:
            for datas in _checked(items, self._codec):
                self._append_all(datas, [None] * len(datas), limits, far)
        return far.counts[0]

    def _append_all(
        self, datas: list[bytes], meta: list[RawBSONDocument | None], limits: Limits, far: HowFar
    ) -> None:
        """Append encoded messages as there is room for them."""
        start = 0
        while start < len(datas):
            wanted = len(datas) if limits.max_backlog is None else min(RECORD_MESSAGES, len(datas) - start)
            end = start + self._take_room(wanted, limits, far)
            part = datas[start:end]
            self._deliver(Entry(part, [clock.now()] * len(part), meta[start:end]), limits.timeout, far)
            start = end

    def flush(self, timeout: float | None = None) -> None:
        """Write all that is queued, and return when it is acknowledged; without a limit, that of who appended it."""
        try:
            failure = self._flush(timeout)
        except BaseException as exc:  # such as Ctrl-C
            tell(exc, 0, self._count_unwritten())
            raise
        queued = self._count_unwritten() if failure else 0
        if failure and queued:  # else it was of an append that says so itself
            raise failure.error(written=0, queued=queued)

    def _flush(self, timeout: float | None) -> Failure | None:
        self._refuse_reentrance()
        with self._lock:
            self._seal_partial()
            unwritten = self._unwritten()
            for entry in unwritten:
                entry.failure = None
        return self._await(unwritten[-1], _patience(unwritten) if timeout is None else timeout) if unwritten else None

    def _write_behind(self, timeout: float) -> Failure | None:
        """Have the record batch being filled written by the thread in the background; wait for the one before it."""
        self._refuse_reentrance()
        with self._lock:
            before, self._behind = self._behind, self._partial
            self._seal_partial()
            self._condition.notify_all()
        if before is None:
            return None
        return self._flush(timeout) if before.failure else self._await(before, timeout)

    def _take_room(self, wanted: int, limits: Limits, far: HowFar) -> int:
        """Take room for 1 to `wanted` messages, or raise `BacklogFullError`."""
        self._refuse_reentrance()
        if limits.max_backlog is None:
            return wanted
        deadline = time.monotonic() + limits.timeout
        pause, longest = ROOM_PAUSES
        taken = self._look_for_room(wanted, limits, deadline, far)
        while not taken:
            # A consumer that waits for what is not written yet would wait for ever.
            if self._partial is not None and (failure := self._flush(max(deadline - time.monotonic(), 0))):
                raise failure.error(far.counts[0], queued=0)
            left = deadline - time.monotonic()
            waits = limits.on_full != 'raise'
            if not waits or left <= 0:
                full = self._room.describe(self.stream, limits, waited=waits)
                raise Failure(BacklogFullError, full).error(far.counts[0], queued=0)
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, longest)
            with suppress(UnreachableError):  # that there was no room is known
                taken = self._room.take(wanted, limits, deadline)
        return taken

    def _look_for_room(self, wanted: int, limits: Limits, deadline: float, far: HowFar) -> int:
        try:
            return self._room.take(wanted, limits, deadline)
        except UnreachableError as exc:
            raise self._unconfirmed(str(exc)).error(far.counts[0], queued=0) from exc

    def _count_backlog(self, enough: int) -> int:
        unwritten = self._count_unwritten()
        return unwritten + count_backlog(self.target.majority, self.stream, enough)

    def _count_unwritten(self) -> int:
        with self._lock:
            partial = [self._partial] if self._partial is not None else []
            return sum(entry.left for entry in [*self._unwritten(), *partial])

    def _deliver(self, entry: Entry, timeout: float, far: HowFar) -> None:
        """Return when `entry` is acknowledged."""
        far.begin(entry)
        entry.timeout = timeout
        try:
            with self._lock:
                self._seal_partial()
                self._queue.append(entry)
            failure = self._await(entry, timeout)
        except BaseException:  # such as Ctrl-C
            with self._lock:
                self._give_up(entry, 'it was interrupted')
            raise
        if failure:
            raise failure.error(*far.counts)

    def _refuse_reentrance(self) -> None:
        """A handler of signals or logging must not wait for the append that it has interrupted, nor come between."""
        if self._writing == threading.get_ident() or self._is_ours() or self._room.counting:
            raise ReentranceError(
                f'stream {self.stream!r} is being appended to by this very thread, which this call, such as that of a '
                f'handler of signals or logging, has interrupted; nothing of it was written. Append from there to '
                f'another stream, from another thread, or later'
            )

    def _seal_partial(self) -> None:
        if self._partial is not None:
            if self._partial not in self._queue:  # else Ctrl-C came between these two lines
                self._queue.append(self._partial)
            self._partial = None

    def _await(self, entry: Entry, timeout: float) -> Failure | None:
        """Return when `entry` is acknowledged, written by another thread or else by this one, or why it is not."""
        deadline, me = time.monotonic() + timeout, threading.get_ident()
        while True:
            try:
                with self._lock:
                    while self._writing and not entry.settled:
                        self._condition.wait(min(deadline - time.monotonic(), WAIT))
                        if time.monotonic() > deadline and self._writing and not entry.settled:
                            self._give_up(entry, 'it waited for an append before it')
                    if entry.settled:
                        return entry.failure  # under the lock: flush() resets it to try again
                    self._writing = me
                self._write(entry, deadline)
            finally:
                if self._writing == me:
                    self._writing = 0  # first, and without a call: so no second Ctrl-C comes before it
                with self._lock:
                    self._condition.notify_all()

    def _write(self, entry: Entry, deadline: float) -> None:
        """Insert what is in flight, or else the next of the queue; tell each entry what became of it."""
        if not self._in_flight:
            with self._lock:
                self._cut_records()
        try:
            written, refusal = self._insert_until(deadline)
        except PyMongoError as exc:
            # After an unclear attempt, also what is refused now may be stored.
            if is_passing(exc) or self._unclear:
                with self._lock:
                    self._give_up(entry, reason_of(exc))
            else:
                self._refuse(reason_of(exc), all_in_flight=True)
            return
        self._settle(written)
        if refusal:
            self._refuse(refusal, all_in_flight=False)

    def _insert_until(self, deadline: float) -> tuple[int, str]:
        buffer = self._buffer
        records: list[Any] = [sent.record for sent in self._in_flight]
        if self.target.is_mock:
            records = [bson.decode(record.raw) for record in records]
        pause, longest = RETRY_PAUSES
        while True:
            try:
                with self.target.within(deadline - time.monotonic()):
                    written, refusal = store.insert_records(buffer, records)
                    # An earlier attempt may have stored what is refused now.
                    if refusal and self._unclear and store.is_stored(buffer, records[written]):
                        return written + 1, ''
                    return written, refusal
            except PyMongoError as exc:
                self._unclear = self._unclear or is_passing(exc)
                self.gave_up = connection.gives_up(self.target)
                if not is_passing(exc) or time.monotonic() > deadline or self.gave_up:
                    raise
                warn(logger, 'append to %r not confirmed, trying again: %s', self.stream, reason_of(exc))
                time.sleep(max(min(pause, deadline - time.monotonic()), 0))
                pause = min(pause * 1.5, longest)
            except BaseException:
                self._unclear = True
                raise

    @property
    def _buffer(self) -> Collection[Any]:
        db = self.target.db
        if self._collection is None or self._collection.database is not db:
            self._collection = db.buffer
        return self._collection

    def _cut_records(self) -> None:
        """Take entries off the queue, as many as one insert should carry, and give them their offsets."""
        now = time.time()
        if now - self._used > RENEWED:  # groups may have forgotten how far they are in the log of this one
            self.id, self._offset = new_id(), 0
        self._used = now
        sent: list[Sent] = []
        size, offset, taken = 0, self._offset, 0
        for entry in self._queue:
            if size >= INSERT_BYTES:
                break
            for start, end, length in cuts(entry.datas, entry.meta, entry.written):
                part = slice(start, end)
                record = store.record_batch(
                    self.stream, self.id, offset, entry.datas[part], entry.times[part], entry.meta[part]
                )
                offset += end - start
                size += length
                sent.append(Sent(entry, record, end, offset))
            taken += 1
        self._in_flight = sent  # first: interrupted after it, an entry is in both, and not in none
        for _ in range(taken):
            self._queue.popleft()

    def _settle(self, count: int) -> None:
        """The first `count` record batches in flight are in MongoDB; interrupted, this can be done again."""
        with self._lock:
            for sent in self._in_flight[:count]:
                sent.entry.written, self._offset = sent.end, sent.offset
            self._in_flight = self._in_flight[count:]
            self._unclear = self._unclear and bool(self._in_flight)

    def _refuse(self, reason: str, all_in_flight: bool) -> None:
        """What is left in flight is certainly not in MongoDB, and the server will not have the first of it."""
        with self._lock:
            in_flight, waiting = self._entries_in_flight(), self._unwritten()
            refused = in_flight if all_in_flight else waiting[:1]
            # What stays keeps its offsets while a copy of it may come late.
            held = in_flight if self._unclear and any(entry.stays for entry in in_flight) else []
            if held or any(entry.stays for entry in refused):
                refused = waiting  # nothing can pass what stays at the head of the queue
            for entry in refused:
                entry.failure = Failure(ServerError, f'MongoDB refused the append: {reason}')
            for entry in held:
                entry.stays = True
            self._queue = deque(e for e in waiting if e not in held and (e.stays or e not in refused))
            if not held:
                self._in_flight = []
                if self._unclear:
                    self._unclear, self._offset, self.id = False, 0, new_id()  # a late copy shall not be in the way

    def _give_up(self, entry: Entry, why: str) -> None:
        """Its time is over. If it is in flight, it may be stored, or be stored later: it stays there."""
        if entry in self._entries_in_flight():
            entry.stays = True
        elif not entry.stays and entry in self._queue:
            self._queue.remove(entry)
        entry.failure = self._unconfirmed(why)

    def _unconfirmed(self, why: str) -> Failure:
        return Failure(UnconfirmedError, f'{masked(self.target.url)} did not confirm an append in time ({why})')

    def _unwritten(self) -> list[Entry]:
        return list(dict.fromkeys([*self._entries_in_flight(), *self._queue]))

    def _entries_in_flight(self) -> list[Entry]:
        return list(dict.fromkeys(sent.entry for sent in self._in_flight))

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f'minibatch-append-{self.stream}', daemon=True)
            self._thread.start()
        else:
            self._condition.notify_all()  # it may wait for longer than `linger`

    def _run(self) -> None:
        """Write record batches that are full, or have waited for `linger`, until there are none for a while."""
        while self._wait_for_due():
            with self._lock:
                if self._partial is not None and self._partial_due <= time.monotonic():
                    self._seal_partial()
                due = [entry for entry in self._unwritten() if entry.stays and not entry.settled]
            try:
                if due and (failure := self._await(due[-1], _patience(due))):
                    raise failure.error(written=0, queued=self._count_unwritten())
            except Exception as exc:
                with self._lock:
                    for entry in due:
                        if not entry.settled:
                            entry.failure = Failure(ServerError, str(exc))
                logger.error('messages of %r stay queued until the next append or flush: %s', self.stream, exc)

    def _wait_for_due(self) -> bool:
        """Wait until there is something to write; False if there is nothing to come, which ends the thread."""
        with self._lock:
            while self._behind is None or self._behind.settled:
                pause = THREAD_IDLE if self._partial is None else self._partial_due - time.monotonic()
                if pause <= 0:
                    return True
                if not self._condition.wait(pause) and self._partial is None:
                    self._thread = None
                    return False
            return True


def _patience(entries: Iterable[Entry]) -> float:
    """How long the most patient of those who appended these waits."""
    return max((entry.timeout for entry in entries), default=TIMEOUT)


def new_id() -> str:
    """The name of a new producer; names sort by age."""
    return f'{time.time_ns() // 1_000_000:011x}{secrets.token_hex(4)}'


def producer_of(target: Target, stream: str) -> Producer:
    """The producer of this process for a stream."""
    key = (target, stream)
    with _registry_lock:
        if key not in _registry:
            if not _registry:
                # Children of multiprocessing end without atexit, but run these.
                Finalize(None, flush_all, exitpriority=100)
            settings.look_after()
            _registry.setdefault(key, Producer(target, stream))  # a handler of signals may have come between
        return _registry[key]


class Flushed:
    """A context: what is appended in it, and only queued, is stored when it ends, or else that raises, as `flush` does.

    Only that of this thread, and of asyncio tasks begun in it; what threads of its own append is theirs to flush.
    """

    def __enter__(self) -> None:
        self._producers: set[Producer] = set()
        self._reset = _queued_on.set(self._producers)

    def __exit__(self, kind: object, *exc: object) -> None:
        _queued_on.reset(self._reset)
        if kind is None:
            for producer in self._producers:
                producer.flush()


def flush_all() -> None:
    """Write all that is queued in this process; called at its end."""
    for key, producer in list(_registry.items()):
        try:
            if producer.gave_up and producer.target.is_away:
                raise UnconfirmedError('MongoDB is away')  # whose messages they are does them again
            producer.flush()
        except Exception as exc:
            del _registry[key]  # so that a second call at the end does not wait once more
            logger.error('messages of %r were not written: %s', producer.stream, exc)


def _checked(items: Iterable[Any], codec: Codec) -> Iterator[list[bytes]]:
    """Encode all messages before any is written, as long as they fit into memory comfortably."""
    datas: list[bytes] = []
    size = done = 0
    for i, item in enumerate(items):
        try:
            datas.append(encode(item, codec))
        except DataError as exc:
            so_far = f'; items[:{done}] are stored' if done else ''
            raise DataError(f'items[{i}]: {exc}{so_far}') from None
        size += len(datas[-1])
        if size > CHECKED_BYTES:
            yield datas
            done += len(datas)
            datas, size = [], 0
    if datas:
        yield datas


def cuts(
    datas: Sequence[bytes], meta: Sequence[RawBSONDocument | None], start: int
) -> Iterator[tuple[int, int, int]]:
    """Cut messages from `start` on into record batches: (start, end, bytes)."""
    end, size = start, 0
    for i in range(start, len(datas)):
        about = meta[i]
        length = len(datas[i]) + 16 + (0 if about is None else len(about.raw))
        if end > start and (size + length > RECORD_BYTES or end - start >= RECORD_MESSAGES):
            yield start, end, size
            start, size = i, 0
        end, size = i + 1, size + length
    if end > start:
        yield start, end, size


def _forget_inherited_producers() -> None:
    # A forked child writes through producers of its own; what its parent has queued is its parent's to write.
    global _registry_lock
    _registry_lock = threading.RLock()
    for producer in _registry.values():
        producer.inherited = True
    _registry.clear()


atexit.register(flush_all)
with suppress(AttributeError):
    os.register_at_fork(after_in_child=_forget_inherited_producers)
