"""Streams and windows; models and appends without a server, on mongomock, and streams as sinks and as archives."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from functools import partial

import cloudpickle
import pytest
from processes import Seen, appended, note, prove, started
from pymongo import MongoClient
from servers import Mongod, eventually

import minibatch as mb
from minibatch import attached, connection, models
from minibatch.clock import EPOCH
from minibatch.connection import Target, masked
from minibatch.errors import ArgumentError, BacklogFullError, DataError, PortabilityError, ServerError
from minibatch.messages import MessageWindow
from minibatch.store import Span
from minibatch.testing import InlineExecutor


@pytest.fixture
def stream():
    connection.disconnect()
    mb.connectdb('mongomock://localhost/models')
    yield mb.stream('s')
    connection.disconnect()


def record(offset, *data, times=None, meta=None):
    start = datetime(2020, 1, 1)
    doc = {'offset': offset, 'n': len(data), 'created': start}
    doc.update({'data': data[0]} if len(data) == 1 else {'batch': list(data)})
    if times:
        doc.update(created=start + timedelta(seconds=times[0]), times=[start + timedelta(seconds=t) for t in times])
    return {**doc, 'meta': meta} if meta else doc


def window(*records):
    return MessageWindow('s/g/1', 's', 1, EPOCH, None, None, 1, list(records))


def test_a_window_is_its_data_in_order():
    view = window((Span('a', 0, 3), [record(0, {'v': 0}), record(1, {'v': 1}, {'v': 2})]))
    assert view.data == [{'v': 0}, {'v': 1}, {'v': 2}] == list(view)
    assert len(view) == 3


def test_a_window_takes_only_its_part_of_a_record_batch():
    batch = record(10, *({'v': v} for v in range(10, 20)))
    assert [d['v'] for d in window((Span('a', 13, 16), [batch])).data] == [13, 14, 15]


def test_record_batches_that_overlap_are_read_once():
    batch, single = record(0, {'v': 0}, {'v': 1}, {'v': 2}), record(2, {'v': 2})
    assert [d['v'] for d in window((Span('a', 0, 3), [batch, single])).data] == [0, 1, 2]


def test_messages_that_are_gone_are_counted():
    view = window((Span('a', 0, 5), [record(3, {'v': 3}), record(4, {'v': 4})]))
    assert (len(view), view.missing) == (2, 3)


def test_messages_of_several_producers_are_ordered_by_time():
    view = window(
        (Span('a', 0, 2), [record(0, {'v': 'a1'}, {'v': 'a3'}, times=[1, 3])]),
        (Span('b', 0, 2), [record(0, {'v': 'b2'}, {'v': 'b4'}, times=[2, 4])]),
    )
    assert [d['v'] for d in view.data] == ['a1', 'b2', 'a3', 'b4']


def test_a_producers_order_holds_even_if_its_clock_goes_backwards():
    view = window(
        (Span('a', 0, 2), [record(0, {'v': 'a5'}, {'v': 'a1'}, times=[5, 1])]),
        (Span('b', 0, 1), [record(0, {'v': 'b3'}, times=[3])]),
    )
    assert [d['v'] for d in view.data] == ['b3', 'a5', 'a1']


def test_messages_have_their_place_time_and_meta():
    view = window((Span('a', 7, 9), [record(7, {'v': 1}, {'v': 2}, meta=[None, {'key': 'k'}])]))
    first, second = view.messages
    assert (first.producer, first.offset, second.offset, second.meta) == ('a', 7, 8, {'key': 'k'})
    assert first.created.tzinfo is not None


def test_an_empty_window_is_still_true():
    assert window()
    assert len(window()) == 0


# --- on mongomock


def test_appended_messages_are_in_the_buffer(stream):
    stream.append({'a': 1})
    assert stream.append_many([{'a': 2}, {'a': 3}]) == 2
    single, batch = stream.buffer()
    assert (single.data, single.offset, batch.batch, batch.offset) == ({'a': 1}, 0, [{'a': 2}, {'a': 3}], 1)
    assert single.processed is False


def test_messages_wait_for_a_full_batch_or_a_flush(stream):
    batched = mb.stream('batched', batchsize=3, linger=3600)
    batched.append({'a': 1})
    batched.append({'a': 2})
    assert batched.buffer().count() == 0
    batched.append({'a': 3})
    eventually(lambda: [len(record.batch) for record in batched.buffer()] == [3])
    with batched:
        batched.append({'a': 4})
    assert [record.n for record in batched.buffer()] == [3, 1]


def test_a_single_append_writes_what_waits_before_it(stream):
    batched, plain = mb.stream('mixed', batchsize=10, linger=3600), mb.stream('mixed')
    batched.append({'a': 1})
    plain.append({'a': 2})
    assert [(record.offset, record.data) for record in plain.buffer()] == [(0, {'a': 1}), (1, {'a': 2})]


def test_clear_deletes_the_messages_of_this_stream_only(stream):
    other = mb.stream('other')
    stream.append({'a': 1})
    other.append({'a': 1})
    assert stream.clear() == 1
    assert (stream.buffer().count(), other.buffer().count()) == (0, 1)


def test_a_message_that_looks_like_a_document_class_stays_a_dict(stream):
    data = {'_cls': 'Stream', 'x': {'_cls': 'Window', '_ref': 1}}
    stream.append(data)
    assert stream.buffer().first().data == data


def test_a_window_stored_with_its_data_can_be_read_and_queried(stream):
    mb.Window(stream='s', data=[{'a': 1}]).save()
    assert stream.window().first().data == [{'a': 1}]
    assert mb.Window.objects(stream='s').count() == 1


def test_the_interval_of_a_stream_is_a_whole_number_of_milliseconds_also_where_it_was_stored_before(stream):
    with pytest.raises(ArgumentError, match='interval must be a whole number of milliseconds'):
        mb.stream('t', interval=1 / 3)
    mb.stream('t', interval=2.5)._get_collection().update_one({'name': 't'}, {'$set': {'interval': 1 / 3}})
    assert mb.make_emitter('t', len, stream=mb.stream('t'), executor='inline').interval == 0.333


def test_a_stream_is_found_again_with_its_options(stream):
    mb.stream('t', interval=2.5)
    assert mb.stream('t').interval == 2.5
    assert mb.Stream.objects(name='t').count() == 1


def test_a_source_appends_in_the_background_until_it_is_cancelled(stream):
    class Source:
        cancelled = False

        def stream(self, stream):
            stream.append({'a': 1})

        def cancel(self):
            self.cancelled = True

    source = Source()
    stream.attach(source)
    stream.stop()
    assert stream.source is source
    assert source.cancelled
    assert stream.buffer().count() == 1


def test_a_source_that_fails_is_started_again(stream, caplog, monkeypatch):
    monkeypatch.setattr(attached, 'PAUSES', (0.01, 0.02))

    class Source:
        starts = 0

        def stream(self, stream):
            self.starts += 1
            if self.starts < 4:
                raise ConnectionError(f'no answer {self.starts}')
            stream.append({'a': 1})

        def cancel(self):
            pass

    source = Source()
    stream.attach(source)
    eventually(lambda: stream._attached.ended)
    assert source.starts == 4
    assert stream.buffer().count() == 1
    assert [record.message for record in caplog.records if 'failed' in record.message] == [
        f"the source of stream 's' (Source) failed, it is started again in {pause} s: ConnectionError: no answer {i}"
        for i, pause in enumerate(('0.01', '0.02', '0.02'), 1)
    ]


def test_a_source_that_waits_to_be_started_again_does_not_count_as_well(stream, monkeypatch):
    monkeypatch.setattr(attached, 'WELL', 0.05)

    class Source:
        def stream(self, stream):
            raise ConnectionError('no answer')

        def cancel(self):
            pass

    stream.attach(Source())
    eventually(lambda: stream.source_failure)
    with pytest.raises(AssertionError):
        eventually(lambda: not stream.source_failure, 0.3)
    stream.stop()


def test_a_source_that_begins_just_after_it_was_cancelled_is_cancelled_again(stream):
    cancelled, may_begin = threading.Event(), threading.Event()

    class Source:
        def stream(self, stream):
            may_begin.wait(10)
            cancelled.clear()
            cancelled.wait(10)

        def cancel(self):
            cancelled.set()
            may_begin.set()

    stream.attach(Source())
    stream.stop(timeout=5)
    assert not stream._attached.running


def test_something_that_is_no_source_is_refused(stream):
    with pytest.raises(mb.MinibatchError, match='source must have'):
        stream.attach(object())


def test_a_stream_that_exists_can_be_found_with_its_options(stream):
    mb.stream('t', interval=2.5, max_age=3)
    found = mb.Stream.find('t')
    assert (found.name, found.interval, found.max_age) == ('t', 2.5, 3)


def test_an_append_promises_the_same_whatever_batchsize_another_program_has(stream):
    mb.stream('t', batchsize=10, linger=3600)
    mb.stream('t').append({'a': 1})
    assert [record.data for record in mb.Stream.find('t').buffer()] == [{'a': 1}]


def test_a_stream_that_does_not_exist_is_not_made_and_those_that_do_are_named(stream):
    for i in range(11):
        mb.stream(f'n{i:02d}')
    with pytest.raises(ArgumentError, match=r"no stream 'x'; there are: 'n00', .*'n09' and more"):
        mb.Stream.find('x')
    assert mb.Stream.objects(name='x').count() == 0


def test_a_limit_of_messages_holds_on_mongomock_too(stream):
    limited = mb.stream('limited', max_backlog=3, on_full='raise')
    with pytest.raises(BacklogFullError) as caught:
        limited.append_many([{'a': i} for i in range(5)])
    assert caught.value.written == 3


# --- a stream is a sink


def test_a_stream_takes_a_message_or_many_as_a_sink_and_stores_them_at_once(stream):
    sink = mb.stream('sink', batchsize=10, linger=3600)
    assert isinstance(sink, mb.abc.Sink)
    sink.append({'a': 0})
    sink.put({'a': 1})
    sink.put([])
    sink.put({'a': i} for i in (2, 3))
    first, second, third = sink.buffer()
    assert (first.data, second.data, third.batch) == ({'a': 0}, {'a': 1}, [{'a': 2}, {'a': 3}])


@pytest.mark.parametrize(
    ('result', 'named'), [(3, 'not int'), ('text', 'not str'), (b'x', 'not bytes'), ([1], r'items\[0\].*not int')]
)
def test_a_result_that_is_no_message_is_refused_by_its_type(stream, result, named):
    with pytest.raises(DataError, match=named):
        stream.put(result)
    assert stream.buffer().count() == 0


def test_the_results_of_many_windows_are_appended_at_once_up_to_the_first_that_is_no_message(stream):
    results = [{'a': 0}, [{'a': 1}, {'a': 2}], [], ({'a': 3},)]
    assert stream.put_many(results, []) == 4
    assert [record.batch for record in stream.buffer()] == [[{'a': n} for n in range(4)]]
    assert stream.put_many([[], {'a': 4}, 5], []) == 0  # so that each is given on its own
    assert stream.put_many([[], {'a': 4}, [6]], []) == 1
    assert stream.put_many([{'a': 4}, iter([{'a': 5}])], []) == 0
    assert stream.buffer().count() == 1


def test_of_many_results_those_count_that_were_stored_before_the_stream_was_full(url):
    stream = mb.stream('s', url=url, max_backlog=1000, on_full='raise')
    results = [[{'a': n}] * 400 for n in range(4)]
    stored = stream.put_many(results, [])
    assert (stored, sum(record.n for record in stream.buffer())) == (2, 1000)


def test_streams_can_be_chained(url):
    first, second, seen = mb.stream('first', url=url), mb.stream('second', url=url, batchsize=100), Seen()

    def relay(window):
        return [{**data, 'window': window.number} for data in window.data]

    relaying = mb.make_emitter('first', relay, stream=first, size=10, sink=second, executor=InlineExecutor)
    noting = mb.make_emitter('second', note, stream=second, size=5, sink=seen, executor=InlineExecutor)
    with started(relaying), started(noting):
        appended(first, 0, 0, 100)
        eventually(lambda: seen.count() == 100)
        eventually(lambda: not first.buffer().count() and not second.buffer().count())
    prove(seen.messages(), {0: 100})


# --- messages are kept for max_age


def test_with_max_age_processed_messages_are_kept_for_a_group_that_comes_later(url):
    stream = mb.stream('s', url=url, max_age=3600)
    appended(stream, 0, 0, 50)
    for group in ('one', 'two'):
        seen = Seen()
        emitter = mb.make_emitter('s', note, stream=stream, size=10, group=group, sink=seen, executor=InlineExecutor)
        assert emitter._run_once() == 5
        prove(seen.messages(), {0: 50})
    assert [(record.n, record.processed) for record in stream.buffer()] == [(50, True)]


def test_a_replica_set_that_was_never_initiated_is_waited_for_and_the_error_says_what_to_do(monkeypatch, caplog):
    monkeypatch.setattr(models, 'OPEN_TIMEOUT', 0.5)
    with Mongod(replica_set='new') as server, pytest.raises(ServerError) as said:
        mb.stream('s', url=server.url())
    assert str(said.value) == (
        f"stream 's' cannot be opened at {server.url()}: not primary. No member of the replica set takes writes; one "
        'that is new must be initiated, by rs.initiate().'
    )
    assert [record.levelname for record in caplog.records] == ['WARNING']
    connection.disconnect()


def test_a_user_who_may_not_write_is_told_which_role_to_have():
    with Mongod('--auth', replica_set=False) as server:
        server.client.admin.command('createUser', 'root', pwd='secret', roles=['root'])
        with MongoClient(f'mongodb://root:secret@{server.address}/') as client:
            client.admin.command('createUser', 'ann', pwd='ad', roles=[{'role': 'read', 'db': 'test'}])
        for user, reason in (('', 'requires authentication'), ('ann:ad@', 'not authorized on test')):
            url = f'mongodb://{user}{server.address}/test?authSource=admin'
            with pytest.raises(ServerError) as said:
                mb.stream('s', url=url)
            assert f'{masked(url)}: ' in str(said.value)
            assert reason in str(said.value)
            assert str(said.value).endswith("name a user who has the role readWrite on the database 'test'.")
    connection.disconnect()


# --- beside documents of others

OTHERS = """
import sys
import mongoengine as me
{before}
class Stream(me.Document):
    title = me.StringField()
