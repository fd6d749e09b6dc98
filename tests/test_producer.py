"""What a message may be, how messages become record batches, and what is told when they cannot be stored."""

import decimal
import threading
import uuid
from collections import OrderedDict, UserDict
from datetime import datetime
from functools import partial

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from processes import command, prove_log
from servers import Mongod, Proxy, eventually

import minibatch as mb
from minibatch import producer
from minibatch.encoding import encode, encode_both, encode_meta
from minibatch.errors import DataError, ServerError, UnconfirmedError, UnreachableError
from minibatch.producer import RECORD_BYTES, RECORD_MESSAGES

OUT_OF_DISK_SPACE = 14031
UNAUTHORIZED = 13
BROKEN = RawBSONDocument(bson.encode({'a': 'xx'}).replace(b'xx', b'\xff\xfe'))  # is stored, and cannot be read


@pytest.mark.parametrize(
    'data',
    [
        {},
        {'a.b': 1, '$set': {'x': 2}, 'c': {'$gt': 3, 'd.e': 4}},
        {'_id': 1, 'a': [1, {'b': None}]},
        {'_cls': 'Stream', 'x': {'_cls': 'Window'}},
        {'t': datetime(2020, 1, 1), 'u': uuid.UUID(int=5), 'b': b'x', 'f': 1.5},
        {'text': 'a value that mentions $ref'},
        {'u': [uuid.UUID(int=5)] * 3, 'b': bson.Binary(b'\0\4' * 3, 5), 'text': '\5a\4\4\4\4', 'a': [[], [5, '\4']]},
    ],
)
def test_data_comes_back_as_it_was(data):
    options = bson.CodecOptions(uuid_representation=bson.binary.UuidRepresentation.STANDARD)
    assert bson.decode(encode(data), options) == data


@pytest.mark.parametrize('data', [1, 'text', None, [1], [('a', 1)], {1, 2}])
def test_data_must_be_a_mapping(data):
    with pytest.raises(DataError, match='must be a mapping'):
        encode(data)


@pytest.mark.parametrize(
    ('data', 'named'),
    [
        ({'a': object()}, r"data\['a'\]"),
        ({'a': {'b': [1, {'c': decimal.Decimal(1)}]}}, r"data\['a'\]\['b'\]\[1\]\['c'\]"),
        ({'n': 2**70}, r"data\['n'\]"),
        ({1: 2}, 'key 1 is not a string'),
        ({'a': {2: 3}}, r"data\['a'\].*key 2 is not a string"),
        ({'a': '\ud800'}, r"data\['a'\]"),
        ({'x': {'$ref': 'c', '$id': 1}}, r"\['x'\].*\$ref"),
        ({'big': 'x' * (17 << 20), 'small': 1}, r"data\['big'\]"),
        ({'a': [1, {'u': bson.Binary(b'0', 4)}]}, r"data\['a'\]\[1\]\['u'\]: cannot decode a uuid from a 1-byte"),
        ({'a': bson.Binary(b'0' * 17, 4)}, r"data\['a'\]: cannot decode a uuid from a 17-byte"),
        (BROKEN, "data: 'utf-8' codec can't decode"),
        ({'a': BROKEN}, r"data\['a'\]: 'utf-8' codec can't decode"),
        ({'a': [1, {'b': (BROKEN,)}]}, r"data\['a'\]\[1\]\['b'\]\[0\]: 'utf-8' codec can't decode"),
        (UserDict({'a': UserDict({'b': [BROKEN]})}), r"data\['a'\]\['b'\]\[0\]: 'utf-8' codec can't decode"),
        (OrderedDict({'a': OrderedDict({'b': BROKEN})}), r"data\['a'\]\['b'\]: 'utf-8' codec can't decode"),
    ],
)
def test_what_mongodb_cannot_store_is_refused_with_the_key(data, named):
    with pytest.raises(DataError, match=named):
        encode(data)


