"""Arguments are checked at the call, and refused by name, before anything is written."""

import copy
import threading
from functools import partial

import pytest

import minibatch as mb
from minibatch.errors import ArgumentError, DataError, PortabilityError
from minibatch.window import (
    CountWindow,
    FixedTimeWindow,
    RelaxedTimeWindow,
    SessionWindow,
    SlidingTimeWindow,
    WindowEmitter,
)


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
        ({'interval': 1, 'relaxed': 0}, 'relaxed must be True or False, not 0'),
        ({'interval': 1, 'relaxed': 'False'}, "relaxed must be True or False, not 'False'"),
        ({'interval': 1, 'emit_empty': 'no'}, "emit_empty must be True or False, not 'no'"),
        ({'size': 1, 'ordered': 'no'}, "ordered must be True or False, not 'no'"),
        ({'size': 1, 'keep': 1}, 'keep must be True or False, not 1'),
        ({'size': 1, 'blocking': 'no'}, "blocking must be True or False, not 'no'"),
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
        ({'interval': 2, 'key': 'k'}, RelaxedTimeWindow),
        ({'interval': 2, 'timestamp': 't'}, FixedTimeWindow),
        ({'interval': 2, 'timestamp': 't', 'relaxed': False}, FixedTimeWindow),
        ({'interval': 2, 'slide': 1}, SlidingTimeWindow),
        ({'gap': 2, 'key': 'k', 'timestamp': 't', 'lateness': 0, 'late': 'drop'}, SessionWindow),
        ({'size': 2, 'max_wait': 1, 'key': 'k', 'max_open_windows': 10, 'overflow': 'error'}, CountWindow),
        ({'emitter': SlidingTimeWindow, 'interval': 2, 'slide': 1, 'key': 'k'}, SlidingTimeWindow),
    ],
)
def test_the_options_choose_the_window(options, expected):
    assert type(mb.make_emitter('s', process, **options)) is expected


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'size': 2, 'interval': 3}, 'size and interval exclude each other.*max_wait'),
        ({'size': 2, 'interval': 3, 'slide': 1}, 'size and interval'),
        ({'size': 2, 'slide': 1}, 'size and slide exclude each other'),
        ({'size': 2, 'gap': 1}, 'size and gap exclude each other'),
        ({'gap': 2, 'interval': 1}, 'gap and interval exclude each other'),
        ({'gap': 2, 'slide': 1}, 'gap and slide exclude each other'),
        ({'slide': 1}, 'slide goes with interval'),
        ({'max_wait': 1}, 'max_wait goes with size'),
        ({'interval': 2, 'max_wait': 1}, 'max_wait and interval exclude each other'),
        ({'gap': 2, 'max_wait': 1}, 'max_wait and gap exclude each other'),
        ({'size': 2, 'key': 'k'}, 'key with size needs max_wait'),
        ({'interval': 2, 'lateness': 1}, 'lateness goes with timestamp'),
        ({'interval': 2, 'late': 'drop'}, 'late goes with timestamp'),
        ({'size': 2, 'timestamp': 't'}, 'size and timestamp exclude each other'),
        ({'interval': 2, 'timestamp': 't', 'relaxed': True}, 'timestamp makes fixed windows'),
        ({'interval': 2, 'slide': 1, 'relaxed': False}, 'relaxed and slide'),
        ({'gap': 2, 'relaxed': False}, 'relaxed goes with interval, not with gap'),
        ({'size': 2, 'relaxed': False}, 'relaxed goes with interval, not with size'),
        ({'interval': 2, 'key': 'k', 'emit_empty': True}, 'emit_empty=True does not go with key'),
        ({'gap': 2, 'emit_empty': True}, 'emit_empty=True does not go with gap'),
        ({'size': 2, 'emit_empty': True}, 'emit_empty=True goes with interval, not with size'),
        ({'interval': 2, 'max_open_windows': 5}, 'max_open_windows goes with key'),
        ({'size': 2, 'overflow': 'close'}, 'overflow goes with key'),
        ({'interval': 2, 'timestamp': 't', 'late': 'other'}, "late must be 'drop' or a Stream"),
        ({'interval': 2, 'timestamp': 't', 'lateness': -1}, 'lateness'),
        ({'interval': 2, 'key': 'k', 'max_open_windows': 0}, 'max_open_windows'),
        ({'interval': 2, 'key': 'k', 'overflow': 'x'}, 'overflow must be'),
        ({'interval': 2, 'key': ''}, 'key must be the name of a field'),
        ({'interval': 2.0001, 'key': 'k'}, 'interval must be a whole number of milliseconds'),
        ({'interval': 1 / 3}, r'interval must be .* milliseconds, not 0\.333.* the nearest is interval=0\.333'),
        ({'interval': 1 / 3, 'relaxed': False}, 'interval must be a whole number of milliseconds'),
        ({'interval': 1, 'slide': 1 / 3}, 'slide must be a whole number of milliseconds'),
        ({'gap': 86400.0001}, 'gap must be a whole number of milliseconds'),
        ({'size': 2, 'max_wait': 0.0015}, 'max_wait must be a whole number of milliseconds'),
        ({'interval': 1, 'timestamp': 't', 'lateness': 0.0004}, 'lateness must be .* the nearest is lateness=0.001'),
    ],
)
def test_options_that_do_not_combine_are_refused_by_their_names(options, named):
    with pytest.raises(ArgumentError, match=named):
        mb.make_emitter('s', process, **options)


