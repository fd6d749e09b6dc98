"""Find, start, share and stop a local mongod when no URL is given.

One server per user and home folder, a replica set of one (so that change streams and transactions work). It
outlives the process that started it and is shared by all that come later, and listens on a unix socket alone,
in a folder that only its user can enter::

    home/lock          held while somebody starts or stops the server
    home/state.json    where it listens and on which host; the socket is empty until it takes writes
    home/mongod.log    kept below 10 MB from start to start, the older part in mongod.log.1
    home/data/         the database files

The home is `platformdirs.user_data_dir('minibatch')`, unless the environment variable MINIBATCH_HOME names
another; MINIBATCH_MONGOD names the mongod program. A server is recognised by its command line and its user,
never by a process id that was written down: after a crash the system gives that to another process.
"""
from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import platformdirs
import psutil
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from minibatch.errors import (
    DataFolderInUseError,
    EmbeddedServerError,
    MinibatchError,
    NoMongodError,
    ReentranceError,
    install_hint,
)

if sys.platform != 'win32':
    import fcntl
    import resource

log = logging.getLogger('minibatch.embedded')

START_TIMEOUT = 120.0  # recovery of the journal after a crash is part of the start
POLL = 0.01
_holder = 0  # the thread of this process that starts or stops the server
LOG_SIZE = 10_000_000
SOCKET_NAME = 'mongodb-27017.sock'  # mongod's own default name: with any other it makes a second socket
OURS = ('lock', 'state.json', 'data', 'mongod')  # how the names in the home begin
SOCKET_PATH_MAX = 100  # bytes; the kernel's limit is 107 on Linux, 103 on macOS
OPTIONS = (
    '--replSet', 'minibatch', '--filePermissions', '0700', '--quiet', '--slowms', '1000',
    '--wiredTigerCacheSizeGB', '0.25', '--setParameter', 'diagnosticDataCollectionEnabled=false',
    # Every message is written to the oplog too, and a change stream further behind than it reaches cannot
    # resume: 64 MB would hold four of the largest documents. The default, 5 % of the disk, is for real sets.
    '--oplogSize', '256',
)
THREE_WAYS = (
    f'Either {install_hint("embedded")}, which brings one; or install MongoDB, so that mongod is on '
    'the PATH, or set MINIBATCH_MONGOD to its path; or give the URL of a MongoDB (MINIBATCH_MONGO_URL).'
)
OTHER_HOME = 'Set MINIBATCH_HOME to a folder of your own, on a local disk, that you can write to.'
ADVICE = {  # what stands in an error of the system or in the log of mongod: what to do about it
    r'Too many open files|errno: 24\b': 'Too few files may be open at a time: raise the limit, as by `ulimit -n 4096`.',
    r'No space left|errno: 28\b|Disk quota': 'The disk of {home} is full: free some space, or set MINIBATCH_HOME to a '
    'folder on another disk.',
    r'File too large|File size limit|errno: 27\b': 'Files may not grow as they must: raise the limit, as by `ulimit -f '
    'unlimited`.',
    r'Cannot allocate memory|errno: 12\b|bad_alloc': 'There is too little memory, or a limit of it: mongod needs 1 GB.',
}
MOST_SAID = 300  # characters
LEAST_FREE = 1_000_000  # bytes
NO_REASON = re.compile(r'about to fork|forked process|ERROR: child process failed|To see additional|.*"s":"I"|\s*$')


@dataclass(frozen=True)
class Status:
    """The embedded server, as it is now."""

    running: bool
    home: Path
    pid: int | None = None
    url: str = ''  # empty when not running; holds no password
    mongod: str = ''  # the program that runs, or that would be started; empty if there is none
    version: str = ''  # of MongoDB; empty when not running
    uptime: float = 0.0  # seconds


