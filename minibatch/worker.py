"""What runs in the pool: load the windows of a task, call the function, say what became of each."""

from __future__ import annotations

import copy
import faulthandler
import logging
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from multiprocessing import resource_tracker, util
from typing import Any

import cloudpickle
import loky
import psutil
import pymongo
from pymongo.errors import PyMongoError

from . import connection, dead, functions, marshaller, producer, signals, store
from .abc import Completion
from .connection import Target
from .errors import DataError, MinibatchError, ServerError, UnconfirmedError
from .marshaller import Portable
from .messages import MessageWindow
from .models import Window
from .progress import Claim
from .store import Records, Span

logger = logging.getLogger(__name__)

PARENT_CHECK = 0.5
END_TIMEOUT = 10.0
WARM_UP_TIMEOUT = 5.0
_CALLED, _WAITS = (re.compile(rf'minibatch.functions\.py", line \d+ in {name}$', re.MULTILINE)
                   for name in ('(call|_guarded)', 'run'))  # fmt: skip
CAN_BLOCK = hasattr(signal, 'pthread_sigmask')


@dataclass(frozen=True)
class Work:
    """One window to do; `argument`, if there is one, is what the function gets instead of the window,
    `picked` says that the order of the spans is that of the messages, `replay` that it was a dead letter."""

    id: str
    number: int
    created: datetime
    start: datetime | None
    end: datetime | None
    attempt: int
    spans: list[Span]
    argument: Any = None
    picked: bool = False
    key: Any = None
    watermark: datetime | None = None
    replay: bool = False

    @classmethod
    def of(cls, claim: Claim, picked: bool = False) -> Work:
        """The work that a claim is."""
        return cls(
            claim.id, claim.number, claim.created, claim.start, claim.end, claim.attempts, claim.spans, claim.argument,
            picked, claim.key, claim.watermark, claim.replay,
        )  # fmt: skip


@dataclass
class Outcome:
    """What became of one window: its result, or the error and who raised it, the function or the loading.

    `by_function` says that it counts as an attempt: the function raised it, or the messages cannot be read.

    It was skipped if none of its messages is stored any more.
    """

    number: int
    result: Any = None
    pickled: bool = False
    error: str = ''
    traceback: str = ''
    by_function: bool = False
    lost: bool = False  # its worker died, for whatever reason
    skipped: bool = False
    missing: int = 0
    host: str = ''  # of the other process, maybe on another machine, that did not find the missing ones
    seconds: float = 0.0
    in_function: float = 0.0  # of these seconds
    newest: datetime | None = None  # when its newest message was created

    @property
    def value(self) -> Any:
        """The result, as the sink gets it."""
        return cloudpickle.loads(self.result) if self.pickled else self.result


