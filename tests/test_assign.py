"""Windows that take reading the messages: what is in which, checked against references that are written otherwise."""

import itertools
import os
from collections import Counter, defaultdict
from datetime import datetime, timezone

import pytest
from assigning import MemoryGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from minibatch import assign, clock, window
from minibatch.errors import ArgumentError, TooManyWindowsError
from minibatch.window import CountWindow, FixedTimeWindow, RelaxedTimeWindow, SessionWindow, SlidingTimeWindow

NOW = 1_000_000_000  # ms
IDLE = 30_000
EXAMPLES = settings(max_examples=int(os.environ.get('EXAMPLES', '100')), deadline=None, derandomize=True)


def group_of(emitter, **producers):
    """Messages (seconds, key) of event time, all created now."""
    messages = {name: [(NOW, {'t': at, 'k': key}) for at, key in items] for name, items in producers.items()}
    return MemoryGroup(emitter, messages)


def seen(group, late=False):
    """(start, end, key) of each window in seconds, with the event times of its messages."""
    return [
        (seconds(claim.start), seconds(claim.end), claim.key, times_in(group, claim))
        for claim in group.seen.values()
        if claim.late == late and not claim.bad
    ]


def seconds(time):
    return None if time is None else clock.to_ms(time) / 1000


def offsets_in(claim):
    return [(span.producer, offset) for span in claim.spans for offset in range(span.start, span.end)]


def times_in(group, claim):
    return sorted(group.messages[producer][offset][1]['t'] for producer, offset in offsets_in(claim))


def event(cls, **options):
    return cls('s', timestamp='t', key='k', **options)


# --- event time


def test_fixed_windows_of_event_time_hold_the_messages_of_their_time():
    group = group_of(event(FixedTimeWindow, interval=10, lateness=2), a=[(1, 'x'), (11, 'x'), (9.999, 'x'), (22, 'x')])
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [1, 9.999]), (10, 20, 'x', [11])]


def test_a_window_is_closed_when_the_watermark_has_passed_its_end_and_says_it():
    group = group_of(event(FixedTimeWindow, interval=10, lateness=5), a=[(1, 'x'), (14.999, 'x')])
    group.run(NOW)
    assert seen(group) == []
    group.messages['a'].append((NOW, {'t': 15, 'k': 'x'}))
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [1])]
    assert [seconds(claim.watermark) for claim in group.seen.values()] == [10]


def test_sliding_windows_overlap():
    group = group_of(event(SlidingTimeWindow, interval=10, slide=5), a=[(7, 'x'), (100, 'x')])
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [7]), (5, 15, 'x', [7])]


def test_a_message_is_late_for_sliding_windows_when_all_of_its_windows_are_closed():
    group = group_of(event(SlidingTimeWindow, interval=10, slide=5), a=[(12, 'x')])
    group.run(NOW)
    group.messages['a'] += [(NOW, {'t': 7, 'k': 'x'}), (NOW, {'t': 3, 'k': 'x'}), (NOW, {'t': 100, 'k': 'x'})]
    group.run(NOW)
    assert seen(group) == [(5, 15, 'x', [7, 12]), (10, 20, 'x', [12])]
    assert seen(group, late=True) == [(None, None, None, [3])]


def test_a_session_ends_by_silence_and_a_message_in_between_joins_two():
    messages = [(0, 'x'), (15, 'x'), (8, 'x'), (25, 'x'), (100, 'x')]
    group = group_of(event(SessionWindow, gap=10, lateness=7), a=messages)
    group.run(NOW)
    assert seen(group) == [(0, 25, 'x', [0, 8, 15]), (25, 35, 'x', [25])]


def test_each_key_has_windows_of_its_own_and_equal_numbers_are_one_key_as_in_mongodb():
    group = group_of(event(FixedTimeWindow, interval=10), a=[(1, 1), (2, 1.0), (3, True), (4, '1'), (5, [1, 'a'])])
    group.messages['a'].append((NOW, {'t': 50, 'k': 1}))
    group.run(NOW)
    assert [(type(key), key) for _, _, key, _ in seen(group)] == [
        (int, 1), (bool, True), (str, '1'), (tuple, (1, 'a')),
    ]  # fmt: skip


def test_a_message_from_the_year_2099_makes_no_other_one_late():
    far = datetime(2099, 1, 1, tzinfo=timezone.utc).timestamp()
    group = group_of(event(FixedTimeWindow, interval=10), a=[(far, 'x'), (1, 'x'), (12, 'x'), (13, 'x')])
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [1])]
    assert seen(group, late=True) == []


def test_the_slowest_producer_holds_the_watermark_until_it_is_idle():
    group = group_of(event(FixedTimeWindow, interval=10), a=[(1, 'x'), (100, 'x')], b=[(3, 'x')])
    group.run(NOW)
    assert seen(group) == []
    group.messages['a'].append((NOW + IDLE, {'t': 101, 'k': 'x'}))
    group.run(NOW + IDLE)
    assert seen(group) == [(0, 10, 'x', [1, 3])]


