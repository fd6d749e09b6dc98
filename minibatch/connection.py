"""Where MongoDB is: URLs, and clients that survive fork and spawn.

A `Target` says which database is meant; it is a small value that can be sent to another process. The client behind
it is made on first use in each process, and shared by all who mean the same database.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import mongoengine
import pymongo
from pymongo import MongoClient, ReadPreference, WriteConcern, common
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from . import embedded
from .errors import ArgumentError, PortabilityError, UnreachableError

DEFAULT_DBNAME = 'minibatch'
DEFAULT_ALIAS = 'minibatch'
URL_VARIABLES = ('MINIBATCH_MONGO_URL', 'MONGO_URL')
CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 1.0
JOIN_PAUSE = 0.2
RAISED_WITHIN = 1000  # steps of Python
WAIT_DEPTH = 5  # so many frames deep pymongo waits
LEAST_TIMEOUT = 0.001
DEFAULTS: dict[str, Any] = {
    'appName': 'minibatch',
    'datetime_conversion': 'DATETIME_AUTO',  # a time beyond the year 9999 must not stop a reader
    'socketTimeoutMS': 120_000,  # a server that is frozen must not hold us for ever
    'uuidRepresentation': 'standard',
}
MAJORITY = WriteConcern('majority')
UNAUTHORIZED = 13
NO_PRIMARY = re.compile(r'(?i)\bnot? primary|Primary\(\)')
# pymongo does not call all of them a lost connection, and none of them if they stand in the reply to a bulk write.
PASSING_CODES = {
    6,  # HostUnreachable
    7,  # HostNotFound
    43,  # CursorNotFound
    50,  # MaxTimeMSExpired
    89,  # NetworkTimeout
    91,  # ShutdownInProgress
    134,  # ReadConcernMajorityNotAvailableYet
    189,  # PrimarySteppedDown
    237,  # CursorKilled
    262,  # ExceededTimeLimit
    9001,  # SocketException
    10107,  # NotWritablePrimary
    11600,  # InterruptedAtShutdown
    11601,  # Interrupted
    11602,  # InterruptedDueToReplStateChange
    13435,  # NotPrimaryNoSecondaryOk
    13436,  # NotPrimaryOrSecondary
    14031,  # OutOfDiskSpace
}

_lock = threading.RLock()
_clients: dict[tuple[Any, ...], MongoClient[dict[str, Any]]] = {}
_databases: dict[tuple[Target, bool], Database[dict[str, Any]]] = {}  # of these clients
_inherited: list[Any] = []
_default: Target | None = None
_first: Target | None = None
_sent: ContextVar[tuple[Target | None, Target | None] | None] = ContextVar('minibatch_sent', default=None)
_told_to_stop: ContextVar[Callable[[], bool] | None] = ContextVar('minibatch_told_to_stop', default=None)
_using: ContextVar[Target | None] = ContextVar('minibatch_using', default=None)
_using_stream: ContextVar[str | None] = ContextVar('minibatch_using_stream', default=None)


@dataclass(frozen=True, repr=False)
class Target:
    """A database: its URL, its name, and further options of the client as sorted pairs."""

    url: str
    dbname: str
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f'Target({masked(self.url)!r}, {self.dbname!r})'

    def __deepcopy__(self, memo: dict[int, Any]) -> Target:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_mock:
            raise PortabilityError(f'{masked(self.url)} is in the memory of this process, where others do not see it')
        return Target, (self.url, self.dbname, self.options)

    @property
    def is_mock(self) -> bool:
        """Whether it is a mongomock, in this process, for unit tests of models and appends."""
        return _is_mock(self.url)

    @property
    def is_connected(self) -> bool:
        """Whether this process has a client for this URL already."""
        with _lock:
            return (self.url, self.options) in _clients

    @property
    def is_away(self) -> bool:
        """Whether no server is known that takes writes, by what the client has noticed; nobody is asked."""
        if self.is_mock or not self.is_connected:
            return False
        return not self.client.topology_description.has_writable_server()

    def why_away(self) -> str:
        """What the client has noticed of each server, without secrets."""
        servers = self.client.topology_description.server_descriptions().values()
        reasons = [_without_secrets(server.error, self.url) for server in servers if server.error is not None]
        return '; '.join(reasons) or 'no server takes writes'

    @property
    def client(self) -> MongoClient[dict[str, Any]]:
        """The client of this process for this URL."""
        key = (self.url, self.options)
        with _lock:
            if key not in _clients:
                _clients[key] = _connect(self.url, dict(self.options))
            return _clients[key]

    @property
    def db(self) -> Database[dict[str, Any]]:
        """For messages: the URL's write concern, reads at majority from the primary whatever the URL prefers."""
        return self._database(majority=False)

    @property
    def majority(self) -> Database[dict[str, Any]]:
        """For bookkeeping (groups, positions, windows): written and read at majority, whatever the URL says."""
        return self._database(majority=True)

    @property
    def waiting(self) -> Database[dict[str, Any]]:
        """As `majority`, for what holds its connection for long: of a pool that has a limit it takes none."""
        if 'maxpoolsize' not in _given(self.url, dict(self.options)):
            return self.majority
        options = {name: value for name, value in self.options if name.lower() not in ('maxpoolsize', 'minpoolsize')}
        return replace(self, options=_hashable({**options, 'maxPoolSize': 0, 'minPoolSize': 0})).majority

    def _database(self, majority: bool) -> Database[dict[str, Any]]:
        key = self, majority
        with _lock:
            if key not in _databases:  # making one costs a tenth of an append
                _databases[key] = self._made(majority)
            return _databases[key]

    def _made(self, majority: bool) -> Database[dict[str, Any]]:
        db = self.client[self.dbname]
        if self.is_mock:
            return db
        given = db.write_concern if 'w' in db.write_concern.document else MAJORITY
        return db.with_options(
            read_preference=ReadPreference.PRIMARY,
            read_concern=ReadConcern('majority'),
            write_concern=MAJORITY if majority else given,
        )

    def within(self, seconds: float) -> AbstractContextManager[None]:
        """What is asked of MongoDB in this block takes no longer, down to the driver's last wait."""
        return nullcontext() if self.is_mock else pymongo.timeout(max(seconds, LEAST_TIMEOUT))

    def check(self, timeout: float = math.inf) -> None:
        """Raise `UnreachableError`, naming the address, if the server does not answer in time.

        In time is within `timeout` seconds, and within the ``serverSelectionTimeoutMS`` of the URL, 10 s by default.
        """
        global _first
        try:
            if not self.is_mock:
                client = self.client
                given = 'serverselectiontimeoutms' in _given(self.url, dict(self.options))
                longest = client.options.server_selection_timeout if given else CONNECT_TIMEOUT
                with self.within(min(timeout, longest)):
                    client.admin.command('ping')
        except PyMongoError as exc:
            raise UnreachableError(f'MongoDB does not answer at {self.explain(exc)}') from None
        with _lock:
            _first = _first or self

    def explain(self, exc: PyMongoError) -> str:
        """The address, what is wrong there, and what to do."""
        if isinstance(exc, OperationFailure) and exc.code == UNAUTHORIZED:
            advice = f'The URL must name a user who has the role readWrite on the database {self.dbname!r}.'
        elif NO_PRIMARY.search(str(exc)):
            advice = 'No member of the replica set takes writes; one that is new must be initiated, by rs.initiate().'
        else:
            advice = (
                'Check that it runs, that host and port are right, and user, password and authSource if it asks for '
                'them.'
            )
        return f'{masked(self.url)}: {_without_secrets(exc, self.url)}. {advice}'


