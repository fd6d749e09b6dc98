"""MongoSink on a real MongoDB."""

import pickle
import subprocess
import sys
import threading
import uuid
from collections import Counter
from datetime import datetime

import pytest
from pymongo import MongoClient, WriteConcern, monitoring
from pymongo.errors import BulkWriteError
from servers import Mongod, Proxy, eventually

import minibatch as mb
from minibatch.abc import BulkSink, ExactlyOnceSink, Sink
from minibatch.contrib.mongodb import MongoReplicasetSource, MongoSink, MongoSource
from minibatch.contrib.mongodb import sink as mongodb
from minibatch.errors import ArgumentError, DataError, LeaseLostError, PortabilityError

WINDOW = 'numbers (+1.5)/default/7'


class CommandCounter(Counter, monitoring.CommandListener):
    """How often each command was sent."""

    def started(self, event):
        self[event.command_name] += 1

    def succeeded(self, event): ...

    def failed(self, event): ...


def stored(db):
    return list(db.results.find({}, {'_id': 0}))


def test_a_mapping_becomes_one_document(db):
    MongoSink(db.results).put({'total': 3})
    assert stored(db) == [{'total': 3}]


@pytest.mark.parametrize('iterable', [list, tuple, iter], ids=lambda kind: kind.__name__)
def test_an_iterable_of_mappings_becomes_one_document_each(db, iterable):
    MongoSink(db.results).put(iterable([{'a': 1}, {'a': 2}]))
    assert stored(db) == [{'a': 1}, {'a': 2}]


def test_an_empty_list_writes_nothing(db):
    MongoSink(db.results).put([])
    assert 'results' not in db.list_collection_names()


def test_an_empty_mapping_is_a_document(db):
    MongoSink(db.results).put({})
    assert stored(db) == [{}]


@pytest.mark.parametrize(('result', 'kind'), [(7, 'int'), ('text', 'str'), (b'bytes', 'bytes'), (None, 'NoneType')])
def test_anything_else_is_refused_by_the_name_of_its_type(db, result, kind):
    with pytest.raises(DataError, match=f'not {kind}$'):
        MongoSink(db.results).put(result)


def test_a_list_with_one_wrong_item_writes_nothing_and_names_the_item(db):
    with pytest.raises(DataError, match='item 1 is of type int'):
        MongoSink(db.results).put([{'a': 1}, 2])
    assert stored(db) == []


def test_the_documents_of_the_caller_get_no_id(db):
    results = [{'a': 1}, {'a': 2}]
    MongoSink(db.results).put(results)
    MongoSink(db.results).put(results[0])
    assert results == [{'a': 1}, {'a': 2}]


def test_an_id_the_function_chose_is_kept(db):
    MongoSink(db.results).put({'_id': 'mine'})
    assert db.results.find_one() == {'_id': 'mine'}


def write_concern(collection):
    return MongoSink(collection)._collection.write_concern.document


def test_results_are_written_at_majority_by_default(db):
    assert write_concern(db.results) == {'w': 'majority'}


def test_a_write_concern_of_the_client_stays(url):
    with MongoClient(url, w=1, journal=True) as client:
        assert write_concern(client.test.results) == {'w': 1, 'j': True}


def test_an_unacknowledged_collection_is_refused(db):
    with pytest.raises(ArgumentError, match='w=0'):
        MongoSink(db.get_collection('results', write_concern=WriteConcern(0)))


def test_a_database_is_no_collection(db):
    with pytest.raises(ArgumentError, match='not Database'):
        MongoSink(db)


def test_it_is_a_sink(db):
    assert isinstance(MongoSink(db.results), Sink)


def test_the_results_of_windows_arrive_in_the_collection(url, db):
    mb.stream('numbers', url=url).append_many({'a': i} for i in range(6))
    emitter = mb.make_emitter(
        'numbers', lambda window: {'total': sum(data['a'] for data in window.data)},
        url=url, size=2, workers=1, sink=MongoSink(db.results),
    )  # fmt: skip
    emitter.run(blocking=False)
    assert sorted(doc['total'] for doc in stored(db)) == [1, 5, 9]


# --- inserted a second time

ONCE = [{'_id': 'a', 'n': 1, 'of': {'x': [1, None]}}, {'_id': 'b', 'n': float('nan')}, {'_id': None, 'n': -0.0}]