class Buffer(me.EmbeddedDocument):
    size = me.IntField()
class Base(me.Document):
    meta = {{'allow_inheritance': True}}
class Window(Base):
    stream = me.ReferenceField('Stream', reverse_delete_rule=me.CASCADE)
    any = me.GenericReferenceField()
    buffers = me.ListField(me.GenericEmbeddedDocumentField())
class _Model(me.Document):
    pass
{after}
me.connect('others', host=sys.argv[1])
with mb.stream('s', url=sys.argv[1]) as ours:
    ours.append({{'v': 1}})
theirs = Stream(title='t').save()
Window(stream=theirs, any=theirs, buffers=[Buffer(size=3)]).save()
window = Base.objects.first()
assert type(window) is Window and type(window.stream) is type(window.any) is Stream
assert type(window.buffers[0]) is Buffer and window.any.title == 't'
for name, document in (('Stream', Stream), ('Buffer', Buffer), ('Window', Window), ('_Model', _Model)):
    assert me.base.get_document(name) is document, name
assert type(ours.buffer().get()) is mb.Buffer and ours.buffer().get().data == {{'v': 1}}
assert type(mb.Stream.objects(name='s').get()) is mb.Stream and mb.Stream.__name__ == 'Stream'
assert all('_cls' not in doc for doc in mb.connectdb(sys.argv[1]).stream.find())
theirs.delete()
assert Window.objects.count() == 0
"""


@pytest.mark.parametrize('first', ['before', 'after'])
def test_documents_of_others_keep_the_names_of_ours_whichever_are_defined_first(url, first):
    program = OTHERS.format(**{'before': '', 'after': '', first: 'import minibatch as mb'})
    done = subprocess.run([sys.executable, '-c', program, url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- travelling

WAYS = {
    'pickle': lambda it: pickle.loads(pickle.dumps(it)),
    'cloudpickle': lambda it: pickle.loads(cloudpickle.dumps(it)),
    'copy': copy.copy,
    'deepcopy': copy.deepcopy,
}


@pytest.fixture
def elsewhere(url, db):
    """Another database, which is meant wherever no URL is given."""
    name = f'{db.name}_elsewhere'
    mb.connectdb(url.replace(db.name, name))
    yield db.client[name]
    db.client.drop_database(name)


@pytest.mark.parametrize('way', WAYS)
def test_a_stream_that_travels_is_the_same_with_its_database_and_options(url, db, elsewhere, way):
    stream = mb.stream('s', url=url, batchsize=3, linger=50, timeout=7, max_backlog=4, on_full='raise', interval=2)
    came = WAYS[way](stream)
    assert came == stream
    assert (came.name, came.interval, came.target) == ('s', 2, stream.target)
    came.append({'v': 0})
    assert db.buffer.count_documents({}) == 0, 'it waits for two more'
    came.flush()
    came.append_many([{'v': 1}, {'v': 2}, {'v': 3}])
    with pytest.raises(BacklogFullError):
        came.append({'v': 4})
    assert sum(doc['n'] for doc in db.buffer.find()) == 4
    assert (came.flush(), came._limits.timeout) == (None, 7)
    assert elsewhere.list_collection_names() == []


@pytest.mark.parametrize('way', WAYS)
def test_a_stream_that_was_closed_or_deleted_travels_to_its_database_too(url, db, elsewhere, way):
    stream = mb.stream('s', url=url)
    stream.close()
    WAYS[way](stream).append({'v': 0})
    assert len(stream.buffer()) == 1
    stream.delete()
    WAYS[way](stream).append({'v': 1})
    assert [doc['data'] for doc in db.buffer.find()] == [{'v': 1}]
    assert elsewhere.list_collection_names() == []


def test_a_stream_without_a_database_of_its_own_travels_with_the_one_it_means(url, db):
    mb.connectdb(url)
    sent = pickle.dumps(mb.Stream(name='s'))
    mb.connectdb(f'{url.replace(db.name, "unused")}')
    pickle.loads(sent).append({'v': 0})
    assert db.buffer.count_documents({}) == 1


def test_stored_documents_and_queries_of_a_stream_travel_to_its_database(url, db, elsewhere):
    stream = mb.stream('s', url=url)
    stream.append_many([{'v': 1}])
    found, query = pickle.loads(pickle.dumps((stream.buffer().first(), stream.buffer(processed=False))))
    assert [doc.data for doc in query] == [{'v': 1}]
    found.modify(processed=True)
    assert db.buffer.find_one()['processed']
    assert elsewhere.list_collection_names() == []


def test_groups_and_dead_letters_travel_to_their_database(url, elsewhere):
    stream = mb.stream('s', url=url)
    stream.append({'v': 1})
    mb.make_emitter('s', lambda window: 1 / 0, stream=stream, size=1, max_attempts=1, executor=InlineExecutor).run(
        blocking=False
    )
    group, letters = pickle.loads(pickle.dumps((stream.group(), stream.dead_letters())))
    assert (group.lag().messages, letters[0].data) == (0, [{'v': 1}])
    assert letters.discard() == 1
    assert elsewhere.list_collection_names() == []


def test_values_of_a_query_can_be_asked_for_alone(stream):
    stream.append({'v': 1})
    assert list(stream.buffer().scalar('n')) == [1]
    assert [doc['data'] for doc in stream.buffer().as_pymongo()] == [{'v': 1}]


def test_a_stream_in_the_memory_of_this_process_is_copied_and_not_sent(stream):
    copy.deepcopy({'out': stream})['out'].append({'v': 1})
    assert len(stream.buffer()) == 1
    with pytest.raises(PortabilityError, match='in the memory of this process'):
        pickle.dumps(stream)


def test_what_is_at_work_in_this_process_is_neither_copied_nor_sent(url):
    stream = mb.stream('s', url=url)
    emitter = mb.make_emitter('s', len, size=1, stream=stream)
    for at_work, named in ((stream.producer('p'), 'NamedProducer'), (emitter, r'CountWindow\(size=1\) on s/default')):
        for way in WAYS.values():
            with pytest.raises(PortabilityError, match=named):
                way(at_work)


def test_a_stream_shows_its_password_nowhere_and_sends_it():
    stream = mb.Stream(name='s').bound_to(Target('mongodb://me:hush@nowhere/db', 'db'))
    assert 'hush' not in f'{stream!r} {vars(stream)!r} {stream.to_mongo()}'
    assert pickle.loads(pickle.dumps(stream)).target == stream.target


class Outputs:
    """A callable object that has a stream, and a method."""

    def __init__(self, out):
        self.out = out

    def __call__(self, how):
        self.out.append({'how': how})

    def method(self, how):
        self.out.append({'how': how})


def append_to(how, out):
    out.append({'how': how})


@pytest.mark.parametrize('executor', ['processes', 'threads', 'inline'])
def test_a_function_appends_to_the_stream_it_refers_to_wherever_it_runs(url, db, elsewhere, executor, caplog):
    caplog.set_level('DEBUG')
    out = mb.stream('out', url=f'{url}&appName=hush', batchsize=100, linger=1000)
    found = partial(append_to, out=out)
    ways = {
        'closure': lambda how: out.append({'how': how}),
        'default': lambda how, out=out: out.append({'how': how}),
        'partial': found,
        'object': Outputs(out),
        'method': Outputs(out).method,
        'method of the stream': lambda how, append=out.append: append({'how': how}),
        'container': lambda how, outs=({'out': [out]},): outs[0]['out'][0].append({'how': how}),
    }
    stream = mb.stream('in', url=url)
    stream.append({'v': 1})

    def fn(window):
        for how, way in ways.items():
            way(how)

    mb.make_emitter('in', fn, stream=stream, size=1, workers=1, executor=executor).run(blocking=False)
    # Although so few do not fill a batch: the window is done, so they are stored.
    stored = [data['how'] for doc in db.buffer.find({'stream': 'out'}) for data in doc.get('batch') or [doc['data']]]
    assert stored == list(ways)
    assert elsewhere.list_collection_names() == []
    assert 'hush' not in str([list(db[name].find()) for name in db.list_collection_names()])
    ours = [record.getMessage() for record in caplog.records if record.name.startswith('minibatch')]
    assert not any('hush' in said for said in ours)


class Forwarding:
    """A sink that appends to a stream which only queues."""

    def __init__(self, out):
        self.out = out

    def put(self, messages):
        self.out.append({'how': 'one'})


class ForwardingLater(Forwarding):
    async def put(self, messages):
        await asyncio.sleep(0)
        self.out.append({'how': 'later'})


class ForwardingMany(Forwarding):
    def put_many(self, results, windows):
        self.out.append({'how': 'many'})
        return len(results)


@pytest.mark.parametrize(
    ('made', 'expected'),
    [(Forwarding, ['one', 'one']), (ForwardingLater, ['later', 'later']), (ForwardingMany, ['many'])],
)
def test_a_window_is_done_when_what_its_sink_has_queued_is_stored(url, made, expected):
    stream, out = mb.stream('in', url=url), mb.stream('out', url=url, batchsize=100, linger=1000)
    stream.append_many([{'v': 1}, {'v': 2}])
    mb.make_emitter('in', None, stream=stream, size=1, sink=made(out), executor='inline').run(blocking=False)
    stored = [data['how'] for record in out.buffer() for data in record.batch or [record.data]]
    assert stored == expected


def test_the_source_of_a_stream_stays_where_it_was_attached(url):
    ended, stream = threading.Event(), mb.stream('s', url=url)

    class Source:
        def stream(self, stream):
            ended.wait(60)

        def cancel(self):
            ended.set()

    stream.attach(Source())
    with pickle.loads(pickle.dumps(stream)) as came:
        assert came.source is None
    assert not ended.is_set()
    stream.close()
    assert ended.is_set()
