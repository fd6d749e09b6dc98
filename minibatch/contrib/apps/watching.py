"""What the endpoints know of streams and groups: asked for at most once a second, however many look."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pymongo
from pymongo.errors import PyMongoError

import minibatch as mb
from minibatch.errors import MinibatchError

ANSWER_TIMEOUT = 5.0
MIN_AGE = 1.0
SAMPLE_PAUSE = 2.0
HISTORY_SECONDS = 600.0
MAX_POINTS = 30_000  # of all groups together

Streams = list[Any]  # of minibatch.overview.StreamStatus


@dataclass(frozen=True)
class Look:
    """What was found at a time: the status of all streams, or the error that kept it from being found."""

    streams: Streams = field(default_factory=list)
    error: str = ''
    time: float = 0.0


class Watcher:
    """Looks at all streams of a database, and remembers what it saw in the last ten minutes.

    Args:
        url: returns the MongoDB URL; called by the first look.
    """

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._look = Look()
        self._looked = 0.0
        self._samples: deque[dict[str, Any]] = deque()

    def look(self) -> Look:
        """What is known, not older than a second. While MongoDB does not answer, others wait no longer than it does."""
        if not self._lock.acquire(timeout=ANSWER_TIMEOUT):
            return Look(error='MongoDB does not answer', time=time.time())
        try:
            if time.monotonic() - self._looked >= MIN_AGE:
                self._look = self._ask()
                self._looked = time.monotonic()
                self._remember(self._look)
            return self._look
        finally:
            self._lock.release()

    def history(self) -> list[dict[str, Any]]:
        """What was seen lately, for charts: counters at times, of which the differences are rates."""
        with self._lock:
            return list(self._samples)

    def _ask(self) -> Look:
        try:
            with pymongo.timeout(ANSWER_TIMEOUT):
                return Look(mb.status(self._url()), time=time.time())
        except MinibatchError as exc:
            return Look(error=str(exc), time=time.time())
        except PyMongoError as exc:  # it was there when we asked first
            return Look(error=f'MongoDB has failed: {type(exc).__name__}', time=time.time())

    def _remember(self, look: Look) -> None:
        samples = self._samples
        if look.error or (samples and look.time - samples[-1]['time'] < SAMPLE_PAUSE - MIN_AGE / 2):
            return
        streams = {stream.name: {'appended': stream.appended, 'groups': _counters(stream)} for stream in look.streams}
        samples.append({'time': look.time, 'streams': streams})
        size = sum(map(_size, samples))
        while samples[0]['time'] < look.time - HISTORY_SECONDS or (size > MAX_POINTS and len(samples) > 1):
            size -= _size(samples.popleft())


def _counters(stream: Any) -> dict[str, Any]:
    return {
        status.name: {
            'messages': status.group.messages,
            'failures': status.group.failed + status.group.retried,
            'lag': status.lag.messages,
            'seconds': status.group.function.sum,
            'windows': status.group.function.count,
        }
        for status in stream.groups
    }


def _size(sample: dict[str, Any]) -> int:
    return sum(1 + len(stream['groups']) for stream in sample['streams'].values())
