"""What users call: `stream`, `streaming` and `make_emitter`. They check the arguments and wire up the parts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from . import connection, kinds
from .errors import ArgumentError
from .models import Stream, check_name
from .window import (
    CountWindow,
    FixedTimeWindow,
    PlannedWindow,
    RelaxedTimeWindow,
    SessionWindow,
    SlidingTimeWindow,
    WindowEmitter,
)

EMITTER_OPTIONS = (
    'emit_empty', 'processfn', 'group', 'start', 'max_attempts', 'timeout', 'on_error', 'ordered', 'lease',
    'stall_after', 'cnx_kwargs', *kinds.OPTIONS,
)  # fmt: skip
STREAM_OPTIONS = ('interval', 'batchsize', 'max_age', 'linger', 'max_backlog', 'on_full', 'timeout',
                  'group_expiry', 'cnx_kwargs')  # fmt: skip

_collected: ContextVar[list[WindowEmitter] | None] = ContextVar('minibatch_collected', default=None)


def stream(name: str, fn: Callable[..., Any] | None = None, url: str | None = None, **options: Any) -> Stream:
    """Open a stream, and create it if there is none of this name.

    Args:
        name: the name of the stream.
        fn: process the windows of the stream with this function; then `options` are those of `streaming`.
        url: a MongoDB URL, else what `connectdb` connected to, else MINIBATCH_MONGO_URL, else MONGO_URL, else the
            embedded MongoDB.
        options: interval, batchsize, linger; max_age, how long messages are kept, processed or not; max_backlog,
            on_full, timeout: how many may wait, and what an append does then; see `Stream.get_or_create`. What is
            stored with the stream stays as it is unless it is given; None unsets it. And the options of
            `pymongo.MongoClient`, such as ``tlsCAFile``, by themselves or as a dict, ``cnx_kwargs``.

    Raises:
        ArgumentError: naming the argument.
        UnreachableError, ServerError: if MongoDB does not answer, takes no writes, or does not let this user write.

    Example:
        >>> import minibatch as mb
        >>> s = mb.stream('test')    # doctest: +SKIP
        >>> s.append({'a': 1})       # doctest: +SKIP
    """
    if fn is not None:
        streaming(name, fn, url=url, **options)
        options = {}
    of_client = {key: options.pop(key) for key in list(options) if connection.is_client_option(key)}
    _refuse_unknown('stream', options, STREAM_OPTIONS)
    cnx_kwargs = {**(options.pop('cnx_kwargs', None) or {}), **of_client}
    return Stream.get_or_create(name, url=url, cnx_kwargs=cnx_kwargs, **options)


class Streaming:
    """The decorator that `streaming` returns."""

    def __init__(self, name: str, blocking: bool, options: dict[str, Any]) -> None:
        self._name, self._blocking, self._options = name, blocking, options

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Process the windows with `fn`: until stopped, or one round with ``blocking=False``. Returns `fn`.

        A worker that imports a module to find a function does not process what is decorated there.
        """
        emitter, collected = self.make(fn), _collected.get()
        if collected is not None and self._blocking:
            collected.append(emitter)
        else:
            emitter.run(blocking=self._blocking)
        return fn

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Process the windows with `fn`, as the decorator does."""
        return self(fn)

    def make(self, fn: Callable[..., Any] | None = None) -> WindowEmitter:
        """Make the emitter that processes the windows with `fn`, and do not run it."""
        return _make(self._name, fn, **self._options)


def streaming(
    name: str,
    fn: Callable[..., Any] | None = None,
    interval: float | None = None,
    size: int | None = None,
    emitter: type[WindowEmitter] | None = None,
    relaxed: bool | None = None,
    keep: bool = False,
    url: str | None = None,
    sink: Any = None,
    queue: Any = None,
    source: Any = None,
    blocking: bool = True,
    executor: Any = None,
    workers: int | None = None,
    max_workers: int | None = None,
    **options: Any,
) -> Any:
    """Process a stream in windows.

    As a decorator, or with `fn`, it processes until stopped: by Ctrl-C or SIGTERM, or by a true item in `queue`.

    Args:
        name: the name of the stream.
        fn: the function, called with each window in a worker process; it may be ``async def``. What it returns goes
            to the sink; of a generator, or any iterator, the list of its items; None, or a window, means the data of
            the window.
        interval: seconds between windows, in whole milliseconds.
        size: messages per window.
        emitter: a `WindowEmitter` class of yours; it gets `size` and `interval`.
        relaxed: with `interval`: True (the default) for all messages since the last window, False for fixed windows
            [start, start + interval), also empty ones.
        keep: keep messages and windows after they were processed.
        url: a MongoDB URL; see `stream` for what holds without one.
        sink: anything with ``put(messages)``, called in this process with each result before the window is
            committed; a `Stream` is one.
        queue: a (multiprocessing) queue; a true item in it stops the processing.
        source: a source, see `minibatch.abc.Source`; attached while this consumer has the lease.
        blocking: False to do one round only.
        executor: where the function runs: 'processes', the default, 'threads', 'inline', an address such as
            'dask://host:8786', or class or instance of anything with ``submit(fn)``.
        workers: how many worker processes, or calls at once; all CPUs by default, or all that the executor has. With
            1, calls are in the order of the messages, but for windows that are run again; see `ordered`.
        max_workers: the same as `workers`.
        options: emit_empty, processfn, group, start, max_attempts, timeout, on_error, ordered, lease, stall_after,
            cnx_kwargs; see `WindowEmitter`. `group` names the consumer group: each group gets every message. A window
            that has failed `max_attempts` times is a dead letter, see `Stream.dead_letters`. `timeout`, `lease` and
            `stall_after` are in seconds. And more that says what a window is: max_wait, slide, gap, key, timestamp,
            lateness, late, idle, max_open_windows, overflow; see `minibatch.window`, and the guide for what combines.

    Raises:
        ArgumentError: naming the argument.
        PortabilityError: if the function cannot be sent to a worker process, naming the variable.
        UnreachableError, ServerError: if MongoDB does not answer, takes no writes, or does not let this user write.

    Example:
        >>> import minibatch as mb
        >>> @mb.streaming('test', size=2)    # doctest: +SKIP
        ... def process(window):
        ...     print(window.data)
    """
    given = {
        'interval': interval,
        'size': size,
        'emitter': emitter,
        'relaxed': relaxed,
        'keep': keep,
        'url': url,
        'sink': sink,
        'queue': queue,
        'source': source,
        'executor': executor,
        'workers': workers,
        'max_workers': max_workers,
        **options,
    }
    _refuse_unknown('streaming', options, (*EMITTER_OPTIONS, 'stream'))
    check_name('the name of a stream', name)
    if not isinstance(blocking, bool):
        raise ArgumentError(f'blocking must be True or False, not {blocking!r}')
    decorator = Streaming(name, blocking, given)
    return decorator if fn is None else decorator(fn)


def make_emitter(
    name: str, fn: Callable[..., Any] | None = None, *, emitfn: Callable[..., Any] | None = None, **options: Any
) -> WindowEmitter:
    """Make an emitter: what `streaming` runs, to be run with ``run()``, or ``start()`` and ``stop()``.

    Args:
        name: the name of the stream.
        fn: the function, or None: then the window itself is the result.
        emitfn: the same as `fn`.
        options: those of `streaming`, and `stream`, a stream that is open already.
    """
    if fn is not None and emitfn is not None:
        raise ArgumentError('fn and emitfn are the same; give one of them')
    decorator: Streaming = streaming(name, **options)
    return decorator.make(emitfn if fn is None else fn)


@contextmanager
def collecting() -> Iterator[list[WindowEmitter]]:
    """Within it `streaming` makes emitters, which are in the list, and does not run them; for who runs them together.

    With ``blocking=False`` it does its round at once, as always.
    """
    emitters: list[WindowEmitter] = []
    reset = _collected.set(emitters)
    try:
        yield emitters
    finally:
        _collected.reset(reset)


def _make(
    name: str,
    fn: Callable[..., Any] | None,
    *,
    interval: float | None,
    size: int | None,
    emitter: type[WindowEmitter] | None,
    relaxed: bool | None,
    keep: bool,
    sink: Any,
    executor: Any,
    workers: int | None,
    max_workers: int | None,
    url: str | None,
    **options: Any,
) -> WindowEmitter:
    if workers is not None and max_workers is not None:
        raise ArgumentError('workers and max_workers are the same; give one of them')
    stream = options.get('stream')
    if stream is not None and (not isinstance(stream, Stream) or stream.name != name or url is not None):
        raise ArgumentError(f'stream must be the open Stream named {name!r}, without url=')
    unset = {'relaxed': relaxed, 'emit_empty': options.get('emit_empty')}
    flags = {'keep': keep, 'ordered': options.get('ordered', False)}
    for option, value in {**flags, **{name: flag for name, flag in unset.items() if flag is not None}}.items():
        if not isinstance(value, bool):
            raise ArgumentError(f'{option} must be True or False, not {value!r}')
    if size is None and interval is None and options.get('gap') is None and emitter is None and stream is not None:
        interval = stream.interval and round(stream.interval, 3)  # stored when fractions of a millisecond were taken
    options.update(size=size, interval=interval)
    chosen = _emitter_class(emitter, relaxed, options)
    for option in {'size', 'interval', *kinds.OPTIONS} - kinds.names_of(options):
        options.pop(option, None)
    chosen.check_function('fn', fn, options.get('processfn'))
    made = chosen(
        name,
        emitfn=fn,
        sink=sink,
        executor=executor,
        max_workers=workers if workers is not None else max_workers,
        stream_url=url,
        **options,
    )
    made.persist(keep)
    if made.executor is None or isinstance(made.executor, str):
        made.check_portable()
    return made


def _emitter_class(
    emitter: type[WindowEmitter] | None, relaxed: bool | None, options: dict[str, Any]
) -> type[WindowEmitter]:
    if emitter is not None:
        if not (inspect.isclass(emitter) and issubclass(emitter, WindowEmitter)) or emitter is WindowEmitter:
            raise ArgumentError(f'emitter must be a subclass of WindowEmitter, not {emitter!r}')
        if relaxed is False:
            raise ArgumentError('relaxed goes with interval, not with emitter; emitter=FixedTimeWindow is the same')
        given = sorted(kinds.names_of(options).intersection(kinds.OPTIONS))
        if given and not issubclass(emitter, PlannedWindow):
            raise ArgumentError(f'{given[0]} goes with windows of minibatch; {emitter.__name__} picks messages itself')
        return emitter
    kinds.check({**options, 'relaxed': relaxed})
    if options.get('gap') is not None:
        return SessionWindow
    if options['size'] is not None:
        return CountWindow
    if options['interval'] is None:
        raise ArgumentError('size=, interval= or emitter= must say what a window is, or gap= for sessions')
    if options.get('slide') is not None:
        return SlidingTimeWindow
    return FixedTimeWindow if relaxed is False or options.get('timestamp') is not None else RelaxedTimeWindow


def _refuse_unknown(what: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    every = {*known, *inspect.signature(globals()[what]).parameters} - {'options'}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(every), 1)
            hint = f'; did you mean {close[0]}?' if close else f'; it knows {", ".join(sorted(every))}'
            raise ArgumentError(f'{what} has no option {name!r}{hint}')


Stream.consume = staticmethod(streaming)