def test_a_window_whose_insert_lost_its_reply_is_delivered_and_no_dead_letter(mongod, url, db):
    mb.stream('numbers', url=url).append_many({'_id': f'number {i}', 'a': i} for i in range(4))
    with Proxy(mongod.port) as proxy, MongoClient(proxy.url(db.name), retryWrites=False) as client:
        emitter = mb.make_emitter('numbers', url=url, size=2, workers=1, sink=MongoSink(client[db.name].results))
        happened = proxy.cut_reply(b'results')
        emitter.run(blocking=False)
        eventually(lambda: emitter.run(blocking=False) or db.window.count_documents({'status': 'open'}) == 0)
        assert happened.wait(10)
    assert [doc['a'] for doc in everything(db)] == [0, 1, 2, 3]
    assert not list(mb.stream('numbers', url=url).dead_letters())


@pytest.mark.parametrize('there', [1, 2, 3])
def test_documents_that_are_there_as_they_would_be_inserted_are_delivered(db, there):
    sink = MongoSink(db.results)
    sink.put(ONCE[:there])
    sink.put([*ONCE, {'n': 4}])
    assert [doc['_id'] for doc in db.results.find()][:3] == ['a', 'b', None]
    assert db.results.count_documents({}) == 4


@pytest.mark.parametrize(('index', 'doc'), [
    (['window', 'item'], {'window': WINDOW, 'item': 1}),
    (['of.day'], {'of': {'day': datetime(2026, 11, 28), 'id': uuid.UUID(int=7)}}),
    (['tags'], {'tags': ['a', 'b']}),
    (['missing'], {'a': 1}),
], ids=str)  # fmt: skip
def test_documents_that_a_unique_index_keeps_apart_are_inserted_once(url, index, doc):
    with MongoClient(url, uuidRepresentation='standard') as client:
        results = client.get_default_database().results
        results.create_index([(field, 1) for field in index], unique=True)
        MongoSink(results).put(doc)
        assert MongoSink(results).put_many([doc, doc], handles(2)) == 2
        assert stored(results.database) == [doc]


def test_another_document_under_the_same_key_is_refused_by_its_key(db):
    sink = MongoSink(db.results)
    sink.put([{'_id': 'a', 'n': 1}, {'_id': 'c', 'n': 1}])
    with pytest.raises(DataError, match=r'item 2 .* _id: "c" .* upsert='):
        sink.put([{'_id': 'a', 'n': 1}, {'_id': 'b', 'n': 1}, {'_id': 'c', 'n': 2}])
    assert [doc['n'] for doc in everything(db)] == [1, 1, 1]


def test_what_is_there_is_looked_up_many_documents_at_a_time(url, db):
    docs = [{'_id': i} for i in range(1200)]
    MongoSink(db.results).put(docs[:1100])
    commands = CommandCounter()
    with MongoClient(url, event_listeners=[commands]) as client:
        MongoSink(client[db.name].results).put(docs)
    assert db.results.count_documents({}) == 1200
    assert commands['find'] == 3
    assert commands['insert'] == 2


def test_many_windows_of_which_some_were_delivered_are_delivered(db):
    results = [{'_id': i, 'n': i} for i in range(4)]
    MongoSink(db.results).put(results[:2])
    assert MongoSink(db.results).put_many([*results, {'_id': 3, 'n': 7}, {'_id': 8}], handles(6)) == 4
    assert everything(db) == results


@pytest.mark.parametrize('once', [False, True], ids=['put', 'put_once'])
def test_documents_that_pass_a_unique_value_on_are_replaced_again_by_another_attempt(alone, once):
    alone.seats.create_index('seat', unique=True)
    sink = MongoSink(alone.seats, exactly_once=once, upsert='who')
    moves = [{'who': 'ann', 'seat': 1}, {'who': 'ann', 'seat': 2}, {'who': 'bob', 'seat': 1}]
    for _ in range(2):
        sink.put_once(moves, Commit(alone)) if once else sink.put(moves)
        assert list(alone.seats.find({}, {'_id': 0})) == moves[1:]


# --- replaced by key


