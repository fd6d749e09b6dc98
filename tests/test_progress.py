"""What is planned, open and finished, and the positions that follow from it."""

from datetime import timedelta

import pytest

from minibatch.clock import EPOCH
from minibatch.progress import Claim, Progress
from minibatch.store import Span


def claim(number, *spans, **plan):
    return Claim([Span(*span) for span in spans], **plan, id=f's/g/{number}', number=number)


def progress(**positions):
    return Progress(0, 1, positions)


def test_a_position_does_not_pass_an_open_window():
    state = progress()
    state.claim(claim(1, ('a', 0, 10)))
    state.claim(claim(2, ('a', 10, 20)))
    state.finished(2)
    assert state.moved() == {}
    state.finished(1)
    assert state.moved() == {'a': 20}


def test_each_producer_has_its_own_position():
    state = progress(a=5)
    state.claim(claim(1, ('a', 5, 10)))
    state.claim(claim(2, ('b', 0, 10)))
    state.finished(2)
    assert state.moved() == {'b': 10}


def test_a_position_is_moved_only_once():
    state = progress()
    state.claim(claim(1, ('a', 0, 10)))
    state.finished(1)
    state.written(state.moved())
    assert state.moved() == {}


def test_the_number_stops_before_the_first_window_that_is_not_finished():
    state = progress()
    for number in (1, 2, 3):
        state.claim(claim(number, ('a', number, number + 1)))
    state.finished(1)
    state.finished(3)
    assert state.number == 1
    state.finished(2)
    assert state.number == 3


def test_the_frontier_is_the_end_of_the_last_window_below_which_all_are_finished():
    state = progress()
    for number in (1, 2):
        state.claim(claim(number, ('a', number, number + 1), frontier=EPOCH + timedelta(seconds=number)))
    state.finished(2)
    assert state.frontier is None
    state.finished(1)
    assert state.frontier == EPOCH + timedelta(seconds=2)


def test_messages_that_are_gone_are_counted_and_skipped():
    state = progress(a=5)
    assert state.skip_to('a', 8) == 3
    assert state.planned['a'] == 8


def test_a_producer_not_seen_before_starts_at_its_first_message_without_loss():
    state = progress()
    assert state.skip_to('a', 8) == 0
    assert state.planned['a'] == 8


def test_a_producer_with_an_open_window_is_not_forgotten():
    state = progress(a=5, b=7)
    state.claim(claim(1, ('a', 5, 6)))
    state.forget(alive=[])
    assert state.planned == {'a': 6}


def test_a_window_that_is_finished_counts_only_when_the_position_has_passed_it():
    state = Progress(0, 1, {}, follows=False)
    state.claim(claim(1, ('a', 5, 10), frontier=EPOCH))
    state.finished(1)
    assert (state.moved(), state.number) == ({}, 0)
    state.plan_to({'a': 7})
    state.written(state.moved())
    assert (state.number, state.frontier) == (0, None)
    state.plan_to({'a': 12})
    state.written(state.moved())
    assert (state.number, state.frontier) == (1, EPOCH)


def document(number, *spans, status='open', **plan):
    doc = claim(number, *spans, **plan).document('s', 'g', 1)
    return {**doc, 'status': status}


def test_what_was_claimed_is_found_again():
    times = dict.fromkeys(('start', 'end', 'watermark', 'frontier'), EPOCH)
    plan = {**times, 'key': ('x', 1), 'late': True, 'part': True}
    (found,) = Progress.resume([document(1, ('a', 0, 3), **plan)], 0, 2, {}).found
    assert {name: getattr(found, name) for name in plan} == plan
    assert (found.id, found.number, found.spans) == ('s/g/1', 1, [Span('a', 0, 3)])


@pytest.mark.parametrize('key', [0, '', False, 0.0])
def test_a_key_that_counts_as_false_is_a_key(key):
    assert Progress.resume([document(1, key=key)], 0, 2, {}).found[0].key is key


def test_windows_that_follow_on_a_hole_are_not_planned_again_when_the_hole_is_known():
    windows = [document(1, ('a', 8, 18)), document(3, ('a', 18, 20), status='processed')]
    state = Progress.resume(windows, 0, 4, {'a': 5})
    assert (state.planned['a'], sorted(state.open)) == (5, [1])
    assert state.skip_to('a', 8) == 3
    assert state.planned['a'] == 20


def test_windows_behind_messages_without_a_window_do_not_hide_them():
    state = Progress.resume([document(1, ('a', 8, 18), status='processed')], 0, 2, {'a': 5})
    assert (state.planned['a'], state.number) == (5, 1)
