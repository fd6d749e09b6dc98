"""Does things with windows in a thread of its own, many at a time, while the next ones are claimed and dispatched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

from . import connection
from .connection import Target
from .progress import Claim

T = TypeVar('T')


class Beside(Generic[T]):
    """A thread that is given windows, and does one list of them after the other: it commits them, for example.

    Args:
        name: of the thread.
        where: the MongoDB that it needs.
        work: called in the thread with all windows that wait.
        wake: called in the thread when that is done.
    """

    def __init__(self, name: str, where: Target, work: Callable[[list[Claim]], T], wake: Callable[[], None]) -> None:
        self._where, self._work, self._wake = where, work, wake
        self._waiting: list[Claim] = []
        self._under_way: list[Claim] = []
        self._future: Future[T] | None = None
        self._given: SimpleQueue[tuple[Future[T], list[Claim]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __bool__(self) -> bool:
        """Whether it has windows that were not taken yet."""
        return bool(self._under_way or self._waiting)

    @property
    def numbers(self) -> set[int]:
        """The numbers of the windows that it has, and that were not taken yet."""
        return {claim.number for claim in (*self._under_way, *self._waiting)}

    def add(self, claims: list[Claim]) -> None:
        """Do these windows, with others that wait."""
        self._waiting += claims
        self._go_on()

    def take_done(self) -> tuple[list[Claim], T] | None:
        """The windows done since this was called last, with what `work` returned. It raises what that raised."""
        if self._future is None or not self._future.done():
            return None
        future, self._future = self._future, None
        result = future.result()
        done, self._under_way = self._under_way, []
        self._go_on()
        return done, result

    def close(self, wait: bool) -> None:
        """End the thread, with `wait` when it has done what waits, else without looking at it again."""
        if wait and self._waiting:
            self._given.put((Future(), self._waiting))
        self._given.put(None)
        if wait and self._thread.ident is not None:
            connection.join(self._thread, self._where)

    def _go_on(self) -> None:
        if self._future is None and self._waiting:
            if self._thread.ident is None:
                self._thread.start()
            self._under_way, self._waiting = self._waiting, []
            self._future = Future()
            self._future.add_done_callback(lambda _: self._wake())
            self._given.put((self._future, self._under_way))

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            future, claims = given
            try:
                future.set_result(self._work(claims))
            except BaseException as exc:
                future.set_exception(exc)
