"""Text for people, such as a name or an error, that can neither steer a terminal nor make lines of its own in a log."""

from __future__ import annotations


def plain(text: str) -> str:
    """The text in one line: what is not printable is escaped."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def plain_lines(text: str) -> str:
    """A text of several lines, such as a traceback; those after the first are set in, so that none looks like another
    entry of a log."""
    return '\n    '.join(map(plain, text.expandtabs().split('\n')))