def test_a_document_replaces_the_one_with_the_same_key(db):
    sink = MongoSink(db.results, upsert='sensor')
    sink.put([{'sensor': 'a', 'value': 1, 'old': True}, {'sensor': 'b', 'value': 1}])
    sink.put({'sensor': 'a', 'value': 2})
    assert stored(db) == [{'sensor': 'a', 'value': 2}, {'sensor': 'b', 'value': 1}]


def test_several_fields_are_one_key(db):
    sink = MongoSink(db.results, upsert=['sensor', 'day'])
    sink.put([{'sensor': 'a', 'day': 1, 'v': 1}, {'sensor': 'a', 'day': 2, 'v': 1}, {'sensor': 'b', 'day': 1, 'v': 1}])
    sink.put([{'sensor': 'a', 'day': 2, 'v': 2}])
    assert [doc['v'] for doc in stored(db)] == [1, 2, 1]


def test_of_two_documents_with_the_same_key_the_last_stays(db):
    MongoSink(db.results, upsert='sensor').put([{'sensor': 'a', 'value': i} for i in range(5)])
    assert stored(db) == [{'sensor': 'a', 'value': 4}]


def test_a_key_is_a_value_and_never_an_operator(db):
    sink = MongoSink(db.results, upsert='sensor')
    sink.put({'sensor': 'a'})
    sink.put({'sensor': {'$gt': ''}})
    assert stored(db) == [{'sensor': 'a'}, {'sensor': {'$gt': ''}}]


def test_documents_are_replaced_by_an_id_of_their_own(db):
    sink = MongoSink(db.results, upsert='_id')
    sink.put({'_id': 'mine', 'value': 1})
    sink.put({'_id': 'mine', 'value': 2})
    assert list(db.results.find()) == [{'_id': 'mine', 'value': 2}]


@pytest.mark.parametrize(('wrong', 'why'), [
    ({'value': 1}, "item 1 has no 'sensor'"),
    ({'sensor': None}, "item 1 has no 'sensor'"),
    ({'sensor': ['a', 'b']}, "'sensor' of item 1 is a list"),
    ({'sensor': 'b', '_id': 1}, "item 1 has an '_id'"),
    ({'sensor': 'b', '$set': 1}, r"'\$set' of item 1 begins with \$"),
])  # fmt: skip
@pytest.mark.parametrize('once', [False, True], ids=['put', 'put_once'])
def test_a_document_that_cannot_be_replaced_by_key_is_refused_before_anything_is_written(db, wrong, why, once):
    sink = MongoSink(db.results, exactly_once=once, upsert='sensor')
    put = (lambda docs: sink.put_once(docs, Commit(db))) if once else sink.put
    with pytest.raises(DataError, match=why):
        put([{'sensor': 'a'}, wrong])
    assert 'results' not in db.list_collection_names()


@pytest.mark.parametrize('upsert', ['', 'a.b', '$a', 'a\0', [], [''], 7, {'a': 1}, ['a', 7], ['_id', 'a']], ids=repr)
def test_an_upsert_that_names_no_fields_is_refused(db, upsert):
    with pytest.raises(ArgumentError, match=r'^upsert '):
        MongoSink(db.results, upsert=upsert)


# --- exactly once


class Commit:
    """A window that is committed as the core does: a document that goes from open to processed."""

    def __init__(self, db, id=WINDOW, error=None):
        self.db, self.id, self.error, self.calls = db, id, error, 0
        db.window.update_one({'_id': id}, {'$setOnInsert': {'status': 'open'}}, upsert=True)

    def joins(self, client):
        return 'setName' in client.admin.command('hello')

    def commit(self, session):
        self.calls += 1
        window = session.client[self.db.name].window
        window.update_one({'_id': self.id}, {'$inc': {'attempts': 1}}, session=session)
        if window.find_one({'_id': self.id, 'status': 'processed'}, session=session):
            return False
        window.update_one({'_id': self.id}, {'$set': {'status': 'processed'}}, session=session)
        if self.error:
            raise self.error
        return True

    @property
    def status(self):
        return self.db.window.find_one({'_id': self.id})['status']


@pytest.fixture
def once(db):
    return MongoSink(db.results, exactly_once=True)


@pytest.fixture
def alone(standalone, standalone_url):
    """A database of a server that has no transactions."""
    return standalone.client.get_database(standalone_url.rsplit('/', 1)[1].split('?')[0])


