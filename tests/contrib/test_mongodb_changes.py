"""MongoReplicasetSource on a real replica set: what its messages say, and how it goes on when that is not simple."""
from __future__ import annotations

import random
import threading
import time
from datetime import datetime, timedelta, timezone

import bson
import pytest
from bringing import await_numbers, brought, messages, numbers, running
from bson import ObjectId
from processes import SEED
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from servers import Mongod, eventually

import minibatch as mb
from minibatch.contracts import SourceContract
from minibatch.contrib.mongodb import MongoReplicasetSource, changes
from minibatch.errors import ArgumentError, ServerError


def place(db):
    """The last token that was saved without a message."""
    return (db.source.find_one() or {}).get('token')


def started(db):
    """Wait until a source has begun, so that what is changed from now on is a change to it."""
    return eventually(lambda: place(db))


class TestMongoReplicasetSource(SourceContract):
    def make(self):
        return MongoReplicasetSource(self.things, start='earliest')

    def send(self, numbers):
        self.things.insert_many([{'i': i} for i in numbers])

    @pytest.fixture(autouse=True)
    def _server(self, url, things):
        self.url, self.things = url, things


def test_an_insert_is_the_document_and_says_so(url, db, things):
    with running(MongoReplicasetSource(things), url):
        started(db)
        before = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=5)
        things.insert_one({'_id': 'a', 'i': 1})
        things.update_one({'_id': 'a'}, {'$set': {'i': 2}})
        things.delete_one({'_id': 'a'})
        things.insert_one({'_id': {'b': 1}, 'i': 3})
        await_numbers(db, [1, 3])
    (one, about_one), (other, about_other) = messages(db)
    assert (one, other) == ({'_id': 'a', 'i': 1}, {'_id': {'b': 1}, 'i': 3})
    assert [about.pop('time') > before for about in (about_one, about_other)] == [True, True]
    assert (about_one, about_other) == ({'operation': 'insert', 'id': 'a'}, {'operation': 'insert', 'id': {'b': 1}})


def test_updates_and_deletes_have_the_same_shape(url, db, things):
    things.insert_many([{'_id': i, 'n': 0} for i in range(3)])
    with running(MongoReplicasetSource(things, updates=True, deletes=True), url):
        started(db)
        things.update_one({'_id': 0}, {'$set': {'n': 1}})
        things.replace_one({'_id': 1}, {'n': 2})
        things.delete_one({'_id': 2})
        things.insert_one({'_id': 3, 'n': 3})
        eventually(lambda: len(brought(db)) == 4)
    assert [(about['operation'], about['id'], data) for data, about in messages(db)] == [
        ('update', 0, {'_id': 0, 'n': 1}), ('update', 1, {'_id': 1, 'n': 2}), ('delete', 2, {'_id': 2}),
        ('insert', 3, {'_id': 3, 'n': 3}),
    ]  # fmt: skip


def test_the_update_of_a_document_that_is_gone_brings_nothing(url, db, things):
    things.insert_one({'_id': 0})
    with running(MongoReplicasetSource(things, updates=True), url) as stream:
        started(db)
        stream.stop()
        things.update_one({'_id': 0}, {'$set': {'n': 1}})
        things.delete_one({'_id': 0})
        things.insert_one({'_id': 1, 'i': 1})
        stream.attach(MongoReplicasetSource(things, updates=True))
        await_numbers(db, [1])


def test_an_update_of_a_document_of_more_than_half_the_limit_is_brought(url, db, things):
    things.insert_one({'_id': 0, 'text': 'a' * 9_000_000})
    with running(MongoReplicasetSource(things, updates=True), url):
        started(db)
        things.update_one({'_id': 0}, {'$set': {'text': 'b' * 9_000_000, 'i': 1}})
        await_numbers(db, [1])
    assert [about['operation'] for _, about in messages(db)] == ['update']


