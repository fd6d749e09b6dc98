"""MongoSource on a real MongoDB: what it brings, in which order, and what it passes over."""
from __future__ import annotations

import random
import struct
import threading
import time
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import bson
import pytest
from bringing import DELAY, await_numbers, brought, id_at, messages, numbers, poll, running, tokens
from bson import Binary, Decimal128, ObjectId, Timestamp
from bson.raw_bson import RawBSONDocument
from processes import SEED
from servers import eventually

import minibatch as mb
from minibatch.contracts import SourceContract
from minibatch.contrib.mongodb import MongoReplicasetSource, MongoSource, ids, polling
from minibatch.errors import ArgumentError


class TestMongoSource(SourceContract):
    def make(self):
        return poll(self.things)

    def send(self, numbers):
        self.things.insert_many([{'i': i} for i in numbers])

    @pytest.fixture(autouse=True)
    def _server(self, url, things):
        self.url, self.things = url, things


# --- documents


EVERYTHING = {
    'int': 1, 'long': bson.Int64(2**40), 'float': 0.5, 'decimal': Decimal128('0.10'), 'text': 'Grüße', 'none': None,
    'id': ObjectId(), 'date': datetime(2026, 1, 1, tzinfo=timezone.utc), 'old uuid': Binary(bytes(16), 3),
    'uuid': Binary(bytes(16), 4), 'code': bson.Code('x'), 'pattern': bson.Regex('a', 'i'), 'time': Timestamp(1, 2),
    'list': [1, [2, {'a.b': 3}]], 'inner': {'$inc': 1, 'b': {}}, 'smallest': bson.MinKey(),
}  # fmt: skip


@pytest.mark.parametrize('make', [poll, lambda things: MongoReplicasetSource(things, start='earliest')])
def test_a_document_is_brought_byte_by_byte(url, db, things, make):
    things.insert_one({'_id': 1, **EVERYTHING})
    with running(make(things), url):
        eventually(lambda: brought(db))
    options = polling.raw_collection(things).codec_options
    stored, original = db.with_options(codec_options=options).buffer.find_one(), things.with_options(options).find_one()
    assert stored['data'].raw == original.raw


def test_the_documents_of_a_view_are_brought(url, db, things):
    things.insert_many([{'i': i} for i in range(10)])
    db.create_collection('even', viewOn='things', pipeline=[{'$match': {'i': {'$mod': [2, 0]}}}])
    with running(poll(db.even, idcol='i'), url):
        await_numbers(db, range(0, 10, 2))


