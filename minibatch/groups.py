"""Consumer groups and dead letters, as whoever runs them sees them: how far, how many, reset, delete, replay."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from . import clock, dead, lease, ledger, store
from .connection import Target
from .errors import ArgumentError, GroupBusyError
from .fields import stored_key
from .lease import Lease
from .messages import Message, MessageWindow, window_of
from .metrics import Histogram, histogram
from .store import DB, Span

LEASE = 10.0
CHUNK = 1000


class Lag(NamedTuple):
    """How far a consumer group is behind: `messages` that it has not finished, and the age of the oldest of them in
    `seconds` of the server's time, 0.0 if there is none."""

    messages: int
    seconds: float


@dataclass(frozen=True)
class Group:
    """A consumer group of a stream, as it was when it was read; see `Stream.groups`.

    Attributes:
        stream, name: which one.
        windows, messages: how many were processed, counted again when they are processed again.
        failed: how many windows became dead letters, also those that were replayed or discarded since.
        retried: how many attempts failed and were followed by another one.
        late: how many messages came when all their windows were closed.
        expired: how many messages were deleted by their age before they were processed.
        owner: 'host:pid' of the consumer that leads now, by the server's time, or None.
        stalled: since when windows wait and none is finished (aware, UTC), or None.
        source_error: what its source failed with, while it has not run well for a minute since, or None. What a source
            mends by itself, such as a lost connection of Kafka or MQTT, is no failure.
        keep: whether it keeps what it has processed.
        workers: how many workers the consumer that leads, or led last, had when it began to.
        committed: when a window was committed last (aware, UTC), or None.
        function: how long the function took for each window, in seconds.
        latency: how long after its newest message was appended each window was committed, in seconds.
        sizes: how many messages each window had.

    Example:
        >>> for group in stream.groups():    # doctest: +SKIP
        ...     print(group.name, group.lag().messages, group.owner)
    """

    stream: str
    name: str
    windows: int
    messages: int
    failed: int
    retried: int
    late: int
    expired: int
    owner: str | None
    stalled: datetime | None
    source_error: str | None
    keep: bool
    workers: int
    committed: datetime | None
    function: Histogram = field(repr=False)
    latency: Histogram = field(repr=False)
    sizes: Histogram = field(repr=False)
    _target: Target = field(repr=False, compare=False)

    def lag(self) -> Lag:
        """How many messages this group has not finished, and for how long the oldest has been waiting.

        Dead letters do not count, as the group has gone on behind them. A window counts until it is committed. The
        cost grows with the number of producers, and not with the number of messages. For a group that picks messages
        itself, it is all messages from the oldest one stored of each producer.

        Raises:
            ArgumentError: if the group was deleted.
        """
        db = self._target.majority
        return how_far(db, _find(self._target, self.stream, self.name)).lag(db, store.log_ends(db, self.stream))

    def reset(self, to: str | datetime) -> None:
        """Let the group go on from elsewhere in the log; what it was doing is given up. Dead letters stay.

        The consumers of the group must be stopped. It is done, or not done at all: killed half way, the next consumer
        of the group finds it decided and finishes it, or finds the group as it was.

        Args:
            to: 'earliest', the oldest message that is stored; 'latest', behind the last one; or a datetime (naive is
                UTC): the first message of each producer that was created at that time or later.

        Raises:
            ArgumentError: if `to` is something else, the group was deleted, or it picks messages itself and so has no
                positions.
            GroupBusyError: if a consumer leads; it is named.

        Example:
            >>> stream.group('alerts').reset('earliest')    # doctest: +SKIP
        """
        if to not in ('earliest', 'latest') and not isinstance(to, datetime):
            raise ArgumentError(f"to must be 'earliest', 'latest' or a datetime, not {to!r}")
        db = self._target.majority
        with self._leading() as (held, number):
            if held.doc.get('picks'):
                raise ArgumentError(
                    f'consumer group {self.name!r} of stream {self.stream!r} picks messages itself, so it has no '
                    f'positions to reset; mark its messages instead, or delete the group'
                )
            known = ledger.read_positions(db, self.stream, self.name)
            positions = {**known, **ledger.offsets_at(db, self.stream, to)}
            ledger.reset_group(db, self.stream, self.name, held.epoch, number, positions)
            ledger.sweep_windows(db, self.stream, self.name, number, held.now())

    def delete(self) -> None:
        """Delete the group, with its positions, windows and dead letters. Its messages wait for it no more.

        The consumers of the group must be stopped; one that starts afterwards makes the group anew. A tombstone stays:
        by it a consumer that hung all the while is refused, and no window id comes twice. It is written first; killed
        after that, the group is gone, and what was left of it is deleted when a consumer makes it anew.

        Raises:
            ArgumentError: if the group was deleted.
            GroupBusyError: if a consumer leads; it is named.
        """
        db = self._target.majority
        with self._leading() as (held, number):
            ledger.delete_group(db, self.stream, self.name, held.epoch, number)
            ledger.clear_group(db, self.stream, self.name, held.epoch, number)

    @contextmanager
    def _leading(self) -> Iterator[tuple[Lease, int]]:
        """The lease of the group, and the number of its last window. Who led before can claim and commit no more."""
        db = self._target.majority
        doc = _find(self._target, self.stream, self.name)
        holder = doc.get('lease', {}).get('owner')
        instead_of = holder['token'] if holder and lease.is_dead(holder) else ''
        asked = time.monotonic()
        owner = lease.owner(lease.new_token())
        taken = ledger.take_lease(db, self.stream, self.name, owner, LEASE, instead_of, {})
        if taken is None:
            raise _busy(_find(self._target, self.stream, self.name))
        held, finished = Lease(self._target, self.stream, self.name, LEASE, taken, asked), False
        try:
            if taken.get('deleted'):
                raise _no_group(self._target, self.stream, self.name)
            if taken.get('sessions'):
                ledger.end_sessions(db, self.stream, self.name, held.epoch, taken['sessions'], taken['clean'])
            following = ledger.next_number(db, self.stream, self.name, int(taken['number']) + 1)
            if not taken['clean']:
                following = ledger.fence(db, self.stream, self.name, held.epoch, following, held.now())
            held.check()
            yield held, following - 1
            finished = True
        finally:
            held.release(clean=finished)


