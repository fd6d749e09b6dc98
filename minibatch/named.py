"""The append side of a source: a producer with a name, which goes on where it was.

A source whose outside system can be read again gives each message a token: where to go on after it. The token is stored
in the record batch of the message, by the same write. So whoever reads the outside system next, after any crash,
starts from the token of the last message that is stored, and nothing is lost or doubled.

Two processes with the same name at once do no harm: both would write the same offset, which only one of them can. The
other is told, and goes on from the token. One that has slept looks first, because what the other has written may be
processed and deleted by then. What remains is one that is frozen inside its insert: it looks afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import bson
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError

from . import clock, connection, ledger, settings, store
from .abc import SourceMessage
from .backlog import Limits, Room, count_backlog
from .connection import Target, is_passing, reason_of
from .encoding import CODEC, MAX_MESSAGE_BYTES, Codec, codec_of, encode_both, to_bson
from .errors import (
    ArgumentError,
    CancelledError,
    DataError,
    OvertakenError,
    PortabilityError,
    ServerError,
    UnreachableError,
)
from .producer import INSERT_BYTES, RENEWED, cuts, new_id, tell

logger = logging.getLogger(__name__)

DEAD_LETTERS = '.dead_letters'
DEAD_LETTERS_KEPT = timedelta(days=30)
PAUSES = (0.1, 5.0)
ATTEMPT = 30.0
AWAKE = 5.0
INSERT_MESSAGES = 10_000
SAID_PAUSE = 60.0
RAW_KEPT = 1 << 20
TEXT_KEPT = 1 << 16


class NamedProducer:
    """Appends what a source brings; get it with `Stream.producer`. For one thread.

    Attributes:
        id: the name of the producer as windows show it.
        token: the token of the last message that is stored under this name, by whichever process; None at first.
    """

    token: Any
    _offset: int

    def __init__(
        self, target: Target, stream: str, name: str | None, limits: Limits, cancelled: Callable[[], bool]
    ) -> None:
        self.id = new_id() if name is None else store.producer_id(name)
        self._named = name is not None
        self._target, self._stream, self._name = target, stream, name
        self._limits, self._cancelled, self._codec = limits, cancelled, codec_of(target)
        self._room = Room(lambda enough: count_backlog(target.majority, stream, enough))
        self._dead_letters: NamedProducer | None = None
        self._rejected = _Said()
        self._waits = _Said()
        self._look()

    def __reduce__(self) -> NoReturn:
        raise PortabilityError('a NamedProducer is for one thread, so it cannot be copied or sent to another process; '
                               'call stream.producer(name) where it is used')  # fmt: skip

    def append(self, data: Any, meta: Any = None, token: Any = None) -> None:
        """Append one message; see `append_many`."""
        self.append_many([SourceMessage(data, meta, token)])

    def append_many(self, messages: Iterable[SourceMessage]) -> int:
        """Append messages, and return when they and the token of the last one are stored.

        It waits as long as it must, for MongoDB or for room in the stream. A message that says an error, or that
        MongoDB cannot store, goes to the stream ``<stream>.dead_letters`` instead, as ``{'error': ..., 'data': ...}``.

        Returns:
            How many were appended to the stream itself.

        Raises:
            OvertakenError: if another process has appended under this name; `token` says how far it is.
            CancelledError: if the source was cancelled while this waited.
            ServerError: if MongoDB refused it.

        Whatever it raises has `written`, how many of those to be appended are stored for certain; `token` goes with
        them. If it was interrupted, as by Ctrl-C, more may be stored; the next append finds out.
        """
        written = 0
        try:
            good: list[_Encoded] = []
            bad: list[SourceMessage] = []
            message = None
            for message in messages:
                try:
                    if message.error:
                        raise DataError(message.error)
                    good.append(_encoded(message.data, message.meta, message.token, self._codec))
                except DataError as exc:
                    bad.append(message._replace(error=str(exc)))
            self._be_sure()
            if bad:
                self._set_aside(bad)
            for count in self._insert(good):
                written += count
            if message is not None and bad and message.token is not None and bad[-1].token == message.token:
                self.save(message.token)
        except BaseException as exc:
            tell(exc, written, 0)
            raise
        return written

    def save(self, token: Any) -> None:
        """Store a token without a message: all that the source has up to there is dealt with.

        A number below the last one says that the source begins again there, such as when its log was made anew.

        Raises:
            OvertakenError: if another process has appended under this name; `token` says how far it is.
            CancelledError: if the source was cancelled while this waited.
        """
        self._be_sure()
        if isinstance(token, int) and isinstance(self.token, int) and token < self.token:
            self._open_dead_letters().save(token)  # else what comes again would be taken for what is there
        self._patiently(lambda: store.save_place(self._target.majority, self._stream, self.id, self._offset, token))
        self.token = token

    # --- where it is

    def _look(self) -> None:
        self._offset, self.token = self._patiently(self._find_place) if self._named else (0, None)
        self._sure, self._looked = True, time.monotonic()

    def _be_sure(self) -> None:
        """See that the log ends where we think: who has slept for long, or failed, does not know."""
        asleep = time.monotonic() - self._looked
        if not self._named and not (self._sure and asleep < RENEWED):
            self.id, self._offset, self._sure, self._looked = new_id(), 0, True, time.monotonic()
        elif self._named and not (self._sure and asleep < AWAKE):
            offset = self._offset
            self._look()
            if self._offset != offset:
                raise OvertakenError(f'{self.id} of stream {self._stream!r} is not where it was; go on from its token')

    def _find_place(self) -> tuple[int, Any]:
        db = self._target.majority
        if self._target.is_mock:
            return store.find_place(db, self._stream, self.id)
        with db.client.start_session(causal_consistency=True) as session:
            store.see_all(db, self._stream, session)
            offset, token = store.find_place(db, self._stream, self.id, session)
            # Who deletes messages by hand deletes tokens too, and new messages must not land behind the groups.
            return max(offset, ledger.furthest_position(db, self._stream, self.id, session)), token

    # --- writing

    def _insert(self, messages: Sequence[_Encoded]) -> Iterator[int]:
        """Insert messages as there is room; yields how many are stored."""
        start = 0
        for _, end in _inserts(messages):
            while start < end:
                room = self._take_room(end - start)
                self._be_sure()  # it may have waited for long
                part = messages[start : start + room]
                self._insert_at_once(part)
                start += len(part)
                yield len(part)

    def _insert_at_once(self, messages: Sequence[_Encoded]) -> None:
        offset, records = self._offset, []
        for first, behind, _ in cuts([each.raw for each in messages], [each.meta for each in messages], 0):
            datas, meta, tokens = zip(*messages[first:behind], strict=True)
            times = [clock.now()] * len(datas)
            _token_size(tokens[-1])  # which raises an error if it cannot be stored
            records.append(store.record_batch(self._stream, self.id, offset, datas, times, meta, tokens[-1]))
            offset += len(datas)
        self._write(records)
        self._offset = offset
        if messages[-1].token is not None:
            self.token = messages[-1].token
        if self._named:
            self._be_sure()  # if that took long, others may have gone on meanwhile, and their messages be deleted

    def _write(self, records: list[Any]) -> None:
        if self._target.is_mock:
            records = [bson.decode(record.raw) for record in records]
        self._sure = False
        _, refusal = self._patiently(lambda: store.insert_records(self._target.majority.buffer, records))
        if refusal:
            self._be_sure()
            raise ServerError(f'MongoDB refused messages of a source of stream {self._stream!r}: {refusal}')
        before, self._looked = self._looked, time.monotonic()
        self._sure = self._looked - before < AWAKE

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        """Do something with MongoDB, again and again while that is not reachable."""
        pause, longest = PAUSES
        while True:
            try:
                with self._target.within(ATTEMPT):
                    return attempt()
            except PyMongoError as exc:
                if not is_passing(exc):
                    raise ServerError(f'MongoDB refused a source of stream {self._stream!r}: {reason_of(exc)}') from exc
                self._waits.say('a source of stream %r waits for MongoDB: %s', self._stream, reason_of(exc))
                connection.heal(self._target.client, exc)
            self._pause(pause)
            pause = min(pause * 1.5, longest)

    def _take_room(self, wanted: int) -> int:
        """Take room for 1 to `wanted` messages."""
        pause, longest = PAUSES
        while not (taken := self._look_for_room(wanted)):
            self._pause(pause)
            pause = min(pause * 1.5, longest)
        return taken

    def _look_for_room(self, wanted: int) -> int:
        try:
            taken = self._room.take(wanted, self._limits, time.monotonic() + ATTEMPT)
        except UnreachableError as exc:
            self._waits.say('a source of stream %r waits for MongoDB: %s', self._stream, exc)
            return 0
        if not taken:
            full = self._room.describe(self._stream, self._limits, waited=False)
            self._waits.say('a source waits: %s', full)
        return taken

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._cancelled():
                raise CancelledError
            time.sleep(min(left, 0.1))

    # --- what cannot be appended

    def _set_aside(self, messages: Sequence[SourceMessage]) -> None:
        """Append to the dead-letter stream what is not there yet: it is written first, so it may be there already."""
        dead_letters = self._open_dead_letters()
        dead_letters._be_sure()
        new = [message for message in messages if not _is_behind(message.token, dead_letters.token)]
        if not new:
            return
        list(dead_letters._insert([_dead_letter(message) for message in new]))
        self._rejected.say(
            'stream %r: %d messages of a source, such as one with %r, could not be appended; they are in the stream %r',
            self._stream, len(new), messages[0].error[:200], self._stream + DEAD_LETTERS,
        )  # fmt: skip

    def _open_dead_letters(self) -> NamedProducer:
        if self._dead_letters is None:
            name = self._stream + DEAD_LETTERS
            first = {'max_age': DEAD_LETTERS_KEPT.total_seconds()}
            doc = self._patiently(lambda: store.open_stream(self._target.majority, name, {}, clock.now(), first))
            settings.opened(self._target, name, doc)
            self._dead_letters = NamedProducer(self._target, name, self._name, Limits(), self._cancelled)
        return self._dead_letters


class _Encoded(NamedTuple):
    raw: bytes
    meta: RawBSONDocument | None
    token: Any


class _Said:
    """Says something at most once a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def say(self, text: str, *args: Any) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SAID_PAUSE
            logger.warning(text, *args)