def everything(db):
    return list(db.results.find().sort('_id', 1))


def test_only_with_exactly_once_is_it_an_exactly_once_sink(db, once):
    assert isinstance(once, ExactlyOnceSink)
    assert not isinstance(MongoSink(db.results, upsert='a'), ExactlyOnceSink)


def test_exactly_once_without_the_window_is_refused(once):
    with pytest.raises(ArgumentError, match='put_once'):
        once.put({'a': 1})


def test_exactly_once_is_yes_or_no(db):
    with pytest.raises(ArgumentError, match='exactly_once must be True or False'):
        MongoSink(db.results, exactly_once='a')


def test_results_come_with_the_commit_of_their_window_and_with_ids_made_of_its_id(db, once):
    window = Commit(db)
    results = [{'a': 1}, {'_id': 'mine', 'a': 2}, {'_id': None, 'a': 3}]
    once.put_once(results, window)
    assert everything(db) == [
        {'_id': 'mine', 'a': 2}, {'_id': f'{WINDOW}#000000', 'a': 1}, {'_id': f'{WINDOW}#000001', 'a': 3},
    ]  # fmt: skip
    assert window.status == 'processed'
    assert results[0] == {'a': 1}


def test_a_window_that_cannot_be_committed_leaves_no_results(db, once):
    window = Commit(db, error=LeaseLostError())
    with pytest.raises(LeaseLostError):
        once.put_once([{'a': 1}], window)
    assert (everything(db), window.status) == ([], 'open')


def test_results_that_cannot_be_written_leave_the_window_open(db, once):
    db.results.create_index('a', unique=True)
    window = Commit(db)
    with pytest.raises(BulkWriteError):
        once.put_once([{'a': 1}, {'a': 1}], window)
    assert (everything(db), window.status) == ([], 'open')


def test_a_window_that_an_earlier_attempt_committed_keeps_its_results(db, once):
    window = Commit(db)
    once.put_once([{'a': 1}], window)
    once.put_once([{'a': 2}, {'a': 3}], window)
    assert stored(db) == [{'a': 1}]
    assert db.window.find_one()['attempts'] == 1, 'the transaction was not aborted'


def test_a_lost_reply_to_the_commit_does_not_write_twice(mongod, db):
    window = Commit(db)
    with Proxy(mongod.port) as proxy, MongoClient(proxy.url(db.name)) as client:
        sink = MongoSink(client[db.name].results, exactly_once=True)
        client.admin.command('ping')
        happened = proxy.cut_reply(b'commitTransaction')
        sink.put_once([{'a': 1}, {'a': 2}], window)
        assert happened.wait(10)
    assert (stored(db), window.status, window.calls) == ([{'a': 1}, {'a': 2}], 'processed', 1)


def test_a_conflict_with_another_transaction_is_tried_again(mongod, db, once):
    window = Commit(db)
    with mongod.client.start_session() as session:
        session.start_transaction()
        db.window.update_one({'_id': WINDOW}, {'$set': {'other': True}}, session=session)
        thread = threading.Thread(target=once.put_once, args=([{'a': 1}], window))
        thread.start()
        eventually(lambda: window.calls > 1)
        session.abort_transaction()
    thread.join(20)
    assert (stored(db), window.status) == ([{'a': 1}], 'processed')


def test_a_transaction_may_be_larger_than_a_document_and_ignores_the_options_of_the_collection(url, db):
    with MongoClient(url, readPreference='secondary', w=1) as client:
        sink = MongoSink(client[db.name].results, exactly_once=True)
        sink.put_once([{'text': 'x' * 6_000_000} for _ in range(4)], Commit(db))
    assert db.results.count_documents({}) == 4


def test_by_key_and_exactly_once_replaces_together_with_the_commit(db):
    db.results.insert_one({'sensor': 'a', 'value': 1})
    sink = MongoSink(db.results, exactly_once=True, upsert='sensor')
    failing = Commit(db, error=LeaseLostError())
    with pytest.raises(LeaseLostError):
        sink.put_once({'sensor': 'a', 'value': 2}, failing)
    assert stored(db) == [{'sensor': 'a', 'value': 1}]
    sink.put_once([{'sensor': 'a', 'value': 2}, {'sensor': 'b', 'value': 2}], window := Commit(db))
    assert stored(db) == [{'sensor': 'a', 'value': 2}, {'sensor': 'b', 'value': 2}]
    assert window.status == 'processed'