@pytest.mark.parametrize('minutes', [-60, 60])
def test_a_producer_whose_clock_is_wrong_is_idle_when_it_sends_nothing(minutes):
    group = group_of(event(FixedTimeWindow, interval=10), a=[(1, 'x')], b=[(3, 'x')])
    wrong = NOW + 60_000 * minutes
    group.messages['b'] = [(wrong, {'t': 3, 'k': 'x'})]
    group.run(NOW)
    group.messages['b'].append((wrong, {'t': 4, 'k': 'x'}))
    group.messages['a'].append((NOW, {'t': 100, 'k': 'x'}))
    group.run(NOW + 1000)
    group.run(NOW + IDLE - 1000)
    assert seen(group) == []
    group.messages['a'].append((NOW, {'t': 101, 'k': 'x'}))
    group.run(NOW + IDLE + 1000)
    assert seen(group) == [(0, 10, 'x', [1, 3, 4])]


def test_an_idle_stream_closes_its_windows_by_the_clock():
    at = NOW / 1000
    group = group_of(event(FixedTimeWindow, interval=10), a=[(at + 1, 'x')])
    group.messages['a'] = [(NOW + 1000, {'t': at + 1, 'k': 'x'})]
    group.run(NOW + 1000)
    group.run(NOW + IDLE + 9_999)
    assert seen(group) == []
    group.run(NOW + IDLE + 10_000)
    assert seen(group) == [(at, at + 10, 'x', [at + 1])]


@pytest.mark.parametrize('ago', [NOW / 1000 - 300, 71])
def test_silence_does_not_close_windows_of_the_past(ago):
    at = NOW // 10_000 * 10 - ago // 10 * 10
    group = group_of(event(FixedTimeWindow, interval=10), a=[(at + 1, 'x')])
    group.run(NOW)
    group.run(NOW + 1000 * IDLE)
    assert seen(group) == []
    group.messages['a'] += [(NOW + 1000 * IDLE, {'t': at + 2, 'k': 'x'}), (NOW + 1000 * IDLE, {'t': at + 10, 'k': 'x'})]
    group.run(NOW + 1000 * IDLE)
    assert seen(group) == [(at, at + 10, 'x', [at + 1, at + 2])]


def test_with_idle_none_silence_closes_nothing_and_a_silent_producer_holds_the_others():
    at = NOW / 1000
    group = group_of(event(FixedTimeWindow, interval=10, idle=None), a=[(at + 1, 'x')], b=[(at + 3, 'x')])
    group.run(NOW)
    group.run(NOW + 1000 * IDLE)
    group.messages['a'].append((NOW + 1000 * IDLE, {'t': at + 100, 'k': 'x'}))
    group.run(NOW + 2000 * IDLE)
    assert seen(group) == []
    group.messages['b'].append((NOW + 2000 * IDLE, {'t': at + 10, 'k': 'x'}))
    group.run(NOW + 2000 * IDLE)
    assert seen(group) == [(at, at + 10, 'x', [at + 1, at + 3])]


@pytest.mark.parametrize('live', [True, False])
def test_silence_that_is_seen_in_the_log_moves_event_time_as_it_would_have_when_it_happened(live):
    at = NOW // 1000
    group = group_of(event(FixedTimeWindow, interval=10, idle=5), a=[(at + 1, 'x')])
    if live:
        group.run(NOW + 1000)
        for now in range(NOW + 1000, NOW + 60_000, 500):
            group.run(now)
    group.messages['a'] += [(NOW + 60_000, {'t': at + 2, 'k': 'x'}), (NOW + 60_000, {'t': at + 59, 'k': 'x'})]
    group.run(NOW + 60_000)
    group.end(NOW + 60_000)
    assert seen(group) == [(at, at + 10, 'x', [at + 1]), (at + 50, at + 60, 'x', [at + 59])]
    assert [times for *_, times in seen(group, late=True)] == [[at + 2]]


def test_a_consumer_that_starts_does_not_take_for_silence_what_it_has_not_seen():
    behind = NOW - 3_600_000  # the clock of the producer, which gives the times, too
    group = group_of(event(FixedTimeWindow, interval=10), a=[])
    group.messages['a'] = [(behind, {'t': behind / 1000, 'k': 'x'})]
    group.run(NOW)
    group.restart()
    group.run(NOW + 1000)
    group.messages['a'].append((behind + 2000, {'t': behind / 1000 + 2, 'k': 'x'}))
    group.run(NOW + 2000)
    group.end(NOW + 2000)
    assert [times for *_, times in seen(group)] == [[behind / 1000, behind / 1000 + 2]]


@pytest.mark.parametrize('now', [NOW, NOW + 86_400_000])
def test_a_time_after_that_of_creation_makes_no_other_message_late_not_even_a_day_later(now):
    at = NOW // 1000
    messages = [(at, 'x'), (at + 3600, 'x'), (at + 1, 'x'), (at + 11, 'x')]
    group = group_of(event(FixedTimeWindow, interval=10), a=messages)
    group.run(now)
    assert seen(group) == [(at, at + 10, 'x', [at, at + 1])]
    assert seen(group, late=True) == []


