"""Where functions run: what ``executor=`` may say, and how it is opened and closed.

An address, such as ``dask://host:8786``, is for the executor that has registered its scheme, as an entry point of the
group ``minibatch.executors``: a class that is called with the address. A client of Dask is for the same class: it has a
method ``submit``, but keeps none of what `minibatch.abc.Executor` promises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from .abc import Completion, Executor
from .connection import masked
from .errors import ArgumentError

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
        try:
            done.set_result(fn())
        except Exception as exc:
            done.set_exception(exc)
        return done


NAMED: dict[str, type | None] = {'inline': InlineExecutor, 'threads': ThreadPoolExecutor, 'processes': None}


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
        getattr(executor, 'shutdown', lambda: None)()


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
        f'{masked(str(given))!r}; pip install minibatch[dask] brings what dask://host:8786 needs'
    )
