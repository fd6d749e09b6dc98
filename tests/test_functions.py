"""Functions as users bring them: refused when they could not run, and over when a call of them returns."""

import asyncio
import functools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from unittest.mock import MagicMock

import pytest
from processes import started
from servers import eventually

import minibatch as mb
from minibatch import functions, store, testing
from minibatch.errors import ArgumentError, ConsumerEndedError, DataError
from minibatch.models import Buffer
from minibatch.testing import InlineExecutor, ListSink
from minibatch.window import CountWindow, WindowEmitter

# --- when it is given


class Stateful:
    def __init__(self, start=0):
        self.start = start

    def __call__(self, window):
        return self.start

    def method(self, window):
        return self.start


class TakesNone:
    def __call__(self):
        return None


def two(a, b):
    return a, b


def logged(fn):
    @functools.wraps(fn)
    def wrapper(window):
        return fn(window, 'more')

    return wrapper


@pytest.mark.parametrize(
    'fn',
    [
        lambda window: 0, lambda window, more=1: 0, lambda *args: 0, lambda window, **kwargs: 0, Stateful(), Stateful,
        Stateful().method, functools.partial(two, 1), functools.partial(two, b=1), logged(two), len, sum, max, str, int,
        dict, [].append, itemgetter('a'), staticmethod(len), MagicMock(),
    ],
)  # fmt: skip
def test_what_takes_a_window_is_taken(fn):
    functions.check('fn', fn, 'the window')


@pytest.mark.parametrize(
    ('fn', 'said'),
    [
        (lambda: 0, r'<lambda>\(\) cannot be: too many positional arguments'),
        (two, r"two\(a, b\) cannot be: missing a required argument: 'b'"),
        (functools.partial(two, 1, 2), 'cannot be: too many'),
        (lambda window, *, unit: 0, "argument: 'unit'"),
        (TakesNone(), r'TakesNone\(\) cannot be'),
        (TakesNone, 'too many'),
        (Stateful.method, "argument: 'window'"),
        (3, 'must be callable, not 3'),
        (None, 'must be callable'),
    ],
)
def test_what_takes_something_else_is_refused_with_the_reason(fn, said):
    with pytest.raises(ArgumentError, match='^fn .*' + said):
        functions.check('fn', fn, 'the window')


def test_a_default_which_may_be_a_secret_is_not_repeated():
    with pytest.raises(ArgumentError, match=r'\(a, b, password=\.\.\.\)') as refused:
        functions.check('fn', lambda a, b, password='hunter2': 0, 'the window')
    assert 'hunter2' not in str(refused.value)


def test_a_coroutine_in_place_of_its_function_is_refused_with_advice():
    async def work(window):
        pass

    given = work(None)
    with pytest.raises(ArgumentError, match='do not call it'):
        functions.check('fn', given, 'the window')
    given.close()


def test_where_nobody_awaits_only_a_plain_function_is_taken():
    async def later(data):
        pass

    def items(data):
        yield data

    class Later:
        async def __call__(self, data):
            pass

    for fn, kind in ((later, 'async def'), (items, 'a generator'), (Later(), 'async def'),
                     (functools.partial(later), 'async def')):  # fmt: skip
        with pytest.raises(ArgumentError, match=f'key must be a plain function, and .* is {kind}'):
            functions.check('key', fn, 'the data', plain=True)
    functions.check('key', len, 'the data', plain=True)


# --- when it is called

TASKS = []  # an event loop holds them weakly


@pytest.fixture(autouse=True)
def no_loop():
    yield
    functions.close_loop()


async def one():
    return 1


async def counted(n):
    for i in range(n):
        yield i


def generated(n):
    yield from range(n)


async def nested():
    return counted(2)