def test_an_empty_result_leaves_the_commit_to_the_consumer(db, once):
    once.put_once([], window := Commit(db))
    assert (window.calls, window.status) == (0, 'open')


def test_more_documents_than_numbers_are_refused(db, once, monkeypatch):
    monkeypatch.setattr(mongodb, 'MAX_DOCUMENTS', 2)
    with pytest.raises(DataError, match='takes 2 documents of a window, not 3'):
        once.put_once([{'a': i} for i in range(3)], Commit(db))


KILLED = """
import os, signal, sys
from pymongo import MongoClient, monitoring
from minibatch.contrib.mongodb import MongoReplicasetSource, MongoSink, MongoSource

url, name, id, moment, command, target = sys.argv[1:]

class Killer(monitoring.CommandListener):
    def started(self, event):
        self.collection = event.command.get(event.command_name)
        self.die('started', event)

    def succeeded(self, event):
        self.die('succeeded', event)

    def failed(self, event):
        pass

    def die(self, what, event):
        if (what, event.command_name) == (moment, command) and str(self.collection) == target:
            os.kill(os.getpid(), signal.SIGKILL)

class Commit:
    id = id

    def joins(self, client):
        return True

    def commit(self, session):
        window = session.client[name].window
        update = {'$set': {'status': 'processed'}}
        return window.update_one({'_id': id, 'status': 'open'}, update, session=session).matched_count == 1

client = MongoClient(url, event_listeners=[Killer()])
MongoSink(client[name].results, exactly_once=True).put_once([{'a': 1}, {'a': 2}, {'a': 3}], Commit())
"""


@pytest.fixture(scope='module')
def hasty():
    """A server that ends abandoned transactions after a second, not sixty."""
    with Mongod('--setParameter', 'transactionLifetimeLimitSeconds=1') as server:
        yield server


@pytest.mark.integration
@pytest.mark.parametrize(('moment', 'command', 'target', 'committed'), [
    ('succeeded', 'update', 'window', False),
    ('succeeded', 'update', 'results', False),
    ('started', 'commitTransaction', '1', False),
    ('succeeded', 'commitTransaction', '1', True),
])  # fmt: skip
def test_a_kill_leaves_results_and_commit_or_neither_and_the_next_attempt_completes_them(
    hasty, moment, command, target, committed
):
    db = hasty.client.get_database(f'{moment}_{command}_{target}')
    window = Commit(db)
    arguments = [hasty.url(db.name), db.name, WINDOW, moment, command, target]
    assert subprocess.run([sys.executable, '-c', KILLED, *arguments], timeout=60).returncode == -9
    left = ([1, 2, 3], 'processed') if committed else ([], 'open')
    assert ([doc['a'] for doc in stored(db)], window.status) == left
    MongoSink(db.results, exactly_once=True).put_once([{'a': 1}, {'a': 2}, {'a': 3}], window)
    assert ([doc['a'] for doc in stored(db)], window.status) == ([1, 2, 3], 'processed')


# --- exactly once without a transaction


def test_without_transactions_the_documents_of_the_last_attempt_are_left(alone):
    sink = MongoSink(alone.results, exactly_once=True)
    window = Commit(alone)
    sink.put_once([{'a': 1}, {'a': 2}, {'a': 3}, {'_id': 'mine', 'a': 4}], window)
    sink.put_once([{'_id': 'mine', 'a': 5}, {'a': 6}], window)
    assert everything(alone) == [{'_id': 'mine', 'a': 5}, {'_id': f'{WINDOW}#000000', 'a': 6}]
    assert (window.calls, window.status) == (0, 'open')


def test_without_transactions_an_empty_result_deletes_those_of_an_earlier_attempt(alone):
    sink = MongoSink(alone.results, exactly_once=True)
    sink.put_once([{'a': 1}, {'a': 2}], Commit(alone))
    sink.put_once([], Commit(alone))
    assert everything(alone) == []


