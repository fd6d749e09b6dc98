"""Commits windows in a thread of its own, many at a time, while the next ones are claimed and dispatched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from . import ledger
from .progress import Claim
from .store import DB


class Commits:
    """The commits of a consumer group, one after the other.

    Args:
        db: written at majority.
        epoch: that of the lease.
        wake: called, in another thread, when a commit is done.
    """

    def __init__(self, db: DB, epoch: int, wake: Callable[[], None]) -> None:
        self._db, self._epoch, self._wake = db, epoch, wake
        self._given: SimpleQueue[tuple[Future[None], list[Claim]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name='minibatch-commit', daemon=True)
        self._thread.start()
        self._waiting: list[Claim] = []
        self._under_way: list[Claim] = []
        self._future: Future[None] | None = None

    @property
    def numbers(self) -> set[int]:
        """The numbers of the windows that are to be committed, or may be already."""
        return {claim.number for claim in (*self._under_way, *self._waiting)}

    def add(self, claims: list[Claim]) -> None:
        """Commit these windows, with others that wait."""
        self._waiting += claims
        self._go_on()

    def take_done(self) -> list[Claim]:
        """The windows that were committed since this was called last.

        Raises:
            LeaseLostError: if one of them is no longer ours.
            PyMongoError: if that is not known.
        """
        if self._future is None or not self._future.done():
            return []
        future, self._future = self._future, None
        future.result()
        done, self._under_way = self._under_way, []
        self._go_on()
        return done

    def close(self) -> None:
        """Commit what waits, as far as that goes, and end the thread."""
        if self._waiting:
            self._given.put((Future(), self._waiting))
        self._given.put(None)
        self._thread.join()

    def _go_on(self) -> None:
        if self._future is None and self._waiting:
            self._under_way, self._waiting = self._waiting, []
            self._future = Future()
            self._future.add_done_callback(lambda _: self._wake())
            self._given.put((self._future, self._under_way))

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            future, claims = given
            try:
                self._commit(claims)
                future.set_result(None)
            except BaseException as exc:
                future.set_exception(exc)

    def _commit(self, claims: list[Claim]) -> None:
        ids = [claim.id for claim in claims if not claim.committed]
        if ids:
            ledger.commit_windows(self._db, ids, self._epoch)