def test_times_that_are_all_after_those_of_creation_are_believed_for_the_clock_of_the_producer_is_behind():
    at = NOW // 1000
    group = group_of(event(FixedTimeWindow, interval=10), a=[])
    group.messages['a'] = [(NOW - 3_600_000, {'t': at + second, 'k': 'x'}) for second in (0, 1, 12)]
    group.run(NOW + 12_000)
    assert seen(group) == [(at, at + 10, 'x', [at, at + 1])]


def test_a_producer_whose_clock_is_hours_ahead_does_not_hold_the_watermark():
    now = NOW / 1000
    group = group_of(event(FixedTimeWindow, interval=10), a=[(now + 7200, 'x')], b=[(now - 100, 'x'), (now, 'x')])
    group.run(NOW)
    assert [times for *_, times in seen(group)] == [[now - 100]]


@pytest.mark.parametrize('field', ['t', 'k'])
@pytest.mark.parametrize('value', [None, {}, float('nan'), object()])
def test_a_message_whose_time_or_key_is_none_is_a_window_of_its_own_with_the_reason(field, value):
    group = group_of(event(FixedTimeWindow, interval=10), a=[(1, 'x'), (2, 'x'), (50, 'x')])
    group.messages['a'][1][1][field] = value
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [1])]
    (bad,) = [claim for claim in group.seen.values() if claim.bad]
    assert offsets_in(bad) == [('a', 1)]
    assert bad.bad.startswith({'t': "timestamp: field 't' is", 'k': "key: field 'k' is"}[field])


def test_a_function_that_raises_makes_its_message_a_bad_one():
    group = group_of(FixedTimeWindow('s', interval=10, timestamp=lambda data: data['x']), a=[(1, 'x')])
    group.run(NOW)
    assert [claim.bad for claim in group.seen.values()] == ["timestamp: KeyError: 'x'"]


# --- without event time


def created(emitter, *items):
    """Messages (created in seconds after NOW, key)."""
    return MemoryGroup(emitter, {'a': [(NOW + round(1000 * at), {'t': at, 'k': key}) for at, key in items]})


def test_keyed_fixed_windows_close_by_the_clock():
    group = created(FixedTimeWindow('s', interval=10, key='k'), (1, 'x'), (2, 'y'), (12, 'x'))
    group.run(NOW + 15_000)
    assert [(key, times) for _, _, key, times in seen(group)] == [('x', [1]), ('y', [2])]
    assert group.emitter.next_due() == clock.from_ms(NOW + 20_000)
    assert {claim.watermark for claim in group.seen.values()} == {None}


def test_a_message_that_was_created_just_after_the_look_at_the_log_is_in_its_own_window():
    group = created(FixedTimeWindow('s', interval=10, key='k'), (1, 'x'), (10.005, 'x'), (3600, 'x'))
    group.run(NOW + 9_999)
    group.run(NOW + 30_000)
    assert [times for *_, times in seen(group)] == [[1], [10.005, 3600]]


def test_a_message_created_long_ago_is_never_late():
    group = created(SlidingTimeWindow('s', interval=10, slide=5), (11, 'x'))
    group.run(NOW + 25_000)
    group.messages['a'].append((NOW, {'t': 0}))
    group.run(NOW + 40_000)
    assert [(start - NOW / 1000, times) for start, _, _, times in seen(group)] == [
        (5, [11]), (10, [11]), (20, [0]), (25, [0]),
    ]  # fmt: skip
    assert seen(group, late=True) == []


def test_a_keyed_count_window_has_its_size_or_what_there_is_after_a_while():
    group = created(CountWindow('s', size=2, max_wait=10, key='k'), (1, 'x'), (2, 'y'), (3, 'x'), (4, 'x'))
    group.run(NOW + 5_000)
    assert seen(group) == [(None, None, 'x', [1, 3])]
    group.run(NOW + 12_000)
    assert seen(group)[1:] == [(None, None, 'y', [2])]


def test_a_count_window_without_key_has_what_there_is_after_max_wait():
    group = created(CountWindow('s', size=3, max_wait=10), *((at, 'x') for at in range(1, 6)))
    group.run(NOW + 5_000)
    assert [times for *_, times in seen(group)] == [[1, 2, 3]]
    assert group.emitter.next_due() == clock.from_ms(NOW + 14_000)
    group.run(NOW + 13_999)
    assert len(seen(group)) == 1
    group.run(NOW + 14_000)
    assert [times for *_, times in seen(group)] == [[1, 2, 3], [4, 5]]


def test_a_keyed_relaxed_window_is_due_its_interval_after_its_first_message():
    group = created(RelaxedTimeWindow('s', interval=10, key='k'), (1, 'x'), (5, 'y'), (9, 'x'))
    group.run(NOW + 12_000)
    assert [(key, times) for _, _, key, times in seen(group)] == [('x', [1, 9])]


# --- the end of the input