def test_what_has_come_is_appended_without_waiting_for_more(url, db, things, monkeypatch):
    monkeypatch.setattr(changes, 'AWAIT_MS', 4000)
    with running(MongoReplicasetSource(things), url):
        started(db)
        for i in range(3):
            began = time.monotonic()
            things.insert_one({'i': i})
            await_numbers(db, range(i + 1))
            assert time.monotonic() - began < 3, 'it was waited with'


def test_no_more_is_read_ahead_than_fits_into_memory_comfortably(url, db, things):
    source = MongoReplicasetSource(things)
    at = source._now()
    things.insert_many([{'i': i, 'text': 'x' * 6_000_000} for i in range(8)])
    with changes._reading(source._watch({'start': at}), 1000) as reader:
        eventually(reader._is_full)
        events, idle = reader.take(1)
        assert (len(events), idle) == (3, None)


def test_a_source_that_never_brought_anything_has_its_start_nevertheless(url, db, things, monkeypatch):
    monkeypatch.setattr(changes, 'SAVE_PAUSE', 1000.0)
    with running(MongoReplicasetSource(things), url):
        started(db)
    things.insert_many([{'i': i} for i in range(100)])
    with running(MongoReplicasetSource(things), url):
        await_numbers(db, range(100))


def test_the_position_moves_on_while_other_collections_change(url, db, things, monkeypatch):
    monkeypatch.setattr(changes, 'SAVE_PAUSE', 0.2)
    with running(MongoReplicasetSource(things), url):
        started(db)
        things.insert_one({'i': 1})
        first = eventually(lambda: place(db) if 'resume' in (place(db) or {}) else None)
        db.other.insert_one({})
        eventually(lambda: place(db)['resume']['_data'] > first['resume']['_data'])
        things.insert_one({'i': 2})
        await_numbers(db, [1, 2])
    with running(MongoReplicasetSource(things), url):
        things.insert_one({'i': 3})
        await_numbers(db, [1, 2, 3])


def test_it_starts_just_behind_a_time_of_the_server(mongod, url, db, things):
    source = MongoReplicasetSource(things)
    with mb.stream('test', url=url) as stream, mongod.client.start_session() as session:
        producer = stream.producer(source._find_name())
        things.insert_one({'i': 0}, session=session)
        before = session.operation_time
        things.insert_one({'i': 1})
        producer.save(changes._behind(before))
    with running(source, url):
        things.insert_one({'i': 2})
        await_numbers(db, [1, 2])


def test_a_client_whose_only_connection_the_change_stream_would_hold_is_refused(url):
    with MongoClient(url + '&maxPoolSize=1') as client, pytest.raises(ArgumentError, match='maxPoolSize=1'):
        MongoReplicasetSource(client.db.things)


def test_a_standalone_is_told_to_use_the_other_source(standalone, standalone_url):
    things = standalone.client.get_database(standalone_url.rsplit('/', 1)[1].split('?')[0]).things
    with mb.stream('test', url=standalone_url) as stream, pytest.raises(ArgumentError, match='is a standalone'):
        stream.attach(MongoReplicasetSource(things), background=False)


@pytest.mark.parametrize(('options', 'why'), [
    ({'viewOn': 'others', 'pipeline': []}, r'things is a view.* follow test_\w+\.others'),
    ({'timeseries': {'timeField': 'at'}}, r"things is a time series.* MongoSource with idcol='at'"),
])  # fmt: skip
@pytest.mark.parametrize('start', ['now', 'earliest'])
def test_what_has_no_change_stream_gets_advice_when_it_is_attached(url, db, things, options, why, start):
    db.create_collection('things', **options)
    with mb.stream('test', url=url) as stream, pytest.raises(ArgumentError, match=why):
        stream.attach(MongoReplicasetSource(things, start=start), background=False)


