"""Notices that MongoDB is away, says so, and ends the waits of a consumer that is told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from . import connection
from .connection import Target

logger = logging.getLogger(__name__)

TICK = 0.5
PATIENCE = 1.0  # seconds, before it is said


class AwayWatch:
    """A thread that says once when MongoDB is away, and once when it is back.

    Meanwhile the thread that made it may wait in pymongo for a server, for half a minute and longer. Once that is told
    to stop, its waits are ended.

    Args:
        name: of the consumer, for the log.
        where: the MongoDB.
        is_told_to_stop: whether the consumer is.
    """

    def __init__(self, name: str, where: Target, is_told_to_stop: Callable[[], bool]) -> None:
        self._name, self._where, self._is_told_to_stop = name, where, is_told_to_stop
        self._waiting = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name='minibatch-away', daemon=True)

    def __enter__(self) -> AwayWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._where.is_away:
            logger.warning('%s: stopped while MongoDB is away; what was not committed is done again', self._name)

    def _run(self) -> None:
        since: float | None = None
        told = False
        while not self._ended.wait(TICK):
            if not self._where.is_away:
                if told and since is not None:
                    logger.warning('%s: MongoDB is back after %.0f s', self._name, time.monotonic() - since)
                since, told = None, False
                continue
            since = since or time.monotonic()
            if not told and time.monotonic() - since >= PATIENCE:
                when = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(time.time() - time.monotonic() + since))
                logger.warning('%s: MongoDB is away since %s, waiting: %s', self._name, when, self._where.why_away())
                told = True
            if self._is_told_to_stop():
                connection.end_wait(self._waiting)
