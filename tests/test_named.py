"""Named producers: what a source has brought is stored with where it goes on, and goes on there."""
from __future__ import annotations

import logging
import random
import signal
import threading
from datetime import timedelta

import pytest
from processes import SCRIPTS, SEED, running
from servers import Mongod, eventually

import minibatch as mb
from minibatch import clock, named, settings, store
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError, CancelledError, OvertakenError
from minibatch.testing import InlineExecutor

NAME = 'outside/log'


@pytest.fixture
def stream(url):
    with mb.stream('test', url=url) as stream:
        yield stream


def messages(start, end):
    """Messages whose token is the number of the next one."""
    return [SourceMessage({'i': i}, token=i + 1) for i in range(start, end)]


def stored(db, name='test', producer=None):
    """The numbers in a stream, in the order of its producers' logs."""
    query = {'stream': name} if producer is None else {'stream': name, 'producer': producer}
    docs = db.buffer.find(query).sort([('producer', 1), ('offset', 1)])
    return [data['i'] for doc in docs for data in (doc['batch'] if 'batch' in doc else [doc['data']])]


def process_all(url, db):
    """Have a consumer group process and delete what is stored, and return what it saw."""
    seen = []
    emitter = mb.make_emitter(
        'test', lambda window: seen.extend(data['i'] for data in window.data), url=url, size=1, executor=InlineExecutor
    )
    while emitter._run_once():
        pass
    eventually(lambda: emitter._run_once() == 0 and not db.buffer.count_documents({'stream': 'test'}))
    return seen


def test_a_producer_of_the_same_name_goes_on_where_the_last_one_was(stream, db):
    first = stream.producer(NAME)
    assert first.token is None
    assert first.append_many(messages(0, 10)) == 10
    second = stream.producer(NAME)
    assert second.token == 10
    second.append({'i': 10}, meta={'a': 'b'}, token=11)
    assert stream.producer(NAME).token == 11
    assert stored(db) == list(range(11))
    assert {doc['producer'] for doc in db.buffer.find()} == {'source:outside/log'}


def test_each_record_batch_has_the_token_of_its_last_message(stream, db):
    stream.producer(NAME).append_many(messages(0, 2500))
    assert [(doc['offset'], doc['n'], doc['token']) for doc in db.buffer.find().sort('offset', 1)] == [
        (0, 1000, 1000), (1000, 1000, 2000), (2000, 500, 2500),
    ]  # fmt: skip


def test_a_token_outlives_the_messages_that_are_processed_and_deleted(stream, db, url):
    producer = stream.producer(NAME)
    producer.append_many(messages(0, 10))
    assert process_all(url, db) == list(range(10))
    assert stream.producer(NAME).token == 10
    stream.producer(NAME).append_many(messages(10, 12))
    assert process_all(url, db) == [10, 11]


def test_the_dead_letters_of_a_source_are_kept_for_30_days_or_as_long_as_their_stream_says(url, db):
    for name, expected in (('one', 30 * 86400), ('two', 60)):
        stream = mb.stream(name, url=url)
        if expected == 60:
            mb.stream('two.dead_letters', url=url, max_age=60)
        stream.producer(NAME).append_many([SourceMessage(b'', error='unreadable', token=1)])
        assert db.stream.find_one({'name': f'{name}.dead_letters'})['max_age'] == expected
        assert (stream.target, f'{name}.dead_letters') in settings._tended


def test_a_token_outlives_messages_that_expire(stream, db):
    stream.producer(NAME).append_many(messages(0, 10))
    assert store.delete_older(stream.target.majority, 'test', clock.now() + timedelta(seconds=10)) == (10, None)
    assert stream.producer(NAME).token == 10
    assert stream.producer(NAME)._offset == 10


def test_a_token_outlives_the_clearing_of_a_stream(stream, db):
    stream.producer(NAME).append_many(messages(0, 10))
    assert stream.clear() == 10
    assert stream.producer(NAME).token == 10
    assert stream.producer(NAME)._offset == 10


def test_a_stream_that_is_deleted_leaves_tombstones_of_its_groups_alone(stream, db, url):
    stream.producer(NAME).append_many(messages(0, 10))
    process_all(url, db)
    stream.producer(NAME).append_many(messages(10, 12))
    assert stream.delete() == 2
    left = {name: list(db[name].find()) for name in db.list_collection_names()}
    assert {name for name, docs in left.items() if docs} == {'group'}
    assert [group['deleted'] for group in left['group']]
    assert mb.stream('test', url=url).producer(NAME).token is None


