"""Functions on their way to a worker."""

import pickle
import re
import subprocess
import sys
import threading
from functools import partial

import cloudpickle
import pytest

from minibatch.errors import PortabilityError
from minibatch.marshaller import Portable
from minibatch.worker import Processed

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


held = threading.Lock()


def uses(window):
    return held


def calls(window):
    return uses(window)


def has_an_attribute(window):
    return None


has_an_attribute.seen = [{'held': held}]


@pytest.fixture
def as_a_script():
    """The functions of this module go by value, as those of a script and of a notebook."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures('as_a_script')
@pytest.mark.parametrize(('fn', 'path'), [
    (calls, 'uses.held'),
    (lambda window, out=held: out, 'out'),
    (lambda window, *, out=held: out, 'out'),
    (partial(print, held), 'args[0]'),
    (partial(print, end=held), 'end'),
    (partial(uses), 'func.held'),
    (has_an_attribute, "seen[0]['held']"),
    (Processed(uses, print), 'processfn.held'),
])
def test_the_error_names_the_way_to_what_cannot_be_sent(fn, path):
    with pytest.raises(PortabilityError, match=f"""its variable ['"]{re.escape(path)}['"] .lock.*: cannot pickle"""):
        Portable(fn).check()


def test_a_function_that_refers_to_itself_and_cannot_be_sent_is_refused_like_any():
    def again(window):
        return again, held
    with pytest.raises(PortabilityError, match="'held'"):
        Portable(again).check()
