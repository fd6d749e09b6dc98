"""What the loop of a consumer asks of an emitter: its options, which messages make a window, and the user's methods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol

from .messages import Message
from .models import Stream
from .progress import Log, WindowPlan


class Job(Protocol):
    """An emitter, as consumer, planner and delivery know it; see `minibatch.window.WindowEmitter`."""

    stream_name: str
    group: str
    lease: float
    emitfn: Callable[..., Any] | None
    processfn: Callable[..., Any] | None
    executor: Any
    max_workers: int | None
    timeout: float | None
    max_attempts: int
    on_error: str
    ordered: bool
    start_at: str
    stall_after: float
    sink: Any
    source: Any
    late: Stream | None
    assigns: bool
    event_time: bool
    wakes_on_append: bool
    fed_by: Sequence[threading.Event]

    # --- what it is

    @property
    def stream(self) -> Stream:
        """The stream that is read, opened on first use."""

    @property
    def name(self) -> str:
        """How logs name the consumer."""

    @property
    def keep(self) -> bool:
        """Whether messages and windows stay stored after they were processed."""

    @property
    def picks(self) -> bool:
        """Whether it picks messages itself instead of planning from the log."""

    @property
    def forwards(self) -> bool:
        """Whether results go somewhere."""

    def overrides(self, name: str) -> bool:
        """Whether the user has written its method of this name."""

    def describe(self) -> str:
        """What consumers of the same group must have in common."""

    # --- whether to go on

    @property
    def is_told_to_stop(self) -> bool:
        """Whether it was told to stop; nobody is asked."""

    def should_stop(self) -> bool:
        """Whether to stop; the user's own method may be asked."""

    def stop_soon(self) -> None:
        """Stop after what is in flight; this does not wait for it."""

    def sleep(self) -> None:
        """Wait when no window is ready."""

    # --- which messages make a window

    def plan(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        """The windows that are due, at most `limit`, in order."""

    def finish(self, log: Log, now: datetime, limit: int) -> list[WindowPlan]:
        """The windows that are not due, when no more messages are to come."""

    def next_due(self) -> datetime | None:
        """When a window will be due even if nothing is appended."""

    def time_of(self, message: Message) -> datetime:
        """The time by which a message belongs to windows."""

    def pick(self) -> WindowPlan | None:
        """The next window of one that picks messages, if it has one."""

    def prepare(self, picked: list[Any]) -> Any:
        """What the function is called with, or None for the window itself."""

    # --- what becomes of a window

    def emit(self, window: Any) -> Any:
        """Call the function."""

    def forward(self, data: Any) -> None:
        """Give a result to the sink."""

    def commit(self, objs: Sequence[Any], window: Any) -> None:
        """Acknowledge messages that were picked."""

    def timestamp(self, query_args: Sequence[Any]) -> None:
        """Note on the stream that it was read."""

    def undo(self, objs: Sequence[Any], window: Any) -> None:
        """The function or the sink has failed; the messages that were picked will be tried again."""