@pytest.mark.parametrize(
    ('fn', 'expected'),
    [
        (one, 1), (lambda: one(), 1), (functools.partial(one), 1), (lambda: counted(2), [0, 1]), (nested, [0, 1]),
        (lambda: generated(3), [0, 1, 2]), (lambda: map(str, [1, 2]), ['1', '2']), (lambda: iter([1]), [1]),
        (lambda: generated(0), []), (lambda: [1], [1]), (lambda: {'a': 1}, {'a': 1}), (lambda: 'ab', 'ab'),
        (lambda: None, None), (lambda: range(2), range(2)),
    ],
)  # fmt: skip
def test_what_a_call_returns_has_run(fn, expected):
    assert functions.call(fn) == expected


def test_items_that_nobody_wants_are_made_and_not_kept():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i

    assert functions.call(items, keep=False) == []
    assert made == [0, 1, 2]


@pytest.mark.parametrize('wrap', [lambda c: [c], lambda c: (1, c), lambda c: {'a': c}, lambda c: iter([c])])
def test_coroutines_in_what_is_returned_are_an_error(wrap):
    waiting = one()
    with pytest.raises(DataError, match=r'asyncio\.gather'):
        functions.call(lambda: wrap(waiting))
    waiting.close()


def test_calls_of_a_thread_have_one_event_loop_in_which_tasks_go_on_between_them():
    ticks = []

    async def start():
        async def tick():
            while True:
                ticks.append(asyncio.get_running_loop())
                await asyncio.sleep(0.001)

        TASKS.append(asyncio.create_task(tick()))
        return asyncio.get_running_loop()

    loop = functions.call(start)
    count = len(ticks)
    eventually(lambda: len(ticks) > count + 3, message='the task does not go on when nothing is called')

    async def again():
        return asyncio.get_running_loop()

    assert functions.call(again) is loop
    with ThreadPoolExecutor(1) as other:
        assert other.submit(functions.call, again).result() is not loop


def test_a_loop_that_is_closed_lets_its_tasks_clean_up():
    seen = []

    async def start():
        async def hold():
            try:
                await asyncio.Event().wait()
            finally:
                seen.append('cleaned up')

        TASKS.append(asyncio.create_task(hold()))
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    loop = functions.call(start)
    functions.close_loop()
    assert seen == ['cleaned up']
    eventually(loop.is_closed)
    assert functions.call(one) == 1, 'there is a new one'


def test_the_loop_of_a_thread_that_has_ended_is_closed():
    async def here():
        return asyncio.get_running_loop()

    loops = []
    thread = threading.Thread(target=lambda: loops.append(functions.call(here)))
    thread.start()
    thread.join()
    del thread
    eventually(lambda: loops[0].is_closed())


@pytest.mark.parametrize('raised', [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, KeyError])
def test_whatever_a_coroutine_raises_comes_out_of_the_call_and_the_loop_goes_on(raised):
    async def fail():
        raise raised('why')

    with pytest.raises(raised, match='why'):
        functions.call(fail)
    assert functions.call(one) == 1


def test_a_task_that_raises_what_would_end_the_loop_does_not_end_it(caplog):
    async def start():
        async def leave():
            raise SystemExit(3)

        TASKS.append(asyncio.create_task(leave()))

    functions.call(start)
    eventually(lambda: 'would have ended' in caplog.text)
    assert functions.call(one) == 1


def test_a_call_can_be_made_where_an_event_loop_runs_already():
    async def main():
        return functions.call(one)

    assert asyncio.run(main()) == 1


def test_the_context_of_the_caller_is_that_of_the_coroutine():
    from contextvars import ContextVar

    name = ContextVar('name')
    name.set('here')

    async def read():
        return name.get()

    assert functions.call(read) == 'here'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_a_forked_child_has_a_loop_of_its_own():
    assert functions.call(one) == 1
    pid = os.fork()
    if not pid:
        os._exit(functions.call(one) + 6)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# --- by a consumer


@pytest.fixture
def stream(url):
    with mb.stream('s', url=url) as stream:
        stream.append_many({'v': v} for v in range(4))
        yield stream


def results(stream, fn, executor='inline', **options):
    """What a sink is given in one round."""
    sink = ListSink()
    mb.make_emitter(
        's', fn, stream=stream, size=2, executor=executor, workers=1, sink=sink, max_attempts=1, keep=True, **options
    ).run(blocking=False)
    return sink


