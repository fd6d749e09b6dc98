"""Streams, messages and windows: what they hold, and the states a window goes through.

`Stream`, `Buffer` and `Window` are mongoengine documents. Their datetimes are naive and in UTC, as mongoengine's are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import accumulate, chain
from typing import Any, ClassVar

from bson import ObjectId
from mongoengine import Document, QuerySet, queryset_manager
from mongoengine.base import BaseField
from mongoengine.fields import BooleanField, DateTimeField, FloatField, IntField, StringField
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from . import clock, dead, groups, ledger, marshaller, messages, settings, store, tail
from .abc import Source, WindowCommit
from .attached import Attached, check_source
from .backlog import TIMEOUT, Limits
from .connection import Target, current, current_stream, is_passing, known, reason_of, target, using
from .errors import ArgumentError, DataError, ServerError
from .groups import DeadLetters, Group
from .messages import Message, MessageWindow
from .named import NamedProducer
from .producer import Producer, producer_of

logger = logging.getLogger(__name__)

MAX_NAME = 200
MAX_COUNT = 10**9
MAX_SECONDS = 1e9
OPEN_TIMEOUT = 30.0
ASIDE_TIMEOUT = 1.0
OPEN_PAUSE = 0.2
MAX_TAIL = 100_000


class _AsStored:
    def __repr__(self) -> str:
        return '<as stored>'


AS_STORED: Any = _AsStored()
"""An option of a stream that was not given, as None unsets it."""


class _RawField(BaseField):
    """A value as it is. What a message says must not be read as a class, a reference or anything but data."""


class _BoundQuerySet(QuerySet):
    """A query set whose documents stay with the database they came from, as it does itself where it is sent."""

    where: Target

    def __next__(self) -> Any:
        return self._bound(super().__next__())

    def __getitem__(self, key: Any) -> Any:  # also behind first()
        return self._bound(super().__getitem__(key))

    def _bound(self, found: Any) -> Any:
        return found.bound_to(self.where) if isinstance(found, _Model) else found

    def _clone_into(self, other: _BoundQuerySet) -> _BoundQuerySet:
        other.where = self.where
        cloned: _BoundQuerySet = super()._clone_into(other)
        return cloned

    def __setstate__(self, state: dict[str, Any]) -> None:
        with using(state['where']):
            super().__setstate__(state)


class _Apart:
    """Leaves the names of documents, by which mongoengine finds their classes, to those who use it beside us."""

    _class_name: ClassVar[str]
    _subclasses: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls._class_name = f'minibatch:{cls.__name__}'  # what it is registered by, right after this
        cls._subclasses = (cls._class_name,)


class _Model(_Apart, Document):
    meta: ClassVar[dict[str, Any]] = {'abstract': True, 'strict': False, 'auto_create_index': False}

    _target: Target | None = None

    def bound_to(self, where: Target) -> Any:
        """This document, which from now on means this database, wherever it is sent."""
        self._target = where
        self._get_collection = lambda: where.db[self._get_collection_name()]  # type: ignore[method-assign]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'where': self._target or known()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state.get('where') is not None:
            self.bound_to(state['where'])

    @classmethod
    def _get_db(cls) -> Any:
        return current().db

    @classmethod
    def _get_collection(cls) -> Collection[Any]:
        return current().db[cls._get_collection_name()]

    @classmethod
    def in_database(cls, where: Target) -> QuerySet:
        """All documents of this model in a database."""
        found = _BoundQuerySet(cls, where.db[cls._get_collection_name()])
        found.where = where
        return found


def _utcnow() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


class Buffer(_Model):
    """A record batch as it is stored: one message in `data`, or `n` of them in `batch`."""

    meta: ClassVar[dict[str, Any]] = {'collection': 'buffer'}
    stream = StringField(required=True)
    created = DateTimeField(default=_utcnow)
    processed = BooleanField(default=False)
    data = _RawField()
    producer = StringField()
    offset = IntField()
    n = IntField()
    batch = _RawField()
    times = _RawField()
    meta_ = _RawField(db_field='meta')
    stored = _RawField(default=store.SERVER_TIME)

    @queryset_manager
    def objects(doc_cls, queryset: QuerySet) -> QuerySet:
        """All messages; to an emitter that picks messages, those of its stream: the others are not its to take."""
        stream = current_stream()
        return queryset if stream is None else queryset.filter(stream=stream)


class Window(_Model):
    """A window as it is stored: which messages it has, and its state. `data` reads them while they are kept.

    Its `status` is open until it is committed, then processed; failed is a dead letter, replay one that is to be tried
    again; void is a number that was never used.
    """

    meta: ClassVar[dict[str, Any]] = {'collection': 'window'}
    id = _RawField(primary_key=True, default=ObjectId)
    stream = StringField(required=True)
    created = DateTimeField(default=_utcnow)
    processed = BooleanField(default=False)
    stored_data = _RawField(db_field='data')
    group = StringField()
    number = IntField()
    spans = _RawField()
    parts = _RawField()
    n = IntField()
    start = DateTimeField()
    end = DateTimeField()
    key = _RawField()
    watermark = DateTimeField()
    frontier = DateTimeField()
    part = BooleanField()
    late = BooleanField()
    bad = StringField()
    status = StringField()
    epoch = IntField()
    attempts = IntField()
    error = StringField()
    traceback = StringField()
    failed = DateTimeField()
    tried = IntField()
    picked = BooleanField()

    def __init__(self, *args: Any, **values: Any) -> None:
        if 'data' in values:
            values['stored_data'] = values.pop('data')
        super().__init__(*args, **values)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data of the messages, as far as they are still stored."""
        if self.stored_data is not None:
            return list(self.stored_data)
        return self.load().data

    def load(self) -> MessageWindow:
        """The window as a function is given it, with what is still stored of its messages."""
        db = self._get_collection().database
        spans = ledger.all_spans(db, {'_id': self.id, 'spans': self.spans, 'parts': self.parts})
        records = dead.records(db, self.id, spans) if self.failed else store.Records(db, self.stream, spans).of(spans)
        return messages.window_of(self.to_mongo(), self.stream, records)


