"""What other programs store and Python cannot read: it stops nobody, its bytes stay, and whoever looks is shown it."""
from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from processes import Seen, started
from servers import eventually

import minibatch as mb
from minibatch import clock, delivery, producer, store
from minibatch.abc import SourceMessage
from minibatch.errors import DataError
from minibatch.executors import InlineExecutor
from minibatch.models import Buffer, Window
from minibatch.unreadable import Unreadable, as_stored, decode

BROKEN = bson.encode({'seq': 3, 'text': 'xx'}).replace(b'xx', b'\xff\xfe')
UTF8 = "'utf-8' codec can't decode byte 0xff"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(delivery, 'RETRY_PAUSES', (0.01, 0.02))


@pytest.fixture
def stream(url):
    return mb.stream('s', url=url)


def write(db, count, broken=(3,), batch=False, meta=None):
    """Store messages as a program would that does not look at what they are."""
    datas = [BROKEN if seq in broken else bson.encode({'seq': seq}) for seq in range(count)]
    times, about = [clock.now()] * count, [meta] * count
    if batch:
        records = [store.record_batch('s', 'p', 0, datas, times, about)]
    else:
        records = [
            store.record_batch('s', 'p', at, [data], times[:1], about[:1]) for at, data in enumerate(datas)
        ]
    db.buffer.insert_many(records)


def here(stream, **options):
    """A consumer whose function runs in this thread, with what its windows had."""
    seen = []
    options = {'size': 5, 'max_attempts': 2, 'sink': Seen(), **options}
    return seen, mb.make_emitter('s', lambda window: seen.append([data['seq'] for data in window]), stream=stream,
                                 executor=InlineExecutor, **options)  # fmt: skip


def test_of_a_document_what_can_be_read_is_told_apart_from_what_cannot():
    good = {'a': 1, 'f': 1.5, 't': datetime(2026, 1, 1), 'o': bson.ObjectId(), 'n': None, 'b': True, 'i': bson.Int64(5),
            's': bson.Timestamp(1, 2), 'd': bson.Decimal128('1'), 'r': bson.Regex('a', 'i'), 'y': b'xyz',
            'c': bson.Code('f'), 'w': bson.Code('f', {'x': 1}), 'min': bson.MinKey(), 'max': bson.MaxKey()}  # fmt: skip
    broken = RawBSONDocument(BROKEN)
    values = {**good, 'list': [1, broken, {'x': 2}, [broken, [1]]], 'doc': broken, 'last': 'x'}
    found = decode(RawBSONDocument(bson.encode(values)), bson.CodecOptions())
    assert {name: found[name] for name in good} == good
    assert found['last'] == 'x'
    assert found['unreadable'] is True
    assert found['list'][:3:2] == [1, {'x': 2}]
    assert found['list'][3]['unreadable'] == bson.encode({'': [broken, [1]]})
    for value in (found['list'][1], found['doc']):
        assert isinstance(value, Unreadable)
        assert value['unreadable'] == BROKEN
        assert UTF8 in value['error']
        assert as_stored(value).raw == BROKEN
    assert decode(RawBSONDocument(bson.encode(good)), bson.CodecOptions()) == good


@pytest.mark.parametrize('batch', [False, True], ids=['one by one', 'a record batch'])
def test_a_message_that_cannot_be_read_makes_its_window_a_dead_letter_and_the_others_are_processed(stream, db, batch):
    write(db, 60, broken=[13], batch=batch)
    seen, emitter = here(stream)
    with started(emitter):
        eventually(lambda: len(seen) == 11 and stream.dead_letters())
        eventually(lambda: not db.buffer.find_one({'offset': {'$gte': 59}}))
    assert [window[0] for window in seen] == [0, 5, *range(15, 60, 5)]
    (letter,) = stream.dead_letters()
    assert letter.attempts == 2
    assert 'message 13 of producer p cannot be read: ' + UTF8 in letter.error
    assert [data.get('seq') for data in letter.data] == [10, 11, 12, None, 14]
    assert letter.data[3]['unreadable'] == BROKEN
    copies = db.get_collection('dead', bson.CodecOptions(RawBSONDocument)).find()
    assert any(BROKEN in copy.raw for copy in copies)


def test_the_neighbours_of_what_cannot_be_read_are_not_blamed_in_a_pool(stream, db):
    write(db, 60, broken=[13], batch=True)
    emitter = mb.make_emitter('s', lambda window: window.data[0], stream=stream, size=5, max_attempts=2,
                              sink=(sink := Seen()))  # fmt: skip
    with started(emitter):
        eventually(lambda: len(sink) == 11 and stream.dead_letters())
    assert sorted(result['seq'] for result in sink) == [0, 5, *range(15, 60, 5)]
    assert [(letter.number, letter.attempts) for letter in stream.dead_letters()] == [(3, 2)]
    assert stream.group().retried == 1


def test_a_dead_letter_that_cannot_be_read_is_one_again_when_it_is_replayed_and_is_read_when_it_can(stream, db):
    write(db, 5)
    seen, emitter = here(stream)
    with started(emitter):
        eventually(stream.dead_letters)
        stream.dead_letters().replay()
        eventually(lambda: stream.group().failed == 2)
        assert seen == []
        db.dead.update_one({'offset': 3}, {'$set': {'data': {'seq': 33}}})
        stream.dead_letters().replay()
        eventually(lambda: seen)
    assert seen == [[0, 1, 2, 33, 4]]
    assert stream.dead_letters() == []


