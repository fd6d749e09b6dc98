"""The contracts of what can be attached to minibatch: sources, sinks and executors.

Nothing here behaves; each contract is described once, and every adapter keeps it. They are protocols, so a class
of yours needs no base class, only the methods. `minibatch.contracts` has tests of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pymongo import MongoClient
    from pymongo.client_session import ClientSession


class SourceMessage(NamedTuple):
    """A message as a source hands it to a `minibatch.named.NamedProducer`.

    Args:
        data: the message, a mapping of what MongoDB can store. With an `error` whatever the source has of it.
        meta: something about it, such as its headers; given to the function in ``window.messages``.
        token: where the source goes on after this message, of what MongoDB can store, but None.
        error: why the message could not be decoded; it then goes to the dead-letter stream.
    """

    data: Any
    meta: Any = None
    token: Any = None
    error: str = ''


class SourceStream(Protocol):
    """What a source needs of the `minibatch.Stream` that it is given."""

    @property
    def name(self) -> str:
        """The name of the stream."""

    def append(self, data: dict[str, Any], meta: Any = None) -> None:
        """Append a message."""

    def append_many(self, items: Iterable[dict[str, Any]]) -> int:
        """Append many messages; returns how many."""

    def flush(self) -> None:
        """Return when all that was appended is stored."""

    def producer(self, name: str | None = None) -> Any:
        """A `minibatch.named.NamedProducer`, which stores positions of the outside system with the messages."""


@runtime_checkable
class Source(Protocol):
    """Brings messages from an outside system into a stream.

    ``stream`` runs in a thread of its own; it may be ``async def``, and is no generator. It appends until the outside
    system ends or `cancel` is called, and must not tell the outside system that a message was taken before the append
    (or flush) has returned. What it raises is logged, and it is called again, after a pause that grows from 1 to 60
    seconds. It may also be called again after a `cancel`. A source whose outside system can be read again from some
    position appends through ``stream.producer(name)``, which stores the position with the messages.
    """

    # Any, so that a source may say that it takes a `minibatch.Stream`, which is more than a `SourceStream`.
    def stream(self, stream: Any) -> None:
        """Append the messages of the outside system to a `SourceStream`, until no more come or `cancel` is called."""

    def cancel(self) -> None:
        """Make `stream` return soon.

        Called from another thread, and again until `stream` has returned; the first time maybe before it began.
        """


@runtime_checkable
class Sink(Protocol):
    """Takes the result of a window to an outside system.

    ``put`` is called in the consumer process, once per window and before the window is committed. It returns when
    the outside system has the result for certain, and raises otherwise: then the window is tried again. It may be
    ``async def``, and so may the methods of the sinks below.
    """

    def put(self, messages: Any) -> Any:
        """Deliver the result of one window: what the function returned, or else the window's data (a list)."""


class WindowCommit(Protocol):
    """A window about to be committed, as an `ExactlyOnceSink` is given it."""

    id: str
    """The id of the window, the same over every retry."""

    def joins(self, client: MongoClient[Any]) -> bool:
        """Whether a transaction of `client` can commit the window: it is on the replica set of the stream."""

    def commit(self, session: ClientSession) -> bool:
        """Commit the window within the transaction of `session`.

        Returns:
            False if an earlier attempt has committed it, with its results: then abort, and all is done.

        Raises:
            LeaseLostError: if another consumer has taken over; abort.
        """

    def commit_all(self, windows: Sequence[WindowCommit], session: ClientSession) -> bool:
        """Commit several windows, of which this is one, within the transaction of `session`, in one step.

        Returns:
            False if not each of them is to be committed now: then abort, and deliver them one by one.
        """


@runtime_checkable
class ExactlyOnceSink(Sink, Protocol):
    """A sink that shows the result of each window once, however often the window is tried.

    ``put_once`` is called instead of ``put``. It either writes the results and calls ``window.commit(session)`` in one
    transaction; or, where that is not possible, it writes them so that writing them again changes nothing, by a key
    made of ``window.id``, and does not call ``window.commit``.
    """

    def put_once(self, messages: Any, window: WindowCommit) -> None:
        """Deliver the result of one window; raise if that is not certain."""


@runtime_checkable
class BulkSink(Sink, Protocol):
    """A sink that can take the results of several windows at once, which is faster.

    ``put_many`` is called instead of ``put`` or ``put_once`` when several windows wait for the sink.
    """

    def put_many(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> int:
        """Deliver the results of windows, in order, as many at once as is reasonable.

        Returns:
            How many of them, from the first on, are delivered for certain, each as ``put`` or ``put_once`` would have
            done. It is called again for the rest; after 0, or if it raises, they are delivered one by one, so that the
            one to blame is found.
        """


@runtime_checkable
class RemoteTask(Protocol):
    """What a consumer gives to `Executor.submit`: a callable whose function need not go with each of them.

    Pickled as it is, it carries the function. ``pickle.loads`` of what `packed` returns is the callable again.
    """

    @property
    def digest(self) -> str:
        """What stands for the function; empty if there is none."""

    def packed(self, with_function: bool) -> bytes:
        """The task as bytes: spans and where MongoDB is, no messages; with the function, or just its digest.

        In a process that does not have the function, unpickling the latter raises `UnknownFunctionError`.
        """


class Completion(Protocol):
    """What `Executor.submit` returns; `concurrent.futures.Future` is one."""

    def add_done_callback(self, fn: Callable[[Any], Any]) -> Any:
        """Call `fn` with this object when it is done, at once if it already is, from any thread."""

    def result(self) -> Any:
        """Return what the callable returned, or raise what it, or the loss of its worker, raised."""


@runtime_checkable
class Executor(Protocol):
    """Runs callables somewhere: in threads, processes, or on other machines.

    `submit` may run the callable before it returns. An executor that sends it to another process pickles it; the
    callable takes care of functions that plain pickle refuses. Losing a worker is an exception of ``result()``; losing
    the way to the workers is not: that lasts until it is found again. A method ``shutdown`` ends an executor that the
    consumer made; a completion with a method ``cancel`` is cancelled when the consumer ends without it.
    """

    def submit(self, fn: Callable[[], Any]) -> Completion:
        """Start `fn` and return its completion."""


@runtime_checkable
class BoundedExecutor(Executor, Protocol):
    """An executor that knows how much it can do at once, which may change, as that of a cluster does."""

    @property
    def workers(self) -> int:
        """How many callables run at once, 0 while none can. It is given twice as many, or as ``workers=`` says."""
