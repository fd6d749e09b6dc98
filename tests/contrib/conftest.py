"""What tests of several outside systems need."""

import gc
import logging
from warnings import catch_warnings, simplefilter

import pytest
from webs import TOKEN

import minibatch as mb


@pytest.fixture
def stream(url):
    with mb.stream('test', url=url) as stream:
        yield stream


@pytest.fixture
def things(db):
    """A collection that is read, which is in the database of the stream."""
    return db.things


@pytest.fixture
def warnings(caplog):
    """What sources and sinks have warned of."""
    caplog.set_level(logging.WARNING, logger='minibatch')
    return lambda: [record.getMessage() for record in caplog.records if 'contrib' in record.name]


@pytest.fixture
def collected():
    """kafka-python leaves sockets whose connection failed to the garbage collector; it is not to meet other tests."""
    yield
    with catch_warnings():
        simplefilter('ignore', ResourceWarning)
        gc.collect()


@pytest.fixture
def make(url):
    """Make web apps on `url`, which are stopped at the end."""
    from minibatch.contrib.apps import StreamingApp

    made = []

    def make(**options):
        made.append(StreamingApp(**{'uri': url, 'token': TOKEN, **options}))
        return made[-1]

    yield make
    for app in made:
        app.stop(0)


@pytest.fixture
def quick(monkeypatch):
    """Web apps look whenever they are asked, and start consumers that end again at once."""
    from minibatch.contrib.apps import supervisor, watching

    monkeypatch.setattr(supervisor, 'PAUSES', (0.05, 0.2))
    monkeypatch.setattr(watching, 'MIN_AGE', 0.0)
    monkeypatch.setattr(watching, 'SAMPLE_PAUSE', 0.0)