def test_a_token_saved_without_a_message_is_the_one_to_go_on_from(stream, db):
    producer = stream.producer(NAME)
    producer.append_many(messages(0, 10))
    producer.save(25)
    assert stream.producer(NAME).token == 25
    producer.append_many([SourceMessage({'i': 30}, token=31)])
    assert stream.producer(NAME).token == 31
    assert stored(db) == [*range(10), 30]


def test_the_other_of_two_producers_of_one_name_is_told_and_can_go_on(stream, db):
    one, other = stream.producer(NAME), stream.producer(NAME)
    one.append_many(messages(0, 10))
    with pytest.raises(OvertakenError, match='source:outside/log'):
        other.append_many(messages(0, 5))
    assert other.token == 10
    other.append_many(messages(10, 12))
    assert stored(db) == list(range(12))


def test_a_producer_that_has_slept_looks_before_it_writes_behind_what_was_processed(stream, db, url, monkeypatch):
    sleeper = stream.producer(NAME)
    stream.producer(NAME).append_many(messages(0, 10))
    process_all(url, db)
    monkeypatch.setattr(named, 'AWAKE', 0.0)
    with pytest.raises(OvertakenError):
        sleeper.append_many(messages(0, 5))
    assert stored(db) == []


def test_two_processes_that_read_the_same_neither_lose_nor_double(stream, db, url):
    """Both bring the same 3000 messages, each starting again from the token when the other was faster."""

    def bring(seed):
        chance = random.Random(seed)
        with mb.stream('test', url=url) as own:
            while True:
                producer = own.producer(NAME)
                at = producer.token or 0
                while at < 3000:
                    upto = min(at + chance.randint(1, 50), 3000)
                    try:
                        producer.append_many(messages(at, upto))
                        at = upto
                    except OvertakenError:
                        at = producer.token or 0
                return

    threads = [threading.Thread(target=bring, args=(SEED + i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stored(db) == list(range(3000)), f'seed {SEED}'


def test_messages_that_cannot_be_appended_are_in_the_dead_letter_stream_once(stream, db, caplog):
    bad = [
        SourceMessage(b'\xff{', {'at': 1}, 2, 'not JSON'),
        SourceMessage({'$ref': 'a'}, None, 3),
        SourceMessage(object(), object(), 4),
    ]
    with caplog.at_level(logging.WARNING):
        assert stream.producer(NAME).append_many([*messages(0, 1), *bad, *messages(4, 6)]) == 3
    assert stored(db) == [0, 4, 5]
    letters = [data for doc in db.buffer.find({'stream': 'test.dead_letters'}) for data in doc['batch']]
    assert letters[0] == {'error': 'not JSON', 'data': b'\xff{'}
    assert '$ref' in letters[1]['error']
    assert 'must be a mapping' in letters[2]['error']
    assert letters[2]['data'].startswith('<object object')
    assert [record.message for record in caplog.records] == [
        "stream 'test': 3 messages of a source, such as one with 'not JSON', could not be appended; they are in the "
        "stream 'test.dead_letters'"
    ]
    again = stream.producer(NAME)
    assert again.token == 6
    again.token = None
    again.append_many(bad)  # as after a crash between the two writes
    assert db.buffer.count_documents({'stream': 'test.dead_letters'}) == 1


def test_the_token_of_a_message_that_cannot_be_appended_counts_too(stream):
    stream.producer(NAME).append_many([*messages(0, 3), SourceMessage(b'?', token=4, error='?')])
    assert stream.producer(NAME).token == 4


def test_a_producer_without_a_name_is_a_new_one(stream, db):
    for _ in range(2):
        producer = stream.producer()
        assert producer.token is None
        producer.append_many([SourceMessage({'i': i}) for i in range(3)])
    assert len(db.buffer.distinct('producer')) == 2


def test_the_name_of_a_producer_is_checked(stream):
    with pytest.raises(ArgumentError, match='the name of a producer'):
        stream.producer('')


class Waiting:
    """A source that appends until it is cancelled, and counts how often it was started."""

    def __init__(self):
        self.starts = 0

    def stream(self, stream):
        self.starts += 1
        producer = stream.producer(NAME)
        while True:
            producer.append({'i': 0}, token=1)

    def cancel(self):
        pass


def test_a_source_that_waits_for_room_ends_when_it_is_cancelled(url, db, caplog):
    with caplog.at_level(logging.WARNING), mb.stream('test', url=url, max_backlog=5) as stream:
        stream.attach(Waiting())
        eventually(lambda: any('a source waits' in record.message for record in caplog.records))
        assert db.buffer.count_documents({}) == 5
        stream.stop()
        assert not stream._attached.running


def test_a_batch_larger_than_the_room_is_stored_as_there_is_room(url, db):
    with mb.stream('test', url=url, max_backlog=5) as stream:
        producer = stream.producer(NAME)
        thread = threading.Thread(target=producer.append_many, args=(messages(0, 12),), daemon=True)
        thread.start()
        for kept in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]):
            eventually(lambda kept=kept: stored(db) == kept)
            stream.clear()
        thread.join(10)
        assert producer.token == 12


def test_a_cancelled_source_in_this_thread_is_told(url):
    with mb.stream('test', url=url, max_backlog=1) as stream:
        timer = threading.Timer(0.5, stream.stop)
        timer.start()
        with pytest.raises(CancelledError):
            stream.attach(Waiting(), background=False)
        timer.join()


def test_a_source_brings_all_although_mongod_is_killed_in_between():
    with Mongod() as server:
        url = server.url('test')
        stream = mb.stream('test', url=url)
        producer = stream.producer(NAME)
        done = threading.Event()

        def bring():
            for start in range(0, 5000, 10):
                producer.append_many(messages(start, start + 10))
            done.set()

        thread = threading.Thread(target=bring, daemon=True)
        thread.start()
        for kept in (100, 2000):
            eventually(lambda kept=kept: (producer.token or 0) > kept)
            server.kill()
            server.start()
        assert done.wait(120)
        assert stored(server.client['test']) == list(range(5000))


def test_a_process_that_is_killed_at_any_moment_neither_loses_nor_doubles(url, db):
    chance = random.Random(SEED)
    for i in range(50):
        with running(str(SCRIPTS / 'name.py'), url, str(SEED + i)) as process:
            before = db.buffer.count_documents({})
            wanted = before + chance.randint(5, 40)
            eventually(lambda wanted=wanted, process=process: (
                process.poll() is not None or db.buffer.count_documents({}) > wanted
            ))  # fmt: skip
            process.send_signal(signal.SIGKILL)
            process.wait()
        if mb.stream('test', url=url).producer(NAME).token == 2000:
            break
    assert stored(db) == list(range(2000)), f'seed {SEED}'


def test_one_that_waited_for_room_while_others_went_on_is_told(url, db, monkeypatch):
    monkeypatch.setattr(named, 'AWAKE', 0.0)
    with mb.stream('test', url=url, max_backlog=2) as stream:
        stream.producer('other').append_many([SourceMessage({'i': i}) for i in (-1, -2)])
        sleeper, told = stream.producer(NAME), []

        def wait():
            try:
                sleeper.append_many(messages(5, 7))
            except OvertakenError as exc:
                told.append(exc)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        eventually(lambda: sleeper._waits._next)
        mb.stream('test', url=url)
        with mb.stream('free', url=url) as free:  # the same log, without the limit
            free.name = 'test'
            free.producer(NAME).append_many(messages(0, 3))
        stream.clear()
        thread.join(20)
        assert told
        assert sleeper.token == 3
        assert stored(db) == []


@pytest.mark.parametrize(
    'message',
    [
        SourceMessage(b'x', token=1, error='file \udcff'),
        SourceMessage({'a' * 5_000_000 + '\0': 1}, token=1),
        SourceMessage({'a': 'x' * ((16 << 20) - 8222)}, token={'seen': b'x' * 80_000}),
        SourceMessage({'a': 'x' * (16 << 20)}, {'file': 'a'}, 1),
    ],
    ids=['error', 'key', 'token', 'size'],
)
def test_whatever_a_message_is_it_does_not_stop_the_source(stream, db, message):
    producer = stream.producer(NAME)
    assert producer.append_many([message, SourceMessage({'i': 1}, token=2)]) == 1
    assert stored(db) == [1]
    assert db.buffer.count_documents({'stream': 'test.dead_letters'}) == 1


def test_a_message_whose_repr_fails_is_a_dead_letter(stream, db):
    class Mean:
        def __repr__(self):
            raise RuntimeError('no')

    stream.producer(NAME).append_many([SourceMessage(Mean(), token=1)])
    assert db.buffer.find_one({'stream': 'test.dead_letters'})['data']['data'] == '<Mean>'


@pytest.mark.parametrize('error', ['', 'bad'])
def test_a_token_that_mongodb_cannot_store_is_named_and_nothing_is_stored(stream, db, error):
    with pytest.raises(ArgumentError, match='cannot store the token'):
        stream.producer(NAME).append_many([SourceMessage({'i': 1}), SourceMessage({'i': 2}, None, object(), error)])
    assert stored(db) == []


def test_what_is_bad_in_a_log_made_anew_is_a_dead_letter_again(stream, db):
    producer = stream.producer(NAME)
    producer.append_many([SourceMessage(b'?', token=101, error='?')])
    producer.save(10)
    producer.append_many([SourceMessage(b'?', token=11, error='?')])
    assert [doc['token'] for doc in db.buffer.find({'stream': 'test.dead_letters'}).sort('offset', 1)] == [101, 11]
