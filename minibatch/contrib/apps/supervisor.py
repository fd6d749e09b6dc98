"""A consumer in a process of its own, which is started again when it dies, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
BEAT = 1.0  # seconds between two signs of life of who watches a process
UNWATCHED = 15.0
BOARD_BYTES = 16384
HEADER = struct.Struct('>II')


def is_consumer_process() -> bool:
    """Whether this is the process of a consumer, or one of its workers."""
    return os.environ.get(PROCESS_VARIABLE) in (str(os.getpid()), str(os.getppid()))


@dataclass(frozen=True)
class State:
    """What is known of the process of a consumer; times but `since` are monotonic."""

    started: float
    since: str
    seen: float
    pid: int | None = None
    lived: float = 0.0
    restarts: int = 0
    exit_code: int | None = None
    error: str = ''
    stopped: bool = False


class Board:
    """Memory in which a process says its state to those that are forked from it; they read it without any lock."""

    def __init__(self, state: State) -> None:
        self._memory, self._last = mmap.mmap(-1, BOARD_BYTES), state
        self.write(state)

    def write(self, state: State) -> None:
        """Say it."""
        text = json.dumps(asdict(state)).encode()
        record = HEADER.pack(len(text), zlib.crc32(text)) + text
        self._memory[: len(record)] = record

    def read(self) -> State:
        """What was said last; what is being written at this moment is read again."""
        for _ in range(100):
            length, checksum = HEADER.unpack_from(self._memory)
            text = self._memory[HEADER.size : HEADER.size + length]
            if zlib.crc32(text) == checksum:
                self._last = State(**json.loads(text))
                break
            time.sleep(0.001)
        return self._last


class ConsumerProcess:
    """Runs ``consumer(url)`` in a process of its own, until `stop`.

    The process is a new interpreter. It is given the function through a pipe, and ends when this process has ended,
    however that was. When it ends for another reason it is started again, after a pause that grows from 1 to 60
    seconds.

    What it knows of the process it also says in processes that are forked from this one, as by ``gunicorn --preload``.

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
        self._owner = os.getpid()
        self._board = Board(State(time.monotonic(), _now(), time.monotonic()))
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
            self._note(stopped=True)
            self._signal(signal.SIGTERM)

    def hurry(self) -> None:
        """After `stop`: wait no longer."""
        self._deadline = time.monotonic()

    def join(self) -> None:
        """Return when the process, and all that it had started, is gone."""
        self._thread.join()

    @property
    def is_mine(self) -> bool:
        """Whether this very process has started it, and not one that this was forked from."""
        return self._owner == os.getpid()

    @property
    def state(self) -> State:
        """What is known of the process, all at one moment."""
        return self._board.read()

    @property
    def pid(self) -> int | None:
        """The id of the process, or None while there is none."""
        return self.state.pid

    @property
    def restarts(self) -> int:
        """How often the process was started again."""
        return self.state.restarts

    @property
    def exit_code(self) -> int | None:
        """That of the process which has ended last, or None while none has."""
        return self.state.exit_code

    @property
    def problem(self) -> str:
        """Why this consumer is not well, or ''."""
        return self._problem(self.state)

    def _problem(self, state: State) -> str:
        now = time.monotonic()
        if state.stopped:
            return f'consumer {self.name!r} is stopped'
        if now - state.seen > UNWATCHED:
            watcher = f'process {self._owner}, which has started it'
            return f'consumer {self.name!r} is not watched: {watcher}, is gone or hangs'
        ended = f'it ended with {_exit(state.exit_code)}' + (f', {state.error}' if state.error else '')
        if state.pid is None:
            return f'consumer {self.name!r} is not running: {ended}; it will be started again'
        if state.restarts and now - state.started < min(max(SETTLED, 1.5 * state.lived), WELL):
            return f'consumer {self.name!r} was started again: {ended}'
        return ''

    def as_dict(self) -> dict[str, Any]:
        """What /status says of it."""
        state = self.state
        return {
            'name': self.name,
            'state': 'stopped' if state.stopped else 'waiting' if state.pid is None else 'running',
            'healthy': not self._problem(state),
            'pid': state.pid,
            'since': state.since,
            'restarts': state.restarts,
            'exit_code': state.exit_code,
            'error': state.error,
        }

    def _note(self, **changes: Any) -> None:
        with self._lock:
            self._board.write(replace(self._board.read(), seen=time.monotonic(), **changes))

    def _supervise(self) -> None:
        pause, longest = PAUSES
        while True:
            if self._process is not None:
                self._run()
            if self._stopped.is_set():
                return
            state = self.state
            if state.lived > WELL:
                pause = PAUSES[0]
            logger.warning('consumer %r ended with %s, it is started again in %g s', self.name,
                           _exit(state.exit_code), pause)  # fmt: skip
            if self._stopped_within(pause):
                return
            pause = min(pause * 2, longest)
            with self._lock:
                if self._stopped.is_set():
                    return
                try:
                    self._launch(state.restarts + 1)
                except OSError as exc:  # no memory, or no file descriptors, for the moment
                    self._note(error=f'it could not be started: {exc}')

    def _stopped_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopped.wait(min(left, BEAT)):
            self._note()
        return self._stopped.is_set()

    def _launch(self, restarts: int = 0) -> None:
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
        self._note(started=time.monotonic(), since=_now(), pid=self._process.pid, restarts=restarts)
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
            code, lived = process.wait(), time.monotonic() - self.state.started
            self._note(exit_code=code, lived=lived, since=_now(), error=self._last_words(), pid=None)
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
            if time.monotonic() - self.state.seen > BEAT:
                self._note()
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='seconds')


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
