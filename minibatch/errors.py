"""Every error minibatch raises.

::

    MinibatchError
    ├── ArgumentError            (ValueError, TypeError)
    │   └── PortabilityError
    ├── DataError                (ValueError)
    ├── UnknownFunctionError
    ├── WorkersError
    ├── WindowFailedError
    ├── ConsumerEndedError
    ├── TooManyWindowsError
    ├── OvertakenError
    ├── CancelledError
    ├── ReentranceError          (RuntimeError)
    ├── ServerError              (ConnectionError)
    │   ├── UnreachableError
    │   ├── EmbeddedServerError
    │   │   ├── NoMongodError
    │   │   └── DataFolderInUseError
    │   ├── UnconfirmedError
    │   └── BacklogFullError
    └── LeaseError
        ├── LeaseLostError
        ├── GroupConflictError
        └── GroupBusyError

The docstring of a class is its message when none is given.
"""


class MinibatchError(Exception):
    """minibatch could not do what was asked."""

    def __init__(self, message: str = '') -> None:
        super().__init__(message or (type(self).__doc__ or '').strip())


class ArgumentError(MinibatchError, ValueError, TypeError):
    """An argument or option is wrong; the message names it and says what to do."""


class PortabilityError(ArgumentError):
    """The function, or something it refers to, cannot be sent to a worker process."""


class DataError(MinibatchError, ValueError):
    """The data of a message cannot be stored in MongoDB; nothing was written, or `written` says how much.

    `written` and `queued` are those of `ServerError`; `queued` is 0.
    """

    written: int = 0
    queued: int = 0


class UnknownFunctionError(MinibatchError):
    """This worker does not have the function of a task; it must be sent with it."""


class WorkersError(MinibatchError):
    """The workers of an executor are not fit for what they are given, or there are none."""


class WindowFailedError(MinibatchError):
    """A window has failed max_attempts times, and on_error='stop' ends the consumer."""


class ConsumerEndedError(MinibatchError):
    """Code that was given to a consumer, but for no window, has raised what is no Exception, such as SystemExit."""


class TooManyWindowsError(MinibatchError):
    """More windows are open than max_open_windows, and overflow='error' ends the consumer."""


class OvertakenError(MinibatchError):
    """Another process appends under the same producer name; go on from the token, which says how far it is."""


class CancelledError(MinibatchError):
    """The source was cancelled while it waited to append; what is not stored is to be read again."""


class ReentranceError(MinibatchError, RuntimeError):
    """Called from within a call of the same kind, as by a handler of signals or logging, which would wait for itself.

    Nothing of the inner call was done. Let such a handler note what it has, and append it later, or from a thread.
    """


class ServerError(MinibatchError, ConnectionError):
    """MongoDB did not answer as it must.

    Whatever an append raises has `written` and `queued`, also what was raised by the iterable that it was given, and
    the KeyboardInterrupt of Ctrl-C: `written` messages of that call are stored, and `queued` messages after
    those stay with the producer, which sends them again before any other. Nothing else of the call was or will be
    written. So this goes on with neither loss nor doubles, once the cause is gone::

        stream.flush()
        stream.append_many(items[exc.written + exc.queued:])

    When `flush` raises it, `queued` is how many messages are not stored yet.
    """

    written: int = 0
    queued: int = 0


class UnreachableError(ServerError):
    """No MongoDB answers at the address."""


class EmbeddedServerError(ServerError):
    """The embedded MongoDB could not be started or stopped."""


class NoMongodError(EmbeddedServerError):
    """There is no mongod program on this machine."""


class DataFolderInUseError(EmbeddedServerError):
    """The data folder of the embedded MongoDB is in use from another host."""


class UnconfirmedError(ServerError):
    """MongoDB did not confirm an append in time; `queued` of its messages stay queued and are sent again first."""


class BacklogFullError(ServerError):
    """The stream has max_backlog messages that wait to be processed; what was refused is not written later either.

    It is a `ServerError`, so that one `except` around an append catches all that may pass.
    """


class LeaseError(MinibatchError):
    """The lease of a consumer group does not allow this."""


class LeaseLostError(LeaseError):
    """Another consumer has taken over this consumer group, or the group was deleted."""


class GroupConflictError(LeaseError):
    """A different function is consuming the stream under the same consumer group."""


class GroupBusyError(LeaseError):
    """A consumer leads this consumer group; stop it first."""


def install_hint(extra: str) -> str:
    """What installs an extra: from the source, because minibatch means another product on the package index."""
    return f"`pip install '.[{extra}]'` in the source folder of minibatch"
