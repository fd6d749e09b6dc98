"""What the documents of streams say, as this process knows it, and the end of what is older than their max_age.

The document of a stream is the one truth. It is read again at least once a minute for each stream that this process
has opened, and before anything is deleted. So what another process has set or unset holds here too, and a stream that
was deleted, or dropped with its database, deletes nothing any more. One thread does that for all streams of a process.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

from . import clock, store
from .connection import Target, reason_of
from .store import DB

logger = logging.getLogger(__name__)

READ_PAUSE = 60.0  # seconds, at most, until a document is read again
EXPIRE_PAUSES = 0.1, 60.0
PAUSE_PER_LOOK = 50.0  # so that a look at many producers takes no more than a part of a core
RETRY_PAUSE = 1.0
CHUNK = 1000


class Settings:
    """What the document of a stream said when this process read it last.

    Attributes:
        max_age: seconds for which messages are kept, or None.
        max_backlog: how many messages may wait, or None.
        on_full: 'block' or 'raise'.
    """

    max_age: float | None = None
    max_backlog: int | None = None
    on_full: str = 'block'

    def __init__(self, where: Target, name: str) -> None:
        self.where, self.name = where, name
        self.due = 0.0  # by the monotonic clock
        self._look_at = 0.0  # when messages may have become too old
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        said = {'max_age': self.max_age, 'max_backlog': self.max_backlog, 'on_full': self.on_full}
        return arrived, (self.where, self.name, said)

    def read(self) -> None:
        """Read the document of the stream again."""
        self.take(store.find_stream(self.where.majority, self.name))

    def take(self, doc: dict[str, Any]) -> None:
        """The document says this; an empty one, that there is none, says nothing."""
        if doc.get('max_age') != self.max_age:
            self._look_at = 0.0
        self.max_age, self.max_backlog = doc.get('max_age'), doc.get('max_backlog')
        self.on_full = doc.get('on_full') or 'block'

    def tend(self, db: DB, doc: dict[str, Any]) -> None:
        """Delete what is too old by the document, which was read just now, and say when this is due again."""
        self.take(doc)
        pause = READ_PAUSE
        try:
            if self.max_age is not None and time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + self._expire(db, self.max_age)
            self._failed = False
        except Exception as exc:  # whatever it is, other streams are to be tended
            if not self._failed:
                logger.warning('old messages of stream %r not deleted, trying again: %s', self.name, reason_of(exc))
            self._failed, pause = True, RETRY_PAUSE
        if self.max_age is not None:
            pause = min(pause, max(self._look_at - time.monotonic(), 0.0))
        self.due = time.monotonic() + pause

    def _expire(self, db: DB, max_age: float) -> float:
        """Delete what is older; returns after how many seconds there may be more."""
        begun = time.monotonic()
        now = clock.now() if self.where.is_mock else clock.aware(store.server_time(db))
        deleted, oldest = store.delete_older(db, self.name, now - timedelta(seconds=max_age))
        if deleted:
            logger.info('%d messages of stream %r were older than %g s', deleted, self.name, max_age)
        until_next = max_age if oldest is None else (oldest - now).total_seconds() + max_age
        shortest, longest = EXPIRE_PAUSES
        pause = max(until_next, min(max(max_age / 10, shortest), longest))
        return pause if deleted else max(pause, PAUSE_PER_LOOK * (time.monotonic() - begun))


_known: WeakValueDictionary[tuple[Target, str], Settings] = WeakValueDictionary()
_tended: dict[tuple[Target, str], Settings] = {}
_changed = threading.Condition()
_tending_in = 0  # the process that has the thread


def settings_of(where: Target, name: str) -> Settings:
    """The settings of a stream, the same ones for all in this process."""
    with _changed:
        settings = _known.get((where, name))
        if settings is None:
            settings = _known[where, name] = Settings(where, name)
        return settings


def opened(where: Target, name: str, doc: dict[str, Any]) -> Settings:
    """A stream was opened, and this is its document: from now on it is tended."""
    settings = settings_of(where, name)
    with _changed:
        settings.take(doc)
        settings.due = time.monotonic() + (0.0 if settings.max_age is not None else READ_PAUSE)
        _tended[where, name] = settings
        look_after()
        _changed.notify_all()
    return settings


def look_after() -> None:
    """Have a thread of this process look after its streams, also those that it has inherited as a forked child."""
    global _tending_in
    with _changed:
        if _tended and _tending_in != os.getpid():
            _tending_in = os.getpid()
            threading.Thread(target=_run, name='minibatch-settings', daemon=True).start()


def arrived(where: Target, name: str, doc: dict[str, Any]) -> Settings:
    """The settings of a stream that was sent here; until its document is read, they are those where it came from."""
    with _changed:
        settings = _known.get((where, name))
    return opened(where, name, doc) if settings is None else settings


def deleted(where: Target, name: str) -> None:
    """A stream was deleted here: nothing holds for it any more."""
    with _changed:
        settings = _tended.pop((where, name), None)
        if settings is not None:
            settings.take({})


def _run() -> None:
    while True:
        with _changed:
            now = time.monotonic()
            next_due = min((each.due for each in _tended.values()), default=now + READ_PAUSE)
            if next_due > now:
                _changed.wait(next_due - now)
            due: dict[Target, list[Settings]] = defaultdict(list)
            for each in _tended.values():
                if each.due <= time.monotonic():
                    due[each.where].append(each)
        for where, settings in due.items():
            for at in range(0, len(settings), CHUNK):
                _tend(where, settings[at : at + CHUNK])


def _tend(where: Target, settings: list[Settings]) -> None:
    if not where.is_connected:  # as after `disconnect`, or in a forked child
        _put_off(settings, READ_PAUSE)
        return
    db = where.majority  # once: when its client is closed meanwhile, there shall be no new one
    try:
        docs = store.find_streams(db, [each.name for each in settings])
    except Exception:  # whoever does something with these streams says so, and others are to be tended
        _put_off(settings, RETRY_PAUSE)
        return
    for each in settings:
        if each.name in docs:
            each.tend(db, docs[each.name])
        else:
            _forget(each)


def _put_off(settings: list[Settings], seconds: float) -> None:
    for each in settings:
        each.due = time.monotonic() + seconds


def _forget(settings: Settings) -> None:
    """The document of a stream is gone: whoever opens the stream again says so."""
    with _changed:
        if settings.due <= time.monotonic():  # else it was opened meanwhile
            _tended.pop((settings.where, settings.name), None)
            settings.take({})


def _after_fork() -> None:
    # The thread stays behind, and may have held the lock.
    global _changed
    _changed = threading.Condition()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)