async def doubled(window):
    await asyncio.sleep(0)
    return [2 * data['v'] for data in window.data]


async def each_doubled(window):
    for data in window.data:
        yield 2 * data['v']


def each_halved(window):
    for data in window.data:
        yield data['v'] / 2


async def where(window):
    return [os.getpid(), threading.main_thread().ident, id(asyncio.get_running_loop())]


EXECUTORS = ['inline', 'threads', 'processes']


@pytest.mark.parametrize('executor', EXECUTORS)
def test_functions_that_return_before_they_have_run_are_run(stream, executor):
    class Both:
        async def __call__(self, window):
            return functools.reduce(lambda a, b: a + b, [data['v'] for data in window.data])

    group = iter('abcd')
    for fn, expected in ((doubled, [[0, 2], [4, 6]]), (each_doubled, [[0, 2], [4, 6]]), (Both(), [1, 5]),
                         (each_halved, [[0, 0.5], [1, 1.5]])):  # fmt: skip
        assert results(stream, fn, executor, group=next(group)) == expected
    assert not stream.dead_letters()


@pytest.mark.parametrize('executor', EXECUTORS)
def test_a_worker_keeps_its_event_loop_over_windows(stream, executor):
    first, second = results(stream, where, executor)
    assert first == second


def test_what_an_async_function_raises_is_an_attempt_that_shows_where_it_was(stream):
    async def fails(window):
        await asyncio.sleep(0)
        raise KeyError('lost')

    assert results(stream, fails) == []
    assert [dead.error for dead in stream.dead_letters()] == ["KeyError: 'lost'"] * 2
    trace = stream.dead_letters()[0].traceback
    assert 'in fails' in trace
    assert 'in _guarded' not in trace


def test_processfn_may_be_async_or_a_generator_and_its_items_are_what_fn_is_given(stream):
    async def values(messages):
        return [message.data['v'] for message in messages]

    def items(messages):
        for message in messages:
            yield message.data['v']

    assert results(stream, sum, processfn=values) == [1, 5]
    assert results(stream, lambda values: values, processfn=items, group='b') == [[0, 1], [2, 3]]


class AsyncSink:
    def __init__(self):
        self.got, self.loops = [], set()

    async def put(self, messages):
        await asyncio.sleep(0)
        self.loops.add(asyncio.get_running_loop())
        self.got.append(messages)


class AsyncBulkSink(AsyncSink):
    async def put_many(self, results, windows):
        for result in results:
            await self.put(result)
        return len(results)


class AsyncOnceSink(AsyncSink):
    async def put_once(self, messages, window):
        await self.put(messages)


class AsyncForward(CountWindow):
    async def forward(self, data):
        await asyncio.sleep(0)
        FORWARDED.append(data)


FORWARDED = []


@pytest.mark.parametrize('kind', [AsyncSink, AsyncBulkSink, AsyncOnceSink])
def test_async_sinks_run_in_one_event_loop_of_the_consumer(stream, kind):
    sink = kind()
    emitter = mb.make_emitter('s', len, stream=stream, size=2, executor='threads', workers=2, sink=sink)
    for _ in range(2):
        emitter.run(blocking=False)
        stream.append_many([{'v': 4}, {'v': 5}])
    assert sink.got == [2, 2, 2]
    assert len(sink.loops) == 1, 'what it has connected to in a round is of no use in the next one'


def test_a_sink_of_an_emitter_or_as_a_generator_runs_too(stream):
    got = []

    class Yields:
        def put(self, messages):
            got.append(messages)
            yield

    mb.make_emitter('s', len, stream=stream, size=2, executor='inline', sink=Yields(), keep=True).run(False)
    assert got == [2, 2]
    FORWARDED.clear()
    mb.make_emitter('s', len, stream=stream, size=2, executor='inline', emitter=AsyncForward, group='b').run(False)
    assert FORWARDED == [2, 2]


