"""Time, without looking at a clock: every function takes the time as an argument, except `now`.

Datetimes are aware and in UTC, durations that users give are seconds as float, windows are half-open: [start, end).
What MongoDB stores has whole milliseconds, and so has all that windows are made of.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MILLISECOND = timedelta(milliseconds=1)


def now() -> datetime:
    """The time of this machine; MongoDB keeps its milliseconds."""
    return datetime.now(timezone.utc)


def aware(time: datetime) -> datetime:
    """Read a naive datetime as UTC, as MongoDB returns it."""
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def to_ms(time: datetime) -> int:
    """Whole milliseconds since 1970; a naive datetime is UTC."""
    return (aware(time) - EPOCH) // MILLISECOND


def from_ms(ms: int) -> datetime:
    """The time so many milliseconds after 1970."""
    return EPOCH + ms * MILLISECOND


def whole_ms(seconds: float) -> int | None:
    """Seconds in milliseconds, if they are a whole number of them but for what a float cannot say.

    >>> whole_ms(1.001), whole_ms(1 / 3)
    (1001, None)
    """
    exact = seconds * 1000
    ms = round(exact)
    return ms if abs(exact - ms) < 0.0005 or ms / 1000 == seconds else None


def window_start(time: datetime, interval: int) -> datetime:
    """The start of the fixed window of `interval` milliseconds that `time` is in; windows are aligned to 1970.

    >>> window_start(EPOCH + timedelta(seconds=12), 5000) - EPOCH
    datetime.timedelta(seconds=10)
    """
    return from_ms(to_ms(time) // interval * interval)


class ServerClock:
    """The time of the server, estimated from what it said last and a monotonic clock of this machine.

    A consumer whose own clock is wrong thus cuts the same windows as any other.
    """

    def __init__(self, server_time: datetime, monotonic: float) -> None:
        self._server_time = server_time
        self._monotonic = monotonic

    def adjust(self, server_time: datetime, monotonic: float) -> None:
        """Take a new reading; the estimate never goes backwards."""
        if server_time > self.at(monotonic):
            self._server_time, self._monotonic = server_time, monotonic

    def at(self, monotonic: float) -> datetime:
        """The server's time at `monotonic` (seconds of the monotonic clock)."""
        return self._server_time + timedelta(seconds=monotonic - self._monotonic)
