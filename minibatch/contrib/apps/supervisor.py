"""A consumer in a process of its own, which is started again when it dies, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import IO, Any

import cloudpickle
import psutil

from minibatch.errors import ArgumentError, MinibatchError

logger = logging.getLogger(__name__)

PROCESS_VARIABLE = 'MINIBATCH_APP_CONSUMER'
MAX_WORDS = 1000
PAUSES = (1.0, 60.0)
SETTLED = 5.0  # seconds that a process must run before it counts as well again, or as long as the one before
WELL = 60.0  # by then it counts as well, and the next pause is a short one again
KILL_TIMEOUT = 5.0
POLL = 0.05


def is_consumer_process() -> bool:
    """Whether this is the process of a consumer, or one of its workers."""
    return os.environ.get(PROCESS_VARIABLE) in (str(os.getpid()), str(os.getppid()))


class ConsumerProcess:
    """Runs ``consumer(url)`` in a process of its own, until `stop`.

    The process is a new interpreter. It is given the function through a pipe, and ends when this process has ended,
    however that was. When it ends for another reason it is started again, after a pause that grows from 1 to 60
    seconds.

    Args:
        consumer: the function; with all that it refers to in its module it must be picklable by cloudpickle.
        url: what it is called with.
        name: how logs and status call it.

    Raises:
        ArgumentError: if the function cannot be sent.
    """

    def __init__(self, consumer: Callable[[str], Any], url: str, name: str) -> None:
        if os.name != 'posix':
            raise MinibatchError('start_streaming needs fork and signals; on this system run the consumer by itself, '
                                 'with `minibatch run`')  # fmt: skip
        self.name = name
        self._payload = pickle.dumps([os.path.abspath(path) for path in sys.path]) + _pickled(consumer, url)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._deadline = 0.0
        self._started, self._lived = time.monotonic(), 0.0
        self._since = datetime.now(timezone.utc)
        self.restarts, self.exit_code, self.error = 0, None, ''  # type: int, int | None, str
        self._thread = threading.Thread(target=self._supervise, name=f'minibatch-app-{name}', daemon=True)

    def start(self) -> None:
        """Start the process, and the thread that watches it."""
        self._launch()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the process: after what it has in flight, if that takes no more than `timeout` seconds, else at once."""
        self._deadline = time.monotonic() + timeout
        with self._lock:  # else it might be started just now
            self._stopped.set()
            self._signal(signal.SIGTERM)

    def hurry(self) -> None:
        """After `stop`: wait no longer."""
        self._deadline = time.monotonic()

    def join(self) -> None:
        """Return when the process, and all that it had started, is gone."""
        self._thread.join()

    @property
    def pid(self) -> int | None:
        """The id of the process, or None while there is none."""
        process = self._process
        return process.pid if process is not None else None

    @property
    def problem(self) -> str:
        """Why this consumer is not well, or ''."""
        if self._stopped.is_set():
            return f'consumer {self.name!r} is stopped'
        with self._lock:
            ended = f'it ended with {_exit(self.exit_code)}' + (f', {self.error}' if self.error else '')
            if self._process is None:
                return f'consumer {self.name!r} is not running: {ended}; it will be started again'
            if self.restarts and time.monotonic() - self._started < min(max(SETTLED, 1.5 * self._lived), WELL):
                return f'consumer {self.name!r} was started again: {ended}'
            return ''

    def as_dict(self) -> dict[str, Any]:
        """What /status says of it."""
        with self._lock:  # what has just ended is told of all at once
            state = 'stopped' if self._stopped.is_set() else 'running' if self._process is not None else 'waiting'
            return {
                'name': self.name,
                'state': state,
                'healthy': not self.problem,
                'pid': self.pid,
                'since': self._since.isoformat(timespec='seconds'),
                'restarts': self.restarts,
                'exit_code': self.exit_code,
                'error': self.error,
            }

    def _supervise(self) -> None:
        pause, longest = PAUSES
        while True:
            if self._process is not None:
                self._run()
            if self._stopped.is_set():
                return
            if self._lived > WELL:
                pause = PAUSES[0]
            logger.warning('consumer %r ended with %s, it is started again in %g s', self.name,
                           _exit(self.exit_code), pause)  # fmt: skip
            if self._stopped.wait(pause):
                return
            pause = min(pause * 2, longest)
            with self._lock:
                if self._stopped.is_set():
                    return
                try:
                    self._launch()
                    self.restarts += 1
                except OSError as exc:  # no memory, or no file descriptors, for the moment
                    self.error = f'it could not be started: {exc}'

    def _launch(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        command = [sys.executable, '-m', 'minibatch.contrib.apps.child', self.name, str(writer)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[writer], start_new_session=True
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._words = reader
        self._started, self._since = time.monotonic(), datetime.now(timezone.utc)
        logger.info('consumer %r started, process %d', self.name, self._process.pid)

    def _run(self) -> None:
        """Feed the process, and wait for its end and that of all it has started."""
        process = self._process
        assert process is not None  # noqa: S101
        feeding = threading.Thread(target=self._feed, args=(process.stdin,), daemon=True)
        feeding.start()
        self._wait(process.pid)
        # The process is not reaped yet, so its number is still that of the group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        _await_end(process.pid)
        with self._lock:
            self.exit_code = process.wait()
            self._since, self._lived = datetime.now(timezone.utc), time.monotonic() - self._started
            self.error = self._last_words()
            self._process = None
        feeding.join()
        with suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]

    def _feed(self, pipe: IO[bytes]) -> None:
        with suppress(BrokenPipeError):
            pipe.write(self._payload)
            pipe.flush()

    def _wait(self, pid: int) -> None:
        killed = False
        while not _has_ended(pid):
            if not killed and self._stopped.is_set() and time.monotonic() > self._deadline:
                logger.warning('consumer %r did not end in time, it is killed', self.name)
                self._signal(signal.SIGKILL)
                killed = True
            time.sleep(POLL)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _last_words(self) -> str:
        try:
            return os.read(self._words, MAX_WORDS).decode(errors='replace')
        except BlockingIOError:
            return ''
        finally:
            os.close(self._words)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; unlike ``Popen.poll`` it leaves the number to it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await_end(group: int) -> None:
    """Wait for the end of the killed processes of a group; what nobody has reaped counts as ended."""
    deadline = time.monotonic() + KILL_TIMEOUT
    while any(_runs_in(process, group) for process in psutil.process_iter()) and time.monotonic() < deadline:
        time.sleep(POLL)


def _runs_in(process: psutil.Process, group: int) -> bool:
    with suppress(ProcessLookupError, PermissionError, psutil.Error):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


def _pickled(consumer: Callable[[str], Any], url: str) -> bytes:
    """The function with its module by value: importing the module again would start the app again."""
    module = sys.modules.get(getattr(consumer, '__module__', None) or '')
    by_value = module is not None and module.__name__ not in ('__main__', *cloudpickle.list_registry_pickle_by_value())
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((consumer, url)))
    except Exception as exc:
        raise ArgumentError(
            f'consumer must be a function that can be sent to another process, with all it refers to: '
            f'{type(exc).__name__}: {exc}; open what cannot be sent inside the function'
        ) from exc
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f'signal {signal.Signals(-code).name}'
    return f'exit code {code}'
