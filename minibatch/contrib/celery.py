"""Bring the events of Celery tasks into a stream."""

from __future__ import annotations

import logging
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import NoneType
from typing import Any
from uuid import uuid4

from minibatch import Stream
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError, CancelledError, MinibatchError, install_hint

try:
    from amqp.exceptions import FrameSyntaxError
    from celery import Celery
    from celery.events import get_exchange
    from celery.events.state import TASK_EVENT_TO_STATE
    from kombu import Queue
    from kombu.message import Message
    from kombu.transport import virtual
except ImportError as exc:
    raise ImportError(f'CeleryEventSource needs Celery: {install_hint("celery")}') from exc

logger = logging.getLogger(__name__)

STATES = {f'task-{event}': state for event, state in TASK_EVENT_TO_STATE.items()}
TOLD_BY = ('task-sent', 'task-received')  # the events with the fields below, which later ones lack
TOLD = ('name', 'args', 'kwargs', 'retries', 'eta', 'expires', 'root_id', 'parent_id')
REMEMBERED_TASKS = 10_000
REMEMBERED_TEXT = 4096
BATCH = 1000  # messages of the broker
POLL = 0.2
KEEP = 24 * 3600.0
KEEP_BYTES = 256 << 20
HEADER_FRAME = 2  # of AMQP: class, weight and size of the content, then its properties
HEADER_BYTES = 12
NO_PROPERTIES = bytes(2)


