"""The log of a stream as it is planned from: read where it is stored, and told when a part of it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from . import store
from .connection import Target
from .progress import Log, Progress
from .store import Span

STOP_CHECK = 100_000  # messages whose times are read before it is asked again whether to stop


class LogView(Log):
    """The log as it is stored.

    Args:
        target: where it is stored.
        name: that of the stream.
        progress: how far the group is.
        check_stop: called between two reads; raises if the consumer is told to stop.
        expired: called with how many messages were deleted before they were read.
    """

    def __init__(
        self, target: Target, name: str, progress: Progress, check_stop: Callable[[], None],
        expired: Callable[[int], None],
    ) -> None:  # fmt: skip
        super().__init__(progress)
        self._target = target
        self._name = name
        self._check_stop = check_stop
        self._expired = expired

    def times(self, span: Span) -> Iterator[tuple[int, int, list[datetime]]]:
        read = STOP_CHECK
        for record in store.read_times(self._target.majority, self._name, span):
            if read >= STOP_CHECK:
                self._check_stop()
                read = 0
            read += record[1]
            yield record

    def messages(self, span: Span, names: list[str] | None) -> Iterator[tuple[int, datetime, Any]]:
        self._check_stop()
        db, name, at = self._target.majority, self._name, span.start
        for message in store.read_messages(db, name, span, names):
            if message[0] > at:
                break
            yield message
            at = message[0] + 1
        if at == span.end:
            return
        missing = 0  # they are deleted, or a new primary does not see them yet
        with self._target.client.start_session(causal_consistency=True) as session:
            store.see_all(db, name, session)
            for message in store.read_messages(db, name, span._replace(start=at), names, session):
                missing += message[0] - at
                yield message
                at = message[0] + 1
        if missing + span.end - at:
            self._expired(missing + span.end - at)
