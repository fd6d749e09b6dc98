"""Messages of a stream as they arrive, for whoever wants to look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from heapq import merge

from . import clock, store
from .connection import Target
from .messages import Message, MessageWindow
from .store import Span

PAUSE = 0.2
QUIET = 1.0
PAUSES_PER_LOOK = 20.0  # so that many producers do not keep it busy
CHUNK = 1000


def tail(target: Target, stream: str, last: int, follow: bool) -> Iterator[Message | None]:
    """See `minibatch.Stream.tail`."""
    db = target.majority
    ends = store.log_ends(db, stream)
    if last:
        newest: list[Message] = []
        for producer, end in ends.items():  # one after the other, so that not all are in memory
            found_here = _messages(target, stream, [Span(producer, max(end - last, 0), end)])
            newest = list(merge(newest, found_here, key=lambda message: message.created))[-last:]
        yield from newest
    quiet = time.monotonic()
    while follow:
        begun, found = time.monotonic(), store.log_ends(db, stream)
        took = time.monotonic() - begun
        if found.keys() - ends.keys():
            ends = {**store.log_starts(db, stream), **ends}
        chunk = max(CHUNK // max(len(found), 1), 1)  # so that a flood is read in pieces
        spans = [
            Span(producer, ends.get(producer, 0), min(end, ends.get(producer, 0) + chunk))
            for producer, end in found.items() if end > ends.get(producer, 0)
        ]  # fmt: skip
        messages = _messages(target, stream, spans)
        yield from messages
        ends.update((span.producer, span.end) for span in spans)
        if messages or time.monotonic() - quiet > QUIET:
            quiet = time.monotonic()
            if not messages:
                yield None
        if not spans:
            time.sleep(max(PAUSE, min(took * PAUSES_PER_LOOK, QUIET)))


def _messages(target: Target, stream: str, spans: list[Span]) -> list[Message]:
    """The messages of spans that are still stored, by time."""
    records = [(span, store.read_records(target.majority, stream, span)) for span in spans]
    return MessageWindow('', stream, 0, clock.now(), None, None, 1, records).messages
