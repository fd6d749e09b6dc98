"""Which messages make a window: planning is pure, so it is tested without a server."""

from datetime import timedelta

import pytest

from minibatch.clock import EPOCH
from minibatch.errors import ArgumentError
from minibatch.store import Span
from minibatch.window import CountWindow, FixedTimeWindow, RelaxedTimeWindow, WindowEmitter


def at(seconds):
    return EPOCH + timedelta(seconds=seconds)


class FakeLog:
    """Producers and the creation times of their messages, in seconds; `batch` of them in each record batch."""

    def __init__(self, frontier=None, batch=1, **producers):
        self.producers, self.frontier, self.batch = producers, frontier, batch
        self.planned, self.memory = {}, {}

    def waiting(self):
        spans = [Span(name, self.planned.get(name, 0), len(times)) for name, times in sorted(self.producers.items())]
        return [span for span in spans if span.start < span.end]

    def times(self, span):
        times = self.producers[span.producer]
        for offset in range(0, len(times), self.batch):
            batch = times[offset : offset + self.batch]
            if offset < span.end and offset + len(batch) > span.start:
                yield offset, len(batch), [at(time).replace(tzinfo=None) for time in batch]

    def take(self, emitter, now, limit=1000):
        """Plan, and note what was planned as the consumer does."""
        plans = emitter.plan(self, at(now), limit)
        for plan in plans:
            for span in plan.spans:
                assert span.start == self.planned.get(span.producer, 0), 'a gap or an overlap'
                self.planned[span.producer] = span.end
        return [[tuple(span) for span in plan.spans] for plan in plans]


# --- count windows


def test_a_count_window_has_exactly_its_size_and_the_rest_waits():
    log, emitter = FakeLog(a=[0] * 5), CountWindow('s', size=2)
    assert log.take(emitter, 0) == [[('a', 0, 2)], [('a', 2, 4)]]
    assert log.take(emitter, 0) == []
    log.producers['a'].append(0)
    assert log.take(emitter, 0) == [[('a', 4, 6)]]


def test_a_count_window_takes_from_several_producers():
    log = FakeLog(a=[0], b=[0] * 3)
    assert log.take(CountWindow('s', size=3), 0) == [[('a', 0, 1), ('b', 0, 2)]]


def test_no_producer_waits_for_ever_behind_a_fast_one():
    log, emitter = FakeLog(a=[0] * 100, b=[0] * 2), CountWindow('s', size=1)
    served = [log.take(emitter, 0, limit=1)[0][0][0] for _ in range(4)]
    assert served == ['a', 'b', 'a', 'b']


def test_a_count_window_without_size_takes_interval_as_the_number():
    assert CountWindow('s', interval=3).size == 3
    assert CountWindow('s').size == 1


def test_no_more_windows_are_planned_than_asked_for():
    log = FakeLog(a=[0] * 100)
    assert len(log.take(CountWindow('s', size=1), 0, limit=7)) == 7


# --- relaxed time windows


def test_a_relaxed_window_has_all_since_the_last_one():
    log, emitter = FakeLog(frontier=at(0), a=[1, 2], b=[3]), RelaxedTimeWindow('s', interval=5)
    assert log.take(emitter, 4.9) == []
    assert log.take(emitter, 5) == [[('a', 0, 2), ('b', 0, 1)]]
    log.producers['a'].append(7)
    assert log.take(emitter, 9) == []
    assert log.take(emitter, 10) == [[('a', 2, 3)]]


def test_a_relaxed_window_without_messages_is_not_emitted_unless_asked_for():
    log = FakeLog(frontier=at(0))
    assert log.take(RelaxedTimeWindow('s', interval=5), 20) == []
    log = FakeLog(frontier=at(0))
    assert log.take(RelaxedTimeWindow('s', interval=5, emit_empty=True), 20) == [[]]


def test_the_first_relaxed_window_is_due_an_interval_after_the_oldest_message():
    log, emitter = FakeLog(a=[100]), RelaxedTimeWindow('s', interval=5)
    assert log.take(emitter, 104) == []
    assert emitter.next_due() == at(105)
    assert log.take(emitter, 105) == [[('a', 0, 1)]]


# --- fixed time windows


def test_fixed_windows_are_half_open():
    log = FakeLog(frontier=at(0), a=[4.999, 5])
    assert log.take(FixedTimeWindow('s', interval=5), 10) == [[('a', 0, 1)], [('a', 1, 2)]]


def test_no_fixed_window_is_skipped_and_empty_ones_are_emitted():
    log = FakeLog(frontier=at(0), a=[1, 16])
    assert log.take(FixedTimeWindow('s', interval=5), 20) == [[('a', 0, 1)], [], [], [('a', 1, 2)]]


def test_fixed_windows_of_a_millisecond_touch_and_have_their_messages():
    log = FakeLog(a=[1.001, 1.003])
    plans = FixedTimeWindow('s', interval=0.001).plan(log, at(1.0045), 10)
    assert [(plan.start, plan.end, plan.n) for plan in plans] == [
        (at(1.001), at(1.002), 1), (at(1.002), at(1.003), 0), (at(1.003), at(1.004), 1),
    ]  # fmt: skip


def test_windows_end_at_whole_milliseconds_as_they_are_stored():
    log, emitter = FakeLog(frontier=at(0)), RelaxedTimeWindow('s', interval=1, emit_empty=True)
    assert [plan.end for plan in emitter.plan(log, at(1.0009), 1)] == [at(1)]
    assert emitter.next_due() == at(2)


