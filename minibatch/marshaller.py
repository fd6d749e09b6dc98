"""What crosses from the consumer to its workers: functions, by value where they must be."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property, partial
from multiprocessing.process import current_process
from typing import Any, cast

import cloudpickle

from . import store
from .connection import masked_text
from .errors import PortabilityError, UnknownFunctionError

MAX_LOADED = 32  # functions that a worker keeps; one that serves many consumers is sent others again

_loaded: OrderedDict[str, Any] = OrderedDict()
_lock = threading.RLock()  # what is loaded may load another
_loading: ContextVar[bool] = ContextVar('minibatch_loading', default=False)
_working: ContextVar[bool] = ContextVar('minibatch_working', default=False)


class Portable:
    """A function that can be pickled even if it is a lambda, nested, or defined in a script or notebook.

    It is pickled only when it crosses a process, so executors that stay in this process call the function itself.
    A worker unpickles a function once. `install` sends it ahead, so that tasks need only name it.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.sent_ahead = False

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    @cached_property
    def blob(self) -> bytes:
        """The pickled function.

        Raises:
            PortabilityError: naming what it refers to that cannot be pickled.
        """
        return self.check()

    def check(self) -> bytes:
        """Pickle the function as it is now; what it refers to may still change before it is sent."""
        try:
            return bytes(cloudpickle.dumps(self.fn))
        except Exception as exc:
            raise PortabilityError(_explain(self.fn, exc)) from exc

    @cached_property
    def digest(self) -> str:
        """What stands for the function where it is known."""
        return hashlib.sha256(self.blob).hexdigest()

    def sent(self, ahead: bool) -> Portable:
        """The same, to be pickled with the function, or for a worker that got it ahead."""
        other = Portable(self.fn)
        other.blob, other.digest, other.sent_ahead = self.blob, self.digest, ahead
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.digest, None if self.sent_ahead else self.blob)


def install(digest: str, blob: bytes) -> None:
    """Make the function known in this worker.

    Raises:
        PortabilityError: if something that it needs is not here.
    """
    with _lock:
        if digest not in _loaded:
            _loaded[digest] = _loads(blob)
        _loaded.move_to_end(digest)
        if len(_loaded) > MAX_LOADED:
            _loaded.popitem(last=False)


def _loads(blob: bytes) -> Any:
    reset = _loading.set(True)
    try:
        return cloudpickle.loads(blob)
    except BaseException as exc:  # also what a module does at its top level
        raise PortabilityError(
            f'the function cannot be loaded by a worker on {platform.node()}: {store.in_words(exc)}. '
            f'Install there what it needs, in the same version.'
        ) from exc
    finally:
        _loading.reset(reset)


def is_loading() -> bool:
    """Whether a module is being imported in a worker, or in a process that somebody's pool has just started.

    What it starts at its top level is for the process that imported it first.
    """
    return _loading.get() or getattr(current_process(), '_inheriting', False) or (_working.get() and _imports())


@contextmanager
def working() -> Iterator[None]:
    """Meanwhile this process does the work of another one."""
    reset = _working.set(True)
    try:
        yield
    finally:
        _working.reset(reset)


def _imports() -> bool:
    """Whether this is called from the top level of a module which is not that of this process."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == '<module>' and frame.f_globals.get('__name__') != '__main__':
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _load(digest: str, blob: bytes | None) -> Portable:
    if blob is not None:
        install(digest, blob)
    try:
        return Portable(_loaded[digest])
    except KeyError:
        raise UnknownFunctionError from None


def name_of(fn: Any) -> str:
    """How errors and logs name a function."""
    return str(getattr(fn, '__qualname__', None) or getattr(type(fn), '__qualname__', fn))


def _explain(fn: Callable[..., Any], exc: Exception) -> str:
    """Why a function cannot be sent: the name of what it refers to that cannot, through functions and containers."""
    path, value, seen = '', cast(Any, fn), {id(fn)}
    while (found := _culprit(value, seen)) is not None:
        name, value, exc = found
        path += name if name.startswith('[') or not path else f'.{name}'
    reason = masked_text(str(exc))
    if not path:
        return f'{name_of(fn)} cannot be sent to a worker process: {reason}'
    return (
        f'{name_of(fn)} cannot be sent to a worker process, because its variable {path!r} ({type(value).__name__}) '
        f'cannot be pickled: {reason}. Make it inside the function, or use executor= with an executor that stays in '
        f'this process.'
    )


def _culprit(value: Any, seen: set[int]) -> tuple[str, Any, Exception] | None:
    """What `value` refers to that cannot be pickled, but for those that were seen: its name, itself, and why."""
    for name, each in _references(value).items():
        try:
            cloudpickle.dumps(each)
        except Exception as exc:
            if id(each) not in seen:
                seen.add(id(each))
                return name, each, exc
    return None


def _references(value: Any) -> dict[str, Any]:
    """What goes with a function, a partial of one, a callable object, or a container of them, by name."""
    if inspect.ismethod(value):
        return {f'self.{name}': each for name, each in getattr(value.__self__, '__dict__', {}).items()}
    if isinstance(value, partial):
        return {'func': value.func, **{f'args[{i}]': each for i, each in enumerate(value.args)}, **value.keywords}
    if isinstance(value, dict):
        return {f'[{name!r}]': each for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return {f'[{i}]': each for i, each in enumerate(value)}
    if not inspect.isfunction(value):
        return dict(vars(value)) if callable(value) and hasattr(value, '__dict__') else {}
    with suppress(TypeError, ValueError):
        closure = inspect.getclosurevars(value)
        defaults = {name: each.default for name, each in inspect.signature(value).parameters.items()}
        return {**closure.globals, **closure.nonlocals, **defaults, **vars(value)}
    return dict(vars(value))