@pytest.mark.parametrize(('cls', 'options', 'first', 'then'), [
    (FixedTimeWindow, {'interval': 10}, [(10, 20, 'x', [10])], [(10, 20, 'x', [12])]),
    (SessionWindow, {'gap': 3}, [(10, 13, 'x', [10])], [(12, 15, 'x', [12])]),
    (SlidingTimeWindow, {'interval': 10, 'slide': 5}, [(5, 15, 'x', [10]), (10, 20, 'x', [10])],
     [(5, 15, 'x', [12]), (10, 20, 'x', [12])]),
])  # fmt: skip
@pytest.mark.parametrize('restarts', [True, False])
def test_at_the_end_of_the_input_what_is_open_is_emitted_and_makes_nothing_late_that_comes_tomorrow(
    cls, options, first, then, restarts
):
    group = group_of(event(cls, **options), a=[(0, 'y'), (10, 'x')])
    group.run(NOW)
    before = len(group.seen)
    group.end(NOW)
    group.follow()
    assert seen(group)[before:] == first
    assert group.positions == {'a': 2}
    assert group.group['number'] == len(group.seen)
    if restarts:
        group.restart()
    after = len(group.seen)
    group.messages['a'] += [(NOW, {'t': 12, 'k': 'x'}), (NOW, {'t': 100, 'k': 'x'})]
    group.run(NOW)
    assert seen(group)[after:] == then
    assert seen(group, late=True) == []


@pytest.mark.parametrize(('emitter', 'expected'), [
    (CountWindow('s', size=2), [[0, 1], [2]]),
    (CountWindow('s', size=2, max_wait=60), [[0, 1], [2]]),
    (CountWindow('s', size=2, max_wait=60, key='k'), [[0, 1], [2]]),
    (RelaxedTimeWindow('s', interval=60), [[0, 1, 2]]),
    (FixedTimeWindow('s', interval=60), [[0, 1, 2]]),
    (FixedTimeWindow('s', interval=60, key='k'), [[0, 1, 2]]),
    (SessionWindow('s', gap=60), [[0, 1, 2]]),
])  # fmt: skip
def test_at_the_end_of_the_input_every_kind_of_window_holds_what_there_is_and_goes_on_with_what_comes_then(
    emitter, expected
):
    group = created(emitter, *((at, 'x') for at in range(3)))
    for turn in range(1, 3):
        group.end(NOW + 5000 * turn)
        group.end(NOW + 5000 * turn)
        assert [times for *_, times in seen(group)] == expected
        group.messages['a'].append((NOW + 9000, {'t': 9, 'k': 'x'}))
        expected = [*expected, [9]]
    group.follow()
    assert group.positions == {'a': 4}


# --- bounds


def test_more_open_windows_than_allowed_end_the_oldest_ones_in_parts():
    emitter = event(FixedTimeWindow, interval=10, max_open_windows=2)
    group = group_of(emitter, a=[(1, 'x'), (2, 'y'), (3, 'z'), (4, 'x')])
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [1]), (0, 10, 'y', [2])]
    assert all(claim.part for claim in group.seen.values())
    group.restart()
    group.messages['a'].append((NOW, {'t': 50, 'k': 'x'}))
    group.run(NOW)
    assert seen(group)[2:] == [(0, 10, 'z', [3]), (0, 10, 'x', [4])]


def test_more_open_windows_than_allowed_are_an_error_if_wanted():
    emitter = event(FixedTimeWindow, interval=10, max_open_windows=2, overflow='error')
    group = group_of(emitter, a=[(1, 'x'), (2, 'y'), (3, 'z')])
    with pytest.raises(TooManyWindowsError, match='max_open_windows=2'):
        group.run(NOW)


def test_a_window_that_stays_open_does_not_hold_the_position_for_ever(monkeypatch):
    monkeypatch.setattr(assign, 'MAX_AHEAD', 100)
    items = [(0, 'rare'), *((at / 100, 'often') for at in range(500))]
    group = group_of(event(SessionWindow, gap=10), a=items)
    monkeypatch.setattr(window, 'CHUNK', 50)
    group.run(NOW)
    group.follow()
    assert group.positions['a'] >= 350
    assert seen(group)[0] == (0, 10, 'rare', [0])


# --- positions


def test_a_position_stays_below_open_windows_and_a_restart_finds_what_is_finished_behind_it():
    group = group_of(event(FixedTimeWindow, interval=10), a=[(25, 'x'), (1, 'y'), (20, 'z'), (2, 'y')])
    group.run(NOW)
    group.follow()
    assert group.positions == {}
    assert group.group['number'] == 0
    group.restart()
    group.messages['a'].append((NOW, {'t': 40, 'k': 'x'}))
    group.run(NOW)
    group.follow()
    places = [place for claim in group.seen.values() for place in offsets_in(claim)]
    assert sorted(places) == [('a', 0), ('a', 1), ('a', 2), ('a', 3)]
    assert group.positions == {'a': 4}
    assert group.group['number'] == len(group.seen)


