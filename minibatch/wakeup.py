"""Tells idle consumers that messages were appended: one change stream per process and database.

It is a hint, and polling stays the truth: a standalone server has no change streams, and one that breaks is opened
again. It is open only while a consumer listens.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from pymongo.errors import OperationFailure, PyMongoError

from . import store
from .connection import Target, reason_of
from .store import Doc

logger = logging.getLogger(__name__)

MAX_WAIT = 1.0
REOPEN_PAUSE = 1.0

_listeners: dict[tuple[int, Target], Listener] = {}


class Listener:
    """The change stream of this process for one database."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._calls: dict[object, tuple[str, Callable[[Doc], None]]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.supported = True
        self.is_open = False

    def add(self, key: object, stream: str, call: Callable[[Doc], None]) -> None:
        """Call `call` after each append to `stream` with its place in the log: producer, offset, n.

        When the change stream is opened, it is called once with nothing, for what was appended before.
        """
        with self._changed:
            self._calls[key] = stream, call
            self._changed.notify_all()
            if self._thread is None and self.supported:
                self._thread = threading.Thread(target=self._run, name='minibatch-wakeup', daemon=True)
                self._thread.start()

    def remove(self, key: object) -> None:
        """Call no more."""
        with self._changed:
            self._calls.pop(key, None)
            self._changed.notify_all()

    def _run(self) -> None:
        while self.supported:
            with self._changed:
                if not self._changed.wait_for(lambda: self._calls, timeout=REOPEN_PAUSE * 10):
                    self._thread = None
                    return
            try:
                self._listen()
            except OperationFailure as exc:
                if exc.code in (40573, 40324):  # not a replica set
                    self.supported = False
                    logger.info('no change streams on a standalone server; polling for messages')
                else:
                    self._pause(exc)
            except PyMongoError as exc:
                self._pause(exc)
            finally:
                self.is_open = False

    def _listen(self) -> None:
        with store.watch_inserts(self._target.waiting, MAX_WAIT) as events:
            self.is_open = True
            for _, call in list(self._calls.values()):
                call({})
            while self._calls:
                event = events.try_next()
                if event is not None:
                    record = event['fullDocument']
                    for stream, call in list(self._calls.values()):
                        if stream == record.get('stream'):
                            call(record)

    def _pause(self, exc: Exception) -> None:
        logger.info('change stream broken, opening it again: %s', reason_of(exc))
        with self._changed:
            self._changed.wait(REOPEN_PAUSE)


def listener(target: Target) -> Listener:
    """The listener of this process for a database."""
    return _listeners.setdefault((os.getpid(), target), Listener(target))