class CeleryEventSource:
    """A source that brings the events of tasks: what ran, how long, what failed.

    Each event is one message::

        {'task_event': 'task-succeeded',
         'task_name': 'shop.tasks.bill',
         'task_id': '0aa29395-3a61-4813-b813-481f7bda9a26',
         'task_state': 'SUCCESS',
         'task_runtime': 0.0021,                  # seconds; of task-succeeded alone, else None
         'task_info': {'args': "('x',)", 'kwargs': '{}', 'result': '3', 'hostname': 'celery@host',
                       'timestamp': 1795288691.8, 'retries': 0, ...}}

    ``task_info`` has all other fields that Celery sends with the event. Arguments, results and exceptions are the texts
    Celery makes of them; nothing is evaluated. ``timestamp='task_info.timestamp'`` makes windows of the time at which
    things happened.

    Workers send events when they run with ``-E``. Celery tells the name and the arguments of a task only when it was
    sent or received. The source remembers them in memory, of the last 10,000 tasks; of a task that was received before
    that, or before the process began, ``task_name`` is None.

    **What may be lost, what may come twice.** Celery sends events without asking whether they arrived: what a worker
    cannot send is lost. After that it depends on the broker:

    - *RabbitMQ (amqp)*: a queue of the stream keeps the events, also while no source runs, and an event leaves it after
      it was appended. So a source that is killed, or loses a connection, loses nothing; events that came last may be
      appended a second time, equal in task_id, task_event and ``task_info['clock']``. RabbitMQ keeps these messages in
      memory: the events that wait in it are lost when it restarts. It deletes the queue when no source has read it for
      `keep` seconds, and the oldest events in it beyond 256 MB.
    - *Redis*: events are published to whoever listens, and nobody keeps them. Lost is what is sent while the source
      does not run, or between the loss of its connection and its return, and what has arrived but is not appended yet
      when it is killed. Redis also closes the connection of a source that cannot append, once more waits for it than
      ``client-output-buffer-limit pubsub`` allows (32 MB, or 8 MB for a minute; 32 MB were 30,000 events of a trial),
      and drops all that waits. Nothing comes twice.
    - *Other brokers* as with Redis, and each in its way; see its page in Celery's manual.

    An event that cannot be read goes to the stream ``<stream>.dead_letters``, with the reason. Only JSON is read
    (``event_serializer``'s default), never pickle, whatever the app accepts.

    Args:
        celeryapp: the Celery app, which knows the broker.
        events: the event, or list of events, to bring: of 'task-sent', 'task-received', 'task-started',
            'task-succeeded', 'task-failed', 'task-retried', 'task-revoked' and 'task-rejected'. By default
            'task-succeeded' and 'task-failed', so that each finished task is there once. Clients send 'task-sent' with
            ``task_send_sent_event=True``.
        keep: on RabbitMQ, how many seconds the events are kept while no source reads them; 0: not at all, then
            it is as with Redis. The queue keeps the value that it was made with; another one is refused by RabbitMQ.

    Raises:
        ArgumentError: naming the argument that is wrong.

    Example:
        >>> import minibatch as mb
        >>> from celery import Celery
        >>> source = CeleryEventSource(Celery('shop', broker='redis://localhost'))
        >>> @mb.streaming('tasks', interval=60, source=source)    # doctest: +SKIP
        ... def failures(window):
        ...     return {'failed': sum(task['task_state'] == 'FAILURE' for task in window.data)}
    """

    default_events = ('task-succeeded', 'task-failed')

    def __init__(self, celeryapp: Celery, events: str | Iterable[str] | None = None, keep: float = KEEP) -> None:
        if not isinstance(celeryapp, Celery):
            raise ArgumentError(f'celeryapp must be a celery.Celery, not {type(celeryapp).__name__}')
        try:
            celeryapp.connection_for_read().get_transport_cls()
        except (KeyError, ImportError) as exc:
            raise ArgumentError(f'celeryapp has a broker that cannot be used here: {exc.args[0]}') from None
        if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 <= keep <= 1e6:
            raise ArgumentError(f'keep must be a number of seconds between 0 and 1,000,000, not {keep!r}')
        self.celeryapp = celeryapp
        self._events = _event_names(self.default_events if events is None else events)
        self._keep = float(keep)
        self._tasks = _Tasks()
        self._cancelled = threading.Event()

    def stream(self, stream: Stream) -> None:
        """Append events until `cancel` is called; see `minibatch.abc.Source`.

        Raises:
            ConnectionError: if the broker cannot be reached, refuses something, or the connection is lost.
        """
        self._cancelled.clear()
        connection = self.celeryapp.connection_for_read()
        try:
            with suppress(CancelledError):
                self._bring(connection, stream)
        except connection.connection_errors + connection.channel_errors as exc:
            if isinstance(exc, MinibatchError):  # of MongoDB
                raise
            raise ConnectionError(f'broker {connection.as_uri()}: {type(exc).__name__}: {exc}') from exc

    def cancel(self) -> None:
        """Make `stream` return soon."""
        self._cancelled.set()

    def _bring(self, connection: Any, stream: Stream) -> None:
        with connection:
            lasting = self._keep > 0 and connection.transport.driver_type == 'amqp'
            arrived = _Arrived(stream, self._tasks, self._events, self._cancelled, lasting)
            channel = connection.channel()
            if lasting:
                _leave_out_what_cannot_be_decoded(connection.connection)
            if isinstance(channel, virtual.Channel):
                channel.Message = _AnyMessage
            consumer = connection.Consumer(
                [self._queue(connection, stream, lasting)], channel, callbacks=[arrived.take], accept=['json'],
                on_decode_error=arrived.refuse, no_ack=not lasting, prefetch_count=BATCH if lasting else None,
            )  # fmt: skip
            with consumer:
                logger.info('events of tasks come from %s', connection.as_uri())
                while not self._cancelled.is_set():
                    try:
                        connection.drain_events(timeout=0 if arrived else POLL)
                    except TimeoutError:
                        arrived.append()
                    except connection.connection_errors as exc:
                        if not (lasting or isinstance(exc, MinibatchError)):
                            arrived.append()  # nobody sends it again
                        raise
                arrived.append()

    def _queue(self, connection: Any, stream: Stream, lasting: bool) -> Queue:
        options: dict[str, Any] = {'durable': False, 'auto_delete': True}
        name = str(uuid4())
        if lasting:
            options = {'durable': True, 'auto_delete': False, 'expires': self._keep, 'max_length_bytes': KEEP_BYTES}
            name = str(stream.id)
        exchange = get_exchange(connection, name=self.celeryapp.conf.event_exchange)
        return Queue(f'celeryev.minibatch.{name}', exchange=exchange, routing_key='task.#', **options)


