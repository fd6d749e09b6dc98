"""Topics with wildcards: which of them overlap, and which subscriptions bring each message once. Pure.

A broker may send a message once for each subscription that it matches, and nothing in the copies tells them from
messages that were published twice. So topics that overlap are subscribed as one that covers them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from paho.mqtt.client import topic_matches_sub

from minibatch.errors import ArgumentError

SHARED = re.compile(r'[$]share/([^/]+)/(.+)')  # name, topic


class Subscription(NamedTuple):
    """A subscription, and the topics that it stands for."""

    topic: str
    wanted: tuple[str, ...]

    def is_superfluous(self, topic: str) -> bool:
        """Whether a message of this topic came for this subscription alone, and nobody wants it."""
        if not topic_matches_sub(_without_share(self.topic), topic):
            return False
        return not any(topic_matches_sub(_without_share(each), topic) for each in self.wanted)


def subscriptions(topics: Sequence[str]) -> list[Subscription]:
    """As few subscriptions as bring each message of these topics once.

    Raises:
        ArgumentError: if a shared topic overlaps with one that is not, or is shared by others; each brings its own.
    """
    found: list[Subscription] = []
    for topic in topics:
        new = Subscription(topic, (topic,))
        while other := next((each for each in found if _overlap(each.topic, new.topic)), None):
            if _share_of(other.topic) != _share_of(new.topic):
                raise ArgumentError(
                    f'topic has {other.topic!r} and {new.topic!r}, which overlap: messages would come twice'
                )
            found.remove(other)
            new = Subscription(_cover(other.topic, new.topic), other.wanted + new.wanted)
        found.append(new)
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether a message may match both."""
    a, b = _without_share(one).split('/'), _without_share(other).split('/')
    if a[0].startswith('$') != b[0].startswith('$'):
        return False  # a wildcard does not match what begins with $
    for x, y in zip(a, b, strict=False):
        if '#' in (x, y):
            return True
        if x != y and '+' not in (x, y):
            return False
    return (a[len(b) :] or b[len(a) :]) in ([], ['#'])


def _cover(one: str, other: str) -> str:
    """The narrowest topic that matches all that two do which overlap; that is one of them, if it covers the other."""
    a, b = one.split('/'), other.split('/')
    levels: list[str] = []
    for x, y in zip(a, b, strict=False):
        if '#' in (x, y):
            return '/'.join([*levels, '#'])
        levels.append(x if x == y else '+')
    return '/'.join(levels if len(a) == len(b) else [*levels, '#'])


def _share_of(topic: str) -> str:
    found = SHARED.fullmatch(topic)
    return found[1] if found else ''


def _without_share(topic: str) -> str:
    found = SHARED.fullmatch(topic)
    return found[2] if found else topic
