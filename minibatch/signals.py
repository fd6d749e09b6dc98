"""SIGTERM and Ctrl-C: the first one asks a process to end, a later one insists."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL = 0.5  # a terminal and a wrapper may both pass on the same Ctrl-C


@contextmanager
def handled(ask: Callable[[], None], insist: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile a signal calls `ask`, and one half a second or more after the first `insist`, with its number.

    Only the main thread hears signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        first = first or time.monotonic()
        if time.monotonic() - first > SAME_SIGNAL:
            insist(number)
        else:
            ask()

    with caught(handle):
        yield


@contextmanager
def caught(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Meanwhile a signal calls `handle`, with its number and the frame; in the main thread only."""
    before = {number: signal.signal(number, handle) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
