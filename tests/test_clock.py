"""Time as an argument."""

from datetime import datetime, timedelta, timezone

import pytest

from minibatch.clock import EPOCH, ServerClock, aware, whole_ms, window_start


def at(seconds):
    return EPOCH + timedelta(seconds=seconds)


def test_a_time_on_the_edge_begins_a_window():
    assert window_start(at(10), 5000) == at(10)
    assert window_start(at(9.999), 5000) == at(5)


def test_windows_before_1970_are_aligned_as_those_after():
    assert window_start(at(-1), 5000) == at(-5)


def test_intervals_may_be_fractions_of_a_second():
    assert window_start(at(0.75), 500) == at(0.5)


@pytest.mark.parametrize(('seconds', 'ms'), [
    (0.001, 1), (1.001, 1001), (0.1 + 0.2, 300), (1e9, 10**12), (1 / 3, None), (0.0015, None), (3600.0001, None),
])  # fmt: skip
def test_seconds_are_milliseconds_or_they_are_not(seconds, ms):
    assert whole_ms(seconds) == ms


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