@pytest.mark.parametrize(
    ('meta', 'named'),
    [
        ({'u': bson.Binary(b'0', 4)}, r"meta\['u'\]: cannot decode a uuid"),
        (BROKEN, "meta: 'utf-8' codec"),
        ([{'a': BROKEN}], r"meta\[0\]\['a'\]: 'utf-8' codec"),
    ],
)
def test_what_is_said_of_a_message_must_be_readable_too(meta, named):
    with pytest.raises(DataError, match=named):
        encode_both({}, meta)


def test_data_that_contains_itself_is_refused():
    data = {}
    data['self'] = data
    with pytest.raises(DataError, match='contains itself'):
        encode(data)


@pytest.mark.parametrize('levels', [175, 500])
def test_data_nested_deeper_than_the_server_takes_is_refused(levels):
    data = {}
    for _ in range(levels):
        data = {'in': data}
    with pytest.raises(DataError, match='nested'):
        encode(data)


def cuts(datas, meta=None):
    return producer.cuts(datas, meta or [None] * len(datas), 0)


def test_record_batches_are_bounded_in_number_and_bytes():
    many = list(cuts([b'x' * 10] * (2 * RECORD_MESSAGES + 1)))
    assert [end - start for start, end, _ in many] == [RECORD_MESSAGES, RECORD_MESSAGES, 1]
    big = list(cuts([b'x' * (RECORD_BYTES // 2 + 1)] * 3))
    assert [end - start for start, end, _ in big] == [1, 1, 1]


def test_one_message_larger_than_a_record_batch_goes_alone():
    assert [(start, end) for start, end, _ in cuts([b'a', b'x' * (2 * RECORD_BYTES), b'b'])] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


def test_what_is_said_about_messages_counts_as_their_bytes():
    about = encode_meta({'header': 'x' * (RECORD_BYTES // 2)})
    assert [end - start for start, end, _ in cuts([b'x'] * 3, [about] * 3)] == [1, 1, 1]


def test_meta_that_cannot_be_stored_is_refused_at_the_call():
    with pytest.raises(DataError, match=r"meta\['header'\]"):
        encode_meta({'header': object()})


# --- what is not stored is told exactly


@pytest.fixture(scope='module')
def failing():
    """A server whose inserts can be made to fail."""
    with Mongod('--setParameter', 'enableTestCommands=1') as server:
        yield server


@pytest.fixture
def own(failing):
    """A database of that server for one test; a producer would go on with its offsets after it was dropped."""
    return failing.client[f'test_{uuid.uuid4().hex[:12]}']


@pytest.fixture
def fail(failing):
    """Let all inserts fail with an error code, but for the first `skip`; with 0 they work again."""

    def configure(code, skip=0):
        data = {'failCommands': ['insert'], 'errorCode': code}
        failing.client.admin.command('configureFailPoint', 'failCommand', mode={'skip': skip} if code else 'off',
                                     **({'data': data} if code else {}))  # fmt: skip

    yield configure
    configure(0)


def messages(count, source=0):
    return [{'source': source, 'seq': seq} for seq in range(count)]


@pytest.mark.integration
@pytest.mark.parametrize(
    ('code', 'kind', 'queued'), [(OUT_OF_DISK_SPACE, UnconfirmedError, 1000), (UNAUTHORIZED, ServerError, 0)]
)
def test_a_part_that_was_not_stored_can_be_appended_again_as_documented(failing, own, fail, code, kind, queued):
    items = messages(5000)
    stream = mb.stream('s', url=failing.url(own.name), max_backlog=10**6, timeout=0.5)
    fail(code, skip=2)
    with pytest.raises(kind, match='first 2,000 messages of this call are stored') as caught:
        stream.append_many(items)
    assert type(caught.value) is kind
    assert (caught.value.written, caught.value.queued) == (2000, queued)
    fail(0)
    stream.flush()
    stream.append_many(items[caught.value.written + caught.value.queued :])
    prove_log(own, 's', {0: 5000})


@pytest.mark.integration
def test_while_the_disk_is_full_an_append_waits_and_goes_on_when_there_is_room(failing, own, fail, caplog):
    stream = mb.stream('s', url=failing.url(own.name))
    fail(OUT_OF_DISK_SPACE)
    thread = threading.Thread(target=stream.append_many, args=(messages(10),))
    thread.start()
    eventually(lambda: 'not confirmed, trying again' in caplog.text)
    fail(0)
    thread.join(10)
    assert not thread.is_alive()
    prove_log(own, 's', {0: 10})


@pytest.mark.integration
@pytest.mark.parametrize('applied', [True, False])
def test_what_a_lost_connection_left_unclear_stays_queued_and_is_stored_once(mongod, db, applied):
    items = messages(1000)
    with Proxy(mongod.port) as proxy:
        stream = mb.stream('s', url=f'{proxy.url(db.name)}&serverSelectionTimeoutMS=200', timeout=0.5)
        stream.append_many(items[:10])
        proxy.refuse()
        if applied:
            happened = proxy.cut_reply(command('insert', 'buffer'))
        else:
            proxy.cut()
        with pytest.raises(UnconfirmedError, match='990 stay queued') as caught:
            stream.append_many(items[10:])
        assert (caught.value.written, caught.value.queued) == (0, 990)
        assert not applied or happened.is_set()
        assert db.buffer.count_documents({}) == 1 + applied
        with pytest.raises(UnconfirmedError) as flushed:
            stream.flush()
        assert flushed.value.queued == 990
        with pytest.raises(UnconfirmedError, match='Nothing of this call was written') as second:
            stream.append({'source': 1, 'seq': 0})
        assert (second.value.written, second.value.queued) == (0, 0)
        proxy.allow()
        eventually(lambda: is_flushed(stream))
        prove_log(db, 's', {0: 1000})


def is_flushed(stream):
    try:
        stream.flush()
    except UnconfirmedError:
        return False
    return True


@pytest.mark.integration
def test_what_stays_queued_is_not_dropped_when_it_is_refused_later(failing, own, fail):
    stream = mb.stream('s', url=failing.url(own.name), timeout=0.3)
    fail(OUT_OF_DISK_SPACE)
    with pytest.raises(UnconfirmedError) as caught:
        stream.append({'source': 0, 'seq': 0})
    assert caught.value.queued == 1
    fail(UNAUTHORIZED)
    for _ in range(2):
        with pytest.raises(ServerError) as flushed:
            stream.flush()
        assert flushed.value.queued == 1
        with pytest.raises(ServerError) as other:
            stream.append({'source': 1, 'seq': 0})
        assert (other.value.written, other.value.queued) == (0, 0)
    fail(0)
    stream.flush()
    prove_log(own, 's', {0: 1})


@pytest.mark.integration
def test_the_append_that_fills_a_batch_tells_that_the_one_before_has_failed(failing, own, fail, caplog):
    stream = mb.stream('s', url=failing.url(own.name), batchsize=3, linger=3600, timeout=0.3)
    fail(UNAUTHORIZED)
    for seq in range(5):
        stream.append({'source': 0, 'seq': seq})
    eventually(lambda: 'stay queued until the next append or flush' in caplog.text)
    with pytest.raises(ServerError, match='flush') as caught:
        stream.append({'source': 0, 'seq': 5})
    assert (caught.value.written, caught.value.queued) == (0, 1)
    fail(0)
    stream.flush()
    prove_log(own, 's', {0: 6})


@pytest.mark.integration
def test_a_full_batch_is_written_while_the_next_one_is_filled_and_no_third_one_piles_up(failing, own):
    stream = mb.stream('s', url=failing.url(own.name), batchsize=3, linger=3600, timeout=20)
    failing.pause()
    try:
        for seq in range(5):
            stream.append({'source': 0, 'seq': seq})
        third = threading.Thread(target=stream.append, args=({'source': 0, 'seq': 5},))
        third.start()
        eventually(lambda: len(stream._producer._unwritten()) == 2)
        assert third.is_alive()
    finally:
        failing.resume()
    third.join(20)
    stream.flush()
    prove_log(own, 's', {0: 6})


def in_time(call, *args):
    """What a call raises that must end long before the driver's own limits, of 30 s and more."""
    raised = []

    def run():
        try:
            call(*args)
        except Exception as exc:
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(25)
    assert not thread.is_alive(), f'{call} waits for longer than its timeout'
    return raised[0] if raised else None


@pytest.mark.integration
@pytest.mark.parametrize('how', ['kill', 'pause'])
def test_a_timeout_holds_down_to_the_last_wait_of_the_driver_when_mongodb_is_gone(how):
    with Mongod() as server:
        url = server.url('test')
        plain, batched, limited = (
            mb.stream(name, url=url, timeout=0.3, **options)
            for name, options in [('plain', {}), ('batched', {'batchsize': 10}), ('limited', {'max_backlog': 10**6})]
        )
        for stream in (plain, batched, limited):
            stream.append({'i': 0})
            stream.flush()
        getattr(server, how)()
        limited._producer._room._counted = 0.0
        failed = in_time(plain.append, {'i': 1})
        assert (type(failed), failed.queued) == (UnconfirmedError, 1)
        assert type(in_time(plain.flush)) is UnconfirmedError
        failed = in_time(limited.append, {'i': 1})
        assert (type(failed), failed.written, failed.queued) == (UnconfirmedError, 0, 0)
        assert in_time(batched.append, {'i': 1}) is None
        assert type(in_time(batched.close)) is UnconfirmedError
        assert type(in_time(partial(mb.stream, 'new', url=url, timeout=0.3))) is UnreachableError
        assert type(in_time(mb.Stream.find, 'plain', url, 0.3)) is UnreachableError
        assert type(in_time(plain._producer.flush)) is UnconfirmedError  # as at the end of the process


@pytest.mark.integration
def test_an_append_that_waits_for_another_one_gives_up_after_its_own_timeout(failing, own):
    patient, hasty = mb.stream('s', url=failing.url(own.name)), mb.stream('s', url=failing.url(own.name), timeout=0.5)
    patiently = threading.Thread(target=patient.append, args=({'source': 0, 'seq': 0},))
    failing.pause()
    try:
        patiently.start()
        eventually(lambda: patient._producer._in_flight)
        with pytest.raises(UnconfirmedError, match='Nothing of this call was written') as caught:
            hasty.append({'source': 1, 'seq': 0})
        assert caught.value.queued == 0
    finally:
        failing.resume()
    patiently.join(20)
    prove_log(own, 's', {0: 1})


def test_of_more_than_is_checked_at_once_a_wrong_message_says_how_many_are_stored(url, db, monkeypatch):
    monkeypatch.setattr(producer, 'CHECKED_BYTES', 1000)
    stream = mb.stream('s', url=url)
    with pytest.raises(DataError, match=r'items\[100\]') as caught:
        stream.append_many([*messages(100), {'wrong': object()}])
    assert 0 < caught.value.written < 100
    assert caught.value.queued == 0
    prove_log(db, 's', {0: caught.value.written})


@pytest.mark.integration
def test_a_stream_is_opened_although_the_primary_steps_down_meanwhile(failing, own, caplog):
    commands, error = ['createIndexes', 'findAndModify'], {'code': 189, 'errmsg': 'stepped down'}
    stepped_down = {'failCommands': commands, 'writeConcernError': error}
    failing.client.admin.command('configureFailPoint', 'failCommand', mode={'times': 2}, data=stepped_down)
    mb.stream('s', url=failing.url(own.name)).append({'a': 1})
    assert caplog.text.count('is not open yet') == 1


@pytest.mark.integration
def test_data_and_meta_that_are_too_large_together_are_refused_and_hold_nothing_up(url, db):
    stream = mb.stream('s', url=url, batchsize=10)
    with pytest.raises(DataError, match='data and meta have 17,'):
        stream.append({'source': 0, 'seq': 0}, meta={'headers': 'x' * (17 << 20)})
    stream.append({'source': 0, 'seq': 0})
    stream.flush()
    prove_log(db, 's', {0: 1})


def test_a_producer_that_was_idle_for_half_a_day_begins_a_new_log(url, db):
    stream = mb.stream('test', url=url)
    stream.append({'a': 1})
    stream._producer._used -= producer.RENEWED + 1
    stream.append({'a': 2})
    stream.append({'a': 3})
    first, *others = db.buffer.find().sort('_id', 1)
    assert [doc['offset'] for doc in (first, *others)] == [0, 0, 1]
    assert first['producer'] != others[0]['producer'] == others[1]['producer']