class _AnyMessage(virtual.Message):  # type: ignore[misc]
    """A message of a transport such as Redis, also one that kombu has not made, which would break the transport."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel, **options)
        except Exception:
            self.errors = [sys.exc_info()]
            Message.__init__(self, payload, channel=channel)


def _leave_out_what_cannot_be_decoded(connection: Any) -> None:
    """Let py-amqp hand over a message without its properties, if it cannot decode them: it would come for ever."""
    handle = connection.on_inbound_frame

    def on_frame(frame: tuple[int, int, bytes]) -> Any:
        kind, channel, content = frame
        try:
            return handle(frame)
        except (UnicodeDecodeError, FrameSyntaxError, struct.error):
            if kind != HEADER_FRAME:
                raise
            return handle((kind, channel, bytes(content[:HEADER_BYTES]) + NO_PROPERTIES))

    connection.on_inbound_frame = on_frame


class _Tasks:
    """What was told of the latest tasks, by their ids."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def complete(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """The event, and what earlier ones told of its task."""
        task_id = event['uuid']
        complete = {**self._told.get(task_id, {}), **event}
        if event['type'] in TOLD_BY:
            told = {field: event[field] for field in TOLD if field in event}
            self._told[task_id] = {field: value for field, value in told.items() if len(str(value)) <= REMEMBERED_TEXT}
            self._told.move_to_end(task_id)
            if len(self._told) > REMEMBERED_TASKS:
                self._told.popitem(last=False)
        return complete


class _Arrived:
    """What has arrived and is not appended yet. False while there is nothing."""

    def __init__(
        self, stream: Stream, tasks: _Tasks, events: frozenset[str], cancelled: threading.Event, acknowledge: bool
    ) -> None:
        self._producer = stream.producer()
        self._tasks, self._events, self._cancelled = tasks, events, cancelled
        self._acknowledge = acknowledge
        self._messages: list[SourceMessage] = []
        self._count = 0
        self._last: Any = None

    def __bool__(self) -> bool:
        return self._count > 0

    def take(self, body: Any, message: Any) -> None:
        """Take the content of a message of the broker: an event, or a list of them."""
        self._messages += self._read(body)
        self._arrived(message)

    def refuse(self, message: Any, exc: Exception) -> None:
        """Take a message that cannot be decoded."""
        self._messages.append(SourceMessage(message.body, error=f'{type(exc).__name__}: {exc}'))
        self._arrived(message)

    def append(self) -> None:
        """Append all, and then acknowledge it to the broker, if that wants to know."""
        if self._messages:
            self._producer.append_many(self._messages)
        if self._acknowledge and self._last is not None:
            self._last.ack(multiple=True)
        self._messages, self._count, self._last = [], 0, None

    def _arrived(self, message: Any) -> None:
        self._count, self._last = self._count + 1, message
        if self._count >= BATCH:
            self.append()
        if self._cancelled.is_set() and not self._acknowledge:
            self.append()
            raise CancelledError  # Redis: drain_events does not return while more arrives

    def _read(self, body: Any) -> Iterator[SourceMessage]:
        for event in body if isinstance(body, list) else [body]:
            fault = _fault_of(event)
            if fault:
                yield SourceMessage(event, error=fault)
            elif event['type'] in STATES:
                complete = self._tasks.complete(event)
                if event['type'] in self._events:
                    yield SourceMessage(_message(complete))


def _message(event: dict[str, Any]) -> dict[str, Any]:
    return {
        'task_event': event['type'],
        'task_name': event.get('name'),
        'task_id': event['uuid'],
        'task_state': STATES[event['type']],
        'task_runtime': event.get('runtime'),
        'task_info': {field: value for field, value in event.items() if field not in ('type', 'uuid', 'name')},
    }


def _fault_of(event: Any) -> str:
    """Why this is no event as Celery sends them, or ''."""
    if not isinstance(event, Mapping):
        return f'an event must be a mapping, not {type(event).__name__}'
    if not isinstance(event.get('type'), str):
        return 'the event has no type'
    if event['type'] in STATES:
        if not isinstance(event.get('uuid'), str):
            return f'{event["type"]} has no uuid of a task'
        if not isinstance(event.get('name', ''), (str, NoneType)):
            return f'the name of the task in {event["type"]} is no text'
        if not isinstance(event.get('runtime', 0), (int, float, NoneType)):
            return f'the runtime of the task in {event["type"]} is no number'
    return ''


def _event_names(events: Any) -> frozenset[str]:
    names = [events] if isinstance(events, str) else events
    if not isinstance(names, Iterable) or isinstance(names, (bytes, Mapping)):
        raise ArgumentError(f'events must be the name of an event or a list of names, not {events!r}')
    names = list(names)
    if not names:
        raise ArgumentError('events must name at least one event')
    for name in names:
        if not isinstance(name, str) or name not in STATES:
            raise ArgumentError(f'events: there is no event {name!r} of tasks; there are {", ".join(sorted(STATES))}')
    return frozenset(names)
