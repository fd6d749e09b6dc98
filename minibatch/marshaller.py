"""What crosses from the consumer to its workers: functions, by value where they must be."""

from __future__ import annotations

import hashlib
import inspect
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import cloudpickle

from .errors import PortabilityError, UnknownFunctionError

MAX_LOADED = 32  # functions that a worker keeps; one that serves many consumers is sent others again

_loaded: OrderedDict[str, Any] = OrderedDict()
_lock = threading.Lock()
_loading: ContextVar[bool] = ContextVar('minibatch_loading', default=False)


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
    except Exception as exc:
        raise PortabilityError(
            f'the function cannot be loaded by a worker on {platform.node()}: {type(exc).__name__}: {exc}. '
            f'Install there what it needs, in the same version.'
        ) from exc
    finally:
        _loading.reset(reset)


def is_loading() -> bool:
    """Whether a module that is being imported is imported for a function of it, in a worker."""
    return _loading.get()


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
    for name, value in _references(fn).items():
        try:
            cloudpickle.dumps(value)
        except Exception:
            return (
                f'{name_of(fn)} cannot be sent to a worker process, because its variable {name!r} '
                f'({type(value).__name__}) cannot be pickled. Make it inside the function, or use executor= with '
                f'an executor that stays in this process.'
            )
    return f'{name_of(fn)} cannot be sent to a worker process: {exc}'


def _references(fn: Callable[..., Any]) -> dict[str, Any]:
    if inspect.ismethod(fn):
        return {f'self.{name}': value for name, value in vars(fn.__self__).items()}
    try:
        closure = inspect.getclosurevars(fn)
    except (TypeError, ValueError):
        return dict(getattr(fn, '__dict__', {}))
    return {**closure.globals, **closure.nonlocals}