def url() -> str:
    """The URL of the embedded server, which is started if it does not run. Takes a millisecond if it does.

    Returns:
        ``mongodb://<percent-encoded socket path>/minibatch?directConnection=true``

    Raises:
        NoMongodError: there is no mongod program
        DataFolderInUseError: the data folder is in use from another host or container
        EmbeddedServerError: the server could not be started, or there can be none here

    Example:
        >>> MongoClient(embedded.url()).admin.command('ping')['ok']
        1.0
    """
    home = _home()
    state = _read_state(home)
    if state.get('boot') == _boot_id() and _owned(home) and _listens(state['socket']):
        return _url(state['socket'])
    return start().url


def start() -> Status:
    """Start the embedded server, or find it running, and wait until it takes writes: usually under a second.

    Raises:
        NoMongodError, DataFolderInUseError, EmbeddedServerError: as `url` does

    Example:
        >>> embedded.start().running
        True
    """
    if sys.platform == 'win32':
        raise EmbeddedServerError('There is no embedded MongoDB on Windows: its mongod has no unix sockets. '
                                  'Give the URL of a running MongoDB (MINIBATCH_MONGO_URL).')
    home = _home()
    _make_private(home)
    try:
        with _locked(home):
            return _started(home)
    except MinibatchError:
        raise
    except OSError as error:
        raise EmbeddedServerError(f'The embedded MongoDB cannot be started in {home}: {error}. '
                                  f'{_advice(home, str(error)) or OTHER_HOME}') from error


def _started(home: Path) -> Status:
    _check_host(home)
    servers, seen = _find(home), _size(_log_of(home))
    if not any(_listens(server.path) for server in servers):
        for server in servers:  # left over, its socket removed or its start cut short
            _end(server, START_TIMEOUT)
        seen = _launch(home)
        servers = _find(home)
    version = _lead(servers[0]) if servers else ''
    if not version:
        raise _failure(home, 'mongod ended right after its start', '', seen)
    _write_state(home, servers[0].path, version)
    return _status(home, servers[0])


def stop(timeout: float = 30.0) -> bool:
    """Shut the embedded server down cleanly, for all who use it, and wait until it is gone.

    Args:
        timeout: seconds to wait for it

    Returns:
        True if one was running

    Raises:
        EmbeddedServerError: it still runs after `timeout`

    Example:
        >>> embedded.stop()
        True
    """
    home = _home()
    if not home.exists():
        return False
    with _locked(home):
        servers = _find(home)
        for server in servers:
            _end(server, timeout)
        if servers:
            (home / 'state.json').unlink(missing_ok=True)
        return bool(servers)


def status() -> Status:
    """Whether the embedded server runs, and where; starts nothing.

    Example:
        >>> embedded.status().running
        False
    """
    home = _home()
    if servers := _find(home):
        return _status(home, servers[0])
    try:
        return Status(False, home, mongod=str(find_mongod()))
    except NoMongodError:
        return Status(False, home)


def find_mongod() -> Path:
    """The mongod program: of MINIBATCH_MONGOD, on the PATH, or of the extra ``embedded``.

    Raises:
        NoMongodError: there is none, or MINIBATCH_MONGOD is wrong
    """
    named = os.environ.get('MINIBATCH_MONGOD')
    if found := shutil.which(named or 'mongod'):
        return Path(found)
    if named:
        raise NoMongodError(f'MINIBATCH_MONGOD is {named!r}, which is no program that can be run. '
                            'Set it to the path of mongod, or unset it.')
    spec = importlib.util.find_spec('fiftyone')  # does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, 'db', 'bin', 'mongod')
        if path.is_file():
            return _executable(path)
    raise NoMongodError(f'There is no mongod program on this machine. {THREE_WAYS}')


def _executable(path: Path) -> Path:
    """The program with its execute bit, which wheels lose; a copy in the home if it is someone else's."""
    if os.access(path, os.X_OK):
        return path
    try:
        path.chmod(path.stat().st_mode | 0o111)
        return path
    except OSError:
        home = _home()
        _make_private(home)
        copy = home / 'mongod'
        if not (copy.exists() and copy.stat().st_size == path.stat().st_size):
            partial = home / f'mongod.{os.getpid()}'
            shutil.copyfile(path, partial)
            partial.chmod(0o700)
            partial.replace(copy)
        return copy