def test_late_messages_cannot_go_to_the_stream_they_come_from():
    stream = mb.stream('s', url='mongomock://localhost/api')
    with pytest.raises(ArgumentError, match='late must be another stream'):
        mb.make_emitter('s', process, stream=stream, interval=2, timestamp='t', late=stream)
    other = mb.stream('other', url='mongomock://localhost/api')
    assert mb.make_emitter('s', process, stream=stream, interval=2, timestamp='t', late=other)


def the_ways_to(stream):
    """What of a stream can be a sink, or a function, of its own consumer."""
    class Sink:
        put = stream.append_many
    return [
        {'sink': stream},
        {'sink': copy.copy(stream)},
        {'sink': Sink()},
        {'fn': stream.append_many},
        {'fn': partial(stream.append, meta=1)},
        {'emitter': ByForwarding, 'size': 2, 'stream': None, 'url': stream.target.url},
    ]


class ByForwarding(CountWindow):
    def __init__(self, name, stream_url, **options):
        super().__init__(name, stream_url=stream_url, **options, forwardfn=mb.stream(name, url=stream_url).append_many)


@pytest.mark.parametrize('way', range(6))
def test_results_cannot_go_to_the_stream_they_come_from(url, way):
    stream = mb.stream('s', url=url)
    options = {'fn': process, 'size': 2, 'stream': stream, **the_ways_to(stream)[way]}
    with pytest.raises(ArgumentError, match=r"(sink|fn|forwardfn) must be another stream than .* read, 's'"):
        mb.make_emitter('s', **options)


def test_the_same_stream_by_another_url_is_the_same_and_of_another_name_database_or_server_is_not(url, db, standalone):
    stream = mb.stream('s', url=url)
    same = [url.replace('127.0.0.1', 'localhost'), f'{url}&appName=other']
    for each in same:
        with pytest.raises(ArgumentError, match='sink must be another stream'):
            mb.make_emitter('s', process, stream=stream, size=2, sink=mb.stream('s', url=each))
        with pytest.raises(ArgumentError, match='late must be another stream'):
            mb.make_emitter('s', process, url=each, interval=2, timestamp='t', late=stream)
    others = [mb.stream('t', url=url), mb.stream('s', url=standalone.url(db.name))]
    for sink in others:
        assert mb.make_emitter('s', process, stream=stream, size=2, sink=sink).sink is sink
    others[1].delete()


def test_the_function_of_make_emitter_is_also_named_emitfn():
    assert mb.make_emitter('s', emitfn=process, size=2).emitfn is process
    assert mb.make_emitter('s', process, size=2).emitfn is process
    assert mb.make_emitter(name='s', fn=process, size=2).emitfn is process
    with pytest.raises(ArgumentError, match='fn and emitfn are the same; give one of them'):
        mb.make_emitter('s', process, emitfn=process, size=2)


def test_an_emitter_of_ones_own_gets_none_of_the_options_of_other_windows():
    class Mine(WindowEmitter):
        pass

    with pytest.raises(ArgumentError, match='key goes with windows of minibatch; Mine picks'):
        mb.make_emitter('s', process, emitter=Mine, interval=3, key='k')


def test_what_a_window_is_tells_consumers_of_a_group_apart():
    def describe(**options):
        return mb.make_emitter('s', process, **options).describe()

    assert describe(size=2) == 'CountWindow(size=2)'
    assert describe(size=2, max_wait=3) == 'CountWindow(size=2, max_wait=3)'
    assert describe(interval=4, slide=2, key='k', timestamp=process) == (
        "SlidingTimeWindow(interval=4, slide=2, key='k', timestamp=process)"
    )
    assert describe(gap=2, timestamp='t', lateness=1) == "SessionWindow(gap=2, timestamp='t', lateness=1)"


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


def test_a_stream_takes_the_options_of_the_client_by_themselves(url):
    stream = mb.stream('test', url=url, appname='orders', tls=False, maxPoolSize=7)
    assert dict(stream.target.options) == {'appname': 'orders', 'tls': False, 'maxPoolSize': 7}
    with pytest.raises(mb.MinibatchError, match='maxPoolSizes'):
        mb.stream('test', url=url, maxPoolSizes=7)
