"""SIGTERM and Ctrl-C: the first one asks a process to end, a later one insists."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger(__name__)

LAST_RESORT = 10.0
NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL = 0.5  # a terminal and a wrapper may both pass on the same Ctrl-C

_raised: list[BaseException] = []  # by `end_at_once`; subclasses would have another exit code


def end_at_once(number: int) -> None:
    """End this process by an exception in its main thread, whatever that does; further signals are ignored."""
    for each in NUMBERS:
        signal.signal(each, signal.SIG_IGN)
    exc = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
    _raised.append(exc)
    raise exc


def is_signal(exc: BaseException) -> bool:
    """Whether somebody has asked this process to end; all else that code of a user raises is an error of it."""
    if any(exc is each for each in _raised):
        return True
    in_main = threading.current_thread() is threading.main_thread()
    as_by_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return in_main and as_by_python and isinstance(exc, KeyboardInterrupt)


@contextmanager
def handled(
    ask: Callable[[], None], insist: Callable[[int], None], within: float | None = None
) -> Iterator[None]:  # fmt: skip
    """Meanwhile a signal calls `ask`, and one half a second or more after the first `insist`, with its number.

    So many seconds after the first one this process insists by itself, and after some more it ends, whatever holds it.
    Only the main thread hears signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0
    over = threading.Event()

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if not first and within is not None:
            threading.Thread(target=see_to_it, args=(number, within), daemon=True).start()
        first = first or time.monotonic()
        if time.monotonic() - first > SAME_SIGNAL:
            insist(number)
        else:
            ask()

    def see_to_it(number: int, within: float) -> None:
        if not over.wait(within):
            logger.warning('not ended %g s after %s, and ended now', within, signal.Signals(number).name)
            os.kill(os.getpid(), number)
        if not over.wait(LAST_RESORT):
            end(128 + number)

    try:
        with caught(handle):
            yield
    finally:
        over.set()


def end(code: int) -> None:
    """End this process, whatever goes on in it."""
    names = [each.name for each in threading.enumerate() if each.is_alive() and not each.daemon]
    logger.warning('this process is ended, though threads of it go on: %s', ', '.join(names))
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def end_by(code: int, seconds: float) -> None:
    """When the main thread has ended, let others keep this process from its end for no more than so many seconds."""

    def see_to_it() -> None:
        threading.main_thread().join()
        time.sleep(seconds)
        end(code)

    threading.Thread(target=see_to_it, name='minibatch-end', daemon=True).start()


@contextmanager
def caught(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Meanwhile a signal calls `handle`, with its number and the frame; in the main thread only."""
    before = {number: signal.signal(number, handle) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
