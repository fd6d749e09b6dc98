"""Time as an argument."""

from datetime import datetime, timedelta, timezone

from minibatch.clock import EPOCH, ServerClock, aware, window_start


def at(seconds):
    return EPOCH + timedelta(seconds=seconds)


def test_a_time_on_the_edge_begins_a_window():
    assert window_start(at(10), 5) == at(10)
    assert window_start(at(9.999), 5) == at(5)


def test_windows_before_1970_are_aligned_as_those_after():
    assert window_start(at(-1), 5) == at(-5)


def test_intervals_may_be_fractions_of_a_second():
    assert window_start(at(0.75), 0.5) == at(0.5)


def test_a_naive_time_is_read_as_utc():
    assert aware(datetime(2020, 1, 1)) == datetime(2020, 1, 1, tzinfo=timezone.utc)


def test_the_servers_time_goes_on_with_the_monotonic_clock():
    clock = ServerClock(at(100), monotonic=5)
    assert clock.at(7.5) == at(102.5)


def test_the_servers_time_never_goes_backwards():
    clock = ServerClock(at(100), monotonic=5)
    clock.adjust(at(101), monotonic=7)
    assert clock.at(7) == at(102)
    clock.adjust(at(110), monotonic=7)
    assert clock.at(7) == at(110)