@pytest.mark.parametrize('options', [{'key': 'seq'}, {'key': lambda data: len(data)}], ids=['a field', 'a function'])
def test_a_message_that_cannot_be_read_to_find_its_window_is_a_dead_letter_alone(stream, db, options):
    write(db, 10, batch=True)
    seen, emitter = here(stream, size=None, interval=0.2, **options)
    with started(emitter):
        eventually(stream.dead_letters)
        eventually(lambda: sum(map(len, seen)) == 9)
    (letter,) = stream.dead_letters()
    assert [data['unreadable'] for data in letter.data] == [BROKEN]
    assert UTF8 in letter.error


class Even(mb.window.WindowEmitter):
    def window_ready(self):
        found = [obj for obj in Buffer.objects(processed=False) if obj.data['seq'] % 2 == 0]
        return bool(found), (found,)

    def query(self, found):
        return found


@pytest.mark.parametrize('batch', [False, True], ids=['one by one', 'a record batch'])
def test_what_keeps_an_emitter_that_picks_from_reading_is_a_dead_letter_alone(stream, db, batch):
    write(db, 10, batch=batch)
    seen, emitter = here(stream, size=None, interval=0.2, emitter=Even)
    with started(emitter):
        eventually(lambda: seen and stream.dead_letters())
        stream.dead_letters().replay()
        eventually(lambda: stream.group().failed == 2)
    assert sorted(seq for window in seen for seq in window) == [0, 2, 4, 6, 8]
    (letter,) = stream.dead_letters()
    assert [data['unreadable'] for data in letter.data] == [BROKEN]
    assert db.buffer.count_documents({'offset': 3}) == 0


def test_a_late_message_that_cannot_be_read_is_a_dead_letter_and_does_not_go_on_as_another(stream, db, url):
    late = mb.stream('late', url=url)
    now = clock.now().replace(tzinfo=None)
    datas = [bson.encode({'at': now - timedelta(seconds=ago), 'seq': ago}) for ago in (500, 100)]
    broken = bson.encode({'at': now - timedelta(seconds=900), 'text': 'xx'}).replace(b'xx', b'\xff\xfe')
    records = [store.record_batch('s', 'p', at, [data], [now], [None]) for at, data in enumerate([*datas, broken])]
    db.buffer.insert_many(records[:2])
    seen, emitter = here(stream, size=None, interval=10, timestamp='at', late=late)
    with started(emitter):
        eventually(lambda: seen)
        db.buffer.insert_one(records[2])
        eventually(stream.dead_letters)
    assert [data['unreadable'] for data in stream.dead_letters()[0].data] == [broken]
    assert db.buffer.count_documents({'stream': 'late'}) == 0


def test_whoever_looks_is_shown_what_cannot_be_read(stream, db, run):
    write(db, 5, batch=True)
    assert [message.data.get('unreadable') for message in stream.tail(last=5, follow=False)][3] == BROKEN
    _, emitter = here(stream, keep=True)
    with started(emitter):
        eventually(stream.dead_letters)
    code, out, err = run('tail s --no-follow')
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get('seq') for line in lines] == [0, 1, 2, None, 4]
    assert set(lines[3]) == {'unreadable', 'error'}
    code, out, err = run(f'dead show {stream.dead_letters()[0].id}')
    assert code == 0, err
    assert json.loads(out.splitlines()[-2]) == lines[3]
    (window,) = Window.in_database(stream.target)
    assert [data.get('seq') for data in window.data] == [0, 1, 2, None, 4]


def test_a_message_that_another_program_stored_with_its_data_alone_is_processed(stream, db):
    db.buffer.insert_many([{'stream': 's', 'data': {'seq': 0}}, {'stream': 's', 'data': {'seq': 1}, 'created': 5}])
    seen, emitter = here(stream, size=2)
    with started(emitter):
        eventually(lambda: seen)
    assert seen == [[0, 1]]


def test_what_a_source_brings_that_cannot_be_read_is_kept_as_bytes(stream, caplog):
    with caplog.at_level(logging.CRITICAL):
        stream.producer('x').append_many([SourceMessage(RawBSONDocument(BROKEN), token=1), SourceMessage({'seq': 1})])
    (letter,) = mb.stream('s.dead_letters', url=stream.target.url).tail(last=5, follow=False)
    assert letter.data['data'] == BROKEN
    assert UTF8 in letter.data['error']


def test_a_token_that_could_not_be_read_is_refused(stream):
    with pytest.raises(mb.errors.ArgumentError, match='token'):
        stream.producer('x').append_many([SourceMessage({'seq': 1}, token={'a': RawBSONDocument(BROKEN)})])


@pytest.mark.parametrize('how', ['append', 'append_many', 'put', 'put_many', 'batchsize'])
def test_every_way_to_append_refuses_what_could_not_be_read(url, db, how):
    stream = mb.stream('s', url=url, batchsize=10 if how == 'batchsize' else None)
    message = {'a': [{'b': RawBSONDocument(BROKEN)}]}
    if how == 'put_many':
        assert stream.put_many([message, {'a': 1}], [None, None]) == 0
    else:
        with pytest.raises(DataError, match=r"data\['a'\]\[0\]\['b'\]"):
            getattr(stream, 'append' if how == 'batchsize' else how)([message] if how == 'append_many' else message)
    producer.producer_of(stream.target, 's').flush()
    assert db.buffer.count_documents({}) == 0
