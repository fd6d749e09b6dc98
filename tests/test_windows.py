"""Windows by key, event time, slide, gap and waiting time, on a real MongoDB."""
from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from processes import Seen, consumer, started, terminate, windows_seen, write_at
from servers import Mongod, eventually

import minibatch as mb
from minibatch import assign, ledger, store
from minibatch.errors import ArgumentError, TooManyWindowsError
from minibatch.testing import InlineExecutor, ListSource
from minibatch.window import WindowEmitter

START = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)


@pytest.fixture
def stream(url: str) -> mb.Stream:
    return mb.stream('test', url=url)


def place(window: mb.MessageWindow) -> dict[str, Any]:
    return {
        'number': window.number, 'key': window.key, 'start': window.start, 'end': window.end,
        'watermark': window.watermark, 'attempt': window.attempt, 'seen': [data['at'] for data in window.data],
    }  # fmt: skip


def emitter_of(stream: mb.Stream, fn: Any = place, **options: Any) -> WindowEmitter:
    return mb.make_emitter(stream.name, fn, stream=stream, **{'executor': InlineExecutor, **options})


def run(stream: mb.Stream, **options: Any) -> list[Any]:
    """What one round gives: (start, end, key, messages), times in seconds after START."""
    seen = Seen()
    emitter_of(stream, sink=seen, **options)._run_once()
    return [(after(each['start']), after(each['end']), each['key'], each['seen']) for each in seen]


def after(time: datetime | None) -> float | None:
    return None if time is None else (time - START).total_seconds()


def events(*items: tuple[float, str]) -> list[dict[str, Any]]:
    return [{'at': at, 'sensor': {'id': key}, 'time': START + timedelta(seconds=at)} for at, key in items]


EVENT = {'timestamp': 'time', 'key': 'sensor.id'}


# --- each kind, end to end


@pytest.mark.parametrize('batched', [True, False])
def test_windows_of_event_time_by_key(stream, batched):
    messages = events((1, 'x'), (2, 'y'), (11, 'x'), (9, 'x'), (30, 'y'))
    if batched:
        stream.append_many(messages)
    else:
        for message in messages:
            stream.append(message)
    expected = [(0, 10, 'x', [1, 9]), (0, 10, 'y', [2]), (10, 20, 'x', [11])]
    assert run(stream, interval=10, lateness=2, **EVENT) == expected


def test_event_time_without_a_key(stream):
    stream.append_many(events((1, 'x'), (12, 'y'), (9, 'y'), (30, 'x')))
    assert run(stream, interval=10, timestamp='time', lateness=3) == [(0, 10, None, [1, 9]), (10, 20, None, [12])]


def test_key_and_timestamp_may_be_functions(stream):
    stream.append_many(events((1, 'x'), (12, 'y'), (9, 'y'), (30, 'x')))
    options = {'timestamp': lambda data: START.timestamp() + data['at'], 'key': lambda data: (data['sensor']['id'], 1)}
    expected = [(0, 10, ('x', 1), [1]), (0, 10, ('y', 1), [9]), (10, 20, ('y', 1), [12])]
    assert run(stream, interval=10, lateness=3, **options) == expected


def test_sliding_windows(stream):
    stream.append_many(events((1, 'x'), (7, 'x'), (30, 'x')))
    expected = [(-5, 5, 'x', [1]), (0, 10, 'x', [1, 7]), (5, 15, 'x', [7])]
    assert run(stream, interval=10, slide=5, **EVENT) == expected


def test_sessions(stream):
    stream.append_many(events((1, 'x'), (2, 'y'), (5, 'x'), (9, 'x'), (20, 'x'), (60, 'y')))
    expected = [(2, 7, 'y', [2]), (1, 14, 'x', [1, 5, 9]), (20, 25, 'x', [20])]
    assert run(stream, gap=5, **EVENT) == expected


def test_a_number_of_messages_or_what_there_is(stream):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, size=3, max_wait=0.3)):
        stream.append_many(events(*((at, 'x') for at in range(5))))
        eventually(lambda: [each['seen'] for each in seen] == [[0, 1, 2], [3, 4]])


def test_a_number_of_messages_of_a_key_or_what_there_is(stream):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, size=2, max_wait=0.3, key='sensor.id')):
        stream.append_many(events((0, 'x'), (1, 'y'), (2, 'x'), (3, 'x')))
        eventually(lambda: sorted(each['seen'] for each in seen) == [[0, 2], [1], [3]])
    assert {each['start'] for each in seen} == {None}