def target(url: str | None = None, dbname: str | None = None, **options: Any) -> Target:
    """Which database is meant.

    `url`, else what `connectdb` connected to, else MINIBATCH_MONGO_URL, else MONGO_URL, else the embedded MongoDB,
    which is started if need be. The name of the database is `dbname`, else the URL's, else ``minibatch``.
    """
    default = chosen()
    if url is None and default is not None:
        merged = {**dict(default.options), **options}
        return Target(default.url, dbname or default.dbname, _hashable(merged))
    url = url or next((os.environ[name] for name in URL_VARIABLES if os.environ.get(name)), None) or embedded.url()
    if not isinstance(url, str) or not re.match(r'(mongodb(\+srv)?|mongomock)://', url):
        raise ArgumentError(f'url must start with mongodb:// or mongodb+srv://, not {masked(str(url))[:80]!r}')
    try:
        if '@' in urlsplit(url).path:
            raise ValueError('user and password must be percent-encoded')
        dbname = dbname or unquote(urlsplit(url).path.lstrip('/')) or DEFAULT_DBNAME
    except ValueError as exc:
        raise ArgumentError(f'the URL {masked(url)} is not right: {_without_secrets(exc, url)}') from None
    if not isinstance(dbname, str) or any(char in '/\\. "$\0' for char in dbname):
        raise ArgumentError(f'dbname must have none of the characters / \\ . " $ and blank: {dbname!r}')
    return Target(url, dbname, _hashable(options))