def test_a_window_that_was_claimed_before_a_crash_is_closed_although_those_planned_with_it_are_not():
    group = group_of(event(FixedTimeWindow, interval=10), a=[(1, 'x'), (2, 'y'), (30, 'z')])
    group.plan(NOW, keep=1)
    assert seen(group) == [(0, 10, 'x', [1])]
    group.messages['a'] += [(NOW, {'t': 5, 'k': 'x'}), (NOW, {'t': 6, 'k': 'y'})]
    group.run(NOW)
    assert seen(group)[1:] == [(0, 10, 'y', [2])]
    assert seen(group, late=True) == [(None, None, None, [5, 6])]


def test_an_open_session_is_the_same_after_a_restart_however_its_messages_are_read_again(monkeypatch):
    group = group_of(event(SessionWindow, gap=20), a=[(0, 'y'), (30, 'x'), (45, 'x'), (50, 'z')])
    group.run(NOW)
    group.follow()
    assert seen(group) == [(0, 20, 'y', [0])]
    group.restart()
    monkeypatch.setattr(window, 'CHUNK', 1)
    group.messages['a'] += [(NOW, {'t': 100, 'k': 'z'})]
    group.run(NOW)
    assert seen(group)[1:] == [(30, 65, 'x', [30, 45]), (50, 70, 'z', [50])]
    assert seen(group, late=True) == []
    assert [seconds(claim.watermark) for claim in group.seen.values()] == [30, 100, 100]


def test_what_was_late_is_late_again_although_what_made_it_so_is_below_the_position_and_a_session_open():
    group = group_of(event(SessionWindow, gap=20), a=[
        (0, 'y'), (100, 'y'), (90, 'x'), (75, 'late'), (105, 'x'), (121, 'z'),
    ])  # fmt: skip
    group.plan(NOW, limit=2)
    group.finish()
    group.follow()
    assert group.positions == {'a': 2}
    assert seen(group) == [(0, 20, 'y', [0]), (100, 120, 'y', [100])]
    group.restart()
    group.end(NOW)
    assert seen(group)[2:] == [(90, 125, 'x', [90, 105]), (121, 141, 'z', [121])]
    assert seen(group, late=True) == [(None, None, None, [75])]


def test_a_session_of_two_producers_is_the_same_after_a_restart_whichever_is_read_first():
    messages = {'a': [(80, 'x'), (110, 'y')], 'b': [(79, 'z'), (100, 'x'), (110, 'y')]}
    group = group_of(event(SessionWindow, gap=25), **messages)
    group.run(NOW, ends={'b': 2})
    group.run(NOW)
    group.follow()
    assert seen(group) == [(79, 104, 'z', [79])]
    group.restart()
    group.end(NOW)
    assert seen(group)[1:] == [(80, 125, 'x', [80, 100]), (110, 135, 'y', [110, 110])]
    assert seen(group, late=True) == []


def test_at_the_end_of_the_input_each_window_is_emitted_once_though_it_is_killed_between_two_claims():
    group = group_of(event(FixedTimeWindow, interval=10), a=[(0, 'x'), (1, 'y'), (2, 'z'), (3, 'x')])
    group.plan(NOW, end=False)
    for _ in range(3):
        group.plan(NOW, end=True, keep=1)
        group.plan(NOW)
    group.end(NOW)
    group.follow()
    assert sorted(seen(group)) == [(0, 10, 'x', [0, 3]), (0, 10, 'y', [1]), (0, 10, 'z', [2])]
    assert group.positions == {'a': 4}


def test_each_claim_says_up_to_when_all_is_decided_as_the_next_one_may_not_be_stored(monkeypatch):
    group = group_of(event(FixedTimeWindow, interval=10), a=[(100, 'x'), (5, 'late'), (110, 'y')])
    group.plan(NOW, keep=1)
    group.finish()
    monkeypatch.setattr(window, 'CHUNK', 1)
    group.plan(NOW)
    group.follow()
    assert group.positions == {'a': 1}
    group.restart()
    group.end(NOW)
    assert seen(group) == [(100, 110, 'x', [100]), (110, 120, 'y', [110])]
    assert seen(group, late=True) == [(None, None, None, [5])]


def test_the_watermark_of_windows_does_not_go_back_when_they_are_found_again(monkeypatch):
    group = group_of(event(SessionWindow, gap=10), a=[(0, 'x'), (2, 'y'), (13, 'z'), (50, 'z')])
    group.plan(NOW, keep=1)
    monkeypatch.setattr(window, 'CHUNK', 1)
    group.run(NOW)
    assert seen(group) == [(0, 10, 'x', [0]), (2, 12, 'y', [2]), (13, 23, 'z', [13])]
    assert [seconds(claim.watermark) for claim in group.seen.values()] == [13, 13, 50]


def test_producers_that_come_and_go_are_forgotten(monkeypatch):
    monkeypatch.setattr(assign, 'MANY_PRODUCERS', 10)
    group = MemoryGroup(FixedTimeWindow('s', interval=10, key='k'), {})
    for turn in range(100):
        now = NOW + 60_000 * turn
        group.messages.clear()
        group.messages[f'p{turn}'] = [(now, {'k': 'x'})]
        group.run(now)
        group.follow()
        group.progress.forget(group.messages)
    assert len(group.seen) == 99
    assert len(group.log.memory['assigner']._producers) <= 11
    assert len(group.progress.planned) <= 3


