"""What tests of several outside systems need."""

import gc
import warnings

import pytest
from webs import TOKEN


@pytest.fixture
def collected():
    """kafka-python leaves sockets whose connection failed to the garbage collector; it is not to meet other tests."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ResourceWarning)
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