def test_fixed_windows_come_back_to_their_grid_from_the_frontier_of_another_interval():
    log = FakeLog(frontier=at(3.2), a=[3.3, 10])
    plans = FixedTimeWindow('s', interval=5).plan(log, at(12), 10)
    assert [(plan.start, plan.end, plan.n) for plan in plans] == [(at(3.2), at(5), 1), (at(5), at(10), 0)]


def test_empty_intervals_that_are_not_emitted_are_jumped_over_however_many():
    log, emitter = FakeLog(a=[0, 1e9]), FixedTimeWindow('s', interval=0.001, emit_empty=False)
    assert log.take(emitter, 1e9) == [[('a', 0, 1)]]
    assert emitter.next_due() == at(1e9 + 0.001)
    log.producers['b'] = [1e9]
    assert log.take(emitter, 2e9) == [[('a', 1, 2), ('b', 0, 1)]]
    assert log.frontier == at(2e9)


def test_what_comes_behind_a_jump_is_in_the_window_of_its_time():
    log, emitter = FakeLog(a=[0, 42]), FixedTimeWindow('s', interval=5, emit_empty=False)
    assert log.take(emitter, 44) == [[('a', 0, 1)]]
    log.producers['b'] = [43, 46]
    assert log.take(emitter, 50) == [[('a', 1, 2), ('b', 0, 1)], [('b', 1, 2)]]


def test_a_fixed_window_is_due_when_its_end_has_come_and_not_before():
    log, emitter = FakeLog(frontier=at(0), a=[1]), FixedTimeWindow('s', interval=5)
    assert log.take(emitter, 4.999) == []
    assert emitter.next_due() == at(5)
    assert len(log.take(emitter, 5)) == 1


def test_the_first_fixed_window_is_that_of_the_oldest_message_aligned_to_the_clock():
    log = FakeLog(a=[12])
    plans = FixedTimeWindow('s', interval=5).plan(log, at(15), 10)
    assert [(plan.start, plan.end) for plan in plans] == [(at(10), at(15))]


@pytest.mark.parametrize('batch', [1, 2, 3, 7])
def test_a_record_batch_over_an_edge_is_cut_there(batch):
    log = FakeLog(frontier=at(0), batch=batch, a=[1, 2, 6, 7, 11])
    assert log.take(FixedTimeWindow('s', interval=5), 15) == [[('a', 0, 2)], [('a', 2, 4)], [('a', 4, 5)]]


def test_a_message_that_comes_after_its_window_closed_is_in_the_next_one():
    log, emitter = FakeLog(frontier=at(0), a=[1]), FixedTimeWindow('s', interval=5)
    log.take(emitter, 5)
    log.producers['b'] = [2]
    assert log.take(emitter, 10) == [[('b', 0, 1)]]


def test_a_producer_whose_clock_goes_backwards_keeps_its_order():
    log = FakeLog(frontier=at(0), a=[6, 1, 7])
    assert log.take(FixedTimeWindow('s', interval=5), 10) == [[], [('a', 0, 3)]]


def test_a_producer_whose_clock_is_an_hour_ahead_is_in_the_window_in_which_it_was_seen():
    log, emitter = FakeLog(frontier=at(0), a=[3601]), FixedTimeWindow('s', interval=5)
    assert log.take(emitter, 5) == [[]]
    assert log.take(emitter, 10) == [[('a', 0, 1)]]


def test_a_producer_whose_clock_is_an_hour_behind_is_not_late():
    log, emitter = FakeLog(frontier=at(7200), a=[3601]), FixedTimeWindow('s', interval=5)
    assert log.take(emitter, 7205) == [[('a', 0, 1)]]


def test_a_limit_stops_between_two_windows_and_the_rest_comes_next():
    log, emitter = FakeLog(frontier=at(0), a=[1, 6, 11]), FixedTimeWindow('s', interval=5)
    assert log.take(emitter, 15, limit=2) == [[('a', 0, 1)], [('a', 1, 2)]]
    assert log.take(emitter, 15) == [[('a', 2, 3)]]


def test_every_message_is_in_exactly_one_fixed_window_however_often_is_planned():
    times = [i * 0.7 for i in range(100)]
    log, emitter = FakeLog(frontier=at(0), batch=4, a=times), FixedTimeWindow('s', interval=3)
    for now in range(80):
        log.take(emitter, now)
    assert log.planned == {'a': 100}


def test_fixed_windows_that_were_not_claimed_are_planned_again_the_same():
    emitter, logs = FixedTimeWindow('s', interval=5), [FakeLog(frontier=at(0), a=[1, 6, 11]) for _ in range(2)]
    assert logs[0].take(emitter, 15) == logs[1].take(emitter, 15) == [[('a', 0, 1)], [('a', 1, 2)], [('a', 2, 3)]]


# --- arguments


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'size': 0}, 'size'),
        ({'size': 1.5}, 'size'),
        ({'size': True}, 'size'),
        ({'interval': -1}, 'interval'),
        ({'interval': 'x'}, 'interval'),
        ({'interval': float('nan')}, 'interval'),
        ({'max_workers': 0}, 'workers'),
        ({'lease': 0}, 'lease'),
        ({'group': 'a/b'}, 'group'),
        ({'group': ''}, 'group'),
        ({'emitfn': 3}, 'emitfn'),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(options, named):
    with pytest.raises(ArgumentError, match=named):
        WindowEmitter('s', **options)


@pytest.mark.parametrize('name', ['', '  ', None, 3, 'x' * 500])
def test_a_stream_needs_a_name(name):
    with pytest.raises(ArgumentError, match='name of a stream'):
        CountWindow(name)
