"""The tools for tests: what a function is given here is what a consumer on a server would give it."""

import doctest
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import minibatch as mb
from minibatch import connection, testing
from minibatch.clock import EPOCH
from minibatch.errors import ArgumentError, DataError
from minibatch.testing import InlineExecutor, ListSink, ListSource, ManualClock, run
from minibatch.window import CountWindow, RelaxedTimeWindow, WindowEmitter

GUIDE = Path(__file__).parent.parent / 'docs' / 'guide.rst'


@pytest.fixture(autouse=True)
def no_server(request, monkeypatch):
    """Without a fixture that starts one, nothing here connects to a server."""
    if 'url' not in request.fixturenames:
        monkeypatch.setattr(connection, 'MongoClient', None)


def values(window):
    return [data['v'] for data in window.data]


def numbered(count):
    return [{'v': i} for i in range(count)]


def at(*seconds):
    """Messages that are appended so many seconds after 1970, numbered."""
    return [(time, {'v': i}) for i, time in enumerate(seconds)]


def timed(*seconds, **fields):
    """Messages whose time is in the message itself."""
    return [{'v': time, 'at': time, **fields} for time in seconds]


def spans(done):
    """Start, end and result of each window, in seconds."""
    return [((window.start - EPOCH).total_seconds(), (window.end - EPOCH).total_seconds(), result)
            for window, result in done]  # fmt: skip


# --- each kind of window


def test_count_windows_are_full_and_the_rest_is_not_emitted_as_on_a_stream():
    assert run(values, numbered(5), size=2).results == [[0, 1], [2, 3]]


def test_with_max_wait_the_rest_is_emitted_when_its_time_has_come():
    assert run(values, at(0, 1, 2, 20), size=2, max_wait=10).results == [[0, 1], [2], [3]]
    assert run(values, at(0, 11, 12), size=2, max_wait=10).results == [[0], [1, 2]]


def test_relaxed_windows_hold_all_since_the_last_one():
    assert spans(run(values, at(3, 4, 14), interval=10)) == [(3, 13, [0, 1]), (13, 23, [2])]


def test_fixed_windows_are_those_of_a_stream_with_empty_ones_between():
    done = run(values, at(3, 9, 10, 35), interval=10, relaxed=False)
    assert spans(done) == [(0, 10, [0, 1]), (10, 20, [2]), (20, 30, []), (30, 40, [3])]
    filled = run(values, at(3, 35), interval=10, relaxed=False, emit_empty=False)
    assert spans(filled) == [(0, 10, [0]), (30, 40, [1])]


def test_in_sliding_windows_a_message_is_several_times():
    assert spans(run(values, at(11, 16), interval=10, slide=5)) == [(5, 15, [0]), (10, 20, [0, 1]), (15, 25, [1])]


def test_sessions_end_by_silence_and_the_last_one_by_the_end_of_the_input():
    assert spans(run(values, at(0, 4, 20), gap=5)) == [(0, 9, [0, 1]), (20, 25, [2])]


def test_there_is_a_window_for_each_key():
    messages = [{'of': key, 'v': i} for i, key in enumerate('abacb')]
    done = run(values, messages, interval=60, key='of')
    assert {window.key: result for window, result in done} == {'a': [0, 2], 'b': [1, 4], 'c': [3]}
    done = run(values, messages, size=2, max_wait=60, key='of')
    assert [(window.key, result) for window, result in done] == [('a', [0, 2]), ('b', [1, 4]), ('c', [3])]


# --- event time


def test_windows_of_event_time_close_by_the_messages_and_at_the_end_all_do():
    done = run(values, timed(1, 12, 8, 31, 25), interval=10, timestamp='at', lateness=5)
    assert spans(done) == [(0, 10, [1, 8]), (10, 20, [12]), (20, 30, [25]), (30, 40, [31])]
    assert done.late == []
    assert done[0].window.watermark == EPOCH + timedelta(seconds=26)


def test_late_messages_are_told():
    done = run(values, timed(1, 12, 8), interval=10, timestamp='at')
    assert done.results == [[1], [12]]
    assert [(message.data['v'], message.offset) for message in done.late] == [(8, 2)]


def test_messages_without_a_key_or_a_time_are_told_with_the_reason():
    messages = [{'v': 0, 'at': 1, 'of': 'a'}, {'v': 1, 'at': 'noon', 'of': 'a'}, {'v': 2, 'at': 3}]
    done = run(values, messages, interval=10, timestamp='at', key='of')
    assert done.results == [[0]]
    assert [(bad.message.data['v'], bad.reason) for bad in done.bad] == [
        (1, "timestamp: field 'at' is no time: 'noon'"), (2, "key: field 'of' is missing"),
    ]  # fmt: skip


def test_event_time_of_an_idle_stream_goes_on_by_the_clock():
    messages = [(when, {'v': time, 'at': time}) for when, time in ((0, 0), (10, 5), (200, 7))]
    done = run(values, messages, interval=10, timestamp='at', lateness=60)
    assert done.results == [[0, 5]]
    assert [message.data['v'] for message in done.late] == [7]
    assert run(values, messages, interval=10, timestamp='at', lateness=200).late == []