@pytest.mark.parametrize('options', [
    {'interval': 0.2, 'key': 'sensor.id'},
    {'interval': 0.2, 'key': 'sensor.id', 'relaxed': False},
    {'gap': 0.2}, {'gap': 0.2, 'key': 'sensor.id'},
])  # fmt: skip
def test_windows_by_the_time_of_creation_close_by_the_clock(stream, options):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, **options)):
        for turn in range(3):
            stream.append_many(events((3 * turn, 'x'), (3 * turn + 1, 'y'), (3 * turn + 2, 'x')))
            eventually(lambda: len([at for each in seen for at in each['seen']]) == 3 * turn + 3)  # noqa: B023
    assert sorted(at for each in seen for at in each['seen']) == list(range(9))
    if 'key' in options:
        assert {at % 3 for each in seen if each['key'] == 'y' for at in each['seen']} == {1}


def test_sliding_windows_by_the_time_of_creation_have_a_message_in_each_of_their_windows(stream):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, interval=0.4, slide=0.1)):
        stream.append_many(events((1, 'x'), (2, 'y')))
        eventually(lambda: Counter(at for each in seen for at in each['seen']) == {1: 4, 2: 4})


def test_a_window_says_its_key_and_watermark_and_so_does_its_document(stream):
    stream.append_many(events((1, 'x'), (13, 'x')))
    seen = Seen()
    emitter_of(stream, sink=seen, interval=10, keep=True, lateness=2, **EVENT)._run_once()
    assert [(each['key'], after(each['watermark'])) for each in seen] == [('x', 11)]
    (stored,) = stream.window(status='processed')
    assert (stored.key, stored.data[0]['at'], after(stored.load().watermark)) == ('x', 1, 11)


def test_in_worker_processes(stream):
    stream.append_many(events((1, 'x'), (2, 'y'), (30, 'x')))
    expected = [(0, 10, 'x', [1]), (0, 10, 'y', [2])]
    assert sorted(run(stream, interval=10, executor=None, workers=1, **EVENT)) == expected


def test_the_last_windows_of_a_stream_that_falls_silent_are_emitted_by_the_clock(stream):
    seen, now = Seen(), datetime.now(timezone.utc)
    with started(emitter_of(stream, sink=seen, interval=0.5, idle=0.2, **EVENT)):
        stream.append_many([{'at': i, 'sensor': {'id': key}, 'time': now} for i, key in enumerate('xyx')])
        eventually(lambda: len(seen) == 2)
    assert [each['seen'] for each in seen] == [[0, 2], [1]]


@pytest.mark.parametrize('options', [{'ordered': True}, {'workers': 2, 'executor': None}, {'max_attempts': 2}])
def test_late_and_bad_messages_are_in_nobodys_way(stream, options):
    seen = Seen()
    with started(emitter_of(stream, sink=seen, interval=1, **EVENT, **options)):
        for turn in range(20):
            messages = events((turn, 'x'), (turn + 0.5, 'y'), (turn - 10, 'late'), (0, 'bad'))
            messages[-1]['time'] = None
            stream.append_many(messages)
        eventually(lambda: sum(each['key'] != 'late' for each in seen) == 38)
        eventually(lambda: stream.group().failed == 20)
    in_time = sorted(at for each in seen for at in each['seen'] if each['key'] != 'late')
    assert in_time == [at / 2 for at in range(38)]


# --- the end of the input


@pytest.mark.parametrize(('options', 'first', 'then'), [
    ({'interval': 10, **EVENT}, [[1], [2], [25]], [[28], [33]]),
    ({'gap': 5, **EVENT}, [[1], [2], [25]], [[28], [33]]),
    ({'size': 2}, [[1, 2], [25]], [[28, 33]]),
    ({'interval': 3600}, [[1, 2, 25]], [[28, 33]]),
])  # fmt: skip
def test_until_done_processes_all_that_is_there_and_what_comes_tomorrow_is_not_late(stream, db, options, first, then):
    for messages, expected in (((1, 'x'), (2, 'y'), (25, 'x')), first), (((28, 'x'), (33, 'x')), then):
        stream.append_many(events(*messages))
        seen = Seen()
        emitter_of(stream, sink=seen, **options).run(until_done=True)
        assert [each['seen'] for each in seen] == expected
        assert (stream.group().lag().messages, stream.group().late) == (0, 0)
    assert db.buffer.count_documents({}) == 0