def test_an_async_sink_that_fails_is_a_failed_window(stream):
    class Fails(AsyncSink):
        async def put(self, messages):
            raise asyncio.CancelledError

    mb.make_emitter('s', len, stream=stream, size=4, executor='inline', sink=Fails(), max_attempts=1).run(False)
    assert [dead.error for dead in stream.dead_letters()] == ['sink: CancelledError: ']


def test_a_consumer_that_was_started_closes_its_event_loop_at_the_end(stream):
    sink = AsyncSink()
    with started(mb.make_emitter('s', len, stream=stream, size=2, executor='inline', sink=sink)):
        eventually(lambda: len(sink.got) == 2)
    (loop,) = sink.loops
    eventually(loop.is_closed)


def test_an_async_function_that_takes_too_long_is_ended_and_it_is_told_where(stream):
    async def holds(window):
        while window.data[0]['v'] == 0:
            pass
        return 'fine'

    sink = ListSink()
    emitter = mb.make_emitter('s', holds, stream=stream, size=2, workers=1, timeout=1, max_attempts=1, sink=sink)
    with started(emitter):
        eventually(lambda: sink == ['fine'] and len(stream.dead_letters()) == 1, 30)
    (dead,) = stream.dead_letters()
    assert 'within timeout=1 s' in dead.error
    assert 'in holds' in dead.traceback


def test_an_async_function_that_waits_for_too_long_is_ended_too(stream):
    async def waits(window):
        await asyncio.sleep(3600 if window.data[0]['v'] == 0 else 0)
        return 'fine'

    got = consumed(stream, waits, 2, executor='processes', timeout=1, max_attempts=1)
    assert got == (['fine'], ['TimeoutError: the function did not return within timeout=1 s'])
    assert 'await' in stream.dead_letters()[0].traceback


# --- sources


def test_an_async_source_runs_and_is_cancelled_in_its_own_event_loop(url):
    class Source:
        async def stream(self, stream):
            self.task = asyncio.current_task()
            stream.append({'a': 1})
            await asyncio.Event().wait()

        async def cancel(self):
            self.task.cancel()

    stream = mb.stream('s', url=url)
    stream.attach(Source())
    eventually(lambda: stream.buffer().count() == 1)
    stream.stop()
    assert not stream._attached.running


def test_an_async_source_that_ends_has_brought_its_messages(url):
    class Source:
        async def stream(self, stream):
            await asyncio.sleep(0)
            stream.append({'a': 1})

        def cancel(self):
            pass

    stream = mb.stream('s', url=url)
    stream.attach(Source(), background=False)
    assert stream.buffer().count() == 1


class Yielding:
    def stream(self, stream):
        yield {'a': 1}

    def cancel(self):
        pass


class AsyncYielding(Yielding):
    async def stream(self, stream):
        yield {'a': 1}


class Blind(Yielding):
    def stream(self):
        pass


@pytest.mark.parametrize(
    ('source', 'said'), [(Yielding(), 'not yield'), (AsyncYielding(), 'not yield'), (Blind(), 'the stream')]
)
def test_a_source_that_would_bring_nothing_is_refused_when_it_is_given(url, source, said):
    with pytest.raises(ArgumentError, match=f'^source.stream .*{said}'):
        mb.stream('s', url=url).attach(source)
    with pytest.raises(ArgumentError, match=f'^source.stream .*{said}'):
        mb.make_emitter('s', len, size=1, source=source)


# --- what a consumer refuses


class PutsNothing:
    def put(self):
        pass


class PutsOne(ListSink):
    def put_many(self, results):
        pass


class Picks(WindowEmitter):
    async def window_ready(self):
        return False, ()

    def query(self):
        return []