def test_without_transactions_an_attempt_that_stopped_half_way_is_completed(alone):
    alone.results.create_index('a', unique=True)
    sink = MongoSink(alone.results, exactly_once=True)
    with pytest.raises(BulkWriteError):
        sink.put_once([{'a': 1}, {'a': 2}, {'a': 2}, {'a': 3}], Commit(alone))
    sink.put_once([{'a': 1}, {'a': 3}], Commit(alone))
    assert stored(alone) == [{'a': 1}, {'a': 3}]


def test_without_transactions_other_windows_keep_their_documents(alone):
    sink = MongoSink(alone.results, exactly_once=True)
    others = [f'{WINDOW}0', f'{WINDOW}#5/default/7', f'{WINDOW[:-1]}6', f'{WINDOW}.', 'numbers/default/7']
    for id in others:
        sink.put_once([{'a': 1}, {'a': 2}], Commit(alone, id))
    sink.put_once([], Commit(alone))
    assert len(everything(alone)) == 2 * len(others)


def test_without_transactions_nothing_is_deleted_when_documents_are_replaced_by_key(alone):
    sink = MongoSink(alone.results, exactly_once=True, upsert='_id')
    mine = [f'{WINDOW}#000000', f'{WINDOW}#000001']
    sink.put_once([{'_id': id, 'a': 1} for id in mine], Commit(alone))
    sink.put_once([{'_id': mine[1], 'a': 2}], Commit(alone))
    sink.put_once([], Commit(alone))
    assert everything(alone) == [{'_id': mine[0], 'a': 1}, {'_id': mine[1], 'a': 2}]


def test_looking_for_what_an_earlier_attempt_left_reads_that_alone(alone):
    MongoSink(alone.results).put([{'_id': f'{WINDOW[:-1]}{n}#{i:06d}'} for n in (6, 7, 8) for i in range(100)])
    plan = alone.results.find(mongodb._numbered_from(90, WINDOW)).explain()['executionStats']
    assert plan['nReturned'] == 10
    assert plan['totalKeysExamined'] <= 11


# --- many windows at once


class Handle:
    """What the core hands to a sink for a window, when nothing is to be committed."""

    def __init__(self, id):
        self.id = id

    def joins(self, client):
        return False


def handles(count):
    return [Handle(f's/g/{number:012d}') for number in range(count)]


def test_results_of_many_windows_are_inserted_at_once_and_in_order(db):
    sink = MongoSink(db.results)
    assert isinstance(sink, BulkSink)
    assert sink.put_many([[{'a': 1}, {'a': 2}], [], {'a': 3}], handles(3)) == 3
    assert [doc['a'] for doc in db.results.find()] == [1, 2, 3]


def test_of_many_windows_those_before_a_refused_document_are_delivered(db):
    db.results.create_index('a', unique=True)
    db.results.insert_one({'a': 3, 'of': 'another'})
    assert MongoSink(db.results).put_many([{'a': 1}, {'a': 2}, [{'a': 4}, {'a': 3}], {'a': 5}], handles(4)) == 2


def test_many_windows_replace_by_their_key_in_order(db):
    sink = MongoSink(db.results, upsert='k')
    assert sink.put_many([{'k': 1, 'v': 1}, {'k': 2, 'v': 1}, {'k': 1, 'v': 2}], handles(3)) == 3
    assert {doc['k']: doc['v'] for doc in db.results.find()} == {1: 2, 2: 1}


def test_many_windows_of_another_server_are_written_by_id_and_again_without_harm(db):
    sink = MongoSink(db.results, exactly_once=True)
    for results in ([[{'a': 1}, {'a': 2}], {'a': 3}], [{'a': 1}, {'a': 3}]):
        assert sink.put_many(results, handles(2)) == 2
    assert [doc['a'] for doc in db.results.find().sort('_id', 1)] == [1, 3]


@pytest.mark.parametrize('made', [MongoSink, MongoSource, MongoReplicasetSource])
def test_what_holds_a_collection_is_refused_by_its_name_where_it_would_be_sent(url, db, made):
    adapter = made(db.results)
    with pytest.raises(PortabilityError, match=f'^{made.__name__} holds a collection'):
        pickle.dumps(adapter)
    with pytest.raises(PortabilityError, match=rf"its variable 'adapter' \({made.__name__}\) .* {made.__name__} holds"):
        mb.streaming('s', lambda window: adapter, size=1, url=url)
