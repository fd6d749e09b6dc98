"""The base of all emitters: the loop's options, and the protocol of an emitter that picks messages itself."""

from __future__ import annotations

import contextlib
import logging
import queue as queues
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from . import clock, connection, executors, functions, marshaller, signals, store
from .abc import BulkSink, ExactlyOnceSink, Sink
from .attached import check_contract, check_source
from .consumer import Consumer
from .errors import ArgumentError, ConsumerEndedError, PortabilityError
from .messages import Message
from .models import Buffer, Stream, Window, check_choice, check_name, check_options
from .progress import Log, WindowPlan
from .store import Span
from .text import plain

logger = logging.getLogger(__name__)

# What subclasses may define, and this process calls; what each is called with.
PLAIN: dict[str, tuple[str, ...]] = {
    'window_ready': (),
    'process': ('the messages',),
    'commit': ('the messages', 'the window'),
    'timestamp': ('what window_ready has returned',),
    'undo': ('the messages', 'the window'),
    'sleep': (),
    'should_stop': (),
    'next_due': (),
}


class WindowEmitter:
    """Cuts a stream into windows, and runs the loop that processes them.

    Subclass it to pick messages your own way, out of order if you like. These methods are called, in this order:

    - ``window_ready()`` returns ``(ready, query_args)``: whether there is a window, and what `query` needs for it
    - ``query(*query_args)`` returns the `Buffer` objects of the window
    - ``process(objs)`` returns what the function is called with, by default a window of these messages
    - ``emit(window)`` calls the function, by default through the executor
    - ``forward(data)`` gives the result to the sink
    - ``commit(objs, window)`` acknowledges the messages: by default deletes them, or marks them as processed
    - ``timestamp(query_args)`` notes on the stream that it was read
    - ``undo(objs, window)`` is called instead of the last two when the function or the sink fails
    - ``sleep()`` waits when no window is ready

    A message counts as processed when its `Buffer` is deleted or has ``processed=True``; there can be no second
    consumer group beside such an emitter, because they would share that mark.

    Args:
        stream_name: the stream to read.
        interval: seconds between windows; what it means is the subclass's choice.
        size: messages per window; what it means is the subclass's choice.
        emitfn: the function, called with each window; without it the window itself is the result. Of a generator the
            items are the result; ``async def`` is awaited.
        processfn: makes, from the list of messages (objects with ``data``), what `emitfn` is called with.
        forwardfn: called with each result, in this process.
        emit_empty: whether windows without messages are emitted.
        executor: 'processes' (the default), 'threads', 'inline', an address such as 'dask://host:8786', or class or
            instance of anything with ``submit(fn)``, see `minibatch.abc.Executor`.
        max_workers: how many worker processes, or how many calls of `executor` at once; all CPUs by default, or all
            that the executor has.
        stream: the `Stream` to read, if it is open already.
        stream_url: the MongoDB URL.
        queue: a queue; a true item in it stops the loop.
        group: the consumer group.
        keep: whether messages and windows stay stored after they were processed.
        lease: seconds after which another consumer of the group takes over when this one is silent.
        max_attempts: how often a window is tried before it is a dead letter.
        timeout: seconds the function may take for a window; then its worker process is ended and replaced.
        on_error: what happens after the last attempt: 'continue', with the window as a dead letter, or 'stop', with
            a `WindowFailedError`, and the window still open.
        ordered: call the sink in the order of the windows. One that fails holds those after it up.
        start: where a new group starts: 'earliest', with the oldest message that is stored, or 'latest', with what is
            appended from now on.
        stall_after: seconds after which a warning says that windows wait and none is finished.
        sink: takes the results, see `minibatch.abc.Sink`; instead of `forwardfn`.
        source: attached to the stream while this consumer has the lease.
        cnx_kwargs: further options of `pymongo.MongoClient`.
    """

    emits_empty = False
    wakes_on_append = True
    assigns = False
    """Whether messages are read to put them into windows, which then do not follow on each other in the log."""
    event_time = False
    """Whether windows are of a time that is in the messages."""
    late: Stream | None = None
    """Where late messages go."""

    def __init__(
        self,
        stream_name: str,
        interval: float | None = None,
        size: int | None = None,
        processfn: Callable[..., Any] | None = None,
        emitfn: Callable[..., Any] | None = None,
        emit_empty: bool | None = None,
        executor: Any = None,
        max_workers: int | None = None,
        stream: Stream | None = None,
        stream_url: str | None = None,
        forwardfn: Callable[[Any], Any] | None = None,
        queue: Any = None,
        group: str = 'default',
        keep: bool = False,
        lease: float = 10.0,
        max_attempts: int = 5,
        timeout: float | None = None,
        on_error: str = 'continue',
        ordered: bool = False,
        start: str = 'earliest',
        stall_after: float = 60.0,
        sink: Any = None,
        source: Any = None,
        cnx_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_name('the name of a stream', stream_name)
        check_name('group', group, forbidden='\0/')
        numbers = {
            'size': size, 'interval': interval, 'workers': max_workers, 'lease': lease, 'max_attempts': max_attempts,
            'timeout': timeout, 'stall_after': stall_after,
        }  # fmt: skip
        check_options({name: value for name, value in numbers.items() if value is not None})
        check_choice('on_error', on_error, 'continue', 'stop')
        check_choice('start', start, 'earliest', 'latest')
        if start == 'latest' and self.picks:
            raise ArgumentError(f"start='latest' is a position, and {type(self).__name__} picks messages itself")
        if sink is not None and forwardfn is not None:
            raise ArgumentError('sink and forwardfn are the same; give one of them')
        self._check_functions(emitfn, processfn, forwardfn, sink, source, queue)
        executor = executors.resolve(executor)
        if timeout is not None and executor is not None:
            raise ArgumentError('timeout ends worker processes of the default executor; with executor= there are none')
        if cnx_kwargs is not None and not isinstance(cnx_kwargs, dict):
            raise ArgumentError(f'cnx_kwargs must be a dict of options of the client, not {type(cnx_kwargs).__name__}')
        self.stream_name, self.group, self.lease = stream_name, group, lease
        self.size, self.interval = size, interval if interval is not None else size
        self.processfn, self.emitfn, self.sink = processfn, emitfn, sink
        self.forwardfn = forwardfn if sink is None else sink.put
        self.max_attempts, self.timeout, self.on_error, self.ordered = max_attempts, timeout, on_error, ordered
        self.start_at, self.stall_after = start, stall_after
        self.emit_empty = self.emits_empty if emit_empty is None else emit_empty
        self.executor, self.max_workers = executor, max_workers
        self.queue, self.source = queue, source
        self._stream, self._stream_url, self._cnx_kwargs = stream, stream_url, cnx_kwargs
        self._keep = keep
        self.appends_to = _appends_to(emitfn), _appends_to(self.forwardfn)
        self.refuse_circle('fn', self.appends_to[0])
        self.refuse_circle('forwardfn' if sink is None else 'sink', self.appends_to[1])
        self._stop = False
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._consumer = Consumer(self)
        self.fed_by: Sequence[threading.Event] = ()  # set when those who append to the stream have come to their end

    def refuse_circle(self, name: str, to: Stream | None) -> None:
        """Raise `ArgumentError` if the option `name` appends `to` the stream that is read, which would never end."""
        if to is None or to.name != self.stream_name:
            return
        if connection.same_database(to.target, self.stream.target):
            raise ArgumentError(f'{name} must be another stream than the one that is read, {self.stream_name!r}: what '
                                f'it is given would come back for ever')  # fmt: skip

    @classmethod
    def check_function(cls, name: str, fn: Any, processfn: Any = None) -> None:
        """Raise `ArgumentError` if the function, which the user calls `name`, could not be called."""
        if fn is not None and cls.emit is WindowEmitter.emit:
            functions.check(name, fn, 'the window' if processfn is None else 'what processfn has made')

    def _check_functions(
        self, emitfn: Any, processfn: Any, forwardfn: Any, sink: Any, source: Any, queue: Any
    ) -> None:  # fmt: skip
        """Refuse what could not be called as it will be; a subclass may call some of it in another way."""
        self.check_function('emitfn', emitfn, processfn)
        if processfn is not None and not self.overrides('process'):
            functions.check('processfn', processfn, 'the list of messages')
        if forwardfn is not None and not self.overrides('forward'):
            functions.check('forwardfn', forwardfn, 'the result of a window')
        if sink is not None and not self.overrides('forward'):
            _check_sink(sink)
        if source is not None:
            check_source(source)
        if queue is not None:
            if not hasattr(queue, 'get'):
                raise ArgumentError(f'queue must have a method get; {type(queue).__name__} has not')
            functions.check('queue.get', queue.get, 'False, for not to wait', plain=True)
        for name in PLAIN:
            if self.overrides(name):
                functions.check(f'{type(self).__name__}.{name}', getattr(self, name), *PLAIN[name], plain=True)

    # --- running

    @property
    def stream(self) -> Stream:
        """The stream, opened on first use."""
        if self._stream is None:
            self._stream = Stream.get_or_create(
                self.stream_name, url=self._stream_url, cnx_kwargs=self._cnx_kwargs
            )
        return self._stream

    def run(self, blocking: bool = True, until_done: bool = False) -> None:
        """Process windows until stopped by `stop`, by the queue, or, on the main thread, by SIGTERM or Ctrl-C.

        What is in flight is finished first. With ``blocking=False`` do one round, as `_run_once` does. In a worker
        that imports a module, to find a function there, this does nothing, and neither does `start`.

        Args:
            blocking: False to do one round only.
            until_done: return when all is processed that was there when this began, or, if there is a source, when
                that came to its end. Windows that are still open then are emitted as they are: what is appended for
                them later is in further windows with the same key, start and end, and not late by that.
        """
        if until_done and not blocking:
            raise ArgumentError('until_done=True goes on until all is done, and blocking=False does one round')
        if marshaller.is_loading():
            return
        with self._telling_why():
            if blocking:
                self._consumer.run(until_done)
            else:
                self._run_once()

    def _run_once(self) -> int:
        """Process what is due now; returns how many windows were committed.

        Takes the lease, and releases it. If another consumer has it, nothing is done. A window that fails is not
        tried again in this round.
        """
        return self._consumer.run_once()

    def start(self) -> None:
        """Process windows in a thread of this process, until `stop`.

        If that ends with an error, the error is logged, and in `error`.
        """
        if marshaller.is_loading():
            return
        if self._thread is not None and self._thread.is_alive():
            raise ArgumentError(f'the consumer of {self.stream_name!r} has been started already')
        self._stop = False
        self.error = None
        self._thread = threading.Thread(target=self._run_logged, name=f'minibatch-{self.stream_name}', daemon=True)
        self._thread.start()

    def _run_logged(self) -> None:
        try:
            with self._telling_why():
                self._consumer.run()
        except Exception:
            logger.exception('the consumer of stream %r has ended', self.stream_name)

    @contextlib.contextmanager
    def _telling_why(self) -> Iterator[None]:
        """What ends the consumer is in `error`; what would end a thread or process without a word is an error, too."""
        self.error = None
        try:
            yield
        except Exception as exc:
            self.error = exc
            raise
        except BaseException as exc:
            if signals.is_signal(exc):
                raise
            self.error = ConsumerEndedError(f'{self.name} has ended with {store.in_words(exc)}')
            raise self.error from exc

    def stop(self, timeout: float = 60.0) -> None:
        """Claim no more windows, finish those in flight, and wait up to `timeout` seconds until that is done."""
        self.stop_soon()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def stop_soon(self) -> None:
        """Stop after what is in flight, without waiting for it."""
        self._stop = True
        self._consumer.inbox.wake()

    @property
    def is_told_to_stop(self) -> bool:
        """Whether it was told to stop; unlike `should_stop` this looks at no queue."""
        return self._stop

    def should_stop(self) -> bool:
        """Whether to stop: after `stop`, or when a true item came through the queue. Called again and again."""
        if self.queue is not None and not self._stop:
            with contextlib.suppress(queues.Empty):
                self._stop = bool(self.queue.get(False))
        return self._stop

    def persist(self, flag: bool = True) -> None:
        """Keep messages and windows after they were processed, marked as processed."""
        self._keep = flag

    @property
    def keep(self) -> bool:
        """Whether messages and windows stay stored after they were processed."""
        return self._keep

    def check_portable(self) -> None:
        """Raise `PortabilityError`, naming the variable, if the function cannot be sent to a worker process."""
        self._consumer.crew.check_portable()

    @property
    def name(self) -> str:
        """How logs name this consumer: stream/group."""
        return plain(f'{self.stream_name}/{self.group}')

    @property
    def forwards(self) -> bool:
        """Whether results go somewhere."""
        return self.forwardfn is not None or self.overrides('forward')

    def describe(self) -> str:
        """What consumers of the same group must have in common."""
        window = f'size={self.size}' if self.size else f'interval={self.interval}'
        return f'{type(self).__name__}({window})'

    def __repr__(self) -> str:
        return f'<{self.describe()} on {self.name}>'

    def __reduce__(self) -> NoReturn:
        raise PortabilityError(f'{self!r} belongs to this process, so it cannot be copied or sent to another; make '
                               f'one there')  # fmt: skip

    # --- planning, for the consumer

    @property
    def picks(self) -> bool:
        """Whether this emitter picks messages itself instead of planning from the log."""
        return type(self).plan is WindowEmitter.plan or self.overrides('window_ready')

    def overrides(self, name: str) -> bool:
        """Whether a subclass has its own method of this name."""
        return getattr(type(self), name) is not getattr(WindowEmitter, name)

    def plan(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        """The windows that are due, at most `limit`, in order; each continues where the one before ended."""
        raise ArgumentError(f'{type(self).__name__} must define window_ready and query, or plan')

    def finish(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        """The windows that are not due, at most `limit`, when all that is due is planned and no more is to come."""
        return []

    def next_due(self) -> datetime | None:
        """When a window will be due even if nothing is appended."""
        return None

    def time_of(self, message: Message) -> datetime:
        """The time by which a message belongs to windows."""
        return message.created

    def pick(self) -> WindowPlan | None:
        """Ask the subclass for its next window; None if it has none, or has picked what is not one message."""
        answer = self.window_ready()
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ArgumentError(f'{type(self).__name__}.window_ready must return (ready, query_args), not {answer!r}')
        ready, query_args = answer
        if not ready:
            return None
        picked = list(self.query(*query_args))
        if any(obj.offset is None or (obj.n or 1) > 1 for obj in picked):
            return None  # appended since the log was made to lie one by one; next time
        return WindowPlan(spans_of(picked), picked=picked, query_args=query_args)

    def prepare(self, picked: list[Any]) -> Any:
        """What the function is called with, or None for the window itself."""
        return self.process(picked) if self.processfn or self.overrides('process') else None

    # --- the protocol

    def window_ready(self) -> tuple[bool, Sequence[Any]]:
        raise ArgumentError(f'{type(self).__name__} must define window_ready')

    def query(self, *query_args: Any) -> Any:
        raise ArgumentError(f'{type(self).__name__} must define query')

    def process(self, objs: Sequence[Any]) -> Any:
        if self.processfn is not None:
            return functions.call(self.processfn, objs)
        return Window(stream=self.stream_name, data=[obj.data for obj in objs])

    def emit(self, window: Any) -> Any:
        return window if self.emitfn is None else self.emitfn(window)

    def forward(self, data: Any) -> None:
        if self.forwardfn is not None:
            functions.call(self.forwardfn, data, keep=False)

    def commit(self, objs: Sequence[Any], window: Any) -> None:
        for obj in objs:
            if self._keep:
                obj.modify(processed=True)
            else:
                obj.delete()

    def timestamp(self, query_args: Sequence[Any]) -> None:
        store.touch_stream(self.stream.target.majority, self.stream_name, clock.now())

    def undo(self, objs: Sequence[Any], window: Any) -> None:
        """Nothing by default: the messages are not marked before they are committed."""

    def sleep(self) -> None:
        self._consumer.inbox.wait()


def _appends_to(fn: Any) -> Stream | None:
    """The stream of which this is a method."""
    while isinstance(fn, partial):
        fn = fn.func
    owner = getattr(fn, '__self__', None)
    return owner if isinstance(owner, Stream) else None


def _check_sink(sink: Any) -> None:
    check_contract('sink', sink, Sink, 'a method put(messages)')
    functions.check('sink.put', sink.put, 'the result of a window')
    if isinstance(sink, ExactlyOnceSink):
        functions.check('sink.put_once', sink.put_once, 'the result of a window', 'the window')
    if isinstance(sink, BulkSink):
        functions.check('sink.put_many', sink.put_many, 'the results of windows', 'the windows')


def spans_of(objs: Sequence[Buffer]) -> list[Span]:
    """The places of messages in the log, in the order of `objs`, neighbours joined."""
    spans: list[Span] = []
    for obj in objs:
        if spans and spans[-1].producer == obj.producer and spans[-1].end == obj.offset:
            spans[-1] = spans[-1]._replace(end=obj.offset + 1)
        else:
            spans.append(Span(obj.producer, obj.offset, obj.offset + 1))
    return spans