def test_idle_says_after_how_long_silence_moves_event_time_and_none_that_it_never_does():
    messages = [(when, {'v': time, 'at': time}) for when, time in ((0, 0), (40, 5), (41, 41))]
    late = [
        [message.data['v'] for message in run(None, messages, interval=10, timestamp='at', **options).late]
        for options in ({}, {'idle': 20}, {'idle': 35}, {'idle': None})
    ]
    assert late == [[5], [5], [], []]


def test_a_time_that_is_ahead_of_the_clock_is_not_believed_and_emitted_at_the_end():
    century = [{'v': 'far', 'at': '2999-01-01'}]
    done = run(values, [*timed(0), *century, *timed(1, 12)], interval=10, timestamp='at')
    assert done.results == [[0, 1], [12], ['far']]
    far = [{'v': 'far', 'at': '9899-12-31'}]
    assert run(values, [*timed(0), *far], interval=10, timestamp='at').results == [[0], ['far']]


def test_sessions_of_event_time_may_be_long_and_all_are_emitted():
    done = run(values, timed(*range(0, 100_000, 4000)), gap=5000, timestamp='at', lateness=100_000)
    assert spans(done) == [(0, 101_000, list(range(0, 100_000, 4000)))]


# --- the clock


def test_messages_without_a_time_are_appended_one_a_second_or_as_said():
    clock = ManualClock('2026-01-31T12:00')
    done = run(lambda window: clock.now().second, numbered(3), size=1, clock=clock)
    assert done.results == [0, 1, 2]
    created = [window.messages[0].created.minute for window in run(None, numbered(3), size=1, every=60).windows]
    assert created == [0, 1, 2]


def test_a_message_without_a_time_comes_after_the_one_before():
    done = run(None, [(100, {'v': 0}), {'v': 1}, ('1970-01-01T00:05', {'v': 2})], size=1)
    assert [(window.messages[0].created - EPOCH).total_seconds() for window in done.windows] == [100, 101, 300]


def test_windows_of_a_millisecond_come_to_an_end():
    assert sum(run(len, at(0, 1), interval=0.001).results) == 2


def test_windows_that_are_due_together_are_emitted_at_the_same_time_however_many():
    clock = ManualClock()
    messages = [*({'of': i, 'at': 0} for i in range(1500)), {'of': 'end', 'at': 100}]
    done = run(lambda window: clock.now(), messages, interval=10, key='of', timestamp='at', clock=clock)
    assert len(done) == 1501
    assert len(set(done.results[:1500])) == 1


def test_a_clock_is_moved_by_hand_and_never_back():
    clock = ManualClock(datetime(2026, 1, 1))
    clock.advance(0.5)
    assert clock.now() == datetime(2026, 1, 1, 0, 0, 0, 500_000, timezone.utc)
    with pytest.raises(ArgumentError, match=r'time must not go back, from 2026-01-01T00:00:00\.500000'):
        clock.advance(-1)
    with pytest.raises(ArgumentError, match="start is no time: 'noon'"):
        ManualClock('noon')


# --- the function


def test_an_exception_of_the_function_comes_out_as_it_is():
    with pytest.raises(ZeroDivisionError):
        run(lambda window: 1 / 0, numbered(1), size=1)
    error = DataError('mine')

    def fail(window):
        raise error

    with pytest.raises(DataError) as raised:
        run(fail, numbered(1), size=1)
    assert raised.value is error


def test_the_result_is_what_a_sink_would_get():
    data = [{'v': 0}]
    for fn in (None, lambda window: None, lambda window: window):
        assert run(fn, numbered(1), size=1).results == [data]
    for empty in ([], 0, '', {}):
        assert run(lambda window, empty=empty: empty, numbered(1), size=1).results == [empty]


def test_the_function_gets_what_mongodb_would_give_it():
    noon = datetime(2026, 1, 31, 12, 0, 0, 1234, tzinfo=timezone.utc)
    stored = {'pair': [1, 2], 'at': datetime(2026, 1, 31, 12, 0, 0, 1000)}
    assert run(None, [{'pair': (1, 2), 'at': noon}], size=1).results == [[stored]]


def test_what_the_function_does_to_a_message_is_not_seen_in_other_windows():
    def spoil(window):
        return [data.pop('v', 'gone') for data in window.data]

    assert run(spoil, at(11, 16), interval=10, slide=5).results == [[0], [0, 1], [1]]


def test_processfn_gets_the_messages():
    done = run(sum, numbered(4), size=2, processfn=lambda messages: [message.data['v'] for message in messages])
    assert done.results == [1, 5]


def test_a_class_of_yours_that_plans_is_run():
    class Counted(CountWindow):
        def emit(self, window):
            return 'mine', len(window)

    assert run(values, numbered(2), emitter=Counted, size=2).results == [('mine', 2)]


def test_no_messages_are_no_windows():
    done = run(values, [], interval=10, timestamp='at')
    assert (done, done.late, done.bad, done.windows) == ([], [], [], [])


