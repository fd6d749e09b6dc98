"""A source at work: in a thread, again when it fails, until it is cancelled or at its end."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

from . import functions, signals
from .abc import Source, SourceStream
from .errors import ArgumentError, MinibatchError
from .store import in_words
from .text import plain

logger = logging.getLogger(__name__)

PAUSES = (1.0, 60.0)
WELL = 60.0
CANCEL_PAUSE = 0.2


def check_contract(name: str, value: Any, contract: type, methods: str) -> None:
    """Raise `ArgumentError` if an object does not have the methods of a contract."""
    if isinstance(value, type):
        raise ArgumentError(f'{name} must be an instance, not the class {value.__name__}')
    if not isinstance(value, contract):
        raise ArgumentError(f'{name} must have {methods}; {type(value).__name__} has not')


def check_source(source: Any) -> None:
    """Raise `ArgumentError` if it is no source, or one that would never run."""
    check_contract('source', source, Source, 'the methods stream and cancel')
    functions.check('source.stream', source.stream, 'the stream')
    functions.check('source.cancel', source.cancel)
    if functions.yields(source.stream):
        raise ArgumentError('source.stream must append to the stream it is given, and not yield: '
                            'stream.append(message) in place of yield message')  # fmt: skip


class Attached:
    """A source attached to a stream.

    Attributes:
        source: the source.
        ended: whether it has come to its end by itself.
    """

    def __init__(self, stream: SourceStream, source: Source) -> None:
        self.source, self._stream = source, stream
        self.ended, self._failure, self._well_at = False, '', math.inf
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether its thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failure(self) -> str:
        """What it failed with last, in words, while it has not run well since, nor come to its end; else ''."""
        return '' if self.ended or self._runs_well else self._failure

    @property
    def _runs_well(self) -> bool:
        return time.monotonic() > self._well_at

    @property
    def cancelled(self) -> bool:
        """Whether it was told to end."""
        return self._cancelled.is_set()

    def run(self) -> None:
        """Run it until its end, or until it is cancelled; what it raises comes out."""
        functions.call(self.source.stream, self._stream, keep=False)
        self._stream.flush()
        self.ended = not self.cancelled

    def start(self) -> None:
        """Run it in a thread."""
        name = f'minibatch-source-{self._stream.name}'
        self._thread = threading.Thread(target=self._run_on, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Cancel it, and wait so long for the end of its thread."""
        self._cancelled.set()
        self._cancel()
        if threading.current_thread() is self._thread:
            return
        deadline = time.monotonic() + timeout
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(CANCEL_PAUSE)
            self._cancel()  # it may have begun just after it was cancelled

    def _cancel(self) -> None:
        try:
            functions.cancel(self.source.cancel, self._thread)
        except BaseException as exc:  # what was to end would go on
            if signals.is_signal(exc):
                raise
            self._log('cannot be cancelled', exc)

    def _run_on(self) -> None:
        try:
            self._run_again_and_again()
        finally:
            functions.close_loop()

    def _run_again_and_again(self) -> None:
        pause, longest = PAUSES
        while not self.cancelled:
            self._well_at = time.monotonic() + WELL
            try:
                self.run()
                return
            except BaseException as exc:  # whatever it is, it ends this run of the source, and not the source
                if self.cancelled:
                    return
                if self._runs_well:
                    pause = PAUSES[0]
                self._failure, self._well_at = in_words(exc), math.inf
                self._log(f'failed, it is started again in {pause:g} s', exc)
            self._cancelled.wait(pause)
            pause = min(pause * 2, longest)

    def _log(self, what: str, exc: BaseException) -> None:
        told = isinstance(exc, (MinibatchError, OSError))  # else it may be a mistake in the source
        logger.warning(
            'the source of stream %r (%s) %s: %s',
            self._stream.name, type(self.source).__name__, what, plain(in_words(exc)), exc_info=not told,
        )  # fmt: skip