def _hashable(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name, value in options.items():
        try:
            hash(value)
        except TypeError:
            raise ArgumentError(
                f'the option {name} of the client must be a plain value, not {type(value).__name__}; use the URL for it'
            ) from None
    return tuple(sorted(options.items()))


def chosen() -> Target | None:
    """What `connectdb` connected to, if it did."""
    sent = _sent.get()
    return _default if sent is None else sent[0]


def first_opened() -> Target | None:
    """The first database that was opened, here or, in a worker, by its parent."""
    sent = _sent.get()
    return _first if sent is None or sent[1] is None else sent[1]


def choose(default: Target | None, first: Target | None = None) -> None:
    """Mean this database wherever no URL is given; for workers, which mean what their parent means.

    Models without it mean `first`. A worker whose threads serve several parents means others in each.
    """
    global _default
    _default = default
    _sent.set((default, first))


def leave_quickly() -> None:
    """Let this process, a worker or a command, not wait at its end for the threads of pymongo that watch the servers.

    They are daemons, and look up every half second. The name of what waits for them is not public, so if there is
    none, the end just takes longer.
    """
    for name in ('pymongo.synchronous.monitor', 'pymongo.monitor'):
        wait = getattr(sys.modules.get(name), '_shutdown_resources', None)
        if wait is not None:
            atexit.unregister(wait)


def known() -> Target | None:
    """The database of models: that of `using`, else `connectdb`'s, else the first one opened, if there is one."""
    return _using.get() or chosen() or first_opened()


def current() -> Target:
    """The database of models: the one that is `known`, else see `target`."""
    return known() or target()


@contextmanager
def using(where: Target, stream: str | None = None) -> Iterator[None]:
    """Let the models mean this database, and messages those of this stream, in this thread."""
    tokens = _using.set(where), _using_stream.set(stream)
    try:
        yield
    finally:
        _using.reset(tokens[0])
        _using_stream.reset(tokens[1])


def current_stream() -> str | None:
    """The stream of `using`, if there is one."""
    return _using_stream.get()


def connectdb(
    url: str | None = None,
    dbname: str | None = None,
    alias: str = DEFAULT_ALIAS,
    authSource: str | None = None,
    **options: Any,
) -> Database[dict[str, Any]]:
    """Connect, and use this connection from now on wherever no URL is given.

    Args:
        url: a MongoDB URL; without it the environment or the embedded MongoDB decides, see `target`.
        dbname: the database, else the URL's, else ``minibatch``.
        alias: mongoengine's name of the connection. Only the default one changes what calls without a URL use.
        authSource: the database that knows the user; may also stand in the URL.
        options: further options of `pymongo.MongoClient`.

    Returns:
        The database, as pymongo knows it.

    Raises:
        UnreachableError: if no server answers.

    Example:
        >>> db = connectdb('mongodb://localhost/test')    # doctest: +SKIP
    """
    global _default
    if authSource is not None:
        options['authSource'] = authSource
    found = target(url, dbname, **options)
    found.check()
    mongoengine.disconnect(alias)
    mongoengine.register_connection(
        alias, name=found.dbname, mongo_client_class=lambda **_: found.client, uuidRepresentation='standard'
    )
    if alias == DEFAULT_ALIAS:
        if _sent.get() is None:
            _default = found
        else:
            choose(found)
    return found.client[found.dbname]


def is_client_option(name: str) -> bool:
    """Whether `pymongo.MongoClient` has an option of this name."""
    return name.lower() in common.VALIDATORS


def disconnect() -> None:
    """Close all connections of this process and forget what `connectdb` chose."""
    global _default, _first
    with _lock:
        _default = _first = None
        _sent.set(None)
        _databases.clear()
        for client in _clients.values():
            with pymongo.timeout(CLOSE_TIMEOUT):  # else it looks for a server that is gone, to end its sessions there
                client.close()
        _clients.clear()


def authenticated_url(url: str, authSource: str = 'admin') -> str:
    """Add ``authSource=admin`` to a URL with a user, unless it says another or is ``mongodb+srv``.

    >>> authenticated_url('mongodb://me:secret@localhost/test')
    'mongodb://me:secret@localhost/test?authSource=admin'
    """
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    given = any(name.lower() == 'authsource' for name, _ in query)
    if given or parts.scheme == 'mongodb+srv' or '@' not in parts.netloc:
        return url
    return urlunsplit(parts._replace(path=parts.path or '/', query=urlencode([*query, ('authSource', authSource)])))


def masked(url: str) -> str:
    """The URL without its password and other secrets, for logs and errors; also one that is not well formed."""
    scheme, separator, rest = url.partition('://')
    if ':' in scheme or not separator:
        scheme, separator, rest = '', '', url
    before, at, after = rest.rpartition('@')
    if at and ':' in before:
        rest = f'{before.partition(":")[0]}:***@{after}'
    elif separator and not at:  # what is no port may be the password of a URL without a host
        rest = re.sub(r'^([^/?#:\[]*:)(?!\d{1,5}(?:\W|$))[^/?]*', r'\1***', rest)
    url = f'{scheme}{separator}{rest}'
    return re.sub(r'(?i)(password|passphrase|secret|token)([=:])[^&,]*', r'\1\2***', url)


def masked_text(text: str) -> str:
    """A text, such as an error, in which each URL is masked."""
    return re.sub(r'[A-Za-z][\w+.-]*://\S+', lambda found: masked(found[0]), text)


def same_database(one: Target, other: Target) -> bool:
    """Whether two targets are the same database, also by URLs or options that differ.

    Raises:
        UnreachableError: if a server does not answer, which must be asked when they differ.
    """
    if one == other:
        return True
    if one.dbname != other.dbname or one.is_mock or other.is_mock:
        return False
    for each in (one, other):
        each.check()
    return same_server(one.client, other.client)


def same_server(one: MongoClient[Any], other: MongoClient[Any]) -> bool:
    """Whether two clients lead to the same server: the same primary, or router of a sharded cluster."""
    if one is other:
        return True
    process, another = (
        client.admin.command('hello').get('topologyVersion', {}).get('processId') for client in (one, other)
    )
    return process is not None and process == another


def same_replica_set(one: MongoClient[Any], other: MongoClient[Any]) -> bool:
    """Whether two clients lead to the same replica set, so that a transaction can span what both see."""
    if one is other:
        return bool(one.admin.command('hello').get('setName'))
    hellos = [client.admin.command('hello') for client in (one, other)]
    names = [(hello.get('setName'), sorted(hello.get('hosts', ()))) for hello in hellos]
    return names[0][0] is not None and names[0] == names[1]


def is_passing(exc: PyMongoError) -> bool:
    """Whether an error is a matter of time, such as a lost connection or a fail-over; what it did is then unclear."""
    if isinstance(exc, BulkWriteError):
        errors = exc.details.get('writeErrors') or ()
        return bool(exc.details.get('writeConcernErrors')) or any(e['code'] in PASSING_CODES for e in errors)
    if _says_no_sessions(exc):
        return True
    code = exc.code if isinstance(exc, OperationFailure) else None
    labelled = exc.timeout or exc.has_error_label('RetryableWriteError')
    return labelled or isinstance(exc, (ConnectionFailure, WriteConcernError)) or code in PASSING_CODES


class _WaitEnded(ServerSelectionTimeoutError):
    def __init__(self) -> None:
        super().__init__('MongoDB is away, and who waited for it was told to stop')


def end_wait(thread: int) -> None:
    """If a thread, by its ident, waits for a server to be there, let that be over as if its time were.

    Where pymongo waits, and how to reach a thread there, is not public; without it the wait takes its time.
    """
    if _waits_for_server(thread):
        _raise_in(thread, ctypes.py_object(_WaitEnded))
        if not _waits_for_server(thread):  # it went on just after it was looked at, and may run code of a user now
            _raise_in(thread, None)
            _forget_raised()


def _waits_for_server(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    for _ in range(WAIT_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == '_select_servers_loop':
            return True
        frame = frame.f_back
    return False


def _raise_in(thread: int, exc: ctypes.py_object[type[BaseException]] | None) -> None:
    """Let a thread raise this when it runs next; None takes back what it has not raised yet."""
    with suppress(AttributeError):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exc)


def _forget_raised() -> None:
    """Let Python forget that something was to be raised in another thread, and was taken back.

    Until 3.12 a flag of all threads says so, which is unset when one has raised. While it is set, a profiler that
    begins hangs for ever. So this thread raises, and goes on.
    """
    with suppress(_WaitEnded):
        _raise_in(threading.get_ident(), ctypes.py_object(_WaitEnded))
        for _ in range(RAISED_WITHIN):
            pass


@contextmanager
def until(is_told_to_stop: Callable[[], bool]) -> Iterator[None]:
    """In this thread, whoever would try again while MongoDB is away gives up once this is so."""
    token = _told_to_stop.set(is_told_to_stop)
    try:
        yield
    finally:
        _told_to_stop.reset(token)


def gives_up(where: Target) -> bool:
    """Whether not to try again in this thread, as MongoDB is away and this thread is told to stop."""
    is_told_to_stop = _told_to_stop.get()
    return is_told_to_stop is not None and is_told_to_stop() and where.is_away


def join(thread: threading.Thread, where: Target) -> None:
    """Wait for the end of a thread, a daemon, but not as long as MongoDB is away: it may wait for that."""
    while thread.is_alive() and not where.is_away:
        thread.join(JOIN_PAUSE)


def heal(client: MongoClient[Any], exc: BaseException) -> None:
    """After an error which says that there are no sessions, close the connections of a client.

    One that was made while the server was starting believes so for ever, and is used again and again. What closes
    connections is not public; without it the error stays.
    """
    if _says_no_sessions(exc):
        with suppress(AttributeError):
            for server in list(client._topology._servers.values()):
                server.pool.reset()


def _says_no_sessions(exc: BaseException) -> bool:
    return isinstance(exc, ConfigurationError) and 'Sessions are not supported' in str(exc)


def _connect(url: str, options: dict[str, Any]) -> MongoClient[dict[str, Any]]:
    if _is_mock(url):
        mock: MongoClient[dict[str, Any]] = _mock_client()
        return mock
    given = _given(url, options)
    options |= {name: value for name, value in DEFAULTS.items() if name.lower() not in given}
    try:
        client: MongoClient[dict[str, Any]] = MongoClient(url, **options)
    except (InvalidURI, ConfigurationError, ValueError, TypeError, KeyError) as exc:
        raise ArgumentError(f'the URL {masked(url)} is not right: {_without_secrets(exc, url)}') from None
    if not client.write_concern.acknowledged:
        client.close()
        raise ArgumentError(f'w=0 in {masked(url)} would lose messages unseen; use w=1 or w=majority')
    return client


def _given(url: str, options: dict[str, Any]) -> set[str]:
    """The options of the client that the URL or a call has, in lower case: no default of ours takes their place."""
    return {name.lower() for name, _ in [*parse_qsl(urlsplit(url).query, keep_blank_values=True), *options.items()]}


def _is_mock(url: str) -> bool:
    return url.startswith('mongomock://')


def _mock_client() -> Any:
    try:
        import mongomock
    except ImportError:
        raise ArgumentError('a mongomock:// URL needs the mongomock package: pip install mongomock') from None
    return mongomock.MongoClient()


def reason_of(exc: Exception) -> str:
    """What an error of pymongo says, without what it adds for those who look into pymongo."""
    if isinstance(exc, BulkWriteError):
        errors = exc.details.get('writeErrors') or exc.details.get('writeConcernErrors') or [{}]
        return str(errors[0].get('errmsg', exc))
    return re.split(r', Timeout:| \(configured timeouts|, full error:', str(exc))[0]


def _without_secrets(exc: Exception, url: str) -> str:
    message = masked_text(reason_of(exc))
    password = url.partition('://')[2].rpartition('@')[0].partition(':')[2]
    for secret in (password, unquote(password)):
        if secret:  # a short one may be part of many words
            found = re.escape(secret) if len(secret) > 3 else rf'(?<!\w){re.escape(secret)}(?!\w)'
            message = re.sub(found, '***', message)
    return message


def _forget_inherited_clients() -> None:
    # A client must not be used, nor closed, by a forked child: its sockets are the parent's.
    global _lock
    _lock = threading.RLock()
    _inherited.extend(_clients.values())
    _clients.clear()
    _databases.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_inherited_clients)