# -- the home folder

def _home() -> Path:
    named = os.environ.get('MINIBATCH_HOME')
    if not (named or os.environ.get('XDG_DATA_HOME') or os.environ.get('HOME', '~')):
        raise EmbeddedServerError(f'The embedded MongoDB has no home folder: HOME is empty. {OTHER_HOME}')
    try:
        home = os.path.expanduser(named or platformdirs.user_data_dir('minibatch', appauthor=False))
    except RuntimeError:
        home = '~'
    if home.startswith('~'):  # as it was: nobody knows whose home that is
        raise EmbeddedServerError(f'The embedded MongoDB has no home folder: HOME is not set, and the system knows no '
                                  f'home of user {os.getuid()}. {OTHER_HOME}')
    return Path(os.path.realpath(home))


def _owned(folder: Path) -> bool:
    """Whether it is a real folder, not a link, and belongs to this user."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _make_private(folder: Path) -> None:
    """Make the folder and close it to others, or raise."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owned = _owned(folder)
        shared = owned and _serves_others(folder)
        if owned and not shared:
            folder.chmod(0o700)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EmbeddedServerError(f'The embedded MongoDB cannot write to {folder}: {error}. '
                                  f'{_advice(folder, str(error)) or OTHER_HOME}') from error
    if not owned:
        raise EmbeddedServerError(f'The folder {folder} of the embedded MongoDB is not yours. {OTHER_HOME}')
    if shared:
        raise EmbeddedServerError(f'The folder {folder} has other things, and others may use it. Name a new one by '
                                  f'MINIBATCH_HOME, or close this one to others: chmod 700 {folder}')


def _serves_others(folder: Path) -> bool:
    """Whether others may look into a folder, and there is something in it that is not of the embedded MongoDB."""
    return bool(folder.stat().st_mode & 0o077) and any(not path.name.startswith(OURS) for path in folder.iterdir())


def _socket_path(home: Path) -> str:
    """Where to listen: in the home, or in a short private folder if the home's path does not fit a socket."""
    if _fits(home):
        return str(home / SOCKET_NAME)
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    for parent in (os.environ.get('XDG_RUNTIME_DIR', ''), tempfile.gettempdir()):
        folder = Path(parent, f'minibatch-{os.getuid()}', name)
        # the owner of the parent could put a folder of his own in place of ours
        if os.path.isdir(parent) and os.stat(parent).st_uid in (0, os.getuid()) and _fits(folder):
            _make_private(folder.parent)
            _make_private(folder)
            return str(folder / SOCKET_NAME)
    raise EmbeddedServerError(f'The path {home} does not fit a unix socket. '
                              'Set MINIBATCH_HOME to a short path of plain letters.')


def _fits(folder: Path) -> bool:
    # mongod takes commas and colons in its address as separators
    path = str(folder / SOCKET_NAME)
    return len(path) <= SOCKET_PATH_MAX and re.fullmatch(r'[\w./-]+', path, re.ASCII) is not None


