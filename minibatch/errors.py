"""Every error minibatch raises.

::

    MinibatchError
    ├── ArgumentError            (ValueError, TypeError)
    │   └── PortabilityError
    ├── DataError                (ValueError)
    ├── ServerError              (ConnectionError)
    │   ├── UnreachableError
    │   ├── EmbeddedServerError
    │   │   ├── NoMongodError
    │   │   └── DataFolderInUseError
    │   └── UnconfirmedError
    └── LeaseError
        ├── LeaseLostError
        └── GroupConflictError

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
    """The data of a message cannot be stored in MongoDB; nothing was written."""


class ServerError(MinibatchError, ConnectionError):
    """MongoDB did not answer as it must."""


class UnreachableError(ServerError):
    """No MongoDB answers at the address."""


class EmbeddedServerError(ServerError):
    """The embedded MongoDB could not be started or stopped."""


class NoMongodError(EmbeddedServerError):
    """There is no mongod program on this machine."""


class DataFolderInUseError(EmbeddedServerError):
    """The data folder of the embedded MongoDB is in use from another host."""


class UnconfirmedError(ServerError):
    """MongoDB did not confirm an append in time; it stays queued and is sent again first."""


class LeaseError(MinibatchError):
    """The lease of a consumer group does not allow this."""


class LeaseLostError(LeaseError):
    """Another consumer has taken over this consumer group."""


class GroupConflictError(LeaseError):
    """A different function is consuming the stream under the same consumer group."""