@dataclass(frozen=True)
class Limit:
    """How long the function may take for a window, in a worker process: longer, and the process is ended.

    A thread of faulthandler does it, which works also when the function holds the interpreter. It writes where the
    function was to a file in `folder`, named by the number of the window.
    """

    seconds: float
    folder: str

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Limit what is done in this context."""
        path = os.path.join(self.folder, str(number))
        with open(path, 'w') as file:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
        with suppress(FileNotFoundError):
            os.unlink(path)

    def exceeded(self) -> dict[int, str]:
        """The numbers of the windows that took too long, each with where its function was; told once."""
        found = {}
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            with suppress(FileNotFoundError), open(path, errors='replace') as file:
                if text := file.read():
                    found[int(name)] = _above_us(text)
                    os.unlink(path)
        return found


def _above_us(text: str) -> str:
    """Of a dump of all threads, that of the function, down to where it was called from here.

    It is the main one, which comes last, or, if that waits for an event loop, the one of the loop.
    """
    threads = [thread.rpartition('first):\n')[2] for thread in text.rstrip().split('\n\n')]
    found = threads[-1]
    if _WAITS.search(found):
        found = next((thread for thread in threads[:-1] if _CALLED.search(thread)), '')
    if not found:
        return 'It waited in an await, of which there is no traceback'
    frames = found.splitlines()
    theirs = list(takewhile(lambda line: not _CALLED.search(line), frames))
    return '\n'.join(['Most recent call first:', *(theirs or frames)])


class Task:
    """Windows for one worker, in order. It is called in the worker, and returns their outcomes.

    Results are pickled here, if the task came from another process, so that one which cannot be pickled fails its
    own window only.
    """

    def __init__(
        self, target: Target, stream: str, fn: Portable | None, works: list[Work], returns: bool,
        limit: Limit | None = None,
    ) -> None:  # fmt: skip
        self.target, self.stream, self.fn, self.works, self.returns = target, stream, fn, works, returns
        self.limit = limit
        self.default, self.first = connection.chosen(), connection.first_opened()
        self.remote = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, remote=True)

    @property
    def digest(self) -> str:
        """See `minibatch.abc.RemoteTask`."""
        return '' if self.fn is None else self.fn.digest

    def packed(self, with_function: bool) -> bytes:
        """See `minibatch.abc.RemoteTask`."""
        sent = copy.copy(self)
        sent.fn = None if self.fn is None else self.fn.sent(ahead=not with_function)
        return pickle.dumps(sent)

    def __call__(self) -> list[Outcome]:
        if not self.remote:
            return self._read_and_do()
        connection.choose(self.default, self.first)
        with marshaller.working():
            outcomes = self._read_and_do()
        for outcome in outcomes:
            outcome.host = platform.node() if outcome.missing else ''
        with suppress(Exception):
            sys.stdout.flush()
        return outcomes

    def _read_and_do(self) -> list[Outcome]:
        found = None
        try:
            spans = [span for work in self.works if not work.replay for span in work.spans]
            found = Records(self.target.majority, self.stream, spans)
        except Exception as exc:
            if not _is_of_the_messages(exc):
                return [failure(work, exc, by_function=False) for work in self.works]
        return self._do_all(found)

    def _do_all(self, found: Records | None) -> list[Outcome]:
        """Do all windows; they are done when what their functions have appended is stored, not just queued."""
        outcomes: list[Outcome] = []
        try:
            with producer.Flushed():
                outcomes += [self._do(work, found) for work in self.works]
        except ServerError as exc:
            by_function = not isinstance(exc, UnconfirmedError)
            outcomes = [
                outcome if outcome.error else failure(work, exc, by_function)
                for work, outcome in zip(self.works, outcomes, strict=True)
            ]
        return outcomes

    def _do(self, work: Work, found: Records | None) -> Outcome:
        started = time.perf_counter()
        try:
            window = load(self.target, self.stream, work, found)
        except Exception as exc:
            connection.heal(self.target.client, exc)
            return failure(work, exc, by_function=_is_of_the_messages(exc))
        if window.missing and not len(window):
            if work.replay:
                return failure(work, DataError('the copies of its messages are gone'), by_function=True)
            return Outcome(work.number, skipped=True, missing=window.missing)
        loaded = time.perf_counter()
        try:
            with self.limit.on(work.number) if self.limit is not None else nullcontext():
                result = self._call(window if work.argument is None else work.argument)
        except BaseException as exc:
            if not self.remote and signals.is_signal(exc):
                raise
            return failure(work, exc, by_function=True, missing=window.missing)
        ended = time.perf_counter()
        return Outcome(
            work.number, result, pickled=self._pickles, missing=window.missing, seconds=ended - started,
            in_function=ended - loaded, newest=window.newest,
        )  # fmt: skip

    @property
    def _pickles(self) -> bool:
        return self.remote and self.returns

    def _call(self, argument: Any) -> Any:
        result = argument if self.fn is None else functions.call(self.fn, argument, keep=self.returns)
        if not self.returns:
            return None
        result = shown(result, argument)
        if not self._pickles:
            return result
        try:
            return cloudpickle.dumps(result)
        except Exception as exc:
            raise DataError(f'what the function returned ({type(result).__name__}) cannot be pickled: {exc}') from exc


def shown(result: Any, argument: Any) -> Any:
    """What the sink gets if a function returned `result` for `argument`; of a window, its data."""
    result = argument if result is None else result
    return result.data if isinstance(result, (MessageWindow, Window)) else result


def load(target: Target, stream: str, work: Work, found: Records | None = None) -> MessageWindow:
    """The window of one work, with its messages, those in `found` if they have been read.

    Raises:
        DataError: naming a message of it that cannot be read.
    """
    if found is None:
        found = Records(target.majority, stream, () if work.replay else work.spans)

    def view(records: list[tuple[Span, list[Any]]]) -> MessageWindow:
        return MessageWindow(
            work.id, stream, work.number, work.created, work.start, work.end, work.attempt, records, work.picked,
            work.key, work.watermark,
        )  # fmt: skip

    window = view(dead.records(target.majority, work.id, work.spans) if work.replay else found.of(work.spans))
    if window.missing:  # they are deleted, or a new primary does not see them yet
        db = target.majority
        with target.client.start_session(causal_consistency=True) as session:
            store.see_all(db, stream, session)
            if work.replay:
                window = view(dead.records(db, work.id, work.spans, session))
            else:
                window = view(Records(db, stream, work.spans, session).of(work.spans))
    if window.unreadable:
        raise DataError(f'{window.unreadable}. `minibatch dead show` shows its bytes')
    return window


def _is_of_the_messages(exc: Exception) -> bool:
    """Whether it is the messages that keep a window from being loaded, and not MongoDB or the way to it."""
    return isinstance(exc, DataError) or not isinstance(exc, (MinibatchError, PyMongoError, OSError))


def failure(work: Work, exc: BaseException, by_function: bool, missing: int = 0) -> Outcome:
    """What became of a window that has failed so."""
    trace = exc.__traceback__
    while by_function and trace is not None and trace.tb_frame.f_globals.get('__package__') == __package__:
        trace = trace.tb_next  # the frames above the function say nothing to its author
    text = store.tellable(''.join(traceback.format_exception(type(exc), exc, trace)))
    return Outcome(work.number, error=store.in_words(exc), traceback=text, by_function=by_function, missing=missing)


class Processed:
    """A function that is called with what another one makes of the messages of a window."""

    def __init__(self, processfn: Callable[..., Any], emitfn: Callable[..., Any] | None) -> None:
        self.processfn, self.emitfn = processfn, emitfn

    def __call__(self, window: MessageWindow) -> Any:
        made = functions.call(self.processfn, window.messages)
        return made if self.emitfn is None else self.emitfn(made)


class Pool:
    """The default executor: worker processes that know the function, do not run the caller's script again, and end
    when their parent does."""

    def __init__(self, workers: int, fn: Portable | None, target: Target | None = None) -> None:
        self._workers, self._target = workers, target
        self._pending: set[Completion] = set()
        self._function = (fn.digest, fn.blob) if fn is not None else None
        if fn is not None:
            fn.sent_ahead = True
        self._start()

    def _start(self) -> None:
        args = (os.getpid(), self._function)
        self._executor = loky.ProcessPoolExecutor(self._workers, initializer=_set_up_worker, initargs=args)
        # Workers are born with Ctrl-C blocked, until they ignore it; the tracker unblocks it, so it comes first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if CAN_BLOCK else set()
        try:
            for _ in range(self._workers):
                self._executor.submit(_warm_up, self._target)
        finally:
            if CAN_BLOCK:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def submit(self, fn: Callable[[], Any]) -> Completion:
        """Run `fn` in a worker; a pool whose workers died is made anew first."""
        try:
            completion: Completion = self._executor.submit(fn)
        except loky.process_executor.BrokenProcessPool:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._start()
            completion = self._executor.submit(fn)
        self._pending.add(completion)
        completion.add_done_callback(self._pending.discard)
        return completion

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """End the workers, at once if they have not done what they were given by now.

        One that does not end is killed, as one would whose function has left a thread that goes on.
        """
        executor, workers = self._executor, list((self._executor._processes or {}).values())
        at_once = kind is not None or bool(self._pending)
        ended = threading.Event()  # a join that a signal interrupts may take a thread for ended that is not

        def end() -> None:
            try:
                executor.shutdown(kill_workers=at_once)
            finally:
                ended.set()

        try:
            threading.Thread(target=end, daemon=True).start()
            if not ended.wait(END_TIMEOUT):
                logger.warning('workers did not end within %g s, and are killed; a function may have left a thread '
                               'that is no daemon', END_TIMEOUT)  # fmt: skip
        finally:
            for worker in () if ended.is_set() else workers:
                with suppress(ProcessLookupError, psutil.NoSuchProcess):
                    _kill(worker.pid)
            ended.wait(END_TIMEOUT)


def _kill(pid: int) -> None:
    """Kill a process with all that it has started."""
    process = psutil.Process(pid)
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def cause_of_loss(exc: BaseException) -> str:
    """Why a task came to no end, in one line."""
    said = store.in_words(exc)
    codes = re.search(r'exit codes of the workers are (\{.*\})', said)
    if codes is not None:
        return f'WorkerDied: the worker process ended while it ran the function, {codes[1]}'
    return said.partition('\n')[0]


def _warm_up(target: Target | None) -> None:
    """Submitted first, so that the workers start, and connect, while the consumer takes its lease."""
    with suppress(MinibatchError, PyMongoError), pymongo.timeout(WARM_UP_TIMEOUT):
        if target is not None:
            target.client.admin.command('ping')


def _set_up_worker(parent: int, function: tuple[str, bytes] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    if CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(parent,), name='minibatch-parent', daemon=True).start()
    connection.leave_quickly()
    multiprocessing.set_start_method(None, force=True)  # that of loky starts no processes from here
    util.Finalize(None, _end_pools, exitpriority=100)
    if function is not None:
        marshaller.install(*function)


def _end_pools() -> None:
    """Tell the pools that a function has left open to end, as those of joblib and concurrent.futures.

    A process of multiprocessing waits for all that it has started before it tells them, and so for ever.
    """
    for end in reversed(getattr(threading, '_threading_atexits', ())):
        with suppress(Exception):
            end()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(1)