async def later(data):
    return data


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'fn': lambda: 0}, 'fn is called with the window'),
        ({'fn': two}, r'two\(a, b\)'),
        ({'processfn': two}, 'processfn is called with the list of messages'),
        ({'sink': PutsNothing()}, 'sink.put is called with the result of a window'),
        ({'sink': PutsOne()}, 'sink.put_many is called with'),
        ({'key': later, 'max_wait': 1}, 'key must be a plain function'),
        ({'timestamp': later, 'interval': 1, 'size': None}, 'timestamp must be a plain function'),
        ({'key': lambda: 0, 'max_wait': 1}, 'key is called with the data'),
        ({'queue': asyncio.Queue()}, 'queue.get'),
        ({'emitter': Picks}, 'Picks.window_ready must be a plain function'),
        ({'sink': ListSink}, 'an instance, not the class'),
    ],
)
def test_what_could_not_be_called_is_refused_when_it_is_given(options, said):
    given = {'fn': len, 'size': 2, **options}
    fn = given.pop('fn')
    with pytest.raises(ArgumentError, match=said):
        mb.make_emitter('s', fn, **given)
    if not {'fn', 'sink', 'queue'} & options.keys():
        return
    kind = {'emitfn' if name == 'fn' else name: value for name, value in {'fn': fn, **options}.items()}
    with pytest.raises(ArgumentError, match=said):
        CountWindow('s', size=2, **kind)


def test_in_tests_functions_run_as_in_a_consumer():
    messages = [{'v': v} for v in range(4)]
    assert testing.run(doubled, messages, size=2).results == [[0, 2], [4, 6]]
    assert testing.run(each_doubled, messages, size=2).results == [[0, 2], [4, 6]]
    assert testing.run(each_halved, messages, size=2).results == [[0, 0.5], [1, 1.5]]
    with pytest.raises(ArgumentError, match='fn is called with the window'):
        testing.run(two, messages, size=2)


# --- what code of users raises


class Odd(BaseException):
    pass


RAISED = [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, Odd]


def fails_on_zero(raised, window):
    if window.data[0]['v'] == 0:
        raise raised('why')
    return [data['v'] for data in window.data]


def consumed(stream, fn, count, **options):
    """What the sink of a consumer that is started, and goes on, is given, and the errors of the dead letters."""
    sink = options.pop('sink', ListSink())
    options = {'executor': 'inline', 'workers': 1, 'max_attempts': 2, **options}
    emitter = mb.make_emitter('s', fn, stream=stream, size=2, sink=sink, **options)
    with started(emitter):
        eventually(lambda: len(sink) + len(stream.dead_letters()) == count, 30)
    assert emitter.error is None
    return list(sink), [dead.error for dead in stream.dead_letters()]


@pytest.mark.parametrize('executor', ['inline', 'threads', ThreadPoolExecutor, 'processes'])
def test_whatever_a_function_raises_is_an_attempt_and_then_a_dead_letter(stream, executor, monkeypatch):
    monkeypatch.setattr('minibatch.delivery.RETRY_PAUSES', (0.01, 0.01))
    for i, raised in enumerate(RAISED):
        got = consumed(stream, functools.partial(fails_on_zero, raised), 2, executor=executor)
        assert got == ([[2, 3]], [f'{raised.__name__}: why'])
        assert [dead.attempts for dead in stream.dead_letters()] == [2]
        stream.dead_letters().discard()
        if i < len(RAISED) - 1:
            stream.append_many({'v': v} for v in range(4))


@pytest.mark.parametrize('raised', RAISED)
@pytest.mark.parametrize('method', ['put', 'put_once', 'put_many'])
def test_whatever_a_sink_raises_is_an_attempt_and_then_a_dead_letter(stream, raised, method, monkeypatch):
    monkeypatch.setattr('minibatch.delivery.RETRY_PAUSES', (0.01, 0.01))

    def fail(self, *args):
        raise raised('why')

    kind = type('Fails', (ListSink,), {method: fail})
    expected = ([2, 2], []) if method == 'put_many' else ([], [f'sink: {raised.__name__}: why'] * 2)
    assert consumed(stream, len, 2, sink=kind()) == expected


def test_a_bulk_sink_that_does_not_say_how_much_it_took_is_given_results_one_by_one(stream):
    class Silent(ListSink):
        def put_many(self, results, windows):
            pass

    assert consumed(stream, len, 2, sink=Silent()) == ([2, 2], [])


