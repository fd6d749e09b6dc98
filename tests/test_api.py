"""Arguments are checked at the call, and refused by name, before anything is written."""

import threading

import pytest

import minibatch as mb
from minibatch.errors import ArgumentError, DataError, PortabilityError
from minibatch.window import CountWindow, FixedTimeWindow, RelaxedTimeWindow, WindowEmitter


def process(window):
    return None


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'sise': 2}, 'sise.*did you mean size'),
        ({'size': 2, 'interval': 3}, 'size and interval'),
        ({}, 'size=, interval= or emitter='),
        ({'size': 0}, 'size'),
        ({'interval': -2}, 'interval'),
        ({'size': 1, 'workers': 0}, 'workers'),
        ({'size': 1, 'workers': 1, 'max_workers': 1}, 'workers and max_workers'),
        ({'size': 1, 'sink': object()}, 'sink must have a method put'),
        ({'size': 1, 'source': object()}, 'source must have'),
        ({'size': 1, 'queue': 3}, 'queue must have'),
        ({'emitter': dict}, 'emitter must be a subclass'),
        ({'size': 1, 'lease': -1}, 'lease'),
    ],
)
def test_a_wrong_option_of_streaming_is_named(options, named):
    with pytest.raises(ArgumentError, match=named):
        mb.make_emitter('s', process, **options)


def test_streaming_refuses_an_unknown_option_before_the_function_is_known():
    with pytest.raises(ArgumentError, match='nonsense'):
        mb.streaming('s', size=2, nonsense=1)


def test_an_unknown_option_is_also_a_type_error_as_python_users_expect():
    with pytest.raises(TypeError):
        mb.streaming('s', size=2, nonsense=1)


@pytest.mark.parametrize('name', ['', 3, None])
def test_a_stream_name_that_is_empty_or_no_string_is_refused(name):
    for call in (lambda: mb.stream(name), lambda: mb.streaming(name, size=1), lambda: mb.make_emitter(name, size=1)):
        with pytest.raises(ArgumentError, match='name of a stream'):
            call()


def test_a_function_that_is_none_is_refused():
    with pytest.raises(ArgumentError, match='fn must be callable'):
        mb.make_emitter('s', 'process', size=1)


def test_a_function_that_cannot_travel_fails_at_once_and_names_the_variable():
    handle = threading.Lock()
    with pytest.raises(PortabilityError, match="'handle'"):
        mb.make_emitter('s', lambda window: handle, size=1)


def test_an_executor_of_this_process_takes_any_function():
    class Inline:
        def submit(self, fn):
            raise AssertionError('not run here')

    handle = threading.Lock()
    assert mb.make_emitter('s', lambda window: handle, size=1, executor=Inline)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'size': 2}, CountWindow),
        ({'interval': 2}, RelaxedTimeWindow),
        ({'interval': 2, 'relaxed': False}, FixedTimeWindow),
    ],
)
def test_the_options_choose_the_window(options, expected):
    assert type(mb.make_emitter('s', process, **options)) is expected


def test_an_emitter_of_ones_own_gets_size_and_interval():
    class Mine(WindowEmitter):
        pass

    emitter = mb.make_emitter('s', process, emitter=Mine, interval=3)
    assert (type(emitter), emitter.interval) == (Mine, 3)
    assert mb.make_emitter('s', process, emitter=Mine, size=4).interval == 4


def test_the_decorator_can_make_the_emitter_without_running_it():
    decorator = mb.streaming('s', size=2, keep=True)
    emitter = decorator.make(process)
    assert (emitter.emitfn, emitter.keep) == (process, True)


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'batchsize': 0}, 'batchsize'),
        ({'batchsize': 10**6}, 'batchsize'),
        ({'max_age': -1}, 'max_age'),
        ({'max_age': 1e300}, 'max_age'),
        ({'x': 1}, 'x'),
    ],
)
def test_a_wrong_option_of_a_stream_is_named(options, named):
    with pytest.raises(ArgumentError, match=named):
        mb.stream('s', url='mongomock://localhost/api', **options)


def test_a_message_that_cannot_be_stored_leaves_nothing_behind():
    stream = mb.stream('s', url='mongomock://localhost/api')
    for call in (
        lambda: stream.append([1]),
        lambda: stream.append({'a': object()}),
        lambda: stream.append_many([{'a': 1}, {'b': object()}]),
        lambda: stream.append_many({'a': 1}),
    ):
        with pytest.raises((DataError, ArgumentError)):
            call()
    assert stream.buffer().count() == 0


def test_append_many_says_which_message_is_wrong():
    stream = mb.stream('s', url='mongomock://localhost/api')
    with pytest.raises(DataError, match=r"items\[2\]: .*data\['b'\]"):
        stream.append_many([{}, {}, {'b': object()}])