@pytest.mark.parametrize(('database', 'name'), [('local', 'oplog.rs'), ('admin', 'things'), ('test', 'system.views')])
def test_collections_of_mongodb_itself_are_refused(mongod, url, database, name):
    with mb.stream('test', url=url) as stream, pytest.raises(ArgumentError, match=f'{name} belongs to MongoDB'):
        stream.attach(MongoReplicasetSource(mongod.client[database][name]), background=False)


def test_what_the_server_refuses_is_said_in_its_words_alone(url, things, monkeypatch):
    monkeypatch.setattr(MongoReplicasetSource, '_check_collection', lambda self: things.database.command('nothing'))
    with mb.stream('test', url=url) as stream, pytest.raises(ServerError, match=r"things: no such command: 'nothing'$"):
        stream.attach(MongoReplicasetSource(things), background=False)


@pytest.mark.parametrize(('wrong', 'why'), [
    ({'collection': 'things'}, 'collection must be'), ({'size': 0}, 'size must be'),
    ({'updates': 1}, 'updates must be'),
    ({'deletes': 'yes'}, 'deletes must be True or False'), ({'start': 'then'}, "start must be 'now' or 'earliest'"),
    ({'name': ''}, 'name must be'),
])  # fmt: skip
def test_wrong_arguments_of_a_following_source_are_refused_by_name(db, wrong, why):
    with pytest.raises(ArgumentError, match=why):
        MongoReplicasetSource(**{'collection': db.things, **wrong})


# --- the collection comes and goes


def test_after_a_drop_the_next_collection_of_the_name_is_followed(url, db, things, warnings):
    with running(MongoReplicasetSource(things, deletes=True), url):
        started(db)
        for i in range(3):
            things.insert_one({'_id': 1, 'i': 2 * i})
            things.drop()
            things.insert_one({'_id': 1, 'i': 2 * i + 1})
            things.rename(f'renamed{i}')
        things.insert_one({'_id': 1, 'i': 6})
        assert await_numbers(db, range(7)) == list(range(7))
    with running(MongoReplicasetSource(things), url):
        things.insert_one({'i': 7})
        await_numbers(db, range(8))
    assert sum('was dropped or renamed' in said for said in warnings()) == 6


def test_a_drop_while_the_source_is_away_is_passed(url, db, things):
    with running(MongoReplicasetSource(things), url):
        started(db)
    things.insert_one({'i': 0})
    things.drop()
    things.insert_one({'i': 1})
    with running(MongoReplicasetSource(things), url):
        await_numbers(db, range(2))


@pytest.mark.parametrize('away', [False, True], ids=['', 'away'])
def test_a_collection_that_replaces_it_is_brought_as_a_whole(url, db, things, warnings, away):
    db.other.insert_many([{'i': i} for i in range(10, 20)])
    with running(MongoReplicasetSource(things), url) as stream:
        started(db)
        things.insert_many([{'i': i} for i in range(10)])
        await_numbers(db, range(10))
        if away:
            stream.stop()
        list(db.other.aggregate([{'$out': 'things'}]))
        if away:
            stream.attach(MongoReplicasetSource(things))
        await_numbers(db, range(20))
        things.insert_one({'i': 20})
        await_numbers(db, range(21))
    assert [about['operation'] for _, about in messages(db)] == ['insert'] * 10 + ['rescan'] * 10 + ['insert']
    assert any('was replaced by another one' in said for said in warnings())


# --- a rescan


IDS = [1, 2.5, 'a', 'b', ObjectId(), {'a': 1}, b'', True, datetime(2026, 1, 1), float('nan'), float('inf'), None]


@pytest.mark.parametrize('size', [1, 5, 1000])
def test_a_rescan_brings_ids_of_all_types_in_their_order_also_over_restarts(url, db, things, size):
    things.insert_many([{'_id': id_, 'i': i} for i, id_ in enumerate(IDS)])
    for wanted in (4, 8, 12):
        with running(MongoReplicasetSource(things, size=size, start='earliest'), url):
            eventually(lambda wanted=wanted: len(brought(db)) >= wanted)
    await_numbers(db, range(12))
    assert [data['i'] for data in brought(db)] == [doc['i'] for doc in things.find().sort('_id', 1)]
    assert all(about['operation'] == 'rescan' for _, about in messages(db))


