"""Where functions run: what ``executor=`` may say, and how it is opened and closed.

An address, such as ``dask://host:8786``, is for the executor that has registered its scheme, as an entry point of the
group ``minibatch.executors``: a class that is called with the address. A client of Dask is for the same class: it has a
method ``submit``, but keeps none of what `minibatch.abc.Executor` promises.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from importlib.metadata import entry_points
from queue import SimpleQueue
from typing import Any

from . import functions, signals
from .abc import Completion, Executor
from .connection import masked
from .errors import ArgumentError, install_hint

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0
ENTRY_POINTS = 'minibatch.executors'
CLIENTS = {'distributed': 'dask'}  # packages, and the scheme of what their clients are connected to


class InlineExecutor:
    """An executor that runs in this process, and has done so when `submit` returns.

    Example:
        >>> InlineExecutor().submit(lambda: 1 + 1).result()
        2
    """

    def submit(self, fn: Callable[[], Any]) -> Completion:
        """Run `fn` now."""
        done: Future[Any] = Future()
        _settle(done, fn)
        return done


class Threads:
    """An executor of threads, which keep the process from ending no longer than `shutdown` waits for them.

    Args:
        max_workers: how many threads.
    """

    def __init__(self, max_workers: int = 1) -> None:
        self._most = max_workers
        self._given: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._waiting: set[Future[Any]] = set()

    def submit(self, fn: Callable[[], Any]) -> Completion:
        """Run `fn` in a thread that is free."""
        done: Future[Any] = Future()
        self._waiting.add(done)
        self._given.put((done, fn))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name='minibatch-worker', daemon=True)
            self._threads.append(thread)
            thread.start()
        return done

    def shutdown(self) -> None:
        """Drop what has not begun, and wait for what has."""
        for done in list(self._waiting):
            done.cancel()
        for _ in self._threads:
            self._given.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while (given := self._given.get()) is not None:
                done, fn = given
                self._waiting.discard(done)
                if done.set_running_or_notify_cancel():
                    _settle(done, fn)
        finally:
            functions.close_loop()


def _settle(done: Future[Any], fn: Callable[[], Any]) -> None:
    try:
        done.set_result(fn())
    except BaseException as exc:
        if signals.is_signal(exc):
            raise
        done.set_exception(exc)


NAMED: dict[str, type | None] = {'inline': InlineExecutor, 'threads': Threads, 'processes': None}


def resolve(given: Any) -> Any:
    """What ``executor=`` means: None for worker processes, else a class or an instance, or the address as it is.

    Raises:
        ArgumentError: if it is none of them, naming those there are.
        ImportError: if what an address needs is not installed, saying what to install.
    """
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]
    if _says_where(given):
        _class_of(given)
    elif given is not None and not callable(getattr(given, 'submit', None)):
        raise ArgumentError(f'executor must have a method submit(fn); {given!r} has not')
    elif given is not None and not isinstance(given, type):
        functions.check('executor.submit', given.submit, 'what to run', plain=True)
    return given


def takes_workers(given: Any) -> bool:
    """Whether it is made for a number of workers, and itself runs no more at once."""
    return isinstance(given, type) and 'max_workers' in inspect.signature(given).parameters


@contextmanager
def opened(given: Any, workers: int) -> Iterator[Executor]:
    """The executor of a class, an address, a client or an instance; closed at the end if it was made here."""
    if _says_where(given):
        executor = _class_of(given)(given)
    elif not isinstance(given, type):
        yield given
        return
    else:
        executor = given(max_workers=workers) if takes_workers(given) else given()
    try:
        yield executor
    finally:
        _close(executor)


def _close(executor: Any) -> None:
    """Shut an executor down; one that waits for what does not end is left behind."""
    done: Future[Any] = Future()
    threading.Thread(target=_settle, args=(done, getattr(executor, 'shutdown', lambda: None)), daemon=True).start()
    try:
        done.result(CLOSE_TIMEOUT)
    except TimeoutError:
        logger.warning('%r did not shut down within %g s: a function may not have returned, or have left a thread',
                       executor, CLOSE_TIMEOUT)  # fmt: skip


def _says_where(given: Any) -> bool:
    """Whether it is an address, or a client that is connected to one."""
    return isinstance(given, str) or bool(_scheme_of(given))


def _scheme_of(given: Any) -> str:
    """That of an address, or for a client that of the address it is connected to."""
    if isinstance(given, str):
        scheme, found, rest = given.partition('://')
        return scheme if found and rest else ''
    packages = {base.__module__.partition('.')[0] for base in type(given).__mro__}
    return next((scheme for package, scheme in CLIENTS.items() if package in packages), '')


def _class_of(given: Any) -> Callable[[Any], Any]:
    scheme = _scheme_of(given)
    registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if scheme in registered:
        made: Callable[[Any], Any] = registered[scheme].load()
        return made
    names = [repr(name) for name in NAMED] + [f"'{name}://...'" for name in sorted(registered)]
    raise ArgumentError(
        f'executor must be one of {", ".join(names)}, or a class or an instance with submit(fn), not '
        f'{masked(str(given))!r}; {install_hint("dask")} brings what dask://host:8786 needs'
    )
