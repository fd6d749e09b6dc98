"""A production web server in this process, waitress, which can be stopped from any thread."""

from __future__ import annotations

import socket
import threading
from typing import Any

from minibatch.errors import ArgumentError, MinibatchError, install_hint

TICK = 1.0
THREADS = 8


class Server:
    """Serves a WSGI app at one address; it listens from when it is made.

    Args:
        app: the WSGI app.
        host: a name or address of this machine.
        port: 0 for any that is free.
        listeners: how many requests may last, besides those that are short.
        max_body: of a request, in bytes; more is answered with 413.

    Raises:
        ArgumentError: if the address is none.
        MinibatchError: if the address is taken, or waitress is not there.
    """

    def __init__(self, app: Any, host: str, port: int, listeners: int, max_body: int) -> None:
        try:
            from waitress import wasyncore
            from waitress.server import create_server
        except ImportError:
            raise MinibatchError(f'the app serves with waitress: {install_hint("apps")}') from None
        self._loop, self._close_all = wasyncore.loop, wasyncore.close_all
        self._map: dict[int, Any] = {}
        listener = _listen(host, port)
        self.host, self.port = listener.getsockname()[:2]
        self._server = create_server(
            app, map=self._map, sockets=[listener], threads=THREADS + listeners, max_request_body_size=max_body,
            ident=None, asyncore_use_poll=True, connection_limit=1000,
        )  # fmt: skip
        self._ending = threading.Event()
        self._done = threading.Event()

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(self.host, self.host)  # noqa: S104
        return f'http://[{host}]:{self.port}' if ':' in host else f'http://{host}:{self.port}'

    def serve(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._ending.is_set():
                self._loop(TICK, use_poll=True, map=self._map, count=1)
            self._server.task_dispatcher.shutdown()
            self._loop(0, use_poll=True, map=self._map, count=1)  # the last words
        finally:
            self._close_all(self._map, ignore_all=True)
            self._done.set()

    def stop(self) -> None:
        """Take no more requests; `serve` returns when those at work are answered, in seconds."""
        self._ending.set()
        if not self._done.is_set():
            self._server.pull_trigger()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as exc:
        raise ArgumentError(f'host {host!r} is not an address of this machine: {exc}') from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as exc:
        listener.close()
        raise MinibatchError(f'the app cannot listen at {host} port {port}: {exc.strerror or exc}; '
                             f'stop what does, or choose another port') from None  # fmt: skip
    return listener
