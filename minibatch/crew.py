"""Who does the windows of a consumer: the function, the executor it runs in, and how much that is given at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from . import executors
from .abc import Executor
from .connection import Target
from .job import Job
from .marshaller import Portable
from .worker import Limit, Pool

FORGETTING = 0.7  # how much of what was known stays when the next task is measured


class Crew:
    """The function of a consumer and, while it is `opened`, the executor.

    Args:
        job: what is asked for: `executor`, `max_workers` and `timeout`; whoever runs an emitter may still change them.
        function: the user's function, as it travels.

    Attributes:
        seconds_per_window: how long one took lately; None at first.
        limit: the timeout, as a task carries it.
    """

    executor: Executor

    def __init__(self, job: Job, function: Portable | None) -> None:
        self.function = function
        self.limit: Limit | None = None
        self.seconds_per_window: float | None = None
        self._job = job
        self._holds_back = True  # whether the executor itself runs no more at once than it was made for

    @property
    def _asked(self) -> int:
        return self._job.max_workers or os.cpu_count() or 1

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return getattr(self.executor, 'workers', self._asked)

    @property
    def at_once(self) -> int:
        """How many tasks the executor is given at once."""
        most: int | None = getattr(self.executor, 'workers', None)  # see `minibatch.abc.BoundedExecutor`
        if most is not None:
            return min(2 * most, self._job.max_workers or 2 * most)
        if self._holds_back:
            return 2 * self._asked
        return self._job.max_workers or 2 * self._asked  # it may run all that it is given at once

    def measured(self, seconds: float) -> None:
        """A window took so long."""
        known = self.seconds_per_window
        self.seconds_per_window = seconds if known is None else FORGETTING * known + (1 - FORGETTING) * seconds

    def check_portable(self) -> None:
        """Raise `PortabilityError` if the function cannot be sent to a worker process."""
        if self.function is not None:
            self.function.check()

    @contextmanager
    def opened(self, target: Target) -> Iterator[None]:
        """Open the executor, and close it if it was made here."""
        given = self._job.executor
        self._holds_back = given is None or executors.takes_workers(given)
        if given is None:
            with self._limited(), Pool(self._asked, self.function, target) as self.executor:
                yield
        else:
            with executors.opened(given, self._asked) as self.executor:
                yield

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self._job.timeout is None:
            yield
            return
        with TemporaryDirectory(prefix='minibatch-', ignore_cleanup_errors=True) as folder:
            self.limit = Limit(self._job.timeout, folder)
            yield