def _inserts(messages: Sequence[_Encoded]) -> Iterator[tuple[int, int]]:
    """Cut messages into what one insert carries: (start, end)."""
    start = size = 0
    for i, message in enumerate(messages):
        length = len(message.raw) + (0 if message.meta is None else len(message.meta.raw))
        if i > start and (size + length > INSERT_BYTES or i - start >= INSERT_MESSAGES):
            yield start, i
            start, size = i, 0
        size += length
    if start < len(messages):
        yield start, len(messages)


def _is_behind(token: Any, there: Any) -> bool:
    """Whether what has this token is stored, if `there` is the last one that is. Only numbers have an order we know."""
    numbers = isinstance(token, int) and isinstance(there, int)
    return there is not None and (token <= there if numbers else bool(token == there))


def _dead_letter(message: SourceMessage) -> _Encoded:
    """The message as the dead-letter stream has it, so that it can be stored whatever it is."""
    error = store.storable(message.error[:TEXT_KEPT])
    data = message.data.raw if isinstance(message.data, RawBSONDocument) else message.data
    data = data[:RAW_KEPT] if isinstance(data, (bytes, str)) else data
    as_text = {'error': error, 'data': _text(data)}
    for letter, meta in (({'error': error, 'data': data}, message.meta), (as_text, message.meta)):
        with suppress(DataError):
            return _encoded(letter, meta, message.token)
    return _encoded(as_text, _text(message.meta), message.token)


def _encoded(data: Any, meta: Any, token: Any, codec: Codec = CODEC) -> _Encoded:
    """A message with its token; DataError if they cannot be stored together."""
    raw, frozen = encode_both(data, meta, codec)
    size = len(raw) + (0 if frozen is None else len(frozen.raw))
    if size > MAX_MESSAGE_BYTES // 2 and (size := size + _token_size(token)) > MAX_MESSAGE_BYTES:
        raise DataError(f'data, meta and token have {size:,} bytes, MongoDB stores at most {MAX_MESSAGE_BYTES:,}')
    return _Encoded(raw, frozen, token)


def _token_size(token: Any) -> int:
    try:
        return len(to_bson({'token': token}))
    except Exception as exc:
        raise ArgumentError(f'MongoDB cannot store the token {_text(token)[:200]}: {exc}') from None


def _text(value: Any) -> str:
    try:
        return store.storable(repr(value)[:TEXT_KEPT])
    except Exception:
        return f'<{type(value).__name__}>'
