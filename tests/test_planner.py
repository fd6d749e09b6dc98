"""What the loop of a consumer costs that has nothing to do: no more with many producers than with a few."""

import time

import pytest
from processes import Seen, note, prove, started, write_at
from servers import eventually

import minibatch as mb
from minibatch import clock, planner, store
from minibatch.testing import InlineExecutor

FOR_EVER = 1e9  # times as long as a look or a plan took
FAR = 60.0


@pytest.fixture
def planners(monkeypatch):
    """Three producers are many, and nothing is done again in vain; the planners there were."""
    found = []
    look = planner.Planner._look

    def noting(self, now):
        found.append(self)
        look(self, now)

    monkeypatch.setattr(planner, 'MANY', 2)
    monkeypatch.setattr(planner, 'PAUSES_PER_LOOK', (FOR_EVER, FOR_EVER))
    monkeypatch.setattr(planner, 'PAUSES_PER_PLAN', FOR_EVER)
    monkeypatch.setattr(planner.Planner, '_look', noting)
    return found


def write(db, *sources, first=0):
    for source in sources:
        write_at(db, 's', [clock.now()], source=source, first=first)


def emitter_of(url, **options):
    seen = Seen()
    return mb.make_emitter('s', note, url=url, sink=seen, executor=InlineExecutor, **options), seen


def is_at_rest(planners):
    """Whether neither a look nor a plan is to come, unless there is something new."""
    far = time.monotonic() + FAR
    return planners and planners[-1]._listening and planners[-1]._look_at > far and planners[-1]._plan_at > far


def test_an_idle_consumer_of_many_producers_does_not_look_at_them_again_and_again_and_hears_a_new_one(
    url, db, planners
):
    mb.stream('s', url=url)
    write(db, 0, 1, 2)
    emitter, seen = emitter_of(url, size=1, keep=True)
    with started(emitter):
        eventually(lambda: seen.count() == 3 and is_at_rest(planners))
        looks = len(planners)
        for seq in range(1, 11):
            write(db, 1, first=seq)
            eventually(lambda seq=seq: seen.count() == 3 + seq and is_at_rest(planners))
        # It follows on what is known; one or two looks are those of a change stream that has opened only now.
        assert len(planners) < looks + 5
        write(db, 3)
        eventually(lambda: seen.count() == 14)
    prove(seen.messages(), {0: 1, 1: 11, 2: 1, 3: 1})


def test_messages_of_many_producers_that_wait_are_planned_when_there_are_more(url, db, planners):
    mb.stream('s', url=url)
    write(db, 0, 1, 2)
    emitter, seen = emitter_of(url, size=5)
    with started(emitter):
        eventually(lambda: is_at_rest(planners))
        write(db, 0, 1, first=1)
        eventually(lambda: seen.count() == 5)


def test_messages_of_many_producers_that_wait_are_planned_when_their_time_has_come(url, db, planners):
    mb.stream('s', url=url)
    write(db, 0, 1, 2)
    emitter, seen = emitter_of(url, size=5, max_wait=0.5)
    with started(emitter):
        eventually(lambda: seen.count() == 3)


def test_where_the_logs_of_many_producers_begin_is_asked_once_and_not_for_each(url, db, planners, monkeypatch):
    stream = mb.stream('s', url=url)
    for source in range(3):
        write_at(db, 's', [clock.now()] * 5, source=source)
        store.delete_records(stream.target.majority, 's', store.Span(f'producer{source}', 0, 2))
    monkeypatch.setattr(store, 'first_kept', lambda *args: pytest.fail('asked for one'))
    emitter, seen = emitter_of(url, size=9)
    skip_to = planner.Progress.skip_to  # without asking again whether it is gone
    monkeypatch.setattr(planner.Planner, '_skip_to', lambda self, *args: skip_to(self.progress, *args))
    assert emitter._run_once() == 1
    assert sorted(seen.messages()) == [[source, seq] for source in range(3) for seq in (2, 3, 4)]