@pytest.mark.parametrize('raised', RAISED)
def test_what_a_key_or_time_raises_is_a_dead_letter_of_its_message(stream, raised):
    def key(data):
        if data['v'] == 0:
            raise raised('why')
        return 'a'

    got = consumed(stream, len, 2, key=key, max_wait=60)
    assert got == ([2], [f'key: {raised.__name__}: why'])


class Leaves(WindowEmitter):
    def window_ready(self):
        raise SystemExit(0)

    def query(self):
        return []


def test_an_emitter_that_would_end_the_process_ends_its_consumer_with_an_error(url, caplog):
    emitter = mb.make_emitter('s', len, emitter=Leaves, url=url)
    with pytest.raises(ConsumerEndedError, match='s/default has ended with SystemExit: 0'):
        emitter.run()
    emitter.start()
    emitter._thread.join(20)
    assert isinstance(emitter.error, ConsumerEndedError)
    assert isinstance(emitter.error.__cause__, SystemExit)
    assert 'has ended' in caplog.text


def test_a_source_that_exits_is_started_again(url, monkeypatch, caplog):
    monkeypatch.setattr('minibatch.attached.PAUSES', (0.01, 0.02))

    class Source:
        tries = 0

        def stream(self, stream):
            self.tries += 1
            if self.tries < 3:
                raise SystemExit(self.tries)
            stream.append({'a': 1})

        def cancel(self):
            raise SystemExit(4)

    stream = mb.stream('s', url=url)
    stream.attach(Source())
    eventually(lambda: stream.buffer().count() == 1)
    stream.stop()
    assert 'SystemExit: 2' in caplog.text


class Cancelled(InlineExecutor):
    """Its first completion says that it was cancelled, as those of other engines may."""

    first = True

    def submit(self, fn):
        if not self.first:
            return super().submit(fn)
        self.first, done = False, Future()
        done.set_exception(asyncio.CancelledError())
        return done


def test_a_completion_that_was_cancelled_is_done_again(stream):
    assert consumed(stream, len, 2, executor=Cancelled()) == ([2, 2], [])


def test_an_error_whose_text_exits_is_told_all_the_same():
    class Wordless(Exception):
        def __str__(self):
            raise SystemExit(1)

    assert store.in_words(Wordless()) == 'Wordless: (its text cannot be had: SystemExit)'


class PicksTwo(WindowEmitter):
    def window_ready(self):
        waiting = Buffer.objects.no_cache().filter(processed=False)
        self.picked = sorted(waiting, key=lambda obj: obj.data['v'])[:2]
        return len(self.picked) == 2, ()

    def query(self):
        return self.picked


class Prepares(PicksTwo):
    def process(self, objs):
        return refuses_zero(objs)


def refuses_zero(objs):
    if objs[0].data['v'] == 0:
        raise SystemExit('why')
    return [obj.data['v'] for obj in objs]


@pytest.mark.parametrize('options', [{'emitter': Prepares}, {'emitter': PicksTwo, 'processfn': refuses_zero}])
def test_what_prepares_a_window_that_was_picked_may_raise_as_the_function_may(stream, options, monkeypatch):
    monkeypatch.setattr('minibatch.delivery.RETRY_PAUSES', (0.01, 0.01))
    assert consumed(stream, lambda values: values, 2, **options) == ([[2, 3]], ['SystemExit: why'])
    assert [dead.attempts for dead in stream.dead_letters()] == [2]


def test_what_an_async_function_or_sink_has_only_queued_is_stored_when_its_window_is_done(stream):
    made, put = (mb.stream(name, url=stream.target.url, batchsize=100, linger=1000) for name in ('made', 'put'))

    async def appends(window):
        await asyncio.sleep(0)
        made.append({'n': len(window)})

    class Appends:
        async def put(self, messages):
            await asyncio.sleep(0)
            put.append({'n': len(messages)})

    mb.make_emitter('s', appends, stream=stream, size=4, executor='inline', sink=Appends()).run(blocking=False)
    assert [sum(record.n for record in each.buffer()) for each in (made, put)] == [1, 1]
