"""What a function is given: a window, and its messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from . import clock, store
from .fields import stored_key
from .store import Span
from .unreadable import Unreadable


@dataclass(frozen=True)
class Message:
    """One message: its `data`, when it was `created` (aware, UTC), and its place in the log of its producer."""

    data: dict[str, Any]
    created: datetime
    producer: str
    offset: int
    meta: Any = None


class MessageWindow:
    """A window as it is given to a function.

    Attributes:
        id: the same over every retry; a sink that upserts on it shows each window once.
        stream: the name of the stream.
        number: the number of the window in its consumer group.
        created: when the window was made.
        start, end: the time span [start, end) of a time window, else None.
        key: with ``key=``, what its messages have in common, else None.
        watermark: with ``timestamp=``, up to when all messages had come, but for late ones, when it was closed.
        attempt: 1 for the first attempt.
        missing: how many of its messages had expired before they were read.

    `as_picked` leaves the messages in the order of `records`, which an emitter has chosen.
    """

    def __init__(
        self,
        id: str,
        stream: str,
        number: int,
        created: datetime,
        start: datetime | None,
        end: datetime | None,
        attempt: int,
        records: list[tuple[Span, list[dict[str, Any]]]],
        as_picked: bool = False,
        key: Any = None,
        watermark: datetime | None = None,
    ) -> None:
        self.key, self.watermark = key, watermark
        self.id, self.stream, self.number, self.created = id, stream, number, created
        self.start, self.end, self.attempt = start, end, attempt
        self._slices = [(span.producer, *piece) for span, found in records for piece in store.trim(span, found)]
        self._count = sum(end - start for _, _, start, end in self._slices)
        self.missing = sum(span.end - span.start for span, _ in records) - self._count
        self._merged = not as_picked and len({producer for producer, *_ in self._slices}) > 1

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data of the messages: those of a producer in its order, those of several by time."""
        if self._merged:
            return [message.data for message in self.messages]
        data: list[dict[str, Any]] = []
        for _, record, start, end in self._slices:
            data += store.batch_of(record)[start:end]
        return data

    @property
    def messages(self) -> list[Message]:
        """The messages with all that is known about them, in the order of `data`."""
        messages = [message for piece in self._slices for message in _messages(*piece)]
        if self._merged:
            # A producer's order holds even if its clock went backwards.
            latest: dict[str, datetime] = {}
            keys = []
            for message in messages:
                latest[message.producer] = max(latest.get(message.producer, message.created), message.created)
                keys.append(latest[message.producer])
            messages = [messages[i] for i in sorted(range(len(messages)), key=keys.__getitem__)]
        return messages

    @property
    def unreadable(self) -> str:
        """Why the first of its messages cannot be read that cannot, or ''."""
        for producer, record, start, end in self._slices:
            if 'unreadable' in record:
                for message in _messages(producer, record, start, end):
                    for value in (message.data, message.meta):
                        if isinstance(value, Unreadable):
                            return f'message {message.offset} of producer {producer} cannot be read: {value["error"]}'
        return ''

    @property
    def newest(self) -> datetime | None:
        """When the newest of its messages was created (aware, UTC), as the record batches say; None of no messages."""
        times = [store.times_of(record)[end - 1] for _, record, _, end in self._slices]
        return clock.aware(max(times)) if times else None

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.data)

    def __repr__(self) -> str:
        return f'<window {self.id} with {self._count} messages>'


def window_of(doc: dict[str, Any], stream: str, records: list[tuple[Span, list[dict[str, Any]]]]) -> MessageWindow:
    """The window that a window document says, with these records for its spans."""
    start, end, watermark = (doc.get(name) and clock.aware(doc[name]) for name in ('start', 'end', 'watermark'))
    return MessageWindow(
        doc['_id'], stream, doc['number'], clock.aware(doc['created']), start, end, int(doc.get('attempts') or 1),
        records, bool(doc.get('picked')), stored_key(doc.get('key')), watermark,
    )  # fmt: skip


def _messages(producer: str, record: dict[str, Any], first: int, end: int) -> Iterator[Message]:
    times = store.times_of(record)
    meta = record.get('meta') or [None] * len(times)
    batch = store.batch_of(record)
    for i in range(first, end):
        yield Message(batch[i], clock.aware(times[i]), producer, int(record['offset']) + i, meta[i])
