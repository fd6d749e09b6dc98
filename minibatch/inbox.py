"""Where the loop of a consumer waits: for tasks that are done, and whatever else is a reason to look at once."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

TICK = 0.1


class Inbox:
    """The end of a wait, from any thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._arrived: list[Any] = []

    def wake(self, item: Any = None) -> None:
        """End the wait; `item` is a task with its completion, or nothing."""
        self._queue.put(item)

    def wait(self, seconds: float = TICK) -> None:
        """Wait until woken, at most so long."""
        with suppress(Empty):
            self._arrived.append(self._queue.get(timeout=max(seconds, 0)))

    def finished(self) -> list[tuple[Any, Any]]:
        """Tasks whose completion has arrived, each with it."""
        with suppress(Empty):
            while True:
                self._arrived.append(self._queue.get_nowait())

        arrived, self._arrived = self._arrived, []
        return [item for item in arrived if item is not None]
