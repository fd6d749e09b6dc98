"""Tests that every source, sink and executor must pass, for yours too: subclass, say how it is made, and run pytest.

::

    from minibatch.contracts import SourceContract

    class TestLinesSource(SourceContract):
        def make(self):
            return LinesSource(self.path)

        def send(self, numbers):
            with open(self.path, 'a') as file:
                file.writelines(f'{{"i": {i}}}\\n' for i in numbers)

They need a MongoDB; by default that is what `minibatch.connectdb` finds without a URL.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import SkipTest, mock

from . import connection, functions
from .abc import BoundedExecutor, Completion, Executor, Sink, Source
from .api import make_emitter
from .connection import Target
from .messages import MessageWindow
from .models import Stream
from .named import NamedProducer

PATIENCE = 60.0
PROBE_PAUSE = 0.3
SOON = 5.0
COUNT = 100
MANY = 1_000_000
SIZE = 10
HERE = 'this runs in the process of the test: set remote = False in the class of the contract'


def _eventually(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f'after {PATIENCE:g} s still not so: {what}'
        time.sleep(0.02)


@contextmanager
def _new_stream(url: str | None, **options: Any) -> Iterator[Stream]:
    with Stream.get_or_create(f'contract-{secrets.token_hex(6)}', url=url, **options) as stream:
        try:
            yield stream
        finally:
            stream.delete()


def _difference(brought: list[int], wanted: range) -> str:
    """What is wrong with the numbers brought."""
    twice = sorted({number for number in brought if brought.count(number) > 1})
    missing = sorted(set(wanted) - set(brought))
    return f'missing: {missing[:10]} ({len(missing)}); came twice: {twice[:10]} ({len(twice)}); in order: ' \
           f'{brought == sorted(brought)}'


@contextmanager
def _explained(why: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except AssertionError as exc:
        raise AssertionError(f'{exc}; {why()}') from None


class SourceContract:
    """The contract of a source.

    Define `make` and `send`, and `number` unless the messages are appended as they are.

    Attributes:
        url: the MongoDB to use.
        keeps: whether the outside system keeps what is sent while no source is there.
        resumes: whether nothing comes twice, since the outside system is read on from a position.
    """

    url: str | None = None
    keeps = True
    resumes = True

    def make(self) -> Source:
        """A new source that reads the same outside system as the last one."""
        raise NotImplementedError('define make() in the class of the contract')

    def send(self, numbers: Iterable[int]) -> None:
        """Put messages ``{'i': number}`` into the outside system, in this order; 0 and above, or -1 to try."""
        raise NotImplementedError('define send() in the class of the contract')

    def number(self, data: Mapping[str, Any]) -> int:
        """The number in a message as it was appended."""
        return int(data['i'])

    # --- the tests

    def test_it_has_the_methods_of_a_source(self) -> None:
        source = self.make()
        assert isinstance(source, Source), f'{type(source).__name__} must have the methods stream and cancel'

    def test_it_brings_every_message_once_and_in_order(self) -> None:
        with _new_stream(self.url) as stream, self._running(self.make(), stream):
            self.send(range(COUNT))
            self._wait_for(stream, range(COUNT))
            brought = self._numbers(stream)
            assert brought == list(range(COUNT)), _difference(brought, range(COUNT))

    def test_it_brings_what_was_sent_while_it_was_away(self) -> None:
        with _new_stream(self.url) as stream:
            for start in range(0, 3 * COUNT, COUNT):
                if self.keeps and start:
                    self.send(range(start, start + COUNT))
                with self._running(self.make(), stream):
                    if not (self.keeps and start):
                        self.send(range(start, start + COUNT))
                    self._wait_for(stream, range(start + COUNT))
            self._prove(stream, range(3 * COUNT))

    def test_the_same_source_goes_on_after_it_was_cancelled(self) -> None:
        source = self.make()
        with _new_stream(self.url) as stream:
            for start in range(0, 3 * COUNT, COUNT):
                with self._running(source, stream):
                    self.send(range(start, start + COUNT))
                    self._wait_for(stream, range(start + COUNT))
            self._prove(stream, range(3 * COUNT))

    def test_it_ends_soon_when_it_is_cancelled_also_twice_and_leaves_no_thread(self) -> None:
        source, before = self.make(), set(threading.enumerate())
        with _new_stream(self.url) as stream:
            with self._running(source, stream):
                self.send(range(COUNT))
                self._wait_for(stream, range(COUNT))
                started = time.monotonic()
            took = time.monotonic() - started
            assert took < SOON, f'the source took {took:.1f} s to end after cancel(); {SOON:g} s at most'
            functions.cancel(source.cancel, None)
            stream.attach(source)
            stream.stop(SOON)
        left = [thread.name for thread in set(threading.enumerate()) - before]
        assert not [name for name in left if 'pymongo' not in name], f'threads that are left: {left}'

    def test_nothing_is_lost_when_the_append_fails(self) -> None:
        self._fail_at_an_append(after=False)

    def test_nothing_is_lost_when_it_fails_between_append_and_acknowledgement(self) -> None:
        self._fail_at_an_append(after=True)

    def test_it_waits_while_the_stream_is_full_and_loses_nothing(self) -> None:
        with _new_stream(self.url, max_backlog=COUNT // 2) as stream, self._running(self.make(), stream):
            stream.clear()  # of what was sent to try
            self.send(range(COUNT))
            _eventually(lambda: len(self._all(stream)) == COUNT // 2, 'the stream is full')
            first = self._numbers(stream)
            stream.clear()
            _eventually(lambda: set(first + self._numbers(stream)) == set(range(COUNT)), 'the rest has come')
            brought = first + self._numbers(stream)
            assert sorted(brought) == list(range(COUNT)), _difference(brought, range(COUNT))

    # --- what they are made of

    def _fail_at_an_append(self, after: bool) -> None:
        if not self.keeps:
            raise SkipTest('the outside system does not keep what is sent')
        append, failures = NamedProducer.append_many, [0]

        def fails_twice(producer: NamedProducer, messages: Any) -> int:
            messages = list(messages)
            fails = failures[0] < 2 and any(self._safe_number(message.data) >= 0 for message in messages)
            done = append(producer, messages) if after or not fails else 0
            if fails:
                failures[0] += 1
                raise ConnectionError('a failure made by this test')
            return done

        with _new_stream(self.url) as stream:
            with self._running(self.make(), stream):
                pass
            with mock.patch.object(NamedProducer, 'append_many', fails_twice), self._running(self.make(), stream):
                for start in range(0, COUNT, COUNT // 10):
                    self.send(range(start, start + COUNT // 10))
                self._wait_for(stream, range(COUNT))
            assert failures[0], 'the source does not append through stream.producer(), so no append could fail'
            self._prove(stream, range(COUNT))

    def _safe_number(self, data: Any) -> int:
        try:
            return self.number(data)
        except (KeyError, TypeError, ValueError):
            return -1

    @contextmanager
    def _running(self, source: Source, stream: Stream) -> Iterator[None]:
        """The source at work; if what is sent before it listens is lost, until something has arrived."""
        stream.attach(source)
        try:
            if not self.keeps:
                count = self._probes(stream)
                while self._probes(stream) == count:
                    self.send([-1])
                    time.sleep(PROBE_PAUSE)
            yield
        finally:
            stream.stop()
            running = stream._attached is not None and stream._attached.running
            assert not running, 'the source did not end within 10 s after it was cancelled'

    def _probes(self, stream: Stream) -> int:
        return sum(1 for number in self._all(stream) if number < 0)

    def _numbers(self, stream: Stream) -> list[int]:
        return [number for number in self._all(stream) if number >= 0]

    def _all(self, stream: Stream) -> list[int]:
        return [self.number(data) for doc in stream.buffer() for data in doc.batch or [doc.data]]

    def _wait_for(self, stream: Stream, numbers: range) -> None:
        def why() -> str:
            failure = stream.source_failure
            return _difference(self._numbers(stream), numbers) + (f'; the source failed: {failure}' if failure else '')

        with _explained(why):
            _eventually(lambda: set(numbers) <= set(self._numbers(stream)), 'all messages have come')

    def _prove(self, stream: Stream, numbers: range) -> None:
        brought = self._numbers(stream)
        brought = brought if self.resumes else sorted(set(brought))
        assert sorted(brought) == list(numbers), _difference(brought, numbers)


class SinkContract:
    """The contract of a sink. Define `make` and `received`.

    Attributes:
        ordered: whether the outside system shows messages in the order in which they were put.
    """

    ordered = True

    def make(self) -> Sink:
        """A new sink that writes into the same outside system as the last one."""
        raise NotImplementedError('define make() in the class of the contract')

    def received(self) -> list[Any]:
        """All messages that the outside system has, as they were put."""
        raise NotImplementedError('define received() in the class of the contract')

    # --- the tests

    def test_it_has_the_method_of_a_sink(self) -> None:
        sink = self.make()
        assert isinstance(sink, Sink), f'{type(sink).__name__} must have the method put'

    def test_the_outside_system_has_a_message_when_put_returns(self) -> None:
        functions.call(self.make().put, {'i': 1})
        self._compare([{'i': 1}])

    def test_it_takes_a_list_of_messages_in_order(self) -> None:
        messages = [{'i': i} for i in range(COUNT)]
        functions.call(self.make().put, messages)
        self._compare(messages)

    def test_it_takes_an_empty_list_and_sends_nothing(self) -> None:
        sink = self.make()
        functions.call(sink.put, [])
        functions.call(sink.put, {'i': 1})
        self._compare([{'i': 1}])

    def test_it_takes_one_result_after_the_other(self) -> None:
        sink = self.make()
        for i in range(20):
            functions.call(sink.put, {'i': i})
        self._compare([{'i': i} for i in range(20)])

    def test_it_does_not_change_what_it_is_given(self) -> None:
        message = {'i': 1, 'list': [1, 2]}
        functions.call(self.make().put, [message])
        assert message == {'i': 1, 'list': [1, 2]}

    def test_it_can_be_used_from_another_thread_than_the_one_that_made_it(self) -> None:
        sink = self.make()
        thread = threading.Thread(target=functions.call, args=(sink.put, {'i': 1}))
        thread.start()
        thread.join()
        self._compare([{'i': 1}])

    def test_what_it_cannot_send_is_refused_with_an_error(self) -> None:
        sink = self.make()
        try:
            functions.call(sink.put, [{'i': 0, 'x': object()}])
        except Exception:
            functions.call(sink.put, [{'i': 1}])
            self._compare([{'i': 1}])
        else:
            raise AssertionError('an object() was put without an error')

    def _compare(self, messages: list[Any]) -> None:
        received = self.received()
        if not self.ordered:
            received = sorted(received, key=lambda message: int(message['i']))
        assert received == messages, f'the outside system has {received[:3]} ... ({len(received)}), and should have ' \
                                     f'{messages[:3]} ... ({len(messages)})'


class ExecutorContract:
    """The contract of an executor. Define `make`, and `close` unless it is ``shutdown()``.

    Attributes:
        url: the MongoDB to use.
        remote: whether callables run in other processes, which may die.
        recovers: whether it goes on when one has died; else it is to raise in `submit`.
    """

    url: str | None = None
    remote = True
    recovers = True

    def make(self) -> Executor:
        """A new executor."""
        raise NotImplementedError('define make() in the class of the contract')

    def close(self, executor: Executor) -> None:
        """Close it."""
        getattr(executor, 'shutdown', lambda: None)()

    # --- the tests

    def test_it_has_the_method_of_an_executor(self) -> None:
        with self._made() as executor:
            assert isinstance(executor, Executor)
            if isinstance(executor, BoundedExecutor):
                assert isinstance(executor.workers, int)
                assert executor.workers > 0

    def test_what_a_callable_returns_comes_back_also_none_and_megabytes(self) -> None:
        with self._made() as executor:
            values: list[Any] = [1, None, []]
            for value in values:
                assert executor.submit(_Returns(value)).result() == value
            assert executor.submit(_Returns(b'many')).result() == b'many' * MANY

    def test_what_a_callable_raises_comes_out_of_result_and_the_next_one_is_run(self) -> None:
        with self._made() as executor:
            error = _error_of(executor.submit(_Raises()))
            assert isinstance(error, KeyError)
            assert error.args == ('raised',)
            assert executor.submit(_Returns(1)).result() == 1

    def test_a_callback_gets_the_completion_once_also_when_it_is_done_already(self) -> None:
        with self._made() as executor:
            for work in (_Returns(1), _Raises()):
                done = executor.submit(work)
                called: list[Any] = []
                done.add_done_callback(called.append)
                _eventually(lambda called=called: called, 'the callback is called')  # type: ignore[misc]
                done.add_done_callback(called.append)
                _eventually(lambda called=called: called[1:], 'the callback is called')  # type: ignore[misc]
                assert called == [done, done]

    def test_callables_from_several_threads_each_get_their_own_result(self) -> None:
        with self._made() as executor:
            results: dict[int, Any] = {}

            def submit(first: int) -> None:
                done = {i: executor.submit(_Returns(i)) for i in range(first, 4 * COUNT, 4)}
                results.update((i, completion.result()) for i, completion in done.items())

            threads = [threading.Thread(target=submit, args=(first,)) for first in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == {i: i for i in range(4 * COUNT)}

    def test_no_more_run_at_once_than_it_says_and_all_that_wait_come_to_run(self) -> None:
        target, name = connection.target(self.url), f'contract_{secrets.token_hex(6)}'
        with self._made() as executor:
            if not isinstance(executor, BoundedExecutor):
                raise SkipTest('it does not say how much it can do at once')
            most = executor.workers
            done = [executor.submit(_Overlaps(target, name, 0.02)) for _ in range(2 * most + COUNT // 10)]
            seen = [completion.result() for completion in done]
        target.db[name].drop()
        assert max(seen) <= most, f'{max(seen)} ran at once, and workers says {most}'

    def test_nothing_begins_after_it_is_closed(self) -> None:
        target, name = connection.target(self.url), f'contract_{secrets.token_hex(6)}'
        with self._made() as executor:
            for _ in range(2 * COUNT):
                executor.submit(_Notes(target, name, 0.05 if self.remote else 0.0))
            if self.remote:
                _eventually(lambda: target.db[name].find_one(), 'something has begun')
        time.sleep(PROBE_PAUSE)
        begun = target.db[name].count_documents({})
        time.sleep(PROBE_PAUSE)
        assert target.db[name].count_documents({}) == begun
        target.db[name].drop()

    def test_consumers_give_each_message_once_to_their_own_function_whatever_it_is(self) -> None:
        with self._made() as executor, _new_stream(self.url) as stream:
            stream.append_many({'i': i} for i in range(COUNT))
            for group, factor in (('plus', 1), ('minus', -1)):
                times = partial(lambda factor, window: [factor * data['i'] for data in window.data], factor)
                with self._consuming(stream, executor, times, group=group) as results:
                    _eventually(lambda results=results: len(results) >= COUNT, 'all')  # type: ignore[misc]
                assert sorted(results) == sorted(factor * i for i in range(COUNT))

    def test_a_window_whose_function_raises_is_tried_again(self) -> None:
        def fails_at_first(window: MessageWindow) -> list[int]:
            if window.attempt == 1 and window.number % 2:
                raise ValueError
            return [data['i'] for data in window.data]

        with self._made() as executor, _new_stream(self.url) as stream:
            stream.append_many({'i': i} for i in range(COUNT))
            with self._consuming(stream, executor, fails_at_first) as results:
                _eventually(lambda: len(results) >= COUNT, 'all messages have come')
            assert sorted(results) == list(range(COUNT))

    def test_a_worker_that_dies_is_an_exception_and_what_comes_next_is_run(self) -> None:
        if not self.remote:
            raise SkipTest('callables run in this process')
        with self._made() as executor:
            error = _error_of(executor.submit(_Exits()))
            assert HERE not in str(error), error
            assert str(error), f'the exception of a worker that died, {error!r}, has no text'
            try:
                value = executor.submit(_Returns(1)).result()
            except Exception:
                if self.recovers:
                    raise
            else:
                assert value == 1

    def test_a_window_that_kills_its_workers_is_a_dead_letter_and_those_beside_it_are_not(self) -> None:
        def kills(window: MessageWindow) -> list[int]:
            if any(data['i'] == COUNT // 2 for data in window.data):
                os._exit(1)
            return [data['i'] for data in window.data for _ in range(window.attempt)]

        if not (self.remote and self.recovers):
            raise SkipTest('no worker dies, or it does not go on when one has died')
        with self._made() as executor, _new_stream(self.url) as stream:
            stream.append_many({'i': i} for i in range(COUNT))
            with self._consuming(stream, executor, kills, max_attempts=2) as results:
                _eventually(lambda: len(results) >= COUNT - SIZE, 'all others have come')
                _eventually(lambda: list(stream.dead_letters()), 'there is a dead letter')
            assert [(dead.n, dead.attempts) for dead in stream.dead_letters()] == [(SIZE, 2)]
            others = [i for i in range(COUNT) if i not in range(COUNT // 2, COUNT // 2 + SIZE)]
            assert sorted(results) == others, 'an attempt of others was counted'

    # --- what they are made of

    @contextmanager
    def _made(self) -> Iterator[Executor]:
        executor = self.make()
        try:
            yield executor
        finally:
            self.close(executor)

    @contextmanager
    def _consuming(
        self, stream: Stream, executor: Executor, fn: Callable[[MessageWindow], list[int]], **options: Any
    ) -> Iterator[list[int]]:
        """A consumer at work, and the numbers that its function has returned."""
        results = _Numbers()
        emitter = make_emitter(stream.name, fn, stream=stream, size=SIZE, sink=results, keep=True, executor=executor,
                               **options)  # fmt: skip
        emitter.start()
        try:
            yield results
        finally:
            emitter.stop()
        assert emitter.error is None, emitter.error


def _error_of(completion: Completion) -> Exception:
    try:
        value = completion.result()
    except Exception as exc:
        return exc
    raise AssertionError(f'result() returned {value!r} instead of raising')


class _Numbers(list[int]):
    put = list.extend


class _Returns:
    """Returns a value, a short one of bytes many times."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value * MANY if isinstance(self.value, bytes) else self.value


class _Raises:
    def __call__(self) -> None:
        raise KeyError('raised')


class _Exits:
    def __init__(self) -> None:
        self.here = platform.node(), os.getpid()

    def __call__(self) -> None:
        if self.here == (platform.node(), os.getpid()):
            raise RuntimeError(HERE)
        os._exit(1)


class _Overlaps:
    """Takes a while, and returns how many of its kind were running when it began."""

    def __init__(self, target: Target, name: str, seconds: float) -> None:
        self.target, self.name, self.seconds = target, name, seconds

    def __call__(self) -> int:
        running = self.target.db[self.name]
        own = running.insert_one({}).inserted_id
        count = running.count_documents({})
        time.sleep(self.seconds)
        running.delete_one({'_id': own})
        return count


class _Notes:
    """Writes down that it has begun, and takes a while."""

    def __init__(self, target: Target, name: str, seconds: float) -> None:
        self.target, self.name, self.seconds = target, name, seconds

    def __call__(self) -> None:
        self.target.db[self.name].insert_one({})
        time.sleep(self.seconds)