def test_a_time_series_is_brought_by_its_time_and_that_is_advised(url, db, things, warnings):
    db.create_collection('things', timeseries={'timeField': 'at'})
    things.insert_many([{'at': datetime(2026, 1, 1 + i // 2), 'i': i} for i in range(6)])
    with running(poll(things, idcol='at', size=1), url):
        await_numbers(db, range(6))
    assert not any('time series' in said for said in warnings())
    with running(poll(things), url, 'by id'):
        await_numbers(db, range(6), 'by id')
    assert any("idcol='at'" in said for said in warnings())


def text_id(id_, text):
    """A document of which MongoDB does not mind that its texts are no UTF-8."""
    raw = bson.encode({'_id': 'ID', 'key': 'KEY'})
    for name, value in ((b'ID', id_), (b'KEY', text)):
        old = struct.pack('<i', len(name) + 1) + name
        raw = raw.replace(old, struct.pack('<i', len(value) + 1) + value)
    return RawBSONDocument(struct.pack('<i', len(raw)) + raw[4:])


@pytest.mark.parametrize('size', [1, 2, 1000])
@pytest.mark.parametrize('make', [
    poll, lambda things, size: poll(things, size=size, idcol='key'),
    lambda things, size: MongoReplicasetSource(things, size=size, start='earliest'),
], ids=['_id', 'key', 'rescan'])  # fmt: skip
def test_ids_that_are_no_utf8_are_stepped_over_to_the_dead_letters(url, db, things, make, size):
    bad = [text_id(b'b\xff', b'b\xff'), text_id(b'b\xff\xfe', b'b\xff'), text_id(b'd\xff', b'd\xfe')]
    things.insert_many([{'_id': 'a', 'key': 'a'}, *bad[:2], {'_id': 'c', 'key': 'c'}, bad[2]])
    with running(make(things, size=size), url):
        eventually(lambda: len(brought(db)) == 2 and len(brought(db, 'test.dead_letters')) == 3)
    with running(make(things, size=size), url):
        things.insert_one({'_id': 'e', 'key': 'e'})
        eventually(lambda: len(brought(db)) == 3)
    assert [doc['_id'] for doc in brought(db)] == ['a', 'c', 'e']
    letters = messages(db, 'test.dead_letters')
    assert [letter['data'] for letter, _ in letters] == [document.raw for document in bad]
    assert [meta['id'] for _, meta in letters] == ['b\\xff', 'b\\xff\\xfe', 'd\\xff']
    assert letters[0][0]['error'].startswith('the document with _id b\\xff cannot be decoded: ')


def test_a_collection_that_does_not_exist_yet_is_waited_for(url, db, things):
    source = poll(things)
    looked, find_name = threading.Event(), source._find_name
    source._find_name = lambda: (find_name(), looked.set())[0]
    with running(source, url):
        assert looked.wait(10)
        things.insert_one({'i': 1})
        await_numbers(db, [1])


def test_only_documents_that_match_the_query_are_brought_and_each_query_has_its_position(url, db, things):
    things.insert_many([{'i': i, 'kind': i % 3} for i in range(30)])
    for kind in (0, 1):
        with running(poll(things, query={'kind': kind}, overlap=0), url):
            await_numbers(db, {i for i in range(30) if i % 3 <= kind})


def test_more_than_fits_into_memory_comfortably_comes_in_several_pages(url, db, things):
    things.insert_many([{'i': i, 'text': 'x' * 6_000_000} for i in range(6)])
    with running(poll(things), url):
        assert await_numbers(db, range(6)) == list(range(6))
    page, more = polling._page(poll(things)._find('objectId'), 1000)
    assert (len(page), more) == (3, True)


# --- order


@pytest.mark.parametrize('size', [1, 3, 1000])
@pytest.mark.parametrize('overlap', [0, 5])
def test_documents_with_equal_values_are_neither_skipped_nor_repeated(url, db, things, size, overlap):
    chance = random.Random(SEED)
    docs = [{'_id': chance.choice([i, f'{i}', ObjectId()]), 'created': i // 7, 'i': i} for i in range(40)]
    things.create_index('created' if size == 3 else [('created', 1), ('_id', 1)])
    things.insert_many(chance.sample(docs, 40))
    with running(poll(things, size=size, idcol='created', overlap=overlap), url):
        eventually(lambda: len(numbers(db)) >= 20)
    with running(poll(things, size=size, idcol='created', overlap=overlap), url):
        await_numbers(db, range(40))
        things.insert_many([{'_id': ObjectId(), 'created': 5, 'i': i} for i in range(40, 45)])
        await_numbers(db, range(45))
    assert [data['created'] for data in brought(db)] == sorted(data['created'] for data in brought(db))


MIXED = [
    1, 2.5, bson.Int64(2**60), Decimal128('1E+400'), -7, 'a', '', 'ä', ObjectId(), {'a': 1}, {'a': 2}, {}, b'',
    b'bytes', True, False, datetime(1960, 1, 1), datetime(2026, 1, 1), Timestamp(0, 1), Timestamp(9, 9),
]  # fmt: skip


@pytest.mark.parametrize('idcol', ['_id', 'key'])
@pytest.mark.parametrize('size', [1, 1000])
def test_ids_of_all_types_are_brought_and_each_type_grows_by_itself(url, db, things, size, idcol):
    docs = [{idcol: value, 'i': i} for i, value in enumerate(MIXED)]
    things.insert_many(docs[::2])
    with running(poll(things, size=size, idcol=idcol, overlap=0), url):
        await_numbers(db, range(0, len(docs), 2))
    later = [bson.Int64(2**61), 'b', ObjectId(), {'a': 3}, b'longer than all', datetime(2027, 1, 1), Timestamp(10, 1)]
    things.insert_many([{idcol: value, 'i': 100 + i} for i, value in enumerate(later)])
    with running(poll(things, size=size, idcol=idcol, overlap=0), url):
        await_numbers(db, [*range(0, len(docs), 2), *range(100, 107)])


def test_values_without_an_order_are_passed_over_and_that_is_said(url, db, things, warnings):
    unfit = [None, [1, 2], [], float('nan'), float('inf'), -float('inf'), bson.Regex('a'), bson.MaxKey()]
    things.insert_many([{'key': value, 'i': -1} for value in unfit] + [{'i': -2}])
    things.insert_many([{'key': value, 'i': i} for i, value in enumerate([1, 'a', ObjectId()])])
    with running(poll(things, idcol='key'), url):
        await_numbers(db, range(3))
        eventually(lambda: any('key is missing, null, a list' in said for said in warnings()))
    await_numbers(db, range(3))


def test_a_missing_index_is_said_and_one_that_is_there_not(url, db, things, warnings):
    things.insert_one({'key': 1, 'i': 1})
    with running(poll(things, idcol='key'), url):
        await_numbers(db, [1])
    assert [said for said in warnings() if "create_index([('key', 1), ('_id', 1)])" in said]
    things.create_index([('key', 1), ('_id', 1)])
    with running(poll(things, idcol='key'), url, 'other'):
        await_numbers(db, [1], 'other')
    assert len(warnings()) == 1


def test_a_poll_reads_no_more_than_it_brings(db, things):
    things.create_index([('key', 1), ('_id', 1)])
    things.insert_many([{'key': i // 10} for i in range(1000)])
    source = poll(things, idcol='key')
    at = things.find_one({'key': 50})
    found = source._find('number', source._beyond(ids.Bound(50, id=at['_id']))).limit(20)
    assert found.explain()['executionStats']['totalKeysExamined'] <= 35


# --- what becomes visible late


LATE = {
    'ObjectId': (id_at, 5),
    'date': (lambda seconds: datetime.now(timezone.utc) + timedelta(seconds=seconds), 5),
    'timestamp': (lambda seconds: Timestamp(int(time.time() + seconds), random.randrange(1, 10**9)), 5),
    'number': (lambda seconds: 1000 + seconds * 1000 + random.random(), 5000),
    'decimal': (lambda seconds: Decimal128(Decimal(1000 + seconds * 1000)), 5000),
}


@pytest.mark.parametrize('kind', LATE)
@pytest.mark.parametrize('idcol', ['_id', 'key'])
@pytest.mark.parametrize('restart', [False, True], ids=['', 'restart'])
def test_what_becomes_visible_late_is_found_within_the_overlap_and_not_beyond(url, db, things, kind, idcol, restart):
    make, overlap = LATE[kind]
    things.create_index([('key', 1), ('_id', 1)])
    things.insert_many([{idcol: make(seconds), 'i': i} for i, seconds in enumerate([-20, -15, -1.1, 0])])
    source = poll(things, idcol=idcol, overlap=overlap)
    with running(source, url) as stream:
        await_numbers(db, range(4))
        things.insert_one({idcol: make(0.1), 'i': 4})
        await_numbers(db, range(5))
        if restart:
            stream.stop()
        things.insert_many([{idcol: make(-0.6), 'i': 5}, {idcol: make(-60), 'i': 99}, {idcol: make(-2.2), 'i': 6}])
        if restart:
            stream.attach(poll(things, idcol=idcol, overlap=overlap))
        await_numbers(db, range(7))
        things.insert_one({idcol: make(0.5), 'i': 7})
        await_numbers(db, range(8))


def test_an_id_of_the_future_hides_none_of_those_that_come_after_it(url, db, things):
    things.insert_one({'_id': id_at(3600), 'i': 0})
    with running(poll(things), url) as stream:
        await_numbers(db, [0])
        things.insert_many([{'_id': id_at(-1), 'i': i} for i in range(1, 5)])
        await_numbers(db, range(5))
        stream.stop()
        things.insert_many([{'_id': id_at(0), 'i': i} for i in range(5, 10)])
        stream.attach(poll(things))
        await_numbers(db, range(10))


def test_a_document_whose_time_is_set_anew_is_brought_again_also_when_that_becomes_visible_late(url, db, things):
    things.create_index([('updated', 1), ('_id', 1)])
    now = datetime.now(timezone.utc)
    things.insert_many([{'_id': i, 'i': i, 'updated': now + timedelta(milliseconds=i)} for i in range(10)])
    with running(poll(things, idcol='updated'), url):
        await_numbers(db, range(10))
        things.update_one({'_id': 3}, {'$set': {'updated': now + timedelta(milliseconds=7.5), 'i': 13}})
        await_numbers(db, {*range(10), 13})
        things.update_one({'_id': 3}, {'$set': {'updated': now + timedelta(milliseconds=70), 'i': 23}})
        await_numbers(db, {*range(10), 13, 23})


@pytest.mark.parametrize('overlap', [1, 30])
def test_writers_with_clocks_that_differ_and_restarts_of_the_reader_lose_nothing(url, db, things, overlap):
    """The ids lie up to 15 s behind, and in the future; the overlap is 30. With one of 1 much is passed over."""
    ended = threading.Event()

    def write(writer):
        chance = random.Random(SEED + writer)
        for i in range(400):
            things.insert_one({'_id': id_at(chance.uniform(-15, 15)), 'i': writer * 1000 + i})
        ended.set()

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in writers:
        thread.start()
    chance = random.Random(SEED)
    with mb.stream('test', url=url) as stream:
        while any(thread.is_alive() for thread in writers):
            stream.attach(poll(things, size=chance.choice([1, 10, 1000]), overlap=overlap))
            ended.wait(chance.uniform(0, 0.3))
            stream.stop()
        sent = {writer * 1000 + i for writer in range(3) for i in range(400)}
        stream.attach(poll(things, overlap=overlap))
        if overlap == 30:
            await_numbers(db, sent)
        else:
            things.insert_one({'_id': id_at(100), 'i': -1})
            eventually(lambda: -1 in numbers(db))
            assert len(set(numbers(db))) < len(sent), 'this test would not see a loss'


def test_more_than_is_remembered_waits_until_it_is_old_enough(url, db, things, monkeypatch, warnings):
    monkeypatch.setattr(polling, 'MAX_SEEN', 50)
    things.insert_many([{'i': i} for i in range(300)])
    with running(poll(things, overlap=2), url):
        eventually(lambda: len(numbers(db)) >= 50)
        assert max(len(token['objectId']['seen'] + token['objectId']['new']) for token in tokens(db)) <= 50 * 8
        things.insert_many([{'i': i} for i in range(300, 400)])
        await_numbers(db, range(400))
        things.insert_one({'_id': id_at(-0.5), 'i': 400})
        await_numbers(db, range(401))
    assert any('more than 50 documents younger than overlap=2' in said for said in warnings())


def test_an_overlap_with_more_numbers_than_are_remembered_becomes_shorter(url, db, things, monkeypatch, warnings):
    monkeypatch.setattr(polling, 'MAX_SEEN', 50)
    with running(poll(things, overlap=1000), url):
        for start in range(0, 400, 100):
            things.insert_many([{'_id': i * 2, 'i': i} for i in range(start, start + 100)])
            await_numbers(db, range(start + 100))
        eventually(lambda: any('it reaches no further back' in said for said in warnings()))
        things.insert_one({'_id': 399 * 2 - 61, 'i': 1000})
        await_numbers(db, {*range(400), 1000})


def test_without_an_overlap_nothing_is_remembered_and_what_is_late_is_passed_over(url, db, things):
    with running(poll(things, overlap=0), url):
        things.insert_one({'_id': 10, 'i': 0})
        await_numbers(db, [0])
        things.insert_many([{'_id': 5, 'i': 5}, {'_id': 11, 'i': 1}])
        await_numbers(db, range(2))
    assert all(not token['number']['seen'] and not token['number']['new'] for token in tokens(db))


def test_old_documents_need_not_be_remembered(url, db, things):
    things.insert_many([{'_id': id_at(-60), 'i': i} for i in range(3000)])
    with running(poll(things, overlap=10), url):
        await_numbers(db, range(3000))
    assert max(len(bson.encode(token)) for token in tokens(db)) < 300


@pytest.mark.parametrize('overlaps', [(0, 10), (10, 0), (2, 20), (0, 10, 0)], ids=str)
def test_the_overlap_may_be_changed(url, db, things, overlaps):
    for id_ in (id_at, lambda seconds: int((time.time() + seconds) * 1000)):
        for n, overlap in enumerate(overlaps):
            offset = things.count_documents({})
            things.insert_many([{'_id': id_(n * 3 + i / 100), 'i': offset + i} for i in range(20)])
            with running(poll(things, overlap=overlap), url):
                if n == 0 or overlap:
                    await_numbers(db, range(offset + 20))
                eventually(lambda offset=offset: max(numbers(db)) >= offset)
            assert len(numbers(db)) == len(set(numbers(db)))


def test_a_clock_of_the_server_that_goes_back_doubles_nothing(url, db, things):
    source, ahead = poll(things, overlap=5), 100
    source._server_time = lambda: int(time.time()) + ahead
    things.insert_many([{'_id': id_at(i), 'i': i} for i in range(20)])
    with running(source, url):
        await_numbers(db, range(20))
        ahead = -100
        things.insert_many([{'_id': id_at(40), 'i': i} for i in range(20, 30)])
        await_numbers(db, range(30))
    with running(poll(things, overlap=5), url):
        things.insert_many([{'_id': id_at(40), 'i': i} for i in range(30, 40)])
        await_numbers(db, range(40))


def test_a_document_that_is_deleted_is_forgotten_and_comes_again_when_it_is_inserted_again(url, db, things):
    with running(poll(things, overlap=100), url):
        things.insert_many([{'_id': i, 'i': i} for i in range(5)])
        await_numbers(db, range(5))
        things.delete_one({'_id': 3})
        things.insert_one({'_id': 5, 'i': 5})
        await_numbers(db, range(6))
        things.insert_one({'_id': 6, 'i': 6})
        await_numbers(db, range(7))
        things.insert_one({'_id': 3, 'i': 7})
        await_numbers(db, range(8))


# --- which position


def test_a_collection_that_is_made_again_is_brought_from_the_start_and_one_that_is_renamed_goes_on(url, db, things):
    with running(poll(things), url):
        things.insert_many([{'_id': i, 'i': i} for i in range(100)])
        await_numbers(db, range(100))
        things.drop()
        things.insert_many([{'_id': i, 'i': 100 + i} for i in range(10)])
        await_numbers(db, range(110))
    things.rename('renamed')
    db.renamed.insert_one({'_id': 100, 'i': 110})
    with running(poll(db.renamed), url):
        await_numbers(db, range(111))


def test_with_a_name_the_position_is_that_of_the_name(url, db, things):
    with running(poll(things, name='mine'), url):
        things.insert_many([{'_id': i, 'i': i} for i in range(100)])
        await_numbers(db, range(100))
    db.other.insert_many([{'_id': i, 'i': i} for i in range(200)])
    with running(poll(db.other, name='mine'), url):
        await_numbers(db, range(200))
    assert {doc['producer'] for doc in db.buffer.find()} == {'source:mine'}


def test_a_subclass_says_what_is_appended(url, db, things):
    class Doubled(MongoSource):
        def data_of(self, document):
            return {'i': 2 * document['i']}

    things.insert_many([{'i': i} for i in range(10)])
    with running(Doubled(things, delay=DELAY), url):
        await_numbers(db, range(0, 20, 2))


@pytest.mark.parametrize(('wrong', 'why'), [
    ({'collection': 'things'}, 'collection must be a pymongo collection, not str'),
    ({'size': 0}, 'size must be a number from 1'), ({'size': True}, 'size'), ({'size': 10_001}, 'size'),
    ({'idcol': 'a.b'}, 'idcol must name a field at the top level'), ({'idcol': ''}, 'idcol'),
    ({'idcol': '$a'}, 'idcol'),
    ({'delay': 0}, 'delay must be more than 0'), ({'delay': 'a'}, 'delay must be a number'),
    ({'overlap': -1}, 'overlap'),
    ({'overlap': float('inf')}, 'overlap'), ({'query': 'all'}, 'query must be a filter'),
    ({'name': ' '}, 'name must be'),
])  # fmt: skip
def test_wrong_arguments_of_a_polling_source_are_refused_by_name(db, wrong, why):
    with pytest.raises(ArgumentError, match=why):
        MongoSource(**{'collection': db.things, **wrong})


@pytest.mark.parametrize('make', [MongoSource, lambda mine: MongoReplicasetSource(mine, start='earliest')])
def test_the_collection_of_its_own_messages_cannot_be_the_source_of_a_stream(url, db, make):
    stream = mb.stream('s', url=url.replace('127.0.0.1', 'localhost'))
    stream.append({'v': 1})
    with pytest.raises(ArgumentError, match=f"collection {db.name}.buffer is where stream 's' keeps its messages"):
        stream.attach(make(db.buffer), background=False)
    assert len(stream.buffer()) == 1


def test_the_messages_of_another_stream_can_be_asked_for_by_a_query(url, db):
    mb.stream('other', url=url).append({'v': 1})
    with running(poll(db.buffer, query={'stream': 'other'}), url) as stream:
        eventually(lambda: len(stream.buffer()) == 1)
