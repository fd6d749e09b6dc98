"""Real servers for tests: a mongod, a replica set of three, and a proxy which loses replies.

::

    with Mongod() as server:                       # a replica set of one; replica_set=False is a standalone
        client = MongoClient(server.url('db'))
        server.kill()                              # SIGKILL; start() brings it back on its data and its port

    with Proxy(server.port) as proxy:
        happened = proxy.cut_reply(b'insert')      # the next insert is applied, its reply is lost
        ...                                        # insert through proxy.url('db')
        assert happened.wait(10)
"""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from minibatch import embedded
from minibatch.errors import NoMongodError

T = TypeVar('T')

ENOUGH_MEMORY = 8 << 30  # bytes; four processes of tests have up to a dozen servers


def missing(reason: str) -> NoReturn:
    """A server is not on this machine: skip the test on a laptop, fail it in CI."""
    if os.environ.get('CI', '').lower() in ('1', 'true'):
        pytest.fail(reason)
    pytest.skip(reason)


def eventually(condition: Callable[[], T], timeout: float = 60, message: str = '') -> T:
    """Poll until the condition is true and return its value, or fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(message or f'not true within {timeout} s: {condition}, last {value!r}')
        time.sleep(0.01)
    return value


def in_memory() -> str | None:
    """Where temporary data of servers may lie in memory, if there is plenty: no test ends the computer."""
    memory = '/dev/shm'
    plenty = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ENOUGH_MEMORY
    return memory if plenty else None


def free_port() -> int:
    """A free loopback port, below the ports which the kernel gives to outgoing connections.

    A port from that range may be taken, by a client's own end, while its server is down for a restart.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(('127.0.0.1', port))
            except OSError:
                continue
            return port


class Mongod:
    """A mongod on a free loopback port, its data in a temporary folder.

    Args:
        options: more options for mongod, for example `'--setParameter', 'enableTestCommands=1'`
        replica_set: True: a replica set of one, writable when start() returns; a name: a member which
            somebody else initiates; False: a standalone, without change streams and transactions
    """

    client: MongoClient[dict[str, Any]]  # stays the same over kill() and start()

    def __init__(self, *options: str, replica_set: bool | str = True) -> None:
        self.options = options
        self.replica_set = replica_set
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.home: Path | None = None

    @property
    def pid(self) -> int:
        assert self.process, 'not running'
        return self.process.pid

    @property
    def address(self) -> str:
        return f'127.0.0.1:{self.port}'

    def url(self, dbname: str = 'test') -> str:
        """The URL of a database of this server."""
        return f'mongodb://{self.address}/{dbname}?directConnection=true'

    def start(self) -> Mongod:
        """Start it, the first time or again, and wait until it takes writes."""
        assert self.process is None, 'already running'
        self.home = self.home or Path(tempfile.mkdtemp(prefix='minibatch-test-', dir=in_memory()))
        self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if self.replica_set is True:
                self._initiate()
            if hasattr(self, 'client'):
                self._await(self.client)
            else:
                self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def connect(self) -> None:
        """Make `client` anew: one made before replSetInitiate believes that there are no sessions."""
        self._disconnect()
        self.client = MongoClient(self.url(), serverSelectionTimeoutMS=2000)
        self._await(self.client)

    def kill(self) -> None:
        """SIGKILL, as by the out-of-memory killer."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """A clean shutdown, which takes about a second."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freeze it: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)
        assert self.process
        threads = Path(f'/proc/{self.process.pid}/task')  # on other systems than Linux there is none

        def stopped() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return all(b'\nState:\tT' in status.read_bytes() for status in threads.glob('*/status'))
            return False

        eventually(stopped)

    def resume(self) -> None:
        """Let it go on after pause()."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, and remove its data."""
        if self.process:
            self.resume()
        self._disconnect()
        if self.process:
            self.kill()
        if self.home:
            shutil.rmtree(self.home, ignore_errors=True)
            self.home = None

    def __enter__(self) -> Mongod:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _command(self) -> list[str]:
        try:
            program = embedded.find_mongod()
        except NoMongodError as error:
            missing(str(error))
        name = 'rs0' if self.replica_set is True else self.replica_set
        return [str(program), '--bind_ip', '127.0.0.1', '--port', str(self.port), '--dbpath', str(self.home),
                '--logpath', f'{self.home}/mongod.log', '--logappend', '--nounixsocket',
                '--wiredTigerCacheSizeGB', '0.25', '--setParameter', 'diagnosticDataCollectionEnabled=false',
                *(('--replSet', name, '--oplogSize', '64') if name else ()), *self.options]

    def _initiate(self) -> None:
        with MongoClient[dict[str, Any]](self.url(), serverSelectionTimeoutMS=500) as client:
            self._await(client)
            if 'setName' not in client.admin.command('hello'):
                eventually(lambda: initiated(client, [self.address], 'rs0'))
            eventually(lambda: self._hello(client).get('isWritablePrimary'), message='not primary')

    def _await(self, client: MongoClient[dict[str, Any]]) -> None:
        eventually(lambda: self._hello(client), message=f'no answer from {self.address}')

    def _hello(self, client: MongoClient[dict[str, Any]]) -> dict[str, Any]:
        assert self.process
        if self.process.poll() is not None:
            log = Path(f'{self.home}/mongod.log')
            tail = log.read_text().splitlines()[-5:] if log.exists() else ['no log']
            raise AssertionError('\n'.join([f'mongod ended with code {self.process.returncode}', *tail]))
        try:
            return client.admin.command('hello')
        except PyMongoError:
            return {}

    def _disconnect(self) -> None:
        if hasattr(self, 'client'):
            self.client.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process, 'not running'
        self.process.send_signal(number)  # nothing if it has ended already

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        self._signal(signal.SIGCONT)
        assert self.process
        self.process.wait(60)
        self.process = None


