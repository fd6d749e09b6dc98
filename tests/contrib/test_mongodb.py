"""MongoSink on a real MongoDB."""

import pytest
from pymongo import MongoClient, WriteConcern

import minibatch as mb
from minibatch.abc import Sink
from minibatch.contrib.mongodb import MongoSink
from minibatch.errors import ArgumentError, DataError


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