def test_until_done_waits_for_the_end_of_its_source_and_for_windows_that_fail(stream):
    attempts = []

    def fails_once(window):
        attempts.append(window.number)
        if len(attempts) == 1:
            raise ValueError
        return place(window)

    class SlowSource(ListSource):
        def stream(self, to):
            eventually(lambda: stream.groups() and stream.group().owner)
            super().stream(to)

    seen, source = Seen(), SlowSource(events((1, 'x'), (2, 'y')))
    emitter_of(stream, fails_once, sink=seen, source=source, interval=10, **EVENT).run(until_done=True)
    assert sorted(each['seen'] for each in seen) == [[1], [2]]
    assert len(attempts) == 3


@pytest.mark.parametrize('options', [{'size': 1}, {'interval': 10, **EVENT}])
def test_until_done_ends_although_somebody_goes_on_appending(stream, options):
    stream.append_many(events((1, 'x'), (20, 'x')))
    seen = Seen()

    def append_another(window):
        if len(seen) < 100:
            stream.append_many(events((30, 'x')))
        return place(window)

    emitter_of(stream, append_another, sink=seen, **options).run(until_done=True)
    assert [each['seen'] for each in seen] == [[1], [20]]
    assert stream.group().lag().messages == 2


def test_until_done_is_refused_with_one_round(stream):
    with pytest.raises(ArgumentError, match='until_done=True goes on'):
        emitter_of(stream, size=1).run(blocking=False, until_done=True)


# --- what is late, and what is bad


def late_and_in_time(stream, **options):
    stream.append_many(events((1, 'x'), (30, 'x')))
    emitter = emitter_of(stream, sink=Seen(), interval=10, **EVENT, **options)
    assert emitter._run_once() == 1
    stream.append_many(events((2, 'x'), (31, 'x'), (5, 'y')))
    assert emitter._run_once() == 0


def test_late_messages_are_dropped_and_counted(stream, db):
    late_and_in_time(stream)
    group = stream.group()
    assert (group.late, group.windows, group.messages) == (2, 1, 1)
    assert group.lag().messages == 2
    assert stream.dead_letters() == []


def test_the_first_warning_of_late_messages_says_which_lateness_would_have_been_enough(stream, caplog):
    stream.append_many(events((1, 'x'), (300, 'x'), (2, 'x'), (3, 'x')))
    emitter_of(stream, interval=10, lateness=5, **EVENT)._run_once()
    (said,) = [record.message for record in caplog.records if 'closed' in record.message]
    assert '2 messages came when all their windows were closed, and are dropped; late=' in said
    assert 'lateness=291 would have waited for them, it is 5' in said
    stream.append_many(events((4, 'x')))
    emitter_of(stream, interval=10, lateness=291, group='patient', **EVENT)._run_once()
    assert (stream.group().late, stream.group('patient').late) == (2, 0)


def test_late_messages_go_to_the_stream_for_them_with_their_place_and_time(stream, url):
    late = mb.stream('late', url=url)
    late_and_in_time(stream, late=late)
    messages = []
    emitter_of(late, lambda window: messages.extend(window.messages), size=2)._run_once()
    assert [message.data['at'] for message in messages] == [2, 5]
    place = {'stream': 'test', 'producer': stream.buffer().first().producer}
    times = [(START + timedelta(seconds=at)).replace(tzinfo=None) for at in (2, 5)]
    assert [message.meta for message in messages] == [
        {**place, 'offset': offset, 'time': time} for offset, time in zip((2, 4), times, strict=True)
    ]
    assert stream.group().late == 2


def test_late_messages_wait_for_room_in_the_stream_for_them(stream, url, db):
    late = mb.stream('late', url=url, max_backlog=1, on_full='raise')
    late.append({})
    seen = Seen()
    stream.append_many(events((1, 'x'), (30, 'x')))
    with started(emitter_of(stream, sink=seen, interval=10, late=late, max_attempts=1, **EVENT)):
        eventually(lambda: seen)
        stream.append_many(events((2, 'x'), (45, 'x')))
        eventually(lambda: len(seen) == 2)
        assert db.window.find_one({'late': True, 'status': 'open', 'attempts': 1})
        assert stream.dead_letters() == []
        mb.stream('late', url=url, max_backlog=100)
        late.clear()
        eventually(lambda: db.buffer.count_documents({'stream': 'late', 'data.at': 2}) == 1)


