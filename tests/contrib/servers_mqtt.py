"""A mosquitto on a free loopback port, and who publishes to it.

::

    with Mosquitto(tmp_path) as broker:
        publish(broker.url, [('a/b', b'{}', 1)])
        broker.kill()                     # SIGKILL; start() brings it back on its port, with what it had saved
"""
from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType

from paho.mqtt import client as paho
from servers import eventually, free_port, missing

PUBREC = 0x50


class Mosquitto:
    """A mosquitto with its data in a folder.

    Args:
        folder: where its files are, of this broker alone.
        options: more lines of its configuration.
        talks: whether its log has each packet.
        tls: the names, without their ends, of the files of a certificate authority and of its own certificate.
    """

    def __init__(self, folder: Path, *options: str, talks: bool = True, tls: tuple[Path, Path] | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        self.log = folder / 'mosquitto.log'
        self._talks, self._tls = talks, tls
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f'{"mqtts" if self._tls else "mqtt"}://127.0.0.1:{self.port}'

    def start(self) -> Mosquitto:
        """Start it, the first time or again, and wait until it answers."""
        # Debian has it where the path of a user does not lead.
        program = shutil.which('mosquitto') or shutil.which('mosquitto', path='/usr/sbin:/usr/local/sbin')
        if program is None:
            missing('there is no mosquitto; on Debian and Ubuntu: apt-get install mosquitto')
        files = self.folder / 'mosquitto.conf'
        files.write_text('\n'.join([*self._configuration(), '']))
        self._process = subprocess.Popen([program, '-c', str(files)], stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        eventually(self._answers, message='mosquitto does not answer')
        return self

    def stop(self) -> None:
        """A clean shutdown: it saves what it has."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what it has not saved is lost."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: connections stay open, and nothing is answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after pause(), also for a clean end."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def said(self, text: str) -> int:
        """How many lines of its log have this text."""
        return sum(text in line for line in self.log.read_text(errors='replace').splitlines())

    def __enter__(self) -> Mosquitto:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._process:
            self.resume()
            self.kill()

    def _configuration(self) -> list[str]:
        anonymous = not any('password_file' in option for option in self._options)
        lines = [f'listener {self.port} 127.0.0.1', 'user root', f'allow_anonymous {str(anonymous).lower()}',
                 f'log_dest file {self.log}', f'log_type {"all" if self._talks else "subscribe"}',
                 'persistence true', f'persistence_location {self.folder}/', 'max_queued_messages 0',
                 'set_tcp_nodelay true', *self._options]
        if self._tls:
            authority, own = self._tls
            lines += [f'cafile {authority}.crt', f'certfile {own}.crt', f'keyfile {own}.key']
        return lines

    def _answers(self) -> bool:
        assert self._process
        if self._process.poll() is not None:
            raise AssertionError(f'mosquitto ended: {self.log.read_text() if self.log.exists() else "no log"}')
        with suppress(OSError), socket.create_connection(('127.0.0.1', self.port), 1):
            return True
        return False

    def _end(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)
        self._process.wait(20)
        self._process = None


def certificates(folder: Path) -> tuple[Path, Path]:
    """Make a certificate authority, and a certificate for 127.0.0.1 signed by it; their names without .crt and .key."""
    if shutil.which('openssl') is None:
        missing('there is no openssl program')
    authority, own = folder / 'authority', folder / 'broker'
    (folder / 'names').write_text('subjectAltName=IP:127.0.0.1')

    def openssl(*args: object) -> None:
        subprocess.run(['openssl', *map(str, args)], check=True, capture_output=True, cwd=folder)
    new = ('req', '-newkey', 'rsa:2048', '-nodes')
    openssl(*new, '-x509', '-days', 2, '-subj', '/CN=authority', '-keyout', 'authority.key', '-out', 'authority.crt')
    openssl(*new, '-subj', '/CN=broker', '-keyout', 'broker.key', '-out', 'broker.csr')
    openssl('x509', '-req', '-in', 'broker.csr', '-days', 2, '-CA', 'authority.crt', '-CAkey', 'authority.key',
            '-CAcreateserial', '-extfile', 'names', '-out', 'broker.crt')
    return authority, own


def publish(url: str, messages: Iterable[tuple[str, bytes, int]], retain: bool = False) -> None:
    """Publish (topic, payload, qos), with a client that is not ours, and return when all are acknowledged."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.connect('127.0.0.1', int(url.rpartition(':')[2]))
    client.loop_start()
    try:
        for info in [client.publish(topic, payload, qos, retain) for topic, payload, qos in messages]:
            info.wait_for_publish(60)
            assert info.is_published(), 'the broker does not answer'
    finally:
        client.disconnect()
        client.loop_stop()


def numbers(source: int, start: int, end: int, qos: int = 1) -> Iterable[tuple[str, bytes, int]]:
    """Messages for `publish`, which say their source and number."""
    return ((f'test/{source}', json.dumps({'source': source, 'seq': seq}).encode(), qos) for seq in range(start, end))


def flood(port: int, count: int, qos: int) -> None:
    """Send `numbers` as fast as the broker reads them, and return when all of them are acknowledged."""
    def packet(kind: int, body: bytes) -> bytes:
        assert len(body) < 128
        return bytes([kind, len(body)]) + body

    def text(value: bytes) -> bytes:
        return len(value).to_bytes(2, 'big') + value

    def messages() -> Iterator[bytes]:
        for i, (topic, payload, _) in enumerate(numbers(0, 0, count)):
            mid = (i % 65535 + 1).to_bytes(2, 'big') if qos else b''
            yield packet(0x30 | qos << 1, text(topic.encode()) + mid + payload)

    def twice_acknowledged(waiting: Iterator[bytes]) -> None:
        connection.sendall(b''.join(islice(waiting, 20)))  # the broker takes no more at once
        for _ in range(2 * count):
            kind, _, *mid = answers.read(4)
            connection.sendall(packet(0x62, bytes(mid)) if kind == PUBREC else next(waiting, b''))
    with socket.create_connection(('127.0.0.1', port), 60) as connection:
        connection.sendall(packet(0x10, text(b'MQTT') + bytes([4, 2, 0, 0]) + text(b'')))
        answers = connection.makefile('rb')
        assert answers.read(4)[3] == 0
        if qos == 2:
            twice_acknowledged(messages())
        else:
            sending = threading.Thread(target=connection.sendall, args=(b''.join(messages()),))
            sending.start()
            assert len(answers.read(4 * count if qos else 0)) == (4 * count if qos else 0)
            sending.join()
        connection.sendall(packet(0xE0, b''))
