"""All streams and consumer groups at a glance, for whoever watches them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any

from . import groups, ledger, store
from .connection import Target, target
from .groups import Group, Lag
from .metrics import Histogram

GROUP_FIELDS = [field.name for field in fields(Group) if field.name != '_target']


@dataclass(frozen=True)
class GroupStatus:
    """A consumer group at a glance.

    Attributes:
        group: the group; its attributes and methods are those of `minibatch.Group`.
        lag: how far it is behind.
        dead: how many dead letters it has.
        in_flight: how many windows are claimed and not finished.
    """

    group: Group
    lag: Lag
    dead: int
    in_flight: int

    @property
    def name(self) -> str:
        """The name of the group."""
        return self.group.name

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can say it, times in ISO 8601 and UTC."""
        said = {name: _plain(getattr(self.group, name)) for name in GROUP_FIELDS}
        return {**said, 'lag': self.lag._asdict(), 'dead': self.dead, 'in_flight': self.in_flight}


@dataclass(frozen=True)
class StreamStatus:
    """A stream at a glance.

    Attributes:
        name: of the stream.
        appended: how many messages were ever appended, as far as the log and its groups know.
        stored: how many of them are stored.
        groups: its consumer groups.
    """

    name: str
    appended: int
    stored: int
    groups: list[GroupStatus]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can say it, times in ISO 8601 and UTC."""
        listed = [group.as_dict() for group in self.groups]
        return {'name': self.name, 'appended': self.appended, 'stored': self.stored, 'groups': listed}


def status(url: str | None = None, stream: str | None = None) -> list[StreamStatus]:
    """All streams of a database, or one, with their consumer groups: how far, how fast, what failed.

    The cost grows with the number of streams, groups and producers, and not with the number of messages.

    Args:
        url: a MongoDB URL, see `connectdb` for what holds without one.
        stream: the name of one stream; without it all.

    Raises:
        UnreachableError: if MongoDB does not answer.

    Example:
        >>> for stream in minibatch.status():    # doctest: +SKIP
        ...     print(stream.name, stream.appended, [(group.name, group.lag.messages) for group in stream.groups])
    """
    where = target(url)
    where.check()
    names = store.stream_names(where.majority, 0) if stream is None else [stream]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for doc in ledger.groups_now(where.majority, stream):
        found.setdefault(doc['stream'], []).append(doc)
    return [_status(where, name, found[name]) for name in names]


def _status(where: Target, name: str, docs: list[dict[str, Any]]) -> StreamStatus:
    db = where.majority
    reached = [groups.how_far(db, doc) for doc in docs]
    ends, starts = store.log_ends(db, name), store.log_starts(db, name)
    stored = sum(end - starts.get(producer, end) for producer, end in ends.items())
    appended = [each.appended(ends) for each in reached]
    listed = []
    for each in reached:
        group = groups.group_from(where, each.doc)
        in_flight = ledger.count_open(db, name, group.name, int(each.doc['number']))
        listed.append(GroupStatus(group, each.lag(db, ends), groups.dead_count(group), in_flight))
    return StreamStatus(name, max([sum(ends.values()), *appended]), stored, listed)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat()
    return asdict(value) if isinstance(value, Histogram) else value