def test_a_message_without_a_time_is_a_dead_letter_of_its_own_and_the_rest_goes_on(stream):
    messages = events((1, 'x'), (2, 'x'), (3, 'x'), (30, 'x'))
    messages[1]['time'] = 'yesterday'
    del messages[2]['sensor']['id']
    stream.append_many(messages)
    assert run(stream, interval=10, **EVENT) == [(0, 10, 'x', [1])]
    assert [(letter.error, letter.data[0]['at'], letter.key) for letter in stream.dead_letters()] == [
        ("timestamp: field 'time' is no time: 'yesterday'", 2, None), ("key: field 'sensor.id' is missing", 3, None),
    ]  # fmt: skip
    assert stream.group().failed == 2


def test_a_bad_message_can_be_replayed_as_a_window_of_its_own(stream):
    messages = events((1, 'x'), (30, 'x'))
    messages[0]['time'] = 'yesterday'
    stream.append_many(messages)
    assert run(stream, interval=10, **EVENT) == []
    assert stream.dead_letters().replay() == 1
    assert run(stream, interval=10, **EVENT) == [(None, None, None, [1])]
    assert stream.dead_letters() == []


def test_a_dead_letter_says_its_key(stream):
    def fail(window):
        raise ValueError

    stream.append_many(events((1, 'x'), (30, 'x')))
    emitter_of(stream, fail, interval=10, max_attempts=1, **EVENT)._run_once()
    (letter,) = stream.dead_letters()
    assert (letter.key, letter.load().key, letter.n) == ('x', 'x', 1)


# --- positions and restarts


def test_what_is_finished_behind_an_open_window_is_not_done_again_and_deleted_in_the_end(stream, db):
    stream.append_many(events((25, 'x'), (1, 'y'), (29, 'z')))
    stream.append_many(events((31, 'a'), (2, 'y'), (52, 'b')))
    options = {'interval': 10, 'lateness': 22, **EVENT}
    assert run(stream, **options) == [(0, 10, 'y', [1, 2]), (20, 30, 'x', [25]), (20, 30, 'z', [29])]
    assert ledger.read_positions(db, 'test', 'default') == {stream.buffer().first().producer: 3}
    assert run(stream, **options) == []
    stream.append_many(events((100, 'x')))
    assert run(stream, **options) == [(30, 40, 'a', [31]), (50, 60, 'b', [52])]
    assert stream.group().late == 0
    assert stream.group().lag().messages == 1
    assert (db.buffer.count_documents({}), db.window.count_documents({'status': {'$ne': 'void'}})) == (1, 0)


@pytest.mark.parametrize('then', ['discard', 'replay'])
def test_a_dead_letter_behind_an_open_window_that_is_no_more_does_not_come_again(stream, db, then):
    def fail(window):
        raise ValueError

    stream.append_many(events((25, 'x'), (1, 'y'), (20, 'z'), (26, 'x')))
    options = {'interval': 10, 'lateness': 16, **EVENT}
    emitter_of(stream, fail, max_attempts=1, **options)._run_once()
    assert getattr(stream.dead_letters(), then)() == 1
    assert run(stream, **options) == ([(0, 10, 'y', [1])] if then == 'replay' else [])
    assert run(stream, **options) == []
    stream.append_many(events((100, 'x')))
    assert run(stream, **options) == [(20, 30, 'x', [25, 26]), (20, 30, 'z', [20])]
    assert db.window.count_documents({'status': {'$ne': 'void'}}) == 0


def test_the_lag_counts_messages_of_overlapping_windows_once(stream, db):
    stream.append_many(events((9, 'x'), (1, 'x'), (2, 'x'), (100, 'x')))
    emitter = emitter_of(stream, interval=20, slide=10, sink=Failing(2), **EVENT)
    emitter._run_once()
    assert db.window.count_documents({'status': 'processed'}) == 1
    assert stream.group().lag().messages == 1


class Failing:
    """A sink that refuses one window."""

    def __init__(self, number):
        self.number = number

    def put(self, result):
        if result['number'] == self.number:
            raise OSError('full')


