"""Tests that every source and sink must pass, for yours too: subclass, say how it is made, and let pytest run it.

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

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest, mock

from .abc import Sink, Source
from .models import Stream
from .named import NamedProducer

PATIENCE = 30.0
PROBE_PAUSE = 0.3
SOON = 5.0
COUNT = 100


def _eventually(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f'after {PATIENCE:g} s still not so: {what}'
        time.sleep(0.02)


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
        raise NotImplementedError

    def send(self, numbers: Iterable[int]) -> None:
        """Put messages ``{'i': number}`` into the outside system, in this order; 0 and above, or -1 to try."""
        raise NotImplementedError

    def number(self, data: Mapping[str, Any]) -> int:
        """The number in a message as it was appended."""
        return int(data['i'])

    # --- the tests

    def test_it_has_the_methods_of_a_source(self) -> None:
        assert isinstance(self.make(), Source)

    def test_it_brings_every_message_once_and_in_order(self) -> None:
        with self._stream() as stream, self._running(self.make(), stream):
            self.send(range(COUNT))
            self._wait_for(stream, range(COUNT))
            assert self._numbers(stream) == list(range(COUNT))

    def test_it_brings_what_was_sent_while_it_was_away(self) -> None:
        with self._stream() as stream:
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
        with self._stream() as stream:
            for start in range(0, 3 * COUNT, COUNT):
                with self._running(source, stream):
                    self.send(range(start, start + COUNT))
                    self._wait_for(stream, range(start + COUNT))
            self._prove(stream, range(3 * COUNT))

    def test_it_ends_soon_when_it_is_cancelled_also_twice_and_leaves_no_thread(self) -> None:
        source, before = self.make(), set(threading.enumerate())
        with self._stream() as stream:
            with self._running(source, stream):
                self.send(range(COUNT))
                self._wait_for(stream, range(COUNT))
                started = time.monotonic()
            assert time.monotonic() - started < SOON
            source.cancel()
            stream.attach(source)
            stream.stop(SOON)
        left = [thread.name for thread in set(threading.enumerate()) - before]
        assert not [name for name in left if 'pymongo' not in name], f'threads that are left: {left}'

    def test_nothing_is_lost_when_the_append_fails(self) -> None:
        self._fail_at_an_append(after=False)

    def test_nothing_is_lost_when_it_fails_between_append_and_acknowledgement(self) -> None:
        self._fail_at_an_append(after=True)

    def test_it_waits_while_the_stream_is_full_and_loses_nothing(self) -> None:
        with self._stream(max_backlog=COUNT // 2) as stream, self._running(self.make(), stream):
            stream.clear()  # of what was sent to try
            self.send(range(COUNT))
            _eventually(lambda: len(self._all(stream)) == COUNT // 2, 'the stream is full')
            first = self._numbers(stream)
            stream.clear()
            _eventually(lambda: set(first + self._numbers(stream)) == set(range(COUNT)), 'the rest has come')
            assert sorted(first + self._numbers(stream)) == list(range(COUNT))

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

        with self._stream() as stream:
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
    def _stream(self, **options: Any) -> Iterator[Stream]:
        with Stream.get_or_create(f'contract-{secrets.token_hex(6)}', url=self.url, **options) as stream:
            yield stream
            stream.clear()

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
        _eventually(lambda: set(numbers) <= set(self._numbers(stream)), f'{numbers} have come')

    def _prove(self, stream: Stream, numbers: range) -> None:
        brought = self._numbers(stream)
        assert set(brought) == set(numbers)
        assert not self.resumes or sorted(brought) == list(numbers)


class SinkContract:
    """The contract of a sink. Define `make` and `received`.

    Attributes:
        ordered: whether the outside system shows messages in the order in which they were put.
    """

    ordered = True

    def make(self) -> Sink:
        """A new sink that writes into the same outside system as the last one."""
        raise NotImplementedError

    def received(self) -> list[Any]:
        """All messages that the outside system has, as they were put."""
        raise NotImplementedError

    # --- the tests

    def test_it_has_the_method_of_a_sink(self) -> None:
        assert isinstance(self.make(), Sink)

    def test_the_outside_system_has_a_message_when_put_returns(self) -> None:
        self.make().put({'i': 1})
        assert self.received() == [{'i': 1}]

    def test_it_takes_a_list_of_messages_in_order(self) -> None:
        messages = [{'i': i} for i in range(COUNT)]
        self.make().put(messages)
        self._compare(messages)

    def test_it_takes_an_empty_list_and_sends_nothing(self) -> None:
        sink = self.make()
        sink.put([])
        sink.put({'i': 1})
        assert self.received() == [{'i': 1}]

    def test_it_takes_one_result_after_the_other(self) -> None:
        sink = self.make()
        for i in range(20):
            sink.put({'i': i})
        self._compare([{'i': i} for i in range(20)])

    def test_it_does_not_change_what_it_is_given(self) -> None:
        message = {'i': 1, 'list': [1, 2]}
        self.make().put([message])
        assert message == {'i': 1, 'list': [1, 2]}

    def test_it_can_be_used_from_another_thread_than_the_one_that_made_it(self) -> None:
        sink = self.make()
        thread = threading.Thread(target=sink.put, args=({'i': 1},))
        thread.start()
        thread.join()
        assert self.received() == [{'i': 1}]

    def test_what_it_cannot_send_is_refused_with_an_error(self) -> None:
        sink = self.make()
        try:
            sink.put([{'i': 0, 'x': object()}])
        except Exception:
            sink.put([{'i': 1}])
            assert self.received() == [{'i': 1}]
        else:
            raise AssertionError('an object() was put without an error')

    def _compare(self, messages: list[Any]) -> None:
        received = self.received()
        if not self.ordered:
            received = sorted(received, key=lambda message: int(message['i']))
        assert received == messages