class Stream(_Model):
    """A named stream of messages, kept in MongoDB.

    Example:
        >>> with Stream.get_or_create('test') as stream:    # doctest: +SKIP
        ...     stream.append({'a': 1})
    """

    meta: ClassVar[dict[str, Any]] = {'collection': 'stream'}
    name = StringField(required=True)
    status = StringField(default='open')
    created = DateTimeField(default=_utcnow)
    closed = DateTimeField()
    interval = FloatField()
    last_read = DateTimeField()
    format = IntField()
    max_age = FloatField()
    max_backlog = IntField()
    on_full = StringField()
    group_expiry = FloatField()

    consume: ClassVar[Callable[..., Any]]
    """What `streaming` calls; the layer above this one puts it here."""

    @classmethod
    def get_or_create(
        cls,
        name: str,
        url: str | None = None,
        interval: float | None = AS_STORED,
        batchsize: int | None = None,
        max_age: float | None = AS_STORED,
        linger: float | None = None,
        max_backlog: int | None = AS_STORED,
        on_full: str | None = AS_STORED,
        timeout: float | None = None,
        group_expiry: float | None = AS_STORED,
        cnx_kwargs: dict[str, Any] | None = None,
    ) -> Stream:
        """Open a stream, and create it if there is none of this name.

        `interval`, `max_age`, `max_backlog`, `on_full` and `group_expiry` are stored with the stream, and hold for all
        who have opened it, within a minute, or within a second where there is a `max_backlog`. What is not given stays
        as it is stored, and None unsets it. The others are of this handle: what an append promises is not changed by
        another program.

        Args:
            name: the name of the stream.
            url: a MongoDB URL, see `connectdb` for what holds without one.
            interval: seconds, in whole milliseconds; that of the windows of `Stream.streaming` if it names none.
            batchsize: messages appended one by one are written as one record batch when there are so many.
                `append` then only queues, and `flush` acknowledges them. One batch is written while the next one is
                filled; the append that fills that one waits for it, and raises if it could not be written.
            max_age: seconds for which messages are kept, processed or not; then they are deleted. Their age counts
                from when they were stored, by the clock of the server, to the second. Processes that have the stream
                open delete them. Without it a message is deleted when all consumer groups have processed it.
            linger: seconds after which a record batch that is not full is written all the same, 1 by default.
            max_backlog: how many messages may wait to be processed by the slowest consumer group, or be stored if
                there is no group yet. It must be more than a window holds. The limit is a soft one: what other
                producers append is known up to a second later.
            on_full: what an append does when there are so many: 'block' (the default) waits for room, up to
                `timeout`, 'raise' raises `BacklogFullError` at once.
            timeout: seconds that an append by this handle waits for room, and then again for MongoDB to confirm,
                while it does not answer or its disk is full; 60 by default. It holds down to the last wait of the
                driver. So long this call waits, too, but for an index that is to be made, and at most 30 s.
            group_expiry: seconds after which messages no longer wait for a consumer group that nobody runs; without
                it they do so for ever.
            cnx_kwargs: further options of `pymongo.MongoClient`.

        Raises:
            ArgumentError: naming the argument.
            UnreachableError, ServerError: if MongoDB does not answer, takes no writes, or does not let this user write.
        """
        numbers = {'interval': interval, 'max_age': max_age, 'max_backlog': max_backlog, 'group_expiry': group_expiry}
        stored: dict[str, Any] = {option: value for option, value in numbers.items() if value is not AS_STORED}
        own = _given(batchsize=batchsize, linger=linger, timeout=timeout)
        check_name('the name of a stream', name)
        check_options({**_given(**stored), **own})
        check_whole_ms(_given(interval=stored.get('interval')))
        if on_full is not AS_STORED:
            stored['on_full'] = on_full
        if stored.get('on_full') is not None:
            check_choice('on_full', on_full, 'block', 'raise')
        return cls._open(name, target(url, **(cnx_kwargs or {})), stored, **own)

    @classmethod
    def find(cls, name: str, url: str | None = None, timeout: float | None = None, **cnx: Any) -> Stream:
        """Open a stream that exists.

        Args:
            name: the name of the stream.
            url: a MongoDB URL, see `connectdb` for what holds without one.
            timeout: seconds, see `get_or_create`.
            cnx: further options of `pymongo.MongoClient`.

        Raises:
            ArgumentError: if there is none of this name; it names up to 10 that there are.
            UnreachableError: if MongoDB does not answer.
        """
        own = _given(timeout=timeout)
        check_name('the name of a stream', name)
        check_options(own)
        where = target(url, **cnx)
        patience = min(OPEN_TIMEOUT, timeout or TIMEOUT)
        where.check(patience)
        with where.within(patience):
            if not store.find_stream(where.majority, name):
                names = store.stream_names(where.majority, 11)
                listed = ', '.join(map(repr, names[:10])) + (' and more' if len(names) > 10 else '')
                raise ArgumentError(f'database {where.dbname!r} has no stream {name!r}; there are: {listed or "none"}')
        return cls._open(name, where, {}, **own)

    @classmethod
    def _open(
        cls, name: str, where: Target, options: dict[str, Any],
        batchsize: int = 1, linger: float = 1.0, timeout: float = TIMEOUT,
    ) -> Stream:  # fmt: skip
        patience = min(OPEN_TIMEOUT, timeout)
        where.check(patience)
        unset = {option for option, value in options.items() if value is None}
        with where.within(patience):
            if options.get('on_full') is not None:
                if not {**store.find_stream(where.majority, name), **options}.get('max_backlog'):
                    raise ArgumentError(f'on_full goes with max_backlog, which stream {name!r} has not; give both')
            elif 'max_backlog' in unset:
                options = {**options, 'on_full': None}
            if 'max_age' in unset:
                ledger.forget_cleaned(where.majority, name)
        doc = _opened(where, name, options, patience)
        stream: Stream = cls._from_son(doc).bound_to(where)
        stream._batchsize, stream._linger = batchsize, linger
        stream._limits = Limits(timeout, settings.opened(where, name, doc))
        return stream

    _known_producer: Producer | None = None
    _attached: Attached | None = None
    _batchsize: int = 1
    _linger: float = 1.0
    _limits = Limits()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'handle': (self._batchsize, self._linger, self._limits)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batchsize, self._linger, self._limits = state.get('handle') or (1, 1.0, Limits())

    @property
    def target(self) -> Target:
        """The database the stream is in."""
        return self._target or current()

    @property
    def _producer(self) -> Producer:
        producer = self._known_producer
        if producer is None or producer.inherited:
            producer = self._known_producer = producer_of(self.target, self.name)
        return producer

    @property
    def source(self) -> Source | None:
        """What `attach` attached."""
        return self._attached.source if self._attached is not None else None

    def append(self, data: dict[str, Any], meta: Any = None) -> None:
        """Append a message; with a batchsize of 1 (the default) it is stored when this returns.

        Args:
            data: the message, a dict or other mapping with string keys, of what MongoDB can store. Datetimes come
                back naive, in UTC, in milliseconds; tuples as lists.
            meta: something about the message, such as its headers; given to the function in ``window.messages``.

        Raises:
            DataError: naming the key that cannot be stored; nothing was written.
            BacklogFullError: there was no room in time, see `max_backlog`; nothing was written.
            UnconfirmedError: MongoDB did not confirm in time. With ``exc.queued`` 1 the message is sent again before
                the next one, and `flush` waits for it; with 0 nothing was written.
            ServerError: MongoDB refused it; `exc.queued` as above.
            ReentranceError: a handler of signals or logging called it that had interrupted an append to this stream.

        The KeyboardInterrupt of Ctrl-C has `written` and `queued`, too.
        """
        if self._batchsize > 1:
            self._producer.append_later(data, meta, self._batchsize, self._linger, self._limits)
        else:
            self._producer.append(data, meta, self._limits)

    def append_many(self, items: Iterable[dict[str, Any]]) -> int:
        """Append many messages as record batches, the fast way; they are stored when this returns.

        Returns:
            How many.

        Raises:
            DataError: naming message and key. Of up to 64 MB nothing was written; of more ``exc.written`` messages.
            BacklogFullError: there was no room in time, see `max_backlog`.
            UnconfirmedError: MongoDB did not confirm in time.
            ServerError: MongoDB refused it.

        Each has `written` and `queued`, also the KeyboardInterrupt of Ctrl-C, and what `items` itself raises, such as a
        generator: ``items[:exc.written]`` are stored, so many more stay queued, and the rest was not taken. With a
        list, this goes on once the cause is gone, and neither loses nor doubles a message::

            stream.flush()
            stream.append_many(items[exc.written + exc.queued:])
        """
        if isinstance(items, (dict, str, bytes)) or not hasattr(items, '__iter__'):
            raise ArgumentError(f'append_many takes an iterable of dicts, not {type(items).__name__}; see append')
        return self._producer.append_many(items, self._limits)

    def append_aside(self, messages: Iterable[tuple[Any, Any]]) -> None:
        """Append messages, each with its meta, for a consumer that has other things to do than to wait for room."""
        self._producer.append_each(messages, replace(self._limits, timeout=ASIDE_TIMEOUT))

    def put(self, messages: Any) -> None:
        """Append the result of a window: a stream is a sink. It is stored when this returns, with a batchsize too.

        Args:
            messages: a message, or an iterable of messages; an empty one does nothing.

        Raises:
            DataError: if it is something else, naming its type.
            ServerError: as `append_many` does.

        Example:
            >>> mb.streaming('a', fn, size=10, sink=mb.stream('b'))    # doctest: +SKIP
        """
        if isinstance(messages, Mapping):
            self._producer.append(messages, limits=self._limits)
        elif isinstance(messages, (str, bytes)) or not isinstance(messages, Iterable):
            raise DataError(
                f'stream {self.name!r} as a sink takes a dict or a list of dicts, not {type(messages).__name__}; '
                f'let the function return such'
            )
        else:
            self._producer.append_many(messages, self._limits)

    def put_many(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> int:
        """Append the results of many windows at once; returns how many. See `minibatch.abc.BulkSink`."""
        if not all(isinstance(result, (Mapping, list, tuple)) for result in results):
            return 0  # one by one, as an iterator can be read once
        parts = [[result] if isinstance(result, Mapping) else result for result in results]
        try:
            written = self._producer.append_many(chain.from_iterable(parts), self._limits)
        except Exception as exc:  # they are given one by one then, to see which is to blame
            written = getattr(exc, 'written', 0)
        return sum(1 for end in accumulate(map(len, parts)) if end <= written)

    def flush(self) -> None:
        """Return when all that was appended in this process is stored.

        Raises:
            UnconfirmedError: MongoDB did not confirm in time; ``exc.queued`` messages stay queued.
            ServerError: MongoDB refused them; they stay queued.
        """
        self._producer.flush(self._limits.timeout)

    def clear(self) -> int:
        """Delete all messages and windows of this stream; returns how many messages. Consumers go on behind them."""
        self.flush()
        return store.clear_stream(self.target.majority, self.name)

    def delete(self) -> int:
        """Delete the stream, with its messages, groups, dead letters, and the positions of its sources.

        Its consumers and producers must be stopped. Of its groups a tombstone stays, so that no window id comes twice.

        Returns:
            How many messages were deleted.

        Raises:
            GroupBusyError: if a consumer leads a group; it is named.
        """
        self.close()
        for group in self.groups():
            group.delete()
        deleted = store.clear_stream(self.target.majority, self.name)
        store.delete_stream(self.target.majority, self.name)
        settings.deleted(self.target, self.name)
        return deleted

    def attach(self, source: Source, background: bool = True) -> None:
        """Let a source append to this stream, in a thread, or with ``background=False`` in this call.

        In the thread a source that fails is logged and started again, after 1 to 60 seconds. In a worker that imports
        a module, to find a function there, this does nothing.

        Raises:
            ArgumentError: if it is not a source, or another one is attached.
        """
        check_source(source)
        if marshaller.is_loading():
            return
        if self._attached is not None and self._attached.running:
            raise ArgumentError(f'stream {self.name!r} has a source already; stop() it first')
        self._attached = Attached(self, source)
        if background:
            self._attached.start()
        else:
            self._attached.run()

    def wants_source(self, source: Source) -> bool:
        """Whether `source` does not run here, but should: it has not come to its end by itself."""
        attached = self._attached
        return attached is None or not (attached.running or (attached.source is source and attached.ended))

    def has_ended(self, source: Source) -> bool:
        """Whether `source` was attached here and has come to its end by itself."""
        attached = self._attached
        return attached is not None and attached.source is source and attached.ended and not attached.running

    @property
    def source_failure(self) -> str:
        """What the source that is attached here failed with, while it has not run well for a minute since; else ''."""
        return self._attached.failure if self._attached is not None else ''

    def producer(self, name: str | None = None) -> NamedProducer:
        """What a source appends through, see `minibatch.named.NamedProducer`; for one thread.

        Args:
            name: names what the source reads, such as ``'kafka/<cluster>/<topic>/<partition>'``; the producer then goes
                on where the last one of this name was. Without a name it is a new one.

        Raises:
            ArgumentError: if the name is none.
        """
        if name is not None:
            check_name('the name of a producer', name)
        attached = self._attached
        return NamedProducer(self.target, self.name, name, self._limits, lambda: bool(attached and attached.cancelled))

    def stop(self, timeout: float = 10.0) -> None:
        """Cancel the source, if there is one, and wait up to `timeout` seconds for it to end."""
        if self._attached is not None:
            self._attached.stop(timeout)

    def close(self) -> None:
        """Stop the source and write all that is queued."""
        self.stop()
        self.flush()

    def __repr__(self) -> str:
        return f'<stream {self.name!r}>'

    __str__ = __repr__

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def buffer(self, **filter: Any) -> QuerySet:
        """The stored record batches of this stream, as a mongoengine query set, in no order.

        One holds one message in `data`, or, after `append_many` and with a batchsize, `n` of them in `batch`.
        """
        return Buffer.in_database(self.target).filter(stream=self.name, **filter)

    def window(self, **filter: Any) -> QuerySet:
        """The stored windows of this stream, as a mongoengine query set."""
        return Window.in_database(self.target).filter(stream=self.name, **filter)

    def tail(self, last: int = 0, follow: bool = True) -> Iterator[Message | None]:
        """The messages as they are appended, whoever processes them: for looking, not for processing.

        What was processed and deleted before it is looked at is not among them, nor what is behind a log that is
        written faster than it is read here.

        Args:
            last: begin with so many of those that are stored.
            follow: go on with new ones, until the iterator is closed; about once a second without any it yields None.

        Example:
            >>> for message in stream.tail(last=10, follow=False):    # doctest: +SKIP
            ...     print(message.created, message.data)
        """
        if isinstance(last, bool) or not isinstance(last, int) or not 0 <= last <= MAX_TAIL:
            raise ArgumentError(f'last must be an int from 0 to {MAX_TAIL}, not {last!r}')
        return tail.tail(self.target, self.name, last, follow)

    def groups(self) -> list[Group]:
        """The consumer groups of this stream, by name.

        Example:
            >>> for group in stream.groups():    # doctest: +SKIP
            ...     print(group.name, group.lag(), group.owner)
        """
        return groups.groups_of(self.target, self.name)

    def group(self, name: str = 'default') -> Group:
        """One consumer group of this stream.

        Raises:
            ArgumentError: if there is none of this name, naming those there are.
        """
        return groups.group_of(self.target, self.name, name)

    def dead_letters(self, group: str | None = None) -> DeadLetters:
        """The windows that have failed for good, of one consumer group or of all; the oldest failure first.

        Returns:
            A list of `DeadLetter`, without their messages, which each reads when asked for. `replay` and `discard` of
            the list do it for all of them.

        Raises:
            ArgumentError: if there is no such consumer group, naming those there are.

        Example:
            >>> for letter in stream.dead_letters():    # doctest: +SKIP
            ...     print(letter.id, letter.error, letter.data[:3])
            >>> stream.dead_letters('alerts').replay()    # doctest: +SKIP
            3
        """
        return groups.dead_letters(self.target, self.name, group)

    def streaming(self, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Process the windows of this stream with a function; takes the options of `minibatch.streaming`."""
        return type(self).consume(self.name, fn, stream=self, **options)

    def autoclear(self, max_age: float) -> None:
        """Keep messages for `max_age` seconds, processed or not, then delete them: what `max_age` of a stream does."""
        check_options({'max_age': max_age})
        doc = store.open_stream(self.target.majority, self.name, {'max_age': max_age}, clock.now())
        settings.opened(self.target, self.name, doc)


def _opened(where: Target, name: str, options: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The document of a stream, which is created if need be; a fail-over in between is waited for."""
    deadline, told = time.monotonic() + timeout, False
    while True:
        try:
            store.ensure_indexes(where.db)  # a limit would stop one that is being made for what is there already
            with where.within(deadline - time.monotonic()):
                return store.open_stream(where.majority, name, options, clock.now())
        except PyMongoError as exc:
            if not is_passing(exc) or time.monotonic() > deadline:
                raise ServerError(f'stream {name!r} cannot be opened at {where.explain(exc)}') from exc
            if not told:
                logger.warning('stream %r is not open yet, trying for %g s: %s', name, timeout, reason_of(exc))
            told = True
            time.sleep(OPEN_PAUSE)


def check_name(what: str, name: Any, forbidden: str = '\0') -> None:
    """Raise `ArgumentError` unless `name` can name a stream or group."""
    if not isinstance(name, str) or not name.strip():
        raise ArgumentError(f'{what} must be a string that is not empty, not {name!r}')
    unfit = any(char in forbidden or 0xD800 <= ord(char) <= 0xDFFF for char in name)
    if len(name) > MAX_NAME or unfit:
        raise ArgumentError(f'{what} must have at most {MAX_NAME} characters, and none of {forbidden!r}: {name[:60]!r}')


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raise `ArgumentError`, naming the option, unless the value is one of the choices."""
    if value not in choices:
        raise ArgumentError(f'{name} must be {" or ".join(map(repr, choices))}, not {value!r}')


def check_options(options: dict[str, Any]) -> None:
    """Raise `ArgumentError`, naming the option, unless counts are whole numbers from 1 and durations positive."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentError(f'{name} must be a number, not {value!r}')
        if name in ('size', 'batchsize', 'workers', 'max_attempts', 'max_backlog', 'max_open_windows'):
            most = store.MAX_BATCH if name == 'batchsize' else MAX_COUNT
            if not float(value).is_integer() or not 1 <= value <= most:
                raise ArgumentError(f'{name} must be a whole number from 1 to {most:,}, not {value!r}')
        else:
            least = {'linger': 0.0, 'lateness': 0.0, 'lease': 0.1}.get(name, 0.001)
            if not least <= value <= MAX_SECONDS:
                raise ArgumentError(f'{name} must be from {least:g} to {MAX_SECONDS:g} seconds, not {value!r}')


def check_whole_ms(durations: dict[str, float]) -> None:
    """Raise `ArgumentError`, naming the option, unless these seconds are whole milliseconds, as stored times are."""
    for name, seconds in durations.items():
        if clock.whole_ms(seconds) is None:
            raise ArgumentError(
                f'{name} must be a whole number of milliseconds, not {seconds!r} seconds; '
                f'the nearest is {name}={round(seconds, 3) or 0.001}'
            )
