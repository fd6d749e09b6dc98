"""Which options make which kind of window, what combines, and what does not; the guide has the table."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError

OPTIONS = (
    'max_wait', 'slide', 'gap', 'key', 'timestamp', 'lateness', 'late', 'idle', 'max_open_windows', 'overflow',
)  # fmt: skip

EXCLUDE = {
    ('size', 'interval'): 'size=N counts messages, interval=T counts seconds; for N messages, or what there is after T '
    'seconds, give size=N, max_wait=T',
    ('size', 'slide'): 'slide=S goes with interval=T; windows of N messages do not overlap',
    ('size', 'gap'): 'a session ends by silence, not by a number; give gap=G alone',
    ('size', 'timestamp'): 'a number of messages knows no time; for windows of event time give interval=T or gap=G',
    ('gap', 'interval'): 'a session ends by silence, not by the clock; give gap=G alone',
    ('gap', 'slide'): 'sessions do not overlap; slide=S goes with interval=T',
    ('max_wait', 'interval'): 'interval=T alone says when a window is due; max_wait=T goes with size=N',
    ('max_wait', 'gap'): 'gap=G alone says when a session ends; max_wait=T goes with size=N',
}
NEED = {
    'max_wait': ('size', 'size=N says how many messages need not wait; every T seconds is interval=T'),
    'slide': ('interval', 'interval=T says how long a window is, slide=S how often one begins'),
    'relaxed': ('interval', 'interval=T with relaxed=False makes fixed windows'),
    'lateness': ('timestamp', 'without a time of its own no message is late'),
    'late': ('timestamp', 'without a time of its own no message is late'),
    'idle': ('timestamp', 'without a time of its own a message counts by the clock'),
}


def names_of(options: dict[str, Any]) -> set[str]:
    """Those that are given: None is as if it were not, but ``idle=None`` says never."""
    return {name for name, value in options.items() if value is not None or name == 'idle'}


def check(given: dict[str, Any]) -> None:
    """Raise `ArgumentError`, naming the options, if those that are given do not combine."""
    names = names_of(given)
    for (one, other), why in EXCLUDE.items():
        if {one, other} <= names:
            raise ArgumentError(f'{one} and {other} exclude each other: {why}')
    for name, (needed, why) in NEED.items():
        if name in names and needed not in names:
            instead = ''.join(f', not with {other}' for other in ('size', 'gap') if other in names)
            raise ArgumentError(f'{name} goes with {needed}{instead}: {why}')
    if {'key', 'size'} <= names and 'max_wait' not in names:
        raise ArgumentError(
            'key with size needs max_wait: a rare key would never come to N messages; give max_wait=T, the seconds '
            'after which what there is of a key is emitted'
        )
    if 'relaxed' in names and 'slide' in names:
        raise ArgumentError('relaxed and slide exclude each other: sliding windows are fixed; leave relaxed out')
    if given.get('relaxed') and 'timestamp' in names:
        raise ArgumentError('timestamp makes fixed windows, not relaxed ones; leave relaxed out, or give relaxed=False')
    assigned = names & {'key', 'timestamp', 'slide', 'gap'}
    for name in ('max_open_windows', 'overflow'):
        if name in names and not assigned:
            raise ArgumentError(f'{name} goes with key, timestamp, slide or gap: without them one window is open')
    if given.get('emit_empty') and 'size' in names:
        raise ArgumentError('emit_empty=True goes with interval, not with size: a window of N messages is never empty')
    if given.get('emit_empty') and assigned:
        option = sorted(assigned)[0]
        raise ArgumentError(f'emit_empty=True does not go with {option}: such a window begins with its first message')