@pytest.mark.parametrize('snapshot', [True, False])
def test_a_rescan_of_documents_of_more_than_half_the_limit_brings_them_all(db, things, snapshot):
    things.insert_many([{'_id': i, 'text': 'x' * 9_000_000} for i in range(4)])
    source = MongoReplicasetSource(things)
    scan, found = {'at': source._now(), 'snapshot': snapshot}, []
    while page := source._page(scan):
        found += [doc['_id'] for doc in page]
        scan['after'] = bson.encode({'_id': found[-1]})
    assert found == [0, 1, 2, 3]


def test_a_rescan_beside_writers_and_restarts_doubles_nothing(url, db, things):
    things.insert_many([{'_id': i, 'i': i} for i in range(0, 20_000, 2)])
    chance, ended = random.Random(SEED), threading.Event()

    def write():
        for i in chance.sample(range(1, 20_000, 2), 1000):
            things.insert_one({'_id': i, 'i': i})
            written.append(i)
        ended.set()

    written = []
    writer = threading.Thread(target=write)
    with mb.stream('test', url=url) as stream:
        stream.attach(MongoReplicasetSource(things, size=100, start='earliest'))
        started(db)
        writer.start()
        while not ended.is_set():
            ended.wait(chance.uniform(0.05, 0.3))
            stream.stop()
            stream.attach(MongoReplicasetSource(things, size=100, start='earliest'))
        writer.join()
        await_numbers(db, [*range(0, 20_000, 2), *written])
    operations = [about['operation'] for _, about in messages(db)]
    assert set(operations) == {'rescan', 'insert'}
    assert operations == sorted(operations, reverse=True)


@pytest.mark.parametrize('how', ['earliest', 'renamed'])
def test_a_capped_collection_is_brought_and_followed(url, db, things, warnings, monkeypatch, how):
    monkeypatch.setattr(changes, 'SNAPSHOT_PAUSE', 0.01)
    db.create_collection('things' if how == 'earliest' else 'others', capped=True, size=1 << 20)
    db['things' if how == 'earliest' else 'others'].insert_many([{'i': i} for i in range(25)])
    source = MongoReplicasetSource(things, size=10, start='earliest' if how == 'earliest' else 'now')
    with running(source, url):
        if how == 'renamed':
            eventually(lambda: db.source.count_documents({}))
            things.insert_one({'i': -1})
            await_numbers(db, [-1])
            db.others.rename('things', dropTarget=True)
        await_numbers(db, range(25) if how == 'earliest' else range(-1, 25))
        eventually(lambda: 'scan' not in db.source.find_one()['token'])  # what comes meanwhile may come twice
        things.insert_one({'i': 25})
        await_numbers(db, range(26) if how == 'earliest' else range(-1, 26))
    assert any('may come twice' in said for said in warnings())


def test_a_rescan_that_can_no_longer_be_at_one_moment_goes_on_as_it_can(url, db, things, warnings, monkeypatch):
    things.insert_many([{'_id': i, 'i': i} for i in range(100)])
    source, page = MongoReplicasetSource(things, size=10, start='earliest'), MongoReplicasetSource._page

    def too_old(self, scan):
        if scan['snapshot'] and 'after' in scan and bson.decode(scan['after'])['_id'] >= 49:
            things.insert_one({'_id': 100, 'i': 100})
            raise OperationFailure('SnapshotTooOld', 239)
        return page(self, scan)

    monkeypatch.setattr(MongoReplicasetSource, '_page', too_old)
    with running(source, url):
        eventually(lambda: numbers(db).count(100) == 2)
    assert sorted(numbers(db)) == [*range(101), 100]
    assert any('may come twice' in said for said in warnings())


