"""Dask as executor: functions run on the workers of a Dask cluster, on as many machines as it has.

::

    mb.streaming('measurements', fn, size=1000, executor='dask://scheduler:8786')

The workers need minibatch and what the function imports, and reach MongoDB at the URL of the consumer. The scheduler
needs neither.
"""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from queue import Empty, SimpleQueue
from typing import Any, cast

import cloudpickle

from minibatch.abc import Completion, RemoteTask
from minibatch.errors import ArgumentError, PortabilityError, UnknownFunctionError, install_hint

try:
    from dask.distributed import Client, Scheduler
    from distributed.scheduler import KilledWorker
    from tornado.ioloop import IOLoop
except ImportError as exc:
    raise ImportError(f'the executor for Dask needs the package distributed: {install_hint("dask")}') from exc

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r'inproc://.+|\w+://.+:\d+/?')
AHEAD = 2  # tasks for each thread of a worker, so that it has the next one when it is done
LOOK_PAUSE = 1.0
PAUSED_PAUSE = 5.0
LOSS_PAUSE = 0.5  # a scheduler that ends may tell of its workers before, and answer for a moment
CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 5.0
ALL = {'n_workers': -1} if 'n_workers' in signature(Scheduler.identity).parameters else {}


class WorkerLostError(ConnectionError):
    """The Dask worker that ran this has died."""