def test_a_message_of_a_stored_window_is_in_its_other_windows_however_it_is_read_again(monkeypatch):
    emitter = SlidingTimeWindow('s', interval=20, slide=5, key='k')
    group = MemoryGroup(emitter, {'a': [(NOW, {'k': 'x'}), (NOW + 10_000, {'k': 'x'}), (NOW, {'k': 'x'})]})
    group.plan(NOW + 10_000, limit=1)
    group.restart()
    monkeypatch.setattr(window, 'CHUNK', 1)
    group.run(NOW + 100_000)
    places = Counter(place for claim in group.seen.values() for place in offsets_in(claim))
    assert places == {('a', 0): 4, ('a', 1): 4, ('a', 2): 4}


# --- against references


EVENTS = st.lists(st.tuples(st.integers(0, 120), st.sampled_from('xyz'), st.sampled_from('abc')), max_size=40)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 8),  # how many more messages are there
        st.integers(1, 7),  # chunk
        st.integers(1, 4),  # most plans
        st.one_of(st.none(), st.none(), st.integers(0, 3)),  # how many claims are stored before it is killed
        st.integers(0, 100),  # which window is finished
        st.booleans(),  # whether positions follow
        st.booleans(),  # whether it is restarted
    ),
    max_size=25,
)


def play(emitter, events, steps, time_of):
    """Let messages come and the consumer go on, by steps; then let all be read, and the stream fall silent.

    All producers have sent one message before: one that was not known could not hold the watermark.
    """
    stored = {producer: [(time_of(0), {'t': 0, 'k': 'x'})] for producer in 'abc'}
    for at, key, producer in events:
        stored[producer].append((time_of(at), {'t': at, 'k': key}))
    group = MemoryGroup(emitter, stored)
    come = Counter('abc')
    left = [producer for _, _, producer in events]
    with pytest.MonkeyPatch.context() as patch:
        for n, chunk, limit, keep, which, follow, restart in steps:
            come.update(left[:n])
            del left[:n]
            patch.setattr(window, 'CHUNK', chunk)
            patch.setattr(window, 'QUERY', 1)

            now = max(stored[producer][n - 1][0] for producer, n in come.items())
            group.plan(now, limit, dict(come), keep)
            numbers = sorted(group.progress.open)
            if numbers:
                group.finish(numbers[which % len(numbers)])
            if follow:
                group.follow()
            if restart:
                group.restart()
        for now in (NOW, NOW + 10_000_000):  # in portions as small as the last ones
            group.run(now)
        group.end(now)
        group.follow()
    return group


def in_allowance(group, lateness):
    """The messages that are not later than `lateness` behind what their producer has sent before."""
    places = set()
    for producer, items in group.messages.items():
        high = 0
        for offset, (_, data) in enumerate(items):
            if data['t'] >= high - lateness:
                places.add((producer, offset))
            high = max(high, data['t'])
    return places


def check_common(group, lateness):
    """What holds for all windows of event time."""
    claims = list(group.seen.values())
    late = [place for claim in claims if claim.late for place in offsets_in(claim)]
    assert len(late) == len(set(late))
    assert not set(late) & in_allowance(group, lateness)
    marks = [claim.watermark for claim in claims]
    assert marks == sorted(marks)
    everything = {(producer, offset) for producer, items in group.messages.items() for offset in range(len(items))}
    assert {place for claim in claims for place in offsets_in(claim)} == everything
    assert group.positions == {producer: len(items) for producer, items in group.messages.items() if items}
    assert group.group['number'] == len(claims)
    return set(late)