# --- what is refused


@pytest.mark.parametrize('options', [
    {}, {'sizze': 2}, {'size': 0}, {'size': 2, 'interval': 3}, {'size': 2, 'key': 'a'}, {'interval': 3, 'lateness': 1},
    {'interval': 3, 'slide': 2}, {'interval': 3, 'timestamp': 'at', 'late': 'keep'}, {'gap': 3, 'relaxed': True},
    {'interval': 3, 'key': 'a..b'}, {'emitter': 'CountWindow'},
])  # fmt: skip
def test_options_are_refused_as_streaming_does(options):
    with pytest.raises(ArgumentError) as refused:
        mb.make_emitter('s', values, stream=mb.Stream(name='s'), **options)
    with pytest.raises(ArgumentError, match=re.escape(str(refused.value))):
        run(values, numbered(1), **options)


def test_an_interval_that_is_missing_is_named():
    with pytest.raises(ArgumentError, match='interval= is missing'):
        run(values, numbered(1), emitter=RelaxedTimeWindow)


@pytest.mark.parametrize('option', ['sink', 'workers', 'group', 'url', 'max_attempts', 'blocking', 'stream', 'name'])
def test_options_of_a_consumer_are_refused_by_name(option):
    with pytest.raises(ArgumentError, match=f'{option} is for a consumer of a stream'):
        run(values, numbered(1), size=1, **{option: 1})


def test_an_emitter_that_picks_messages_is_refused():
    class Picks(WindowEmitter):
        def window_ready(self):
            return False, ()

    with pytest.raises(ArgumentError, match='Picks asks MongoDB for messages'):
        run(values, numbered(1), emitter=Picks)


@pytest.mark.parametrize(('messages', 'error', 'text'), [
    ({'v': 1}, ArgumentError, 'messages must be an iterable of dicts, not dict'),
    (5, ArgumentError, 'messages must be an iterable of dicts, not int'),
    ([{'v': 1}, 2], DataError, r'messages\[1\]: data must be a mapping such as a dict, not int'),
    ([{'v': {1}}], DataError, r"messages\[0\]: MongoDB cannot store data\['v'\]"),
    ([('noon', {'v': 1})], ArgumentError, r"messages\[0\]: its time is no time: 'noon'"),
    ([(1, {'v': 1}), (0, {'v': 1})], ArgumentError, r'messages\[1\]: .*put messages in the order of their arrival'),
])  # fmt: skip
def test_messages_that_are_none_are_named(messages, error, text):
    with pytest.raises(error, match=text):
        run(values, messages, size=1)


@pytest.mark.parametrize('every', [0, -1, 'x', True])
def test_every_must_be_seconds(every):
    with pytest.raises(ArgumentError, match='every must be'):
        run(values, numbered(1), size=1, every=every)


# --- on a server


def test_a_consumer_on_a_server_emits_the_same(url):
    messages = [{'of': i % 3, 'at': i * 7 % 50 + i, 'v': i} for i in range(200)]
    options = {'interval': 10, 'timestamp': 'at', 'key': 'of', 'lateness': 60}
    stream, sink = mb.stream('s', url=url), ListSink()

    def told(window):
        return window.start, window.key, values(window)

    # A stream has no end; a message from later closes the windows before it.
    stream.attach(ListSource([*messages, {'of': 3, 'at': 10_000, 'v': -1}]), background=False)
    mb.make_emitter('s', told, stream=stream, executor=InlineExecutor, sink=sink, **options).run(blocking=False)
    here = run(told, messages, **options)
    assert here.late == []
    assert sorted(sink) == sorted(here.results)


def test_a_list_source_goes_on_where_it_was(url):
    class Cancels(ListSource):
        def __init__(self, messages):
            super().__init__(messages)
            self.stops = 1

        @property
        def position(self):
            return self._position

        @position.setter
        def position(self, value):
            self._position = value
            if value and self.stops:
                self.stops = 0
                self.cancel()

    stream, source = mb.stream('s', url=url), Cancels(numbered(2500))
    source.stream(stream)
    assert (source.position, stream.buffer().count()) == (1000, 1)
    source.stream(stream)
    source.stream(stream)
    seen = [data['v'] for record in stream.buffer() for data in record.batch]
    assert sorted(seen) == list(range(2500))


# --- the rest


def test_an_inline_executor_has_done_it_when_submit_returns():
    done = []
    assert InlineExecutor().submit(lambda: done.append(1) or 'result').result() == 'result'
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        InlineExecutor().submit(lambda: 1 / 0).result()


def test_ctrl_c_in_an_inline_executor_is_not_a_failure_of_the_task():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineExecutor().submit(interrupted)


@pytest.mark.parametrize('place', ['guide', 'module'])
def test_the_examples_of_the_documentation_are_right(place):
    if place == 'guide':
        failed, tried = doctest.testfile(str(GUIDE), module_relative=False, encoding='utf-8')
    else:
        failed, tried = doctest.testmod(testing)
    assert failed == 0
    assert tried > 3
