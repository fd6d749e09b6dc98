"""What tests of several outside systems need."""

import gc
import warnings

import pytest


@pytest.fixture
def collected():
    """kafka-python leaves sockets whose connection failed to the garbage collector; it is not to meet other tests."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ResourceWarning)
        gc.collect()