def _try_lock(descriptor: int, home: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EmbeddedServerError(f'{home} is on a disk without file locks: {error}. {OTHER_HOME}') from error
    return True


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process (and thread) at a time may start or stop; the kernel frees the lock of a dead one."""
    global _holder
    if _holder == threading.get_ident():  # such as a handler of signals, which would wait for what it has interrupted
        raise ReentranceError('The embedded MongoDB is being started or stopped by this very thread. Try again later.')
    descriptor = os.open(home / 'lock', os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while not _try_lock(descriptor, home):
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f'Another process has held {home}/lock for {START_TIMEOUT:.0f} s, '
                                          'to start or stop the server. Try again, or end that process.')
            time.sleep(POLL)
        try:
            _holder = threading.get_ident()
            yield
        finally:
            _holder = 0
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a child was forked meanwhile
    finally:
        os.close(descriptor)


# -- the state file

def _boot_id() -> str:
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def _read_state(home: Path) -> dict[str, Any]:
    try:
        state = json.loads((home / 'state.json').read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and {'host', 'boot', 'socket', 'version'} <= state.keys() else {}


def _write_state(home: Path, path: str, version: str) -> None:
    state = {'host': socket.gethostname(), 'boot': _boot_id(), 'socket': path, 'version': version}
    partial = home / 'state.json.new'
    partial.write_text(json.dumps(state, indent=1))
    partial.replace(home / 'state.json')


def _check_host(home: Path) -> None:
    """Refuse a home whose server runs, or has crashed, on another host.

    The same boot id is the same kernel, whatever the host name, and mongod's own file locks tell who uses the
    data. The same host name with another boot id is this host, started again.
    """
    state = _read_state(home)
    if state and state['host'] != socket.gethostname() and state['boot'] != _boot_id():
        raise DataFolderInUseError(
            f'The data in {home} is in use by an embedded MongoDB on the host {state["host"]}. Stop it '
            'there, or set MINIBATCH_HOME to another folder on this host. If it certainly runs no more, '
            f'delete {home}/state.json.')


# -- the process

def _url(path: str) -> str:
    return f'mongodb://{quote_plus(path)}/minibatch?directConnection=true'


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class _Server:
    process: psutil.Process
    path: str  # of its socket
    program: str


def _server(process: psutil.Process, home: Path) -> _Server | None:
    """The process, if it is a server of this home and of this user."""
    try:
        words: list[str] = process.cmdline()
        mine: bool = process.uids().real == os.getuid()
    except psutil.Error:  # gone, a zombie, or hidden from us
        return None
    options = dict(itertools.pairwise(words))
    path = options.get('--bind_ip', '')
    if mine and options.get('--dbpath') == str(home / 'data') and path.endswith(SOCKET_NAME):
        return _Server(process, path, words[0])
    return None


def _find(home: Path) -> list[_Server]:
    """The running servers of this home, the newest first: more than one only while mongod forks."""
    if sys.platform == 'win32':
        return []
    found = [server for process in psutil.process_iter() if (server := _server(process, home))]
    return sorted(found, key=lambda server: (server.process.create_time(), server.process.pid), reverse=True)


def _end(server: _Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    process = server.process
    with suppress(psutil.NoSuchProcess):
        process.terminate()  # psutil checks first that the process id was not given to another
    # a process that exits loses its command line first, then its locks and its socket, and itself last
    while _runs(process) or _listens(server.path):
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f'The embedded MongoDB (process {process.pid}) has not ended within '
                                      f'{timeout:g} s. Wait longer, or end it with `kill -9 {process.pid}`: '
                                      'what was acknowledged is kept.')
        time.sleep(POLL)
    log.info('embedded MongoDB stopped, process %s', process.pid)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _launch(home: Path) -> int:
    """Start mongod, in a session of its own, and wait until it listens; returns where its log begins."""
    program, path, messages = find_mongod(), _socket_path(home), _log_of(home)
    data = home / 'data'
    data.mkdir(mode=0o700, exist_ok=True)
    if _size(messages) > LOG_SIZE:
        messages.replace(home / 'mongod.log.1')
    seen = _size(messages)
    _write_state(home, '', '')
    # --fork, so that no process of a user of this server is its parent, with a zombie left to reap
    command = [str(program), '--fork', '--logpath', str(messages), '--logappend', '--dbpath', str(data),
               '--bind_ip', path, '--unixSocketPrefix', str(Path(path).parent), *OPTIONS]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True,
                              timeout=START_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedServerError(f'{program} cannot be run: {error}. {THREE_WAYS}') from error
    if done.returncode:
        (home / 'state.json').unlink()
        raise _failure(home, f'{program} does not start (code {done.returncode})', done.stdout, seen)
    log.info('embedded MongoDB started in %.2f s, data in %s', time.monotonic() - began, data)
    return seen


def _log_of(home: Path) -> Path:
    return home / 'mongod.log'


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failure(home: Path, what: str, output: str, seen: int) -> EmbeddedServerError:
    """What happened, what to do, and what mongod said, in its log from `seen` on or else on its output: one line."""
    messages = _log_of(home)
    logged = messages.read_bytes()[seen:].decode(errors='replace') if messages.exists() else ''
    if 'DBPathInUse' in logged:
        return DataFolderInUseError(
            f'The data in {home} is in use by a mongod which cannot be seen from here: in another container, '
            'or started before the folder was renamed. Stop it, or set MINIBATCH_HOME to another folder.')
    said = _first_error(logged) or '; '.join(line for line in output.splitlines() if not NO_REASON.match(line))
    advice = _advice(home, said + logged) or _advice(home, _what_is_full(home)) or (
        f'Mend that, or take another MongoDB. {THREE_WAYS}')
    heard = f' It said: {said[:MOST_SAID]}.' if said else ''
    return EmbeddedServerError(f'{what}. {advice}{heard} Its log is {messages}')


def _first_error(logged: str) -> str:
    """The first error in a log of mongod, as text: those that follow come of it."""
    for line in logged.splitlines():
        with suppress(ValueError, AttributeError):
            entry = json.loads(line)
            if entry['s'] in 'EF' and (words := _words(entry.get('attr', {}))):
                return f'{entry["msg"].strip()}: {words}'
    return ''


def _words(attr: dict[str, Any]) -> str:
    """What the attributes of an entry in a log of mongod say."""
    inner = {key: value for value in attr.values() if isinstance(value, dict) for key, value in value.items()}
    said = [{**inner, **attr}.get(name) for name in ('error', 'message', 'msg', 'error_str', 'errmsg', 'reason')]
    return ', '.join(dict.fromkeys(text.strip() for text in said if isinstance(text, str)))


def _what_is_full(home: Path) -> str:
    """What a mongod that could not even write its log would have said."""
    with suppress(OSError):
        if shutil.disk_usage(home).free < LEAST_FREE:
            return 'No space left'
    return 'File too large' if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY else ''


def _advice(home: Path, text: str) -> str:
    """What to do about an error, if that is known."""
    return next((advice.format(home=home) for found, advice in ADVICE.items() if re.search(found, text)), '')


def _lead(server: _Server) -> str:
    """Make the server a replica set of one which takes writes; returns its version, '' if it has ended."""
    deadline = time.monotonic() + START_TIMEOUT
    problem: PyMongoError | None = None
    with MongoClient[dict[str, Any]](_url(server.path), serverSelectionTimeoutMS=1000,
                                     socketTimeoutMS=10000) as client:
        while time.monotonic() < deadline:
            try:
                if _leads(client, server.path):
                    return str(client.server_info()['version'])
            except PyMongoError as error:
                problem = error
            if not _runs(server.process):
                return ''
            time.sleep(POLL)
    reason = re.split(r' \(configured|, Timeout:', str(problem))[0]
    raise EmbeddedServerError(f'The embedded MongoDB takes no writes after {START_TIMEOUT:.0f} s: {reason}. '
                              'Stop it and try again; mongod.log in its home folder says more.')


def _leads(client: MongoClient[dict[str, Any]], path: str) -> bool:
    config = client['local']['system.replset'].find_one()
    members = [{'_id': 0, 'host': path}]
    if config is None:
        client.admin.command('replSetInitiate', {'_id': 'minibatch', 'members': members})
    elif config['members'][0]['host'] != path:  # the home was moved or copied: it looks for itself there
        config |= {'members': members, 'version': config['version'] + 1}
        client.admin.command('replSetReconfig', config, force=True)
    return bool(client.admin.command('hello')['isWritablePrimary'])


def _status(home: Path, server: _Server) -> Status:
    uptime = time.time() - server.process.create_time()
    version = _read_state(home).get('version', '')
    return Status(True, home, server.process.pid, _url(server.path), server.program, version, uptime)
