"""Servers as fixtures, and a wall around the user's own server.

A test which uses a server, by the name of a fixture, gets the marker `integration`:
`pytest -m 'not integration'` is the fast set.
"""
from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple
from typing import Any

import pytest
from click.testing import CliRunner
from processes import FAULTS, HEADINGS, SEED, Row, table
from pymongo.database import Database
from servers import Mongod, in_memory

from minibatch import connection, embedded
from minibatch.cli import main

SERVER_FIXTURES = {'mongod', 'standalone', 'url', 'db', 'standalone_url', 'home'}


# Started in the background, by a shell without job control, we and our children would be deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, 'fixturenames', ())):
            item.add_marker(pytest.mark.integration)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist leaves what it found to the one that prints."""
    if hasattr(session.config, 'workeroutput'):
        session.config.workeroutput['faults'] = [astuple(row) for row in FAULTS]


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a test failed with may show text that is no Unicode, at which a process of pytest-xdist would end."""
    said = yield
    if not said or said.get('outcome') != 'failed':
        return said
    return json.loads(json.dumps(said, ensure_ascii=False).encode(errors='replace'))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    FAULTS.extend(Row(*cells) for cells in getattr(node, 'workeroutput', {}).get('faults', []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FAULTS:
        terminalreporter.section(f'faults, seed {SEED}')
        terminalreporter.write_line(table(HEADINGS, [row.cells() for row in FAULTS]))


@pytest.fixture(scope='session', autouse=True)
def isolation() -> Iterator[None]:
    """Tests never touch the user's server or data; an embedded server started by them is stopped."""
    folder = tempfile.TemporaryDirectory(prefix='minibatch-test-', dir=in_memory())
    with pytest.MonkeyPatch.context() as patch, folder as home:
        for name in [name for name in os.environ if name == 'MONGO_URL' or name.startswith('MINIBATCH_')]:
            if name != 'MINIBATCH_MONGOD':
                patch.delenv(name)
        patch.setenv('MINIBATCH_HOME', home)
        yield
        embedded.stop()


@pytest.fixture(autouse=True)
def disconnected() -> Iterator[None]:
    """The connections of a test end with it: each holds descriptors, and threads which go on looking for its server."""
    yield
    connection.disconnect()


@pytest.fixture(scope='session')
def mongod() -> Iterator[Mongod]:
    """A replica set of one, shared by the whole session: do not kill it, start your own."""
    with Mongod() as server:
        yield server


@pytest.fixture(scope='session')
def standalone() -> Iterator[Mongod]:
    """A server without change streams and transactions."""
    with Mongod(replica_set=False) as server:
        yield server


@pytest.fixture
def url(mongod: Mongod) -> Iterator[str]:
    """The URL of a fresh database, dropped afterwards."""
    yield from _fresh(mongod)


@pytest.fixture
def standalone_url(standalone: Mongod) -> Iterator[str]:
    """The URL of a fresh database of a standalone server."""
    yield from _fresh(standalone)


@pytest.fixture
def db(mongod: Mongod, url: str) -> Database[dict[str, Any]]:
    """The database of `url`, as pymongo sees it."""
    return mongod.client[_name(url)]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random moments; the seed is printed when a test fails."""
    print(f'FAULTS_SEED={SEED}')
    return random.Random(f'{SEED} {request.node.name}')


@pytest.fixture
def run(url: str) -> Callable[..., tuple[int, str, str]]:
    """Run a command of `minibatch` on a database, with some input; its exit code, stdout and stderr."""

    def run(words: str, given: bytes = b'') -> tuple[int, str, str]:
        result = CliRunner().invoke(main, [*words.split(), '--url', url], input=given)
        return result.exit_code, result.stdout, result.stderr

    return run


def _fresh(server: Mongod) -> Iterator[str]:
    url = server.url(f'test_{uuid.uuid4().hex[:12]}')
    yield url
    server.client.drop_database(_name(url))


def _name(url: str) -> str:
    return url.rsplit('/', 1)[1].split('?')[0]