def test_another_kind_of_window_goes_on_without_losing_what_was_still_open(stream):
    stream.append_many(events((25, 'x'), (1, 'y'), (26, 'z'), (31, 'w'), (32, 'w')))
    assert run(stream, interval=10, timestamp='time', key='sensor.id', lateness=20) == [(0, 10, 'y', [1])]
    assert {at for *_, seen in run(stream, size=1) for at in seen} >= {25, 26, 31, 32}
    stream.append_many(events((50, 'x')))
    assert run(stream, size=1) == [(None, None, None, [50])]
    assert stream.group().lag().messages == 0


def test_too_many_open_windows_end_the_consumer_if_wanted(stream):
    stream.append_many(events((1, 'x'), (2, 'y'), (3, 'z')))
    with pytest.raises(TooManyWindowsError, match='max_open_windows'):
        run(stream, interval=10, max_open_windows=2, overflow='error', **EVENT)


def test_messages_that_expired_before_they_were_read_are_counted(stream, db):
    stream.append_many(events((1, 'x')))
    stream.append_many(events((2, 'x')))
    stream.append_many(events((30, 'x')))
    emitter = emitter_of(stream, interval=10, sink=(seen := Seen()), **EVENT)
    read, db_buffer = store.read_messages, db.buffer

    def gone_meanwhile(*args):
        db_buffer.delete_one({'offset': 1})
        return read(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, 'read_messages', gone_meanwhile)
        emitter._run_once()
    assert [each['seen'] for each in seen] == [[1]]
    assert stream.group().expired == 1


@pytest.mark.parametrize('interrupt', [
    ['SIGKILL', 'after', 'claim_windows', 2], ['SIGKILL', 'before', 'commit_windows', 2],
    ['SIGKILL', 'after', 'commit_windows', 2], ['SIGKILL', 'after', 'write_positions', 1],
    ['SIGKILL', 'before', 'delete_windows', 1],
])  # fmt: skip
def test_windows_of_event_time_by_key_are_exact_when_the_consumer_is_killed(url, db, stream, interrupt):
    options = {'key': 'source', 'timestamp': 'seq', 'interval': 20, 'slide': 10, 'lateness': 5, 'workers': 1}
    expected = {}
    for start in range(-10, 480, 10):
        for source in range(3):
            if seqs := [seq for seq in range(max(start, 0), start + 20) if seq % 3 == source]:
                expected[source, start] = seqs
    with consumer(url, 'test', interrupt=interrupt, **options) as process:
        for at in range(0, 300, 6):
            if at == 150:
                eventually(lambda: windows_seen(db) or process.poll() is not None)
            stream.append_many(message(seq) for seq in mixed(at))
        eventually(lambda: process.poll() is not None)
    with consumer(url, 'test', **options) as process:
        for at in range(300, 516, 6):
            stream.append_many(message(seq) for seq in mixed(at))
        eventually(lambda: db.seen.find_one({'end': datetime.fromtimestamp(490, timezone.utc)}), 30)
        eventually(lambda: len(windows_seen(db)) >= len(expected), 30)
        terminate(process)
    got = {}
    for calls in windows_seen(db).values():
        start = int(calls[0]['start'].replace(tzinfo=timezone.utc).timestamp())
        (source,) = {source for source, _ in calls[0]['seen']}
        if start + 20 <= 490:
            assert (source, start) not in got, 'a window twice'
            got[source, start] = sorted(seq for _, seq in calls[0]['seen'])
    assert got == {place: seqs for place, seqs in expected.items() if place[1] + 20 <= 490}
    assert mb.stream('test', url=url).group().late == 0


def mixed(at: int) -> list[int]:
    """Six numbers, out of order."""
    return [at + 4, at, at + 5, at + 2, at + 1, at + 3]


def message(seq: int) -> dict[str, int]:
    return {'source': seq % 3, 'seq': seq}


# --- cost


def test_a_thousand_windows_of_interleaved_keys_are_one_stretch_each_reading():
    spans = [store.Span('a', offset, offset + 1) for offset in range(0, 10_000, 100)]
    assert store._stretches([store.Span('a', s.start + key, s.end + key) for key in range(100) for s in spans]) == [
        store.Span('a', 0, 10_000)
    ]
    assert len(store._stretches(store.Span('a', at, at + 1) for at in (0, 200, 150))) == 2


