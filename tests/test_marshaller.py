"""Functions on their way to a worker."""

import pickle
import subprocess
import sys
import threading

import pytest

from minibatch.errors import PortabilityError
from minibatch.marshaller import Portable

lock = threading.Lock()


def uses_a_global_lock(window):
    return lock


def test_a_lambda_with_a_closure_travels_by_value():
    factor = 3
    blob = pickle.dumps(Portable(lambda x: x * factor))
    code = 'import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())(14))'
    done = subprocess.run([sys.executable, '-c', code], input=blob, capture_output=True, check=True)
    assert done.stdout.strip() == b'42'


@pytest.mark.parametrize('fn', [print, len, str.upper])
def test_a_builtin_travels(fn):
    assert pickle.loads(pickle.dumps(Portable(fn))).fn is not None


def test_the_error_names_the_variable_of_a_closure():
    connection = threading.Lock()
    with pytest.raises(PortabilityError, match="'connection'"):
        _ = Portable(lambda window: connection).blob


def test_the_error_names_the_attribute_of_a_callable_object():
    class Model:
        def __init__(self):
            self.handle = threading.Lock()

        def __call__(self, window):
            return self.handle

    with pytest.raises(PortabilityError, match="'handle'"):
        _ = Portable(Model()).blob


def test_in_this_process_the_function_itself_is_called():
    seen = []
    Portable(seen.append)('x')
    assert seen == ['x']


def test_the_error_names_the_attribute_of_the_object_of_a_method():
    class Model:
        def __init__(self):
            self.handle = threading.Lock()

        def predict(self, window):
            return self.handle

    with pytest.raises(PortabilityError, match=r"'self\.handle'"):
        _ = Portable(Model().predict).blob