@dataclass(frozen=True)
class DeadLetter:
    """A window that has failed for good, with its messages; see `Stream.dead_letters`.

    Attributes:
        id: the window's id, which names it everywhere, also after a replay.
        stream, group, number: which window.
        n: how many messages it has.
        attempts: how many attempts were made.
        error: of the last one, a line.
        failed: when that was (aware, UTC).
        start, end: the time span [start, end) of a time window, else None.
        key: with ``key=``, what its messages have in common, else None.
        waiting: whether it waits to be run again, since `replay`.
    """

    id: str
    stream: str
    group: str
    number: int
    n: int
    attempts: int
    error: str
    failed: datetime
    start: datetime | None
    end: datetime | None
    key: Any
    waiting: bool
    _target: Target = field(repr=False, compare=False)

    @property
    def traceback(self) -> str:
        """Where the last attempt failed, or ''. Read when asked for; ArgumentError if the dead letter is gone."""
        return str(self._read().get('traceback') or '')

    @property
    def spans(self) -> list[Span]:
        """The offsets of its messages: (producer, start, end). Read when asked for; ArgumentError if it is gone."""
        return ledger.all_spans(self._target.majority, self._read())

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data of its messages, in order. Read when asked for."""
        return self.load().data

    @property
    def messages(self) -> list[Message]:
        """Its messages, with their time and place. Read when asked for."""
        return self.load().messages

    def load(self) -> MessageWindow:
        """The window as the function was given it, from the copies that were kept; ArgumentError if it is gone."""
        doc, db = self._read(), self._target.majority
        return window_of(doc, self.stream, dead.records(db, self.id, ledger.all_spans(db, doc)))

    def replay(self) -> None:
        """Have it run again, under the same id, by the consumer that leads its group now or later.

        The function is given what was kept of its messages. When it succeeds, the dead letter is gone; when it fails
        as often as before, it is a dead letter again. Nothing happens if it waits for that already.

        Raises:
            ArgumentError: if the dead letter is gone, because it was replayed, discarded, or too old.
        """
        if not DeadLetters([self]).replay():
            self._read()

    def discard(self) -> None:
        """Delete it and its messages.

        Raises:
            ArgumentError: if it is gone, or waits to be run again.
        """
        if not DeadLetters([self]).discard():
            self._read()
            raise ArgumentError(f'dead letter {self.id!r} waits to be run again, so it cannot be discarded')

    def _read(self) -> dict[str, Any]:
        doc = ledger.find_window(self._target.majority, self.id)
        if doc is None or doc['status'] not in ('failed', 'replay'):
            raise _no_dead_letters([self.id])
        return doc


class DeadLetters(list[DeadLetter]):
    """A list of dead letters, oldest failure first, which can be replayed and discarded together.

    Example:
        >>> stream.dead_letters('alerts').replay()    # doctest: +SKIP
        3
    """

    def replay(self) -> int:
        """Have all of them run again, see `DeadLetter.replay`. Returns how many did not wait for that already."""
        return sum(dead.replay(target.majority, ids) for target, ids in self._chunks())

    def discard(self) -> int:
        """Delete them with their messages, but for those that wait to be run again. Returns how many."""
        return sum(dead.discard(target.majority, ids) for target, ids in self._chunks())

    def _chunks(self) -> Iterator[tuple[Target, list[str]]]:
        for start in range(0, len(self), CHUNK):
            chunk = self[start : start + CHUNK]
            yield chunk[0]._target, [letter.id for letter in chunk]


def groups_of(target: Target, stream: str | None = None) -> list[Group]:
    """The consumer groups of a stream, or of all streams."""
    return [group_from(target, doc) for doc in ledger.groups_now(target.majority, stream)]


def group_of(target: Target, stream: str, name: str) -> Group:
    """One consumer group; ArgumentError, naming those there are, if there is none of this name."""
    return group_from(target, _find(target, stream, name))


def dead_letters(target: Target, stream: str | None = None, group: str | None = None) -> DeadLetters:
    """The dead letters of a group of a stream, of a stream, or of all streams."""
    if stream is not None and group is not None:
        _find(target, stream, group)
    return _dead_letters(target, dead.find(target.majority, stream, group))


def dead_letters_by_id(target: Target, ids: Iterable[str]) -> DeadLetters:
    """The dead letters with these ids; ArgumentError, naming those, if some are none."""
    ids = list(ids)
    found = _dead_letters(target, dead.find(target.majority, ids=ids))
    unknown = [id_ for id_ in ids if id_ not in {letter.id for letter in found}]
    if unknown:
        raise _no_dead_letters(unknown)
    return found


@dataclass(frozen=True)
class HowFar:
    """How far a group is in the logs: its document, the spans it has finished above its positions, and these."""

    doc: dict[str, Any]
    finished: dict[str, list[Span]]
    positions: dict[str, int]

    def lag(self, db: DB, ends: dict[str, int]) -> Lag:
        """See `Group.lag`; `ends` are those of the logs, read after this was."""
        messages, oldest = 0, clock.aware(self.doc['now'])
        for producer, end in ends.items():
            ahead = Span(producer, self.positions.get(producer, 0), end)
            left = list(store.gaps(ahead, self.finished.get(producer, ())))
            count, since = _waiting(db, self.doc['stream'], left)
            messages += count
            oldest = min(oldest, since or oldest)
        return Lag(messages, (clock.aware(self.doc['now']) - oldest).total_seconds())

    def appended(self, ends: dict[str, int]) -> int:
        """How many messages were appended, as far as the group knows: also deleted ones, of producers long gone."""
        known = self.positions.keys() | ends.keys()
        reached = sum(max(self.positions.get(producer, 0), ends.get(producer, 0)) for producer in known)
        return int(self.doc.get('forgotten', 0)) + reached


def how_far(db: DB, doc: dict[str, Any]) -> HowFar:
    """How far the group of this document is."""
    stream, name = doc['stream'], doc['group']
    # In this order: what is finished meanwhile is counted as waiting rather than not at all.
    finished = ledger.finished_spans(db, stream, name, int(doc['number']))
    return HowFar(doc, finished, ledger.read_positions(db, stream, name))


def _waiting(db: DB, stream: str, gaps: list[Span]) -> tuple[int, datetime | None]:
    """How many messages of these spans of one producer are stored, and when the first one was created."""
    for i, gap in enumerate(gaps):
        for offset, _, times in store.read_times(db, stream, gap, limit=1):
            start = max(gap.start, offset)  # what is gone from a log is gone from its beginning
            count = gap.end - start + sum(later.end - later.start for later in gaps[i + 1 :])
            return count, clock.aware(times[start - offset])
    return 0, None


def dead_count(group: Group) -> int:
    """How many dead letters a group has now."""
    return dead.count(group._target.majority, group.stream, group.name)


def messages_from(group: Group, to: str | datetime) -> int:
    """The lag that a group would have after ``group.reset(to)``."""
    db = group._target.majority
    starts, ends = ledger.offsets_at(db, group.stream, to), store.log_ends(db, group.stream)
    return sum(end - starts.get(producer, end) for producer, end in ends.items())


def _find(target: Target, stream: str, name: str) -> dict[str, Any]:
    found = ledger.groups_now(target.majority, stream, name)
    if not found:
        raise _no_group(target, stream, name)
    return found[0]


def group_from(target: Target, doc: dict[str, Any]) -> Group:
    """The group of this document."""
    held = doc.get('lease', {}).get('expires', doc['now']) > doc['now']
    return Group(
        stream=doc['stream'],
        name=doc['group'],
        windows=int(doc.get('windows', 0)),
        messages=int(doc.get('messages', 0)),
        failed=int(doc.get('failed', 0)),
        retried=int(doc.get('retried', 0)),
        late=int(doc.get('late', 0)),
        expired=int(doc.get('expired_unprocessed', 0)),
        owner='{host}:{pid}'.format_map(doc['lease']['owner']) if held else None,
        stalled=_time(doc.get('stalled')),
        source_error=doc.get('source_error'),
        keep=bool(doc.get('keep')),
        workers=int(doc.get('workers', 0)),
        committed=_time(doc.get('committed')),
        function=histogram(doc, 'function'),
        latency=histogram(doc, 'latency'),
        sizes=histogram(doc, 'sizes'),
        _target=target,
    )


def _dead_letters(target: Target, docs: list[dict[str, Any]]) -> DeadLetters:
    letters = (
        DeadLetter(
            id=doc['_id'],
            stream=doc['stream'],
            group=doc['group'],
            number=int(doc['number']),
            n=int(doc.get('n', 0)),
            attempts=int(doc.get('attempts', 1)),
            error=str(doc.get('error') or ''),
            failed=clock.aware(doc['failed']),
            start=_time(doc.get('start')),
            end=_time(doc.get('end')),
            key=stored_key(doc.get('key')),
            waiting=doc['status'] == 'replay',
            _target=target,
        )
        for doc in docs
    )
    return DeadLetters(sorted(letters, key=lambda letter: letter.failed))


def _time(stored: datetime | None) -> datetime | None:
    return None if stored is None else clock.aware(stored)


def _no_group(target: Target, stream: str, name: str) -> ArgumentError:
    known = ', '.join(repr(doc['group']) for doc in ledger.groups_now(target.majority, stream)) or 'none'
    return ArgumentError(f'stream {stream!r} has no consumer group {name!r}; there are: {known}')


def _no_dead_letters(ids: list[str]) -> ArgumentError:
    some = ', '.join(map(repr, ids[:5])) + (f' and {len(ids) - 5} more' if len(ids) > 5 else '')
    return ArgumentError(f'there is no dead letter {some}; it was replayed or discarded, or never there')


def _busy(doc: dict[str, Any]) -> GroupBusyError:
    owner = doc['lease']['owner']
    left = max((doc['lease']['expires'] - doc['now']).total_seconds(), 0)
    return GroupBusyError(
        f'consumer group {doc["group"]!r} of stream {doc["stream"]!r} is led by process {owner["pid"]} on '
        f'{owner["host"]}; stop it first, or wait {left:.0f} s if it is dead'
    )