def check_grid(group, interval, slide, late):
    """Each message within the allowance is in all of its windows, once; any other one in some of them, or late."""
    places, in_time = defaultdict(list), in_allowance(group, group.emitter._lateness)
    for claim in group.seen.values():
        for place in offsets_in(claim):
            if not claim.late:
                data = group.messages[place[0]][place[1]][1]
                assert claim.key == data['k']
                assert clock.to_ms(claim.start) <= data['t'] * 1000 < clock.to_ms(claim.end)
                assert clock.to_ms(claim.end) - clock.to_ms(claim.start) == interval * 1000
                places[place].append(clock.to_ms(claim.end))
    for (producer, offset), ends in places.items():
        assert (producer, offset) not in late
        assert len(ends) == len(set(ends)), 'twice in a window'
        at = group.messages[producer][offset][1]['t']
        mine = [1000 * end for end in range(at // slide * slide + slide, at // slide * slide + slide + interval, slide)]
        assert set(ends) <= set(mine)
        assert len(ends) == len(mine) or (producer, offset) not in in_time, 'not in all of its windows'


def test_a_window_that_is_closed_stays_closed_when_only_some_of_those_due_were_claimed_before_a_stop():
    found = []
    for stops in (False, True):
        emitter = event(FixedTimeWindow, interval=60)
        group = group_of(emitter, a=[(1, 'x'), (2, 'y'), (200, 'z')])
        group.plan(NOW, limit=1)
        group.finish()
        group.follow()
        if stops:
            group.restart()
        group.messages['a'] += [(NOW, {'t': 3, 'k': 'x'}), (NOW, {'t': 290, 'k': 'z'})]
        group.run(NOW)
        found.append([(claim.key, claim.late, claim.n) for claim in group.seen.values()])
    assert found[0] == found[1] == [('x', False, 1), ('y', False, 1), ('z', False, 1), (None, True, 1)]


def test_windows_of_producers_that_are_forgotten_do_not_stay_for_ever():
    group = MemoryGroup(SessionWindow('s', gap=10, key='k'), {'q': [(NOW, {'k': 'long'}), (NOW + 1, {'k': 'short'})]})
    now = NOW
    for i in range(190):
        now += 5000
        if i < 150:
            group.messages['q'].append((now, {'k': 'long'}))  # a session that goes on
            group.messages[f'p{i}'] = [(now, {'k': f'p{i}'})]
        group.run(now)
        group.follow()
        left = {name for name, sent in group.messages.items() if group.positions.get(name, 0) < len(sent)}
        if len(group.progress.planned) > 2 * len(left) + 100:
            group.progress.forget(left)
    assert group.group['number'] == len(group.seen) == 152
    assert not group.windows


@EXAMPLES
@given(EVENTS, STEPS, st.sampled_from([(10, 10), (20, 10), (30, 10), (12, 4)]), st.sampled_from([0, 5, 40]))
def test_every_message_is_in_exactly_the_windows_of_its_time(events, steps, sizes, lateness):
    interval, slide = sizes
    emitter = event(SlidingTimeWindow, interval=interval, slide=slide, lateness=lateness)
    group = play(emitter, events, steps, lambda at: NOW)
    check_grid(group, interval, slide, check_common(group, lateness))


@EXAMPLES
@given(EVENTS, STEPS, st.sampled_from(['slide', 'gap', 'count', 'created']), st.integers(2, 4))
def test_when_windows_are_emitted_early_nothing_is_lost_or_twice(events, steps, kind, most):
    emitter, copies, time_of = {
        'slide': (event(SlidingTimeWindow, interval=20, slide=10, lateness=1000, max_open_windows=most), 2, NOW),
        'gap': (event(SessionWindow, gap=10, lateness=1000, max_open_windows=most), 1, NOW),
        'count': (CountWindow('s', size=3, max_wait=10, key='k', max_open_windows=most), 1, None),
        'created': (FixedTimeWindow('s', interval=10, key='k', max_open_windows=most), 1, None),
    }[kind]
    group = play(emitter, events, steps, lambda at: time_of or NOW + 1000 * at)
    assert not any(claim.late for claim in group.seen.values())
    count = Counter(place for claim in group.seen.values() for place in offsets_in(claim))
    everything = {(producer, offset) for producer, items in group.messages.items() for offset in range(len(items))}
    assert count == dict.fromkeys(everything, copies)
    assert group.group['number'] == len(group.seen)


@EXAMPLES
@given(EVENTS, STEPS, st.sampled_from([3, 10, 25]))
def test_sessions_of_messages_within_the_allowance_are_those_of_the_reference(events, steps, gap):
    group = play(event(SessionWindow, gap=gap, lateness=1000), events, steps, lambda at: NOW)
    assert check_common(group, 1000) == set()
    times = defaultdict(list)
    for _, data in itertools.chain(*group.messages.values()):
        times[data['k']].append(data['t'])
    expected = []
    for key, ordered in times.items():
        ordered.sort()
        cuts = [i for i in range(1, len(ordered)) if ordered[i] - ordered[i - 1] >= gap]
        for start, end in zip([0, *cuts], [*cuts, len(ordered)], strict=True):
            expected.append((ordered[start], ordered[end - 1] + gap, key, ordered[start:end]))
    assert sorted(seen(group)) == sorted(expected)


@EXAMPLES
@given(EVENTS, STEPS, st.sampled_from([3, 10, 25]), st.sampled_from([0, 5, 40]))
def test_sessions_lose_nothing_and_none_is_late_within_the_allowance(events, steps, gap, lateness):
    group = play(event(SessionWindow, gap=gap, lateness=lateness), events, steps, lambda at: NOW)
    check_common(group, lateness)
    count = Counter(place for claim in group.seen.values() for place in offsets_in(claim))
    assert set(count.values()) <= {1}
    for start, end, _, times in seen(group):
        assert (start, end) == (times[0], times[-1] + gap)
        assert all(after - before < gap for before, after in itertools.pairwise(times))


ALONE = st.lists(st.tuples(st.integers(0, 90), st.sampled_from('xyz'), st.sampled_from([0, 0, 1, 4, 45])), max_size=40)
KINDS = st.sampled_from([
    (FixedTimeWindow, {'interval': 10}), (SlidingTimeWindow, {'interval': 20, 'slide': 5}),
    (SessionWindow, {'gap': 3}), (SessionWindow, {'gap': 10}),
])  # fmt: skip


def decided(group):
    """The windows and what is in them, and what is late, as they are stored."""
    windows = [(claim.key, claim.start, claim.end, claim.spans) for claim in group.seen.values() if not claim.late]
    late = [place for claim in group.seen.values() if claim.late for place in offsets_in(claim)]
    return sorted(windows), sorted(late)


@EXAMPLES
@given(ALONE, STEPS, KINDS, st.sampled_from([0, 5, 40]), st.booleans())
def test_a_producer_has_the_same_windows_one_by_one_in_chunks_as_a_backlog_and_over_restarts(
    events, steps, kind, lateness, follows
):
    cls, options = kind
    at, messages = NOW, []
    for time, key, pause in events:  # all at once long after, or as it happens, with silence in between
        at += 1000 * pause * follows
        messages.append((at, {'t': at / 1000 - time / 3 if follows else time, 'k': key}))
    groups = [MemoryGroup(event(cls, lateness=lateness, **options), {'a': messages}) for _ in range(3)]
    for come, (created, _) in enumerate(messages, 1):
        groups[0].run(created, ends={'a': come})
    with pytest.MonkeyPatch.context() as patch:
        come = 0
        for n, chunk, limit, keep, which, follow, restart in steps:
            come = min(come + n, len(messages))
            patch.setattr(window, 'CHUNK', chunk)
            patch.setattr(window, 'QUERY', 1)
            groups[1].plan(messages[come - 1][0] if come else NOW, limit, {'a': come}, keep)
            if numbers := sorted(groups[1].progress.open):
                groups[1].finish(numbers[which % len(numbers)])
            if follow:
                groups[1].follow()
            if restart:
                groups[1].restart()
        for group in groups:
            group.end(at)
    assert decided(groups[1]) == decided(groups[0]) == decided(groups[2])


@EXAMPLES
@given(EVENTS, STEPS, st.sampled_from(['fixed', 'slide', 'gap', 'count', 'relaxed']))
def test_without_event_time_nothing_is_lost_late_or_twice(events, steps, kind):
    emitter, times = {
        'fixed': (FixedTimeWindow('s', interval=10, key='k'), 1),
        'slide': (SlidingTimeWindow('s', interval=20, slide=5, key='k'), 4),
        'gap': (SessionWindow('s', gap=10, key='k'), 1),
        'count': (CountWindow('s', size=3, max_wait=10, key='k'), 1),
        'relaxed': (RelaxedTimeWindow('s', interval=10, key='k'), 1),
    }[kind]
    group = play(emitter, events, steps, lambda at: NOW + 1000 * at)
    count = Counter(place for claim in group.seen.values() for place in offsets_in(claim))
    everything = {(producer, offset) for producer, items in group.messages.items() for offset in range(len(items))}
    assert count == dict.fromkeys(everything, times)
    assert not any(claim.late or claim.bad for claim in group.seen.values())
    for claim in group.seen.values():
        assert {group.messages[producer][offset][1]['k'] for producer, offset in offsets_in(claim)} == {claim.key}
    if kind == 'slide':  # neighbours: the windows of a message follow on each other
        ends = defaultdict(list)
        for claim in group.seen.values():
            for place in offsets_in(claim):
                ends[place].append(clock.to_ms(claim.end) // 5000)
        assert all(sorted(each) == list(range(min(each), min(each) + 4)) for each in ends.values())
    assert group.group['number'] == len(group.seen)


# --- arguments


@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda: SlidingTimeWindow('s', interval=10, slide=3), 'interval must be a multiple of slide'),
        (lambda: SlidingTimeWindow('s', interval=10, slide=20), 'interval must be a multiple of slide'),
        (lambda: SlidingTimeWindow('s', interval=10, slide=0.001), 'at most 1000 slides'),
        (lambda: SlidingTimeWindow('s', interval=0.0015, slide=0.0005), 'slide'),
        (lambda: SessionWindow('s'), 'needs gap=G'),
        (lambda: SessionWindow('s', gap=0), 'gap'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp=3), 'timestamp must be the name of a field'),
        (lambda: FixedTimeWindow('s', interval=10, key='a..b'), 'key must be the name of a field'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp='t', lateness=-1), 'lateness'),
        (lambda: FixedTimeWindow('s', interval=10, idle=5), 'idle goes with timestamp'),
        (lambda: FixedTimeWindow('s', interval=10, idle=None), 'idle goes with timestamp'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp='t', idle=0), 'idle must be from 0.001'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp='t', idle='5'), 'idle'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp='t', idle=0.0005), 'idle'),
        (lambda: FixedTimeWindow('s', interval=10, timestamp='t', late='keep'), "late must be 'drop' or a Stream"),
        (lambda: FixedTimeWindow('s', interval=10, key='k', overflow='drop'), "overflow must be 'close' or 'error'"),
        (lambda: RelaxedTimeWindow('s', interval=10, timestamp='t'), 'FixedTimeWindow'),
        (lambda: CountWindow('s', size=10, key='k'), 'key with size needs max_wait'),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(make, named):
    with pytest.raises(ArgumentError, match=named):
        make()