def test_windows_of_100_interleaved_keys_read_each_record_batch_about_as_often_as_one_key(stream, monkeypatch):
    reads = Counter()
    real = store.read_records

    def counted(*args):
        records = real(*args)
        reads.update(record['offset'] for record in records)
        return records

    monkeypatch.setattr(store, 'read_records', counted)
    for start in range(0, 10_000, 1000):
        stream.append_many({'at': at, 'key': at % 100} for at in range(start, start + 1000))
    stream.append_many([{'at': 20_000, 'key': 0}])
    emitter = emitter_of(stream, timestamp='at', interval=20_000, key='key', workers=1)
    emitter._consumer.crew.seconds_per_window = 1e-5  # as known after the first tasks
    assert emitter._run_once() == 100
    assert max(reads.values()) <= 10


def test_a_backlog_is_read_in_chunks_and_windows_come_meanwhile(stream, db, monkeypatch):
    monkeypatch.setattr('minibatch.window.CHUNK', 500)
    write_at(db, 'test', [datetime.now(timezone.utc)] * 3, source='b')
    db.buffer.delete_many({})
    stream.append_many({'at': at, 'k': at % 7} for at in range(5000))
    assert len(run(stream, timestamp='at', interval=100, key='k')) == 49 * 7
    assert assign.MAX_AHEAD > 5000


@pytest.mark.parametrize('options', [{'timestamp': 'tiem'}, {'key': 'usr'}, {'key': lambda data: data['usr']}])
def test_a_name_that_no_message_has_is_taken_for_wrong_and_no_message_is_given_up(stream, db, options):
    stream.append_many({'time': n, 'user': n % 7} for n in range(3000))
    emitter = mb.make_emitter(stream.name, len, stream=stream, interval=10, executor=InlineExecutor, **options)
    with pytest.raises(ArgumentError, match=r'as in all of the first 1,000 messages'):
        emitter.run()
    assert db.dead.count_documents({}) == db.window.count_documents({}) == 0
    assert stream.groups()[0].lag().messages == 3000


def test_a_group_that_goes_on_with_another_kind_of_time_drops_nothing_and_makes_no_windows_of_the_past(stream, db):
    def go_on(items, **options):
        stream.append_many(events(*items))
        seen = Seen()
        with started(emitter_of(stream, sink=seen, **options)):
            eventually(lambda: any(each['seen'] for each in seen))
        return [each['seen'] for each in seen]

    go_on([(at, 'x') for at in range(5)], interval=0.1)
    event = {'interval': 5, 'timestamp': 'time', 'lateness': 10}
    assert go_on([(at, 'x') for at in (*range(5, 10), 100)], **event) == [list(range(5, 10))]
    assert len(go_on([(101, 'x')], interval=0.2, relaxed=False)) < 100
    assert db.group.find_one({'group': 'default'}).get('late', 0) == 0


def test_windows_go_on_while_the_stream_for_late_messages_does_not_answer(stream):
    with Mongod() as other:
        late, seen = mb.stream('late', url=other.url('late')), Seen()
        with started(emitter_of(stream, interval=5, late=late, sink=seen, **EVENT)) as emitter:
            stream.append_many(events((1, 'x'), (20, 'x')))
            eventually(lambda: seen)
            other.pause()
            try:
                stream.append_many(events((2, 'x'), (40, 'x')))
                eventually(lambda: len(seen) == 2)
                stream.append_many(events((60, 'x')))
                eventually(lambda: len(seen) == 3)
            finally:
                other.resume()
            eventually(lambda: late.buffer().count())
            assert [record.data['at'] for record in late.buffer()] == [2]
            assert emitter.error is None


def test_what_is_done_behind_a_window_that_stays_open_is_no_backlog(url):
    stream, seen = mb.stream('full', url=url, max_backlog=150, timeout=10), Seen()
    with started(emitter_of(stream, interval=1, sink=seen, **EVENT)):
        stream.append_many(events((10**10 / 4, 'x')))  # it waits for the clock for long
        for at in range(5):
            stream.append_many(events(*((at * 10 + i / 100, 'x') for i in range(50))))
            eventually(lambda: len(seen) >= at)  # noqa: B023


def test_a_flood_of_bad_messages_does_not_stop_a_group_that_has_done_something(stream, db):
    run(stream, interval=1, **EVENT)
    stream.append_many(events((1, 'x'), (5, 'x')))
    assert len(run(stream, interval=1, **EVENT)) == 1
    stream.append_many([{'at': 0}] * 1001)
    stream.append_many(events((10, 'x'), (20, 'x')))
    assert len(run(stream, interval=1, **EVENT)) == 2
    assert db.group.find_one({'group': 'default'})['failed'] == 1001
