"""Windows that the tests and documentation of seven other systems say come out of an input: live, and from a backlog.

data/peer_windows.json has those that can be asked for here: where they come from, our options, and messages as
[time in ms, key, value]; 'tick' is the key of one that only moves event time. Expected are windows as [start, end,
key, values]; what is null is not said. Where another rule holds here, it is named, and what is expected follows it.
"""

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from assigning import MemoryGroup

from minibatch import api, clock
from minibatch.models import Stream
from minibatch.testing import run

TABLES = json.loads((Path(__file__).parent / 'data/peer_windows.json').read_text())
NOW = clock.to_ms(datetime(2026, 1, 1, tzinfo=timezone.utc))


def of(table):
    """The options of a table, and its messages as they are appended."""
    options = dict(table['options'])
    if any(time is not None for time, _, _ in table['messages']):
        options['timestamp'] = 'at'
    if any(key for _, key, _ in table['messages']) and options != {'size': options.get('size')}:
        options['key'] = 'key'
    messages = [
        {'at': None if time is None else clock.from_ms(time), 'key': key, 'value': value}
        for time, key, value in table['messages']
    ]
    return options, messages


def live(table):
    """What comes out of messages that come one by one."""
    options, messages = of(table)
    done = run(None, messages, every=table.get('every', 1), **options)
    windows = [
        (window.start, window.end, window.key, [message.data['value'] for message in window.messages])
        for window in done.windows
    ]
    late = [message.data['value'] for message in done.late]
    return windows, late, [bad.message.data['value'] for bad in done.bad]


def backlog(table):
    """What comes out of the same messages when all are there before a consumer is."""
    options, messages = of(table)
    step = round(1000 * table.get('every', 1))
    emitter = api.make_emitter('s', None, executor='inline', stream=Stream(name='s'), **options)
    group = MemoryGroup(emitter, {'a': [(NOW + i * step, data) for i, data in enumerate(messages)]})
    now = NOW + step * len(messages)
    group.run(now)
    group.end(now) if 'timestamp' in options else group.run(now + 86_400_000)

    windows, late, bad = [], [], []
    for claim in group.seen.values():
        values = [messages[offset]['value'] for span in claim.spans for offset in range(span.start, span.end)]
        if claim.late or claim.bad:
            (late if claim.late else bad).extend(values)
        else:
            windows.append((claim.start, claim.end, claim.key, values))
    return windows, late, bad


@pytest.mark.parametrize('how', [live, backlog])
@pytest.mark.parametrize('table', TABLES, ids=[table['id'] for table in TABLES])
def test_windows_are_those_of_other_systems_live_and_from_a_backlog(table, how):
    windows, late, bad = how(table)
    left = [window for window in windows if window[2] != 'tick']
    for start, end, key, values in table['windows']:
        found = [
            window
            for window in left
            if (start is None or window[0] == clock.from_ms(start)) and (end is None or window[1] == clock.from_ms(end))
            and (key is None or window[2] == key) and window[3] == values
        ]  # fmt: skip
        assert found, f'{start, end, key, values} is not among {left}'
        left.remove(found[0])
    assert left == []
    assert (late, bad) == (table['late'], table['bad'])
