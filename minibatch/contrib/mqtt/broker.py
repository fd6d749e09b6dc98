"""How to reach an MQTT broker, and the arguments that say it."""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from minibatch.errors import ArgumentError

PROTOCOLS = {'3.1.1': mqtt.MQTTv311, '5': mqtt.MQTTv5}
CONNECT_TIMEOUT = 5.0
CLOSE_TIMEOUT = 5.0
LAST_WORDS_TIMEOUT = 2.0
RECONNECT_PAUSES = (1, 60)
BATCH_MESSAGES = 1000
Selector = getattr(selectors, 'PollSelector', selectors.SelectSelector)
REFUSED_PASSWORDS = ('Not authorized', 'Bad user name or password')


class Client(mqtt.Client):
    """A paho client that can be ended for certain, and tells when its thread has ended."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **options)
        self._ended = threading.Event()
        self._closing = False
        self.on_socket_close = self._let_it_be_read

    def loop_forever(self, *args: Any, **options: Any) -> Any:
        reason = 'its thread has ended'
        try:
            return super().loop_forever(*args, **options)
        except Exception as exc:
            reason = f'{type(exc).__name__}: {exc}'
        finally:
            self._ended.set()
            self.ended(reason)

    def ended(self, reason: str) -> None:
        """The thread of the client has ended."""

    def _loop(self, timeout: float = 1.0) -> Any:
        """What paho does by select(), which takes no descriptor above 1023, by poll() where there is one."""
        connection = self.socket()
        if connection is None:
            return mqtt.MQTT_ERR_NO_CONN
        try:
            ready = self._wait(connection, timeout)
        except (OSError, ValueError):  # another thread has just closed it
            return mqtt.MQTT_ERR_CONN_LOST
        if ready & selectors.EVENT_READ and (error := self.loop_read()):
            return error
        if ready & selectors.EVENT_WRITE and (error := self.loop_write()):
            return error
        return self.loop_misc()

    def _let_it_be_read(self, client: Any, data: Any, connection: Any) -> None:
        """Wait until the broker has closed its end.

        If ours is closed with something unread, what the broker has not read yet is lost, acknowledgements among it.
        """
        until = time.monotonic() + LAST_WORDS_TIMEOUT
        with suppress(OSError):
            if self._closing:
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(LAST_WORDS_TIMEOUT)
                while connection.recv(1 << 16) and time.monotonic() < until:
                    pass

    def _wait(self, connection: Any, timeout: float) -> int:
        """Wait until there is something to read, or to write, also from another thread."""
        decrypted = isinstance(connection, ssl.SSLSocket) and connection.pending()
        bell: Any = self._sockpairR
        with Selector() as selector:
            selector.register(connection, selectors.EVENT_READ | (self.want_write() and selectors.EVENT_WRITE))
            selector.register(bell, selectors.EVENT_READ)
            ready = {key.fileobj: events for key, events in selector.select(0 if decrypted else timeout)}
        events: int = ready.get(connection, 0) | (selectors.EVENT_READ if decrypted else 0)
        if bell in ready:
            with suppress(BlockingIOError):
                bell.recv(10_000)
            events |= selectors.EVENT_WRITE
        return events

    def close(self) -> None:
        """Send what waits to be sent, disconnect, and end the thread, also when the broker does not move."""
        self._closing = True
        self.disconnect()
        if not self._ended.wait(CLOSE_TIMEOUT):
            with suppress(OSError, AttributeError):
                self.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        self.loop_stop()


class Broker:
    """Where a broker is, and how to connect to it. Its text has no password."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        known = {
            'client_id': None, 'protocol': '3.1.1', 'keepalive': 60, 'ca_certs': None, 'certfile': None,
            'keyfile': None, 'keyfile_password': None, 'tls_insecure': False,
        }  # fmt: skip
        if unknown := sorted(set(options) - set(known)):
            raise ArgumentError(f'{", ".join(unknown)}: unknown; there are {", ".join(known)}')
        given = {**known, **options}
        tls = self._read_url(url)
        self.client_id = given['client_id']
        if self.client_id is not None and (not isinstance(self.client_id, str) or not self.client_id):
            raise ArgumentError(f'client_id must be a text, not {self.client_id!r}')
        if str(given['protocol']) not in PROTOCOLS:
            raise ArgumentError(f"protocol must be '3.1.1' or '5', not {given['protocol']!r}")
        self.protocol = PROTOCOLS[str(given['protocol'])]
        self._keepalive = given['keepalive']
        if type(self._keepalive) is not int or not 1 <= self._keepalive <= 65535:
            raise ArgumentError(f'keepalive must be a number of seconds from 1 to 65535, not {self._keepalive!r}')
        self._tls_insecure = check_bool('tls_insecure', given['tls_insecure'])
        for_tls = {name: given[name] for name in ('ca_certs', 'certfile', 'keyfile', 'keyfile_password')}
        if not tls and (superfluous := [name for name in (*for_tls, 'tls_insecure') if given[name]]):
            raise ArgumentError(f'{", ".join(superfluous)}: for TLS only, which a url with mqtts:// asks for')
        self._tls = _tls_context(**for_tls) if tls else None

    def __str__(self) -> str:
        return f'the MQTT broker {self.host}:{self.port}'

    def _read_url(self, url: str) -> bool:
        """Take the url apart; returns whether it asks for TLS. Errors do not show it, as there may be a password."""
        if not isinstance(url, str) or not url:
            raise ArgumentError(f"url must be a text like 'mqtt://localhost:1883', not of type {type(url).__name__}")
        try:
            parts = urlsplit(url if '://' in url else f'mqtt://{url}')
            port = parts.port
        except ValueError:
            raise ArgumentError('url has a wrong host or port; percent-encode / ? # [ ] @ in a password') from None
        if parts.scheme not in ('mqtt', 'mqtts'):
            raise ArgumentError(f'url must begin with mqtt:// or mqtts://, not {parts.scheme}://')
        if not parts.hostname or parts.path not in ('', '/') or parts.query or parts.fragment:
            raise ArgumentError(
                "url must be like 'mqtt://user:password@host:1883', with nothing behind the port; the topic is an "
                'argument of its own, and / ? # [ ] @ in a password are percent-encoded'
            )
        if parts.password and not parts.username:
            raise ArgumentError('url has a password and no user')
        tls = parts.scheme == 'mqtts'
        self.host, self.port = parts.hostname, port or (8883 if tls else 1883)
        self._user = unquote(parts.username) if parts.username else None
        self._password = unquote(parts.password) if parts.password else None
        return tls

    def options(self, session: bool) -> dict[str, Any]:
        """The arguments of a paho client."""
        options = {'client_id': self.client_id, 'protocol': self.protocol}
        return options if self.protocol == mqtt.MQTTv5 else {**options, 'clean_session': not session}

    def connect(self, client: Client, session: bool) -> None:
        """Connect, and start the thread of the client.

        Raises:
            ConnectionError: if that fails.
        """
        if self._user is not None:
            client.username_pw_set(self._user, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
            client.tls_insecure_set(self._tls_insecure)
        client.connect_timeout = CONNECT_TIMEOUT
        client.reconnect_delay_set(*RECONNECT_PAUSES)
        later: dict[str, Any] = {}
        if self.protocol == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = BATCH_MESSAGES
            properties.SessionExpiryInterval = 0xFFFFFFFF if session else 0  # never
            later = {'clean_start': not session, 'properties': properties}
        try:
            client.connect(self.host, self.port, self._keepalive, **later)
        except OSError as exc:
            kind = TimeoutError if isinstance(exc, TimeoutError) else ConnectionError
            raise kind(f'{self} cannot be reached: {exc}') from exc
        client.loop_start()


def refusal(reason: Any) -> str:
    hint = '; check user and password of the url' if str(reason) in REFUSED_PASSWORDS else ''
    return f'{reason}{hint}'


def check_topic(topic: Any, wildcards: bool) -> None:
    if not isinstance(topic, str) or not topic or '\0' in topic or len(topic.encode()) > 65535:
        raise ArgumentError(f'topic must be a text of 1 to 65535 bytes, not {topic!r}')
    if not wildcards and ('+' in topic or '#' in topic):
        raise ArgumentError(f'topic must be one topic to publish to, without + and #, not {topic!r}')
    levels = topic.split('/')
    if '#' in ''.join(levels[:-1]) or any(len(each) > 1 and ('+' in each or '#' in each) for each in levels):
        raise ArgumentError(f'topic has + and # only as a whole level, and # only as the last, not {topic!r}')


def check_qos(qos: Any) -> int:
    if type(qos) is not int or qos not in (0, 1, 2):
        raise ArgumentError(f'qos must be 0, 1 or 2, not {qos!r}')
    return qos


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ArgumentError(f'{name} must be True or False, not {value!r}')
    return value


def _tls_context(ca_certs: Any, certfile: Any, keyfile: Any, keyfile_password: Any) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except (OSError, TypeError, ValueError) as exc:
        raise ArgumentError(f'ca_certs must be a file with certificates: {exc}') from exc
    if not certfile and (keyfile or keyfile_password):
        raise ArgumentError('keyfile and keyfile_password need a certfile')
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile, keyfile_password or '')
        except (OSError, TypeError, ValueError) as exc:
            raise ArgumentError(f'certfile and keyfile must be a certificate and its key: {exc}') from exc
    return context
