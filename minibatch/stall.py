"""Notices when windows wait and none is finished, whatever the reason: a hanging sink, a failing function."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pymongo.errors import PyMongoError

from . import connection
from .connection import Target

logger = logging.getLogger(__name__)

TICK = 1.0


class StallWatch:
    """A thread that says once when windows have waited so long, and once when they go on.

    Args:
        name: of the consumer, for the log.
        where: its MongoDB.
        after: seconds.
        look: returns how many windows are waiting, and how many have been finished so far.
        report: called with the seconds since when nothing was finished, or None when that is over.
    """

    def __init__(
        self, name: str, where: Target, after: float, look: Callable[[], tuple[int, int]],
        report: Callable[[float | None], None],
    ) -> None:  # fmt: skip
        self._name, self._where, self._after, self._look, self._report = name, where, after, look, report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name='minibatch-stall', daemon=True)

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        connection.join(self._thread, self._where)

    def _run(self) -> None:
        since, before, stalled = time.monotonic(), -1, False
        while not self._stopped.wait(min(self._after / 4, TICK)):
            waiting, finished = self._look()
            if not waiting or finished != before:
                since, before = time.monotonic(), finished
                if stalled:
                    logger.warning('%s: windows are being finished again', self._name)
                    stalled = self._told(None)
            elif not stalled and time.monotonic() - since >= self._after:
                logger.warning('%s: stalled: %d windows wait, and none has been finished for %g s', self._name,
                               waiting, self._after)  # fmt: skip
                stalled = self._told(time.monotonic() - since)

    def _told(self, seconds: float | None) -> bool:
        with suppress(PyMongoError):
            self._report(seconds)
        return seconds is not None