class DaskExecutor:
    """Runs tasks on the workers of a Dask cluster.

    A task says where MongoDB is and which messages its windows have, and the worker reads them there: no message goes
    through the scheduler. Each task is bound to one worker, two for each of its threads, as the cluster grows and
    shrinks. The function goes through the scheduler with the first tasks of each worker, until one has returned;
    results come from the worker directly.

    So Dask runs no task a second time, whatever ``allowed-failures`` says: what a worker had when it died has failed,
    and minibatch decides what that means. Its windows are run again one by one, and only one whose worker dies again
    counts as failed, see ``max_attempts``. What a worker had that was retired goes to another one; one that is ended by
    a signal has died, also of SIGTERM, so end workers with ``client.retire_workers()``, or give them a ``--lifetime``.

    What a worker has not begun when Dask pauses it, as it does at 80 % of its memory, goes to others after 5 seconds.

    Without the scheduler tasks wait: when it is back, or a new one is at its address, they are sent again. A function
    may then be called twice for a window, as after any crash; its result is used once. When the consumer dies, the
    scheduler drops what has not begun, and nobody uses the result of what has.

    What is sent includes the URL of MongoDB, with its password. It is in no key, log line or page of Dask, but crosses
    the network, and whoever reaches the scheduler can run anything: use TLS where others listen.

    Args:
        scheduler: its address, such as ``dask://host:8786``, ``tcp://host:8786`` or ``tls://host:8786``; or a
            `dask.distributed.Client`, of which it takes the address and the security.
        resources: what a task needs of a worker, such as ``{'GPU': 1}``; other workers get none.
        direct: whether results come from the workers directly; False if this process cannot reach them.
        security: a `dask.distributed.Security`, for ``tls://``.

    Raises:
        ArgumentError: naming the argument.

    Example:
        >>> executor = DaskExecutor('tcp://scheduler:8786', resources={'GPU': 1})    # doctest: +SKIP
        >>> mb.streaming('images', classify, size=100, executor=executor)            # doctest: +SKIP
        >>> mb.streaming('images', classify, size=100, executor=client)              # doctest: +SKIP
    """

    def __init__(
        self, scheduler: Any, resources: dict[str, float] | None = None, direct: bool = True, security: Any = None
    ) -> None:
        if isinstance(scheduler, Client):
            client: Any = scheduler
            scheduler, security = getattr(client.scheduler, 'address', client), security or client.security
        if not isinstance(scheduler, str) or not ADDRESS.fullmatch(scheduler):
            raise ArgumentError(
                f'scheduler must be an address like dask://host:8786, or a Client that is connected, not {scheduler!r}'
            )
        needs = {} if resources is None else resources
        if not isinstance(needs, dict) or not all(isinstance(n, (int, float)) and n > 0 for n in needs.values()):
            raise ArgumentError(f"resources must be a dict of numbers, such as {{'GPU': 1}}, not {resources!r}")
        self.address = scheduler.replace('dask://', 'tcp://', 1)
        self.resources, self.direct, self._security = dict(needs), direct, security
        self._lock = threading.RLock()
        self._events: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._loop: _Loop | None = None
        self._client: Any = None
        self._hosts: dict[str, _Host] = {}
        self._waiting: list[_Run] = []
        self._losses: list[_Loss] = []
        self._thread: threading.Thread | None = None
        self._scheduler = ''  # the id of the one that is connected
        self._away = self._warned = self._closed = False

    def __repr__(self) -> str:
        needs = f', resources={self.resources!r}' if self.resources else ''
        return f'DaskExecutor({self.address!r}{needs})'

    @property
    def workers(self) -> int:
        """How many threads of workers there are for tasks.

        Raises:
            ConnectionError: if there has been no scheduler at the address yet.
        """
        self._open()
        with self._lock:
            return 0 if self._away else sum(host.threads for host in self._hosts.values())

    def submit(self, fn: Callable[[], Any]) -> Completion:
        """Run `fn` on a worker, the one that has the least to do.

        Raises:
            ConnectionError: if there has been no scheduler at the address yet.
        """
        self._open()
        run = _Run(fn, self)
        with self._lock:
            self._place(run)
        return run

    def shutdown(self) -> None:
        """Drop what has not begun, and close the connection. What has begun comes to its end, for nothing."""
        with self._lock:
            self._closed = True
            holders: list[_Host | _Loss] = [*self._hosts.values(), *self._losses]
            runs = self._waiting + [run for holder in holders for run in holder.runs]
        for run in runs:
            run.cancel()
        if self._thread is not None:
            self._events.put(lambda: None)
            self._thread.join(CLOSE_TIMEOUT)

    # --- connecting

    def _open(self) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(f'{self!r} is shut down')
            if self._thread is None:
                self._loop = _Loop()
                try:
                    self._connect()
                    self._look()
                except BaseException:
                    self._disconnect()
                    raise
                self._thread = threading.Thread(target=self._tend, name='minibatch-dask', daemon=True)
                self._thread.start()

    def _connect(self) -> None:
        try:
            self._client = cast(Any, Client)(
                self.address, name='minibatch', set_as_default=False, timeout=CONNECT_TIMEOUT, security=self._security,
                loop=cast(_Loop, self._loop).loop,
            )  # fmt: skip
        except OSError as exc:
            raise ConnectionError(f'no Dask scheduler answers at {self.address}: {exc}') from exc

    def _disconnect(self) -> None:
        if self._client is not None:
            with suppress(Exception):
                self._client.close(timeout=CLOSE_TIMEOUT)
        cast(_Loop, self._loop).stop()

    def _tend(self) -> None:
        """Do what events ask for, and look at the cluster now and then, until shutdown."""
        look_at = 0.0
        try:
            while not self._closed:
                if time.monotonic() >= look_at:
                    self._tend_connection()
                    look_at = time.monotonic() + LOOK_PAUSE
                with suppress(Empty):
                    self._do(self._events.get(timeout=max(look_at - time.monotonic(), 0)))
        finally:
            self._disconnect()

    def _do(self, event: Callable[[], Any]) -> None:
        try:
            event()
        except Exception:  # without this thread everything would wait for ever
            logger.exception('%r: an event was not taken in', self)

    def _tend_connection(self) -> None:
        try:
            if self._client.status == 'closed':  # it has given up
                self._connect()
            if not self._closed:
                self._look()
        except Exception as exc:
            if not self._warned:
                expected = isinstance(exc, (OSError, asyncio.TimeoutError))
                logger.warning('waiting for the Dask scheduler at %s: %r', self.address, exc, exc_info=not expected)
            self._away = self._warned = True

    def _look(self) -> None:
        """See which workers there are, and listen to what becomes of them."""
        client, began = self._client, time.monotonic()
        if client.status != 'running':
            raise ConnectionError('the connection is lost')
        found = client.sync(client.scheduler.identity, **ALL, callback_timeout=CONNECT_TIMEOUT)
        with self._lock:
            another = found['id'] != self._scheduler
            if another or self._away:
                logger.info('connected to the Dask scheduler at %s', self.address)
            self._scheduler, self._away, self._warned = found['id'], False, False
            for address, worker in found['workers'].items():
                self._see(self._hosts.setdefault(address, _Host(address)), worker)
            for host in [host for address, host in self._hosts.items() if address not in found['workers']]:
                if host.missing or another:
                    self._removed(host.address, expected=another)
                host.threads, host.missing = 0, True  # the event which says why is on its way
            self._judge(began, another)
            self._refill()

    def _see(self, host: _Host, worker: dict[str, Any]) -> None:
        client, now = self._client, time.monotonic()
        if host.heard_on is not client.scheduler_comm:
            client.subscribe_topic(host.address, partial(self._hear, host.address))
        host.threads, host.missing, host.heard_on = self._threads_of(worker), False, client.scheduler_comm
        if worker['status'] != 'paused':
            host.asked_at = now
        elif host.runs and now - host.asked_at > PAUSED_PAUSE:
            host.asked_at = now
            client.loop.add_callback(self._ask, host, {run.sent.key: run for run in host.runs})

    def _threads_of(self, worker: dict[str, Any]) -> int:
        """How many tasks of ours a worker can run at once."""
        if worker['status'] != 'running':
            return 0
        shares = [worker['resources'].get(name, 0) // need for name, need in self.resources.items()]
        return int(min([worker['nthreads'], *shares]))

    def _hear(self, address: str, event: tuple[float, Any]) -> None:
        """An event of a worker; called in the thread of the client."""
        what = event[1]
        if isinstance(what, dict) and what.get('action') == 'remove-worker':
            expected = bool(what.get('expected', what.get('safe')))
            self._events.put(partial(self._removed, address, expected))

    async def _ask(self, host: _Host, runs: dict[str, _Run]) -> None:
        """Ask a paused worker what it runs; in the thread of the client."""
        with suppress(Exception):  # it is asked again
            asked = self._client.scheduler.call_stack(keys=list(runs))
            stacks = await asyncio.wait_for(asked, CONNECT_TIMEOUT)
            self._events.put(partial(self._relieve, [runs[key] for key in runs.keys() - stacks.get(host.address, {})]))

    def _relieve(self, runs: list[_Run]) -> None:
        """Place elsewhere what a paused worker has not begun."""
        with self._lock:
            for run in runs:
                if run.host is not None and not run.host.threads and run.sent.status == 'pending':
                    self._take_back(run)
                    self._waiting.append(run)
            self._refill()

    # --- tasks

    def _place(self, run: _Run) -> None:
        """Send a task to the worker that has the least to do; if none has room it waits."""
        free = [host for host in self._hosts.values() if len(host.runs) < AHEAD * host.threads]
        if not free or self._away or self._client.status != 'running':
            self._waiting.append(run)
            return
        host = min(free, key=lambda host: len(host.runs) / host.threads)
        try:
            run.sent = self._send(run, host)
        except Exception as exc:
            if self._client.status == 'running':
                _settle(run.set_exception, exc)  # it cannot be pickled
            else:
                self._waiting.append(run)
            return
        run.host = host
        host.runs.add(run)
        self._client.loop.add_callback(self._collect, run, run.sent)

    def _send(self, run: _Run, host: _Host) -> Any:
        if isinstance(run.fn, RemoteTask):
            data = run.fn.packed(with_function=run.fn.digest not in host.known)
        else:
            data = cloudpickle.dumps(run.fn)
        # Dask unpickles, shows and logs a file and a function of the standard library, and nothing of what is in the
        # file: where minibatch is missing the task fails; a worker would end if it could not read what it is told.
        return self._client.submit(
            pickle.load, io.BytesIO(pickle.dumps(_Call(data))), key=f'minibatch-{uuid.uuid4().hex}', pure=False,
            retries=0, workers=[host.address], allow_other_workers=False, resources=self.resources or None,
        )  # fmt: skip

    def _refill(self) -> None:
        waiting, self._waiting = self._waiting, []
        for run in waiting:
            self._place(run)

    async def _collect(self, run: _Run, sent: Any) -> None:
        """Wait for a result; in the thread of the client."""
        try:
            known, value = await sent.client.gather(sent, direct=self.direct, asynchronous=True)
        except Exception as exc:
            self._events.put(partial(self._failed, run, sent, exc))
        else:
            self._events.put(partial(self._returned, run, sent, known, value))

    def _returned(self, run: _Run, sent: Any, known: bool, value: Any) -> None:
        with self._lock:
            if run.sent is not sent:
                return
            host = self._take_back(run)
            digest = run.fn.digest if isinstance(run.fn, RemoteTask) else ''
            if known:
                host.known.add(digest)
            else:
                host.known.discard(digest)
                self._waiting.insert(0, run)
            self._refill()
        if known:
            _settle(run.set_result, value)

    def _failed(self, run: _Run, sent: Any, exc: Exception) -> None:
        with self._lock:
            if run.sent is not sent:
                return
            if isinstance(exc, KilledWorker):
                self._removed(cast(_Host, run.host).address, expected=False)
                return
            raised = sent.status == 'error'  # by the task; or else the connection was lost before its result was here
            host = self._take_back(run)
            if isinstance(exc, (CancelledError, OSError, asyncio.TimeoutError)) and not raised:
                self._away = True
                self._waiting.append(run)
                return
            self._refill()
        _settle(run.set_exception, _reason(run, host, exc))

    def _removed(self, address: str, expected: bool) -> None:
        """A worker is gone: what it had goes to others, or its loss is to be judged if it was not by intent."""
        with self._lock:
            host = self._hosts.pop(address, _Host(address))
            runs = list(host.runs)
            for run in runs:
                self._take_back(run)
            if expected:
                self._waiting += runs
            else:
                self._losses.append(_Loss(address, set(runs)))
            self._refill()
        with suppress(Exception):  # a client that is new or closed has not subscribed
            self._client.unsubscribe_topic(address)

    def _judge(self, looked_at: float, another: bool) -> None:
        """What workers had that died has failed; what they had because their scheduler ended, goes to others."""
        for loss in [loss for loss in self._losses if another or loss.at < looked_at - LOSS_PAUSE]:
            self._losses.remove(loss)
            if another:
                self._waiting += loss.runs
                continue
            for run in loss.runs:
                _settle(run.set_exception, WorkerLostError(f'the Dask worker {loss.address} died'))

    def _take_back(self, run: _Run) -> _Host:
        """Let Dask forget a task, and drop it if it has not begun."""
        host, sent = cast(_Host, run.host), run.sent
        host.runs.discard(run)
        run.host = run.sent = None
        sent.release()
        return host

    def _withdraw(self, run: _Run) -> None:
        with self._lock:
            if run.sent is not None:
                self._take_back(run)
            if run in self._waiting:
                self._waiting.remove(run)
            for loss in self._losses:
                loss.runs.discard(run)


@dataclass(eq=False)
class _Host:
    """A worker of Dask: its threads for our tasks, those it has, and the functions it knows."""

    address: str
    threads: int = 0
    missing: bool = False
    asked_at: float = field(default_factory=time.monotonic)  # what it does; or when it was last not paused
    heard_on: Any = None  # the connection on which its events are subscribed to
    runs: set[_Run] = field(default_factory=set)
    known: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Loss:
    """What a worker had that is gone, maybe just because its scheduler ends."""

    address: str
    runs: set[_Run]
    at: float = field(default_factory=time.monotonic)


class _Loop(threading.Thread):
    """The event loop of one client after the other: a client that makes its own leaves it behind when it fails."""

    def __init__(self) -> None:
        super().__init__(name='minibatch-dask-loop', daemon=True)
        self._ready: Future[IOLoop] = Future()
        self.start()
        self.loop = self._ready.result()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._ready.set_result(IOLoop.current())
        await self._end.wait()

    def stop(self) -> None:
        self.loop.add_callback(self._end.set)
        self.join(CLOSE_TIMEOUT)


class _Run(Future[Any]):
    """A task, which may be sent several times, and its completion."""

    def __init__(self, fn: Callable[[], Any], executor: DaskExecutor) -> None:
        super().__init__()
        self.fn, self._executor = fn, executor
        self.host: _Host | None = None
        self.sent: Any = None

    def cancel(self) -> bool:
        self._executor._withdraw(self)
        return super().cancel()


class _Call:
    """A call of `_perform`: whoever unpickles it does it, and gets what that returns."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _perform, (self.data,)


def _perform(data: bytes) -> tuple[bool, Any]:
    """Run a task, on a worker; returns whether the worker knows the function, and what the task returned."""
    try:
        task = pickle.loads(data)  # noqa: S301  (from the consumer)
    except UnknownFunctionError:
        return False, None
    return True, task()


def _reason(run: _Run, host: _Host, exc: Exception) -> Exception:
    """What a task has failed of, for which Dask says `exc`."""
    if isinstance(exc, PortabilityError) or not isinstance(run.fn, RemoteTask):
        return exc
    error = PortabilityError(  # for a remote task returns what its function has raised
        f'a task cannot run on the Dask worker {host.address}: {type(exc).__name__}: {" ".join(str(exc).split())}. '
        f'Install minibatch, and what the function imports, on all workers, in the same versions as here.'
    )
    error.__cause__ = exc
    return error


def _settle(settle: Callable[[Any], None], outcome: Any) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        settle(outcome)
