"""A web app around streams: consumers in processes of their own, a live dashboard, HTTP in, metrics and health.

::

    import minibatch as mb
    from minibatch.contrib.apps import StreamingApp

    app = StreamingApp()

    def consumer(url):
        @mb.streaming('readings', size=2, url=url)
        def process(window):
            print(window.data)

    app.start_streaming(consumer)
    app.run()
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from minibatch import functions, marshaller
from minibatch.errors import ArgumentError, install_hint

try:
    from flask import Blueprint, Flask
except ImportError:
    raise ImportError(f'minibatch.contrib.apps needs Flask: {install_hint("apps")}') from None

from minibatch.connection import Target, target

from .asked import NameConverter
from .security import HOW_TO, Guard, Refused
from .serving import Server
from .supervisor import ConsumerProcess, is_consumer_process
from .views import add_views, not_routed, refusal
from .watching import Look, Watcher

__all__ = ['StreamingApp']

logger = logging.getLogger(__name__)

LOOPBACK = ('127.0.0.1', '::1', 'localhost')
MAX_BODY = 16_000_000
MAX_NAME = 200
MAX_PORT = 65535


class StreamingApp(Blueprint):
    """A web app with consumers behind it: a Flask blueprint, which makes a Flask app of its own when it needs one.

    It serves ``/``, a live dashboard; ``/status``, ``/health`` and ``/metrics`` for machines; ``POST /streams/NAME`` to
    append; ``/streams/NAME/tail``; and ``/dead``, dead letters to be looked at, replayed and discarded. ``/append`` and
    ``/tail`` take any name, as ``?stream=NAME``. What changes something asks for the token; without one the app is
    read-only.

    Args:
        name: what the dashboard calls it.
        uri: the same as `url`.
        server: a Flask app of yours, to which the endpoints are added, as ``server.register_blueprint(app)`` does.
        on: an omega|ml instance, whose MongoDB is meant.
        token: what clients must send, as ``Authorization: Bearer TOKEN``, to change something; without it the
            environment variable MINIBATCH_APP_TOKEN.
        private: whether reading asks for the token, too. ``/health`` and the dashboard's empty page do not.
        hosts: the names by which the app may be asked, besides ``localhost``, the name of this machine, and addresses;
            ``'*'`` for any. Else a page elsewhere could read it with the browser of somebody who may.
        url_prefix: under which path of `server` the endpoints are, such as ``'/streams'``.
        max_body: of a request, in bytes; more is answered with 413.
        listeners: how many may listen to ``/streams/NAME/tail`` at once; one more is answered with 503.
        timeout: seconds that an append waits for room in a stream, and for MongoDB.
        url: a MongoDB URL, see `minibatch.connectdb` for what holds without one.

    Raises:
        ArgumentError: naming the argument.

    Example:
        >>> with StreamingApp(token='correct-horse') as app:    # doctest: +SKIP
        ...     app.start_streaming(consumer)
        ...     app.run()
    """

    def __init__(
        self,
        name: str = 'minibatch',
        uri: str | None = None,
        server: Flask | None = None,
        on: Any = None,
        token: str | None = None,
        private: bool = False,
        hosts: Sequence[str] = (),
        url_prefix: str | None = None,
        max_body: int = MAX_BODY,
        listeners: int = 8,
        timeout: float = 10.0,
        url: str | None = None,
    ) -> None:
        _check_name(name)
        where = [option for option, value in {'url': url, 'uri': uri, 'on': on}.items() if value is not None]
        if len(where) > 1:
            raise ArgumentError(f'{" and ".join(where)} both say where MongoDB is; give one of them')
        url = _url_of(on) if on is not None else uri if uri is not None else url
        if url_prefix is not None and not (isinstance(url_prefix, str) and url_prefix.startswith('/')):
            raise ArgumentError(f"url_prefix must be a path that begins with a slash, such as '/x', not {url_prefix!r}")
        if server is not None and not isinstance(server, Flask):
            raise ArgumentError(f'server must be a Flask app, not {type(server).__name__}')
        for option, value in {'max_body': max_body, 'listeners': listeners, 'timeout': timeout}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ArgumentError(f'{option} must be a number above 0, not {value!r}')
        super().__init__(name.replace('.', '-'), __name__, url_prefix=url_prefix)
        self.title, self.max_body, self.listeners, self.timeout = name, max_body, listeners, timeout
        self.guard = Guard(token, private, hosts)
        self._target = None if url is None else target(url)
        self.watcher = Watcher(lambda: self.url)
        self.ending = False
        self._consumers: list[ConsumerProcess] = []
        self._pid = os.getpid()
        self._web: Server | None = None
        self._thread: threading.Thread | None = None
        self._server: Flask | None = None
        self._making = threading.Lock()
        add_views(self, self)
        if server is not None:
            server.register_blueprint(self)

    def _make_server(self) -> Flask:
        server = Flask(__name__, static_folder=None)
        server.before_request(self.guard.check_host)
        server.register_error_handler(Refused, refusal)
        for status in (404, 405):
            server.register_error_handler(status, not_routed)
        return server

    def register(self, app: Any, options: dict[str, Any]) -> None:
        """Add the endpoints to a Flask app; ``flask_app.register_blueprint(app)`` calls it.

        Raises:
            ArgumentError: if they are in one already, or another app of this name is.
        """
        if self._server is not None:
            raise ArgumentError(
                f'{self.title!r} is in a Flask app already; register it before its first route, and only once'
            )
        name = options.get('name', self.name)
        if name in app.blueprints:
            raise ArgumentError(f'the Flask app has a blueprint {name!r} already; give this one another name=')
        app.url_map.converters['minibatch_name'] = NameConverter
        super().register(app, options)
        self._server = app

    # --- what it is

    @property
    def server(self) -> Flask:
        """The Flask app with the endpoints; if it was added to none, one is made."""
        with self._making:
            if self._server is None:
                self._make_server().register_blueprint(self)
            return cast(Flask, self._server)

    @property
    def url(self) -> str:
        """The URL of the MongoDB database that is meant."""
        if self._target is None:
            self._target = target()
        return _full_url(self._target)

    @property
    def address(self) -> str | None:
        """Where a browser finds the app, while `run` or `start` serve it."""
        return self._web.url if self._web is not None else None

    @property
    def consumers(self) -> list[ConsumerProcess]:
        """The consumers that were started, by this process or by one that it was forked from."""
        return list(self._consumers)

    def problems(self, look: Look | None = None) -> list[str]:
        """What is not well, in words: nothing, or no database, a dead consumer, a stalled group, a failing source."""
        look = look or self.watcher.look()
        led = [status.group for stream in look.streams for status in stream.groups if status.group.owner]
        return [
            *filter(None, [look.error, *(consumer.problem for consumer in self.consumers)]),
            *(f'stream {group.stream!r}, group {group.name!r}: {what}' for group in led for what in _troubles(group)),
        ]

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer as a WSGI app, so that any server can run it: ``gunicorn module:app``."""
        return self.server(environ, start_response)

    def route(self, rule: str, **options: Any) -> Callable[..., Any]:
        """Add a page of yours, as Flask's ``route`` does.

        Raises:
            ArgumentError: if the app has something there already.
        """
        methods = {method.upper() for method in options.get('methods') or ('GET',)}
        for known in self.server.url_map.iter_rules():
            if known.rule == rule and methods & (known.methods or set()):
                raise ArgumentError(f'{rule} is the endpoint {known.endpoint!r}; choose another path')
        return self.server.route(rule, **options)

    # --- consumers

    def start_streaming(self, consumer: Callable[[str], Any], name: str | None = None) -> None:
        """Run a consumer in a process of its own, and start it again whenever it ends.

        Args:
            consumer: called with the MongoDB URL; it defines functions with ``@streaming(..., url=url)``, and so does
                not return. It is sent with what it refers to in its module, which is not imported again: open there
                what cannot be sent. Logging is to be set up in it, too.
            name: how logs and status call it; the name of the function by default.

        Raises:
            ArgumentError: if it does not take the URL or cannot be sent to a process, or there is one of this name.
        """
        if is_consumer_process() or marshaller.is_loading():
            logger.info('a consumer does not start consumers; its module was imported by one')
            return
        functions.check('consumer', consumer, 'the URL', plain=True)
        if name is not None:
            _check_name(name)
        name = name or str(getattr(consumer, '__name__', type(consumer).__name__))
        if name in [each.name for each in self._consumers]:
            raise ArgumentError(f'there is a consumer {name!r} already; give this one another name=')
        process = ConsumerProcess(consumer, self.url, name)
        atexit.unregister(self.stop)
        atexit.register(self.stop)
        process.start()
        self._consumers.append(process)

    # --- serving

    def run(self, host: str = '127.0.0.1', port: int = 5000) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`, then stop all consumers. It is a production server.

        In a worker that imports a module, to find a function there, this does nothing, and neither do `start` and
        `start_streaming`.

        Args:
            host: the address to listen at; loopback, so that only this machine can ask.
            port: 0 for any that is free.

        Raises:
            ArgumentError: naming the argument.
            MinibatchError: if the address is taken.
        """
        if marshaller.is_loading():
            return
        web = self._listen(host, port)
        print(f'{self.title}: {web.url} (Ctrl-C stops it)', file=sys.stderr, flush=True)
        try:
            with self._signals():
                web.serve()
                self.stop()
        finally:
            self.stop()

    def start(self, host: str = '127.0.0.1', port: int = 5000) -> str:
        """Serve in a thread, until `stop`; for notebooks. Returns the address, '' in a worker that imports a module."""
        if marshaller.is_loading():
            return ''
        web = self._listen(host, port)
        self._thread = threading.Thread(target=web.serve, name='minibatch-app', daemon=True)
        self._thread.start()
        atexit.unregister(self.stop)
        atexit.register(self.stop)
        return web.url

    def stop(self, timeout: float = 10.0) -> None:
        """End all consumers, after what they have in flight, and the server. No process stays behind.

        Args:
            timeout: seconds; what has not ended by then is killed, and its windows are tried again some time.

        Raises:
            ArgumentError: if `timeout` is none.
        """
        known = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if not known or not 0 <= timeout <= threading.TIMEOUT_MAX:
            raise ArgumentError(f'timeout must be a number of seconds, 0 or more, not {timeout!r}')
        self.ending = True
        consumers = [consumer for consumer in self._consumers if consumer.is_mine]
        for consumer in consumers:
            consumer.stop(timeout)
        if self._web is not None and os.getpid() == self._pid:
            self._web.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        for consumer in consumers:
            consumer.join()
        self._consumers = [consumer for consumer in self._consumers if not consumer.is_mine]
        self._web, self._thread = None, None
        atexit.unregister(self.stop)

    def __enter__(self) -> StreamingApp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _listen(self, host: str, port: int) -> Server:
        if self._web is not None:
            raise ArgumentError(f'the app is served already, at {self._web.url}; stop() it first')
        if not isinstance(host, str):
            raise ArgumentError(f'host must be a name or an address, not {host!r}')
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MAX_PORT:
            raise ArgumentError(f'port must be a whole number from 0 to {MAX_PORT}, not {port!r}')
        if host not in LOOPBACK and not host.startswith('127.') and not self.guard.private:
            logger.warning('whoever can reach %s port %s can read all streams; %s and private=True', host, port, HOW_TO)
        self._web = Server(self.server, host, port, self.listeners, self.max_body)
        self.ending, self._pid = False, os.getpid()
        return self._web

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop the app; the second one does not wait for what is in flight."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        first = 0.0

        def end(number: int, frame: Any) -> None:
            nonlocal first
            if first and time.monotonic() - first > 0.2:
                for consumer in self._consumers:
                    consumer.hurry()
            first = first or time.monotonic()
            self.ending = True
            if self._web is not None:
                self._web.stop()

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _troubles(group: Any) -> Iterator[str]:
    if group.stalled:
        yield f'windows wait, and none was finished since {group.stalled:%Y-%m-%d %H:%M:%S} UTC'
    if group.source_error:
        yield f'its source has failed, and is started again: {group.source_error}'


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise ArgumentError(f'name must be a text of 1 to {MAX_NAME} characters that can be shown, not {name!r:.80}')


def _url_of(om: Any) -> str:
    url = getattr(getattr(om, 'datasets', None), 'mongo_url', None)
    if not isinstance(url, str):
        raise ArgumentError(f'on must be an omega|ml instance, with datasets.mongo_url; {type(om).__name__} has none')
    return url


def _full_url(where: Target) -> str:
    """A URL that says all of it, for another process."""
    parts = urlsplit(where.url)
    more = urlencode({name: str(value).lower() if isinstance(value, bool) else value for name, value in where.options})
    query = '&'.join(filter(None, (parts.query, more)))
    return urlunsplit(parts._replace(path='/' + quote(where.dbname, safe=''), query=query))