def test_a_collection_younger_than_the_rescan_that_was_to_read_it_is_brought_once(url, db, things):
    with mb.stream('test', url=url) as stream:
        source = MongoReplicasetSource(things, start='earliest')
        stream.producer(source._find_name()).save(changes._scan(source._now()))
    things.insert_many([{'i': i} for i in range(10)])
    with running(source, url):
        await_numbers(db, range(10))
        things.insert_one({'i': 10})
        await_numbers(db, range(11))


# --- history that is lost


@pytest.fixture(scope='module')
def forgetful():
    """A server that forgets its changes soon after: a small oplog, and a checkpoint each second."""
    with Mongod('--syncdelay', '1') as server:
        yield server


def make_forget(server):
    """Write until the changes up to now are forgotten."""
    oplog = server.client.local['oplog.rs']
    last = oplog.find_one(sort=[('$natural', -1)])['ts']
    deadline = time.monotonic() + 60
    while oplog.find_one(sort=[('$natural', 1)])['ts'] <= last:
        server.client.junk.junk.insert_many([{'text': 'x' * 100_000} for _ in range(50)])
        assert time.monotonic() < deadline, 'the server forgets nothing'


@pytest.mark.integration
def test_lost_history_is_reported_and_all_documents_are_brought_again(url, db, forgetful, warnings):
    things = forgetful.client.lost.things
    with running(MongoReplicasetSource(things, deletes=True), url):
        started(db)
        things.insert_many([{'_id': i, 'i': i} for i in range(10)])
        await_numbers(db, range(10))
    last = messages(db)[-1][1]['time']
    things.delete_one({'_id': 0})
    things.insert_many([{'_id': i, 'i': i} for i in range(10, 20)])
    make_forget(forgetful)
    with running(MongoReplicasetSource(things, size=3, deletes=True), url) as stream:
        eventually(lambda: len(brought(db)) >= 16)
        stream.stop()
        stream.attach(MongoReplicasetSource(things, size=3, deletes=True))
        eventually(lambda: len(brought(db)) >= 29)
        things.insert_one({'_id': 20, 'i': 20})
        eventually(lambda: 20 in numbers(db))
    assert numbers(db) == [*range(10), *range(1, 20), 20]
    assert [about['operation'] for _, about in messages(db)] == ['insert'] * 10 + ['rescan'] * 19 + ['insert']
    said = next(said for said in warnings() if 'has no longer all changes' in said)
    assert f'from {last} on' in said
    assert len([said for said in warnings() if 'has no longer all changes' in said]) == 1


@pytest.mark.integration
def test_a_position_of_another_server_is_history_that_is_lost(url, db, things, forgetful, warnings):
    with running(MongoReplicasetSource(forgetful.client.elsewhere.things, name='mine'), url):
        started(db)
        forgetful.client.elsewhere.things.insert_one({'i': 0})
        await_numbers(db, [0])
    things.insert_many([{'i': i} for i in range(1, 10)])
    with running(MongoReplicasetSource(things, name='mine'), url):
        await_numbers(db, range(10))
    assert any('has no longer all changes' in said for said in warnings())


def test_a_change_that_is_too_large_for_an_event_is_recovered_as_lost_history_is(url, db, things, warnings):
    with running(MongoReplicasetSource(things), url):
        started(db)
        things.insert_one({'_id': 1, 'i': 1})
        things.insert_one({'_id': 'x' * 3_500_000, 'text': 'x' * 4_000_000, 'i': 3})
        things.insert_one({'_id': 2, 'i': 2})
        eventually(lambda: {2, 3} <= set(numbers(db)), 40)
        things.insert_one({'_id': 4, 'i': 4})
        eventually(lambda: 4 in numbers(db))
    assert sorted(numbers(db)[:-1]) == [1, 1, 2, 3]  # 2 may have come before the rescan
    assert numbers(db)[-1] == 4
    assert any('(error 10334)' in said for said in warnings())
