"""Dask schedulers and workers as programs of their own, to be killed.

::

    with Cluster(tmp_path) as cluster:                  # a scheduler
        cluster.start_workers(2)
        cluster.workers[0].kill()
        cluster.scheduler.kill()
        cluster.start_scheduler()                       # at the same address
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from dask import config
from dask.distributed import Client, LocalCluster
from processes import family, is_alive
from servers import eventually, free_port

import minibatch as mb

QUIET = '--no-dashboard', '--dashboard-address', '127.0.0.1:0'  # else what is left of it listens to everybody


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """Two processes, which are replaced when they die: by their nannies, but for those that die while they start."""
    ended = threading.Event()
    with config.set({'distributed.deploy.lost-worker-timeout': '5s'}), LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host='127.0.0.1', dashboard_address='127.0.0.1:0'
    ) as cluster:

        def tend() -> None:
            while not ended.wait(1):
                cluster.scale(2)

        tending = threading.Thread(target=tend, daemon=True)
        tending.start()
        try:
            yield cluster
        finally:
            ended.set()
            tending.join(10)


def complete(cluster: LocalCluster) -> str:
    """The address of a cluster, when it has its two workers."""
    eventually(lambda: len(cluster.scheduler_info['workers']) == 2, 120, 'workers have not come')
    return str(cluster.scheduler_address)


class Cluster:
    """A scheduler on a free loopback port and its workers, with one thread each, without nannies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.path = str(Path(mb.__file__).parent.parent)  # where what is started finds minibatch
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.client: Client | None = None

    @property
    def address(self) -> str:
        return f'dask://127.0.0.1:{self.port}'

    @property
    def log(self) -> str:
        """What all of them have logged."""
        return (self.folder / 'dask.log').read_text(errors='replace')

    def start_scheduler(self) -> None:
        self.scheduler = self._start('scheduler', '--host', '127.0.0.1', '--port', str(self.port), *QUIET)

    def end_scheduler(self, number: int = signal.SIGKILL) -> None:
        assert self.scheduler, 'not running'
        self.scheduler.send_signal(number)
        self.scheduler.wait()

    def start_workers(self, count: int, *options: str, scheduler: str = '') -> None:
        """Start so many more, and wait until they are there."""
        to = scheduler or f'tcp://127.0.0.1:{self.port}'
        where = to, '--host', '127.0.0.1', '--local-directory', str(self.folder)
        for _ in range(count):
            self.workers.append(self._start('worker', *where, '--nthreads', '1', '--no-nanny', *QUIET, *options))
        alive = sum(worker.poll() is None for worker in self.workers)
        with self.asked() as client:
            eventually(lambda: started_workers(client) >= alive, 60)

    @contextmanager
    def asked(self) -> Iterator[Client]:
        """A client, to look at the cluster."""
        with Client(f'tcp://127.0.0.1:{self.port}', timeout=60, set_as_default=False) as client:
            yield client

    def _start(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        with open(self.folder / 'dask.log', 'ab') as log:
            return subprocess.Popen(
                [sys.executable, '-m', f'distributed.cli.dask_{what}', *options], stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, env={**os.environ, 'PYTHONPATH': self.path}, cwd=self.folder,
            )  # fmt: skip

    def __enter__(self) -> Cluster:
        self.start_scheduler()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in [*self.workers, self.scheduler]:
            if process is not None:
                started = family(process)
                process.kill()
                process.wait(10)
                for child in started:
                    if is_alive(child):
                        child.kill()


def started_workers(client: Client) -> int:
    """How many there are, also such as are paused."""
    return sum(worker['status'] != 'init' for worker in client.scheduler_info(n_workers=-1)['workers'].values())


def tasks_of(client: Client) -> list[str]:
    """The keys of all tasks that the scheduler has."""
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))


def nothing_left(client: Client) -> None:
    """The scheduler has no task, and no worker runs one."""
    eventually(lambda: not tasks_of(client) and not any(client.processing().values()), 60, 'tasks are left')


class Meter:
    """A TCP proxy in front of a scheduler, which counts the bytes both ways, and can cut all connections."""

    def __init__(self, port: int) -> None:
        self._target, self.bytes = port, 0
        self._listener = socket.create_server(('127.0.0.1', 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.address = f'tcp://127.0.0.1:{self._listener.getsockname()[1]}'

    def cut(self) -> None:
        """Close all connections."""
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for each in sockets:
            each.close()

    def __enter__(self) -> Meter:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(('127.0.0.1', self._target))
                except OSError:  # it has not started yet
                    client.close()
                    continue
                self._sockets += [client, server]
                for ends in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._pass_on, args=ends, daemon=True)
                    thread.start()
                    self._threads.append(thread)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