def initiated(client: MongoClient[dict[str, Any]], addresses: list[str], name: str) -> bool:
    """Make a replica set; False while a member cannot be reached yet. Elections take a second, not ten."""
    members = [{'_id': i, 'host': address} for i, address in enumerate(addresses)]
    settings = {'electionTimeoutMillis': 1000, 'heartbeatIntervalMillis': 200}
    try:
        client.admin.command('replSetInitiate', {'_id': name, 'members': members, 'settings': settings})
    except PyMongoError as error:
        return 'already initialized' in str(error)
    return True


class ReplicaSet:
    """Three mongods which form a replica set, for step-downs and fail-overs. Started by `with`."""

    client: MongoClient[dict[str, Any]]

    def __init__(self, *options: str, members: int = 3) -> None:
        self.members = [Mongod(*options, replica_set='rs3') for _ in range(members)]

    def url(self, dbname: str = 'test') -> str:
        """The URL which finds the primary, whichever it is."""
        return f'mongodb://{",".join(member.address for member in self.members)}/{dbname}?replicaSet=rs3'

    @property
    def primary(self) -> Mongod:
        """The member which is primary now; waits for an election."""
        def address() -> Any:
            return self.client.primary
        port = eventually(address, message='no primary')[1]
        return next(member for member in self.members if member.port == port)

    def step_down(self, seconds: int = 60) -> None:
        """Make the primary step down; another member is elected."""
        catching_up = min(10, seconds - 1)
        command = {'replSetStepDown': seconds, 'secondaryCatchUpPeriodSecs': catching_up, 'force': True}
        self.primary.client.admin.command(command)

    def __enter__(self) -> ReplicaSet:
        try:
            for member in self.members:
                member.start()
            with MongoClient[dict[str, Any]](self.members[0].url()) as client:
                eventually(lambda: initiated(client, [member.address for member in self.members], 'rs3'))
            for member in self.members:
                member.connect()
            self.client = MongoClient(self.url())
            eventually(self._writable, message='no member became primary')
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all members, and remove their data."""
        if hasattr(self, 'client'):
            self.client.close()
        for member in self.members:
            member.close()

    def _writable(self) -> bool:
        try:
            return bool(self.client.admin.command('hello')['isWritablePrimary'])
        except PyMongoError:
            return False


class Proxy:
    """A TCP proxy on loopback in front of a mongod, which can lose replies and connections on command."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = free_port()
        self._lock = threading.Lock()
        self._marker: bytes | None = None
        self._happened = threading.Event()
        self._refusing = self._ending = False
        self._pairs: set[_Pair] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()

    def url(self, dbname: str = 'test') -> str:
        """The URL of a database, through the proxy."""
        return f'mongodb://127.0.0.1:{self.port}/{dbname}?directConnection=true'

    def cut_reply(self, marker: bytes) -> threading.Event:
        """Lose the reply to the next request which contains `marker`, once.

        The request goes to the server, the server's reply is read and thrown away, and both connections
        are closed. The event returned is set after that: the server has then done what was asked.
        """
        with self._lock:
            self._marker, self._happened = marker, threading.Event()
            return self._happened

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.close()

    def refuse(self) -> None:
        """Close every new connection at once; those open stay."""
        self._refusing = True

    def allow(self) -> None:
        """Take new connections again."""
        self._refusing = False

    def __enter__(self) -> Proxy:
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(('127.0.0.1', self.port))
        self._listener.listen(128)
        self._run(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._ending = True
        socket.create_connection(('127.0.0.1', self.port)).close()  # wakes accept()
        self._threads[0].join(10)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._ending:
                client.close()
                return
            if self._refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(('127.0.0.1', self.target))
            except OSError:
                client.close()
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.add(pair)
            self._run(self._requests, pair)
            self._run(self._replies, pair)

    def _requests(self, pair: _Pair) -> None:
        while message := pair.read(pair.client):
            with self._lock:
                if self._marker and self._marker in message:
                    self._marker = None
                    pair.lost, pair.happened = number(message, 4), self._happened
            if not pair.send(pair.server, message):
                break
        self._forget(pair)

    def _replies(self, pair: _Pair) -> None:
        while message := pair.read(pair.server):
            if pair.happened and number(message, 8) == pair.lost:
                self._forget(pair)
                pair.happened.set()
                return
            if not pair.send(pair.client, message):
                break
        self._forget(pair)

    def _forget(self, pair: _Pair) -> None:
        with self._lock:
            self._pairs.discard(pair)
        pair.close()


def number(message: bytes, at: int) -> int:
    """A field of the header of a MongoDB message: length at 0, request id at 4, that of the request at 8."""
    value: int = struct.unpack_from('<i', message, at)[0]
    return value


class _Pair:
    """A client's connection and its own connection to the server; whole messages go through."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.lost = 0
        self.happened: threading.Event | None = None

    def read(self, source: socket.socket) -> bytes:
        """One whole message, or nothing when the connection has ended."""
        size = self._receive(source, 4)
        rest = self._receive(source, number(size, 0) - 4) if size else b''
        return size + rest if rest else b''

    def send(self, target: socket.socket, message: bytes) -> bool:
        try:
            target.sendall(message)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Wake both pumps, and tell both sides."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @staticmethod
    def _receive(source: socket.socket, size: int) -> bytes:
        chunks = []
        while size:
            try:
                chunk = source.recv(min(size, 1 << 20))
            except OSError:
                return b''
            if not chunk:
                return b''
            chunks.append(chunk)
            size -= len(chunk)
        return b''.join(chunks)
