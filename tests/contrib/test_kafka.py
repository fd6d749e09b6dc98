"""The Kafka source and sink, against a real broker."""
from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from bson import ObjectId
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import OffsetOutOfRangeError, TopicAlreadyExistsError
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.serializer import JsonSerializer
from processes import FAULTS, Row, is_stopped, running
from servers import eventually, free_port
from servers_kafka import Broker

import minibatch as mb
from minibatch.abc import ExactlyOnceSink, Sink
from minibatch.contrib.kafka import KafkaSink, KafkaSource
from minibatch.errors import ArgumentError, DataError
from minibatch.testing import InlineExecutor

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures('collected'),
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::ResourceWarning'),
]


@pytest.fixture(scope='module')
def broker():
    """One for all tests, which each take topics of their own; in memory."""
    with Broker() as broker:
        yield broker


@pytest.fixture
def topic(broker):
    """A topic with one partition."""
    name = f'topic-{uuid.uuid4().hex[:8]}'
    broker.create(name)
    return name


def source(broker, topic, **configs):
    """A source in a group of its own, which this broker lets join after half the session timeout."""
    group = topic if isinstance(topic, str) else uuid.uuid4().hex
    return KafkaSource(topic, broker.url, **{'group_id': group, 'session_timeout_ms': 2000, **configs})


@contextmanager
def attached(stream, source):
    """Let a source run; in the end, it has not failed."""
    stream.attach(source)
    try:
        yield
        assert stream._attached.failure == ''
    finally:
        stream.stop()


def messages(db, name='test'):
    """The messages of a stream, (data, meta), each producer's in order."""
    found = []
    for doc in db.buffer.find({'stream': name}).sort([('producer', 1), ('offset', 1)]):
        datas = doc['batch'] if 'batch' in doc else [doc['data']]
        found += zip(datas, doc.get('meta') or [None] * len(datas), strict=True)
    return found


def datas(db, name='test'):
    return [data for data, _ in messages(db, name)]


def arrived(db, count, name='test', timeout=30):
    """Wait for so many messages, and return them."""
    total = [{'$match': {'stream': name}}, {'$group': {'_id': None, 'n': {'$sum': '$n'}}}]
    eventually(lambda: sum(doc['n'] for doc in db.buffer.aggregate(total)) >= count, timeout, f'{count} not arrived')
    return messages(db, name)


def numbers(*values):
    return [b'{"i": %d}' % i for i in values]


def prove(db, scenario, count, producers=1, name='test'):
    """All numbers below count have arrived once, of each partition in the order of Kafka; a row of the table."""
    found = messages(db, name)
    seen = [data['i'] for data, _ in found]
    order = [(meta['partition'], meta['offset']) for _, meta in found]
    row = Row(scenario, count, 0, lost=count - len(set(seen)), doubled=len(seen) - len(set(seen)))
    row.ordered = order == sorted(order)
    FAULTS.append(row)
    assert (row.lost, row.doubled, row.ordered) == (0, 0, True), row
    assert len({meta['partition'] for _, meta in found}) == producers


# --- what a message is


def test_messages_arrive_in_order_with_key_headers_and_timestamp(broker, topic, stream, db):
    broker.send(topic, numbers(0), key=b'k\xc3\xb6', headers=[('trace', b'1'), ('trace', b'\xff')], timestamp_ms=1234)
    broker.send(topic, numbers(*range(1, 2500)), key=b'\xff')
    with attached(stream, source(broker, topic)):
        found = arrived(db, 2500)
    assert [data['i'] for data, _ in found] == list(range(2500))
    assert found[0][1] == {
        'topic': topic, 'partition': 0, 'offset': 0, 'key': 'kö', 'timestamp': datetime(1970, 1, 1, 0, 0, 1, 234000),
        'headers': [['trace', '1'], ['trace', b'\xff']],
    }  # fmt: skip
    assert found[1][1]['key'] == b'\xff'
    assert [meta['offset'] for _, meta in found] == list(range(2500))


def test_a_function_sees_the_meta(broker, topic, stream, url):
    broker.send(topic, numbers(7), key=b'k')
    seen = []
    with attached(stream, source(broker, topic)):
        emitter = mb.make_emitter(
            'test', lambda window: seen.extend((message.data, message.meta) for message in window.messages),
            url=url, size=1, executor=InlineExecutor,
        )  # fmt: skip
        eventually(lambda: emitter._run_once() and seen)
    (data, meta), = seen
    assert (data, meta['key'], meta['offset']) == ({'i': 7}, 'k', 0)
    assert abs(meta['timestamp'].replace(tzinfo=timezone.utc) - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_what_is_not_an_object_is_the_value_of_one(broker, topic, stream, db):
    broker.send(topic, [b'[1, {"a": 2}]', b'1.5', b'"text"', b'null', None, b'{"a": 1}'], key=b'k')
    with attached(stream, source(broker, topic)):
        arrived(db, 6)
    assert datas(db) == [
        {'value': [1, {'a': 2}]}, {'value': 1.5}, {'value': 'text'}, {'value': None}, {'value': None}, {'a': 1},
    ]  # fmt: skip


def test_what_cannot_be_decoded_or_stored_is_a_dead_letter_and_the_others_arrive(broker, topic, stream, db):
    bad = [b'\xff', b'{"a":', b'', b'[' * 100_000, b'9' * 5000, b'{"a": "\\ud800"}', b'{"a": 18446744073709551616}']
    mixed = [each for i, value in enumerate(bad) for each in (value, *numbers(i))]
    broker.send(topic, mixed, timestamp_ms=2**61)
    with attached(stream, source(broker, topic)):
        arrived(db, len(bad))
        arrived(db, len(bad), 'test.dead_letters')
        broker.send(topic, [b'oops'])  # the last one: its offset is stored all the same
        dead = arrived(db, len(bad) + 1, 'test.dead_letters')
        eventually(lambda: broker.committed(topic, group=topic) == len(mixed) + 1)
    assert datas(db) == [{'i': i} for i in range(len(bad))]
    assert [data['data'] for data, _ in dead][:5] == bad[:5]
    assert [meta['offset'] for _, meta in dead] == [0, 2, 4, 6, 8, 10, 12, len(mixed)]
    assert dead[0][0]['error'].startswith(f'message 0 of {topic}/0: UnicodeDecodeError: ')
    assert dead[0][1]['timestamp'] is None
    with attached(stream, source(broker, topic)):
        broker.send(topic, numbers(100))
        arrived(db, len(bad) + 1)
    assert len(datas(db, 'test.dead_letters')) == len(bad) + 1
    FAULTS.append(Row('kafka: malformed messages', len(mixed) + 1, 0))


class NoText(str):
    """A text that another client would have sent as bytes."""

    def encode(self, *args):
        return b'\xff'


def test_what_the_client_of_kafka_cannot_decode_is_a_dead_letter_with_its_place(
    broker, topic, stream, db, monkeypatch
):
    broker.send(topic, numbers(0))
    broker.send(topic, numbers(1), headers=[(NoText('name'), b'')])
    build = DefaultRecordBatchBuilder.build
    with monkeypatch.context() as patch:
        patch.setattr(DefaultRecordBatchBuilder, 'build', lambda self: build(self)[:-1] + b'?')
        broker.send(topic, numbers(2))
    broker.send(topic, numbers(3))
    with attached(stream, source(broker, topic)):
        arrived(db, 2)
        (header, place), (checksum, also) = arrived(db, 2, 'test.dead_letters')
    assert datas(db) == [{'i': 0}, {'i': 3}]
    places = [(each['topic'], each['partition'], each['offset']) for each in (place, also)]
    assert places == [(topic, 0, 1), (topic, 0, 2)]
    assert f'message 1 of {topic}/0: ' in header['error']
    assert "'utf-8'" in header['error']
    assert checksum['error'] == f'message 2 of {topic}/0: its checksum is wrong'
    assert b'{"i": 1}' in header['data']
    with attached(stream, source(broker, topic)):
        broker.send(topic, numbers(4))
        arrived(db, 3)
    assert len(datas(db, 'test.dead_letters')) == 2


@pytest.mark.parametrize('value', [lambda raw: json.loads(raw), JsonSerializer()], ids=['function', 'Deserializer'])
def test_values_and_keys_are_decoded_as_the_user_says(broker, topic, stream, db, value):
    broker.send(topic, numbers(1), key=b'7')
    broker.send(topic, numbers(2), key=b'x')
    broker.send(topic, numbers(3))
    with attached(stream, source(broker, topic, value_deserializer=value, key_deserializer=int)):
        arrived(db, 2)
        dead = arrived(db, 1, 'test.dead_letters')
    assert [(data['i'], meta['key']) for data, meta in messages(db)] == [(1, 7), (3, None)]
    assert [(data['data'], meta['key']) for data, meta in dead] == [(b'{"i": 2}', b'x')]


# --- which topics


def test_several_topics_are_read(broker, stream, db):
    names = [f'several-{uuid.uuid4().hex[:8]}' for _ in range(2)]
    for i, name in enumerate(names):
        broker.create(name, partitions=2)
        broker.send(name, numbers(i), partition=1)
    with attached(stream, source(broker, names)):
        arrived(db, 2)
    assert {(meta['topic'], data['i']) for data, meta in messages(db)} == {(names[0], 0), (names[1], 1)}


def test_a_pattern_reads_all_topics_that_match_also_later_ones(broker, stream, db):
    start = uuid.uuid4().hex[:8]
    for name in (f'{start}-a', f'x{start}-a'):
        broker.create(name)
        broker.send(name, numbers(1))
    with attached(stream, source(broker, re.compile(f'{start}-[a-e]'), metadata_max_age_ms=200)):
        arrived(db, 1)
        for i, letter in enumerate('bcde', 2):  # each makes the group form anew
            broker.create(f'{start}-{letter}')
            broker.send(f'{start}-{letter}', numbers(i))
            arrived(db, i)
    found = [(meta['topic'][-1], data['i']) for data, meta in messages(db)]
    assert sorted(found) == [('a', 1), ('b', 2), ('c', 3), ('d', 4), ('e', 5)]


def test_a_topic_that_was_made_again_is_read_from_its_beginning(broker, topic, stream, db):
    broker.send(topic, numbers(*range(10)))
    with attached(stream, source(broker, topic, metadata_max_age_ms=500)):
        arrived(db, 10)
        broker.delete(topic)
        with suppress(TopicAlreadyExistsError):  # the broker makes it when the source asks for it in between
            broker.create(topic)
        broker.send(topic, numbers(*range(10, 30)))
        eventually(lambda: {data['i'] for data in datas(db)} == set(range(30)))
    before = datas(db)  # what was read before that was noticed may be there twice
    broker.delete(topic)
    broker.create(topic)
    broker.send(topic, numbers(*range(30, 70)))
    with attached(stream, source(broker, topic)):
        arrived(db, len(before) + 40)
    assert sorted(data['i'] for data in datas(db)) == sorted([*(data['i'] for data in before), *range(30, 70)])


# --- where it begins


def test_the_stored_offset_counts_and_not_what_was_committed_to_kafka(broker, topic, stream, db):
    broker.send(topic, numbers(*range(10)))
    with attached(stream, source(broker, topic)):
        arrived(db, 10)
    for wrong in (3, 12):
        broker.send(topic, numbers(*range(len(datas(db)), len(datas(db)) + 5)))
        commit(broker, topic, wrong)
        with attached(stream, source(broker, topic)):
            arrived(db, len(datas(db)) + 5)
    assert [data['i'] for data in datas(db)] == list(range(20))


def test_where_the_stream_has_nothing_the_committed_offset_counts(broker, topic, stream, db):
    broker.send(topic, numbers(*range(10)))
    commit(broker, topic, 6)
    with attached(stream, source(broker, topic)):
        arrived(db, 4)
    assert [data['i'] for data in datas(db)] == [6, 7, 8, 9]


def commit(broker, topic, offset):
    """Commit an offset for the group of the topic, as another program would."""
    from kafka import OffsetAndMetadata
    consumer = KafkaConsumer(bootstrap_servers=broker.url, group_id=topic, enable_auto_commit=False)
    try:
        consumer.assign([TopicPartition(topic, 0)])
        consumer.commit({TopicPartition(topic, 0): OffsetAndMetadata(offset, '', -1)})
    finally:
        consumer.close(autocommit=False)


def test_the_producer_is_named_by_cluster_topic_and_id_not_by_the_urls(broker, topic, stream, db):
    broker.send(topic, numbers(0))
    with attached(stream, source(broker, topic)):
        arrived(db, 1)
    broker.send(topic, numbers(1))
    other = KafkaSource(topic, [f'localhost:{broker.port}', broker.url], group_id='other', session_timeout_ms=2000)
    with attached(stream, other):
        arrived(db, 2)
    (producer,) = db.buffer.distinct('producer')
    assert re.fullmatch(f'source:kafka/tansu_cluster/{topic}@[0-9a-f-]{{36}}/0', producer)
    assert [data['i'] for data in datas(db)] == [0, 1]


def test_a_topic_of_the_longest_name_has_a_producer(broker, stream, db):
    name = uuid.uuid4().hex.ljust(249, 'x')
    for partition in (0, 1):
        broker.create(name, 2) if not partition else None
        broker.send(name, numbers(partition), partition=partition)
    with attached(stream, source(broker, name, group_id='long')):
        arrived(db, 2)
    assert len(db.buffer.distinct('producer')) == 2


def test_latest_begins_with_what_comes_and_skips_nothing_after_that(broker, topic, stream, db, caplog):
    caplog.set_level(logging.INFO, 'minibatch.contrib.kafka')
    broker.send(topic, numbers(0))
    with attached(stream, source(broker, topic, auto_offset_reset='latest')):
        eventually(lambda: 'from offset 1 (latest)' in caplog.text)
    broker.send(topic, numbers(1))  # while nothing reads
    with attached(stream, source(broker, topic, auto_offset_reset='latest', group_id='another')):
        arrived(db, 1)
    assert datas(db) == [{'i': 1}]


def test_none_fails_where_nothing_says_where_to_begin(broker, topic, stream):
    broker.send(topic, numbers(0))
    with pytest.raises(Exception, match=f"NoOffsetForPartitionError: {topic}/0, with auto_offset_reset='none'"):
        source(broker, topic, auto_offset_reset='none').stream(stream)


@pytest.mark.parametrize(('reset', 'offset', 'said'), [
    ('earliest', -7, 'offsets -7 to -1 of {}/0 are skipped: Kafka has deleted messages there'),
    ('earliest', 100, 'reading {}/0 from offset 0, as it does not reach 100'),
    ('none', 100, None),
])  # fmt: skip
def test_an_offset_that_kafka_does_not_have_is_told(
    broker, topic, stream, db, caplog, monkeypatch, reset, offset, said
):
    """The broker here never says that an offset is out of range, so this reply alone is made up."""
    broker.send(topic, numbers(10, 11, 12))
    commit(broker, topic, 0)
    replies = iter([OffsetOutOfRangeError({TopicPartition(topic, 0): offset})])
    poll = KafkaConsumer.poll

    def out_of_range(self, **options):
        records = poll(self, **options)
        if records and (error := next(replies, None)):
            raise error
        return records

    monkeypatch.setattr(KafkaConsumer, 'poll', out_of_range)
    reader = source(broker, topic, auto_offset_reset=reset)
    if said:
        with attached(stream, reader):
            arrived(db, 3)
        assert said.format(topic) in caplog.text
        assert datas(db) == [{'i': 10}, {'i': 11}, {'i': 12}]
    else:
        with pytest.raises(OffsetOutOfRangeError):
            reader.stream(stream)
        assert datas(db) == []


# --- arguments


async def later(data):
    return data


@pytest.mark.parametrize(('options', 'why'), [
    ({'topic': 'a b'}, r"topic must have 1 to 249 letters, digits, and \. _ -, not 'a b'"),
    ({'topic': 'a.*'}, r'for a pattern pass re\.compile'),
    ({'topic': []}, 'topic must be a name, a list of names, or a compiled pattern'),
    ({'topic': re.compile(b'a')}, 'topic must be a name'),
    ({'urls': []}, "urls must be 'host:port'"),
    ({'urls': 7}, "urls must be 'host:port'"),
    ({'enable_auto_commit': True}, 'enable_auto_commit=True would lose messages'),
    ({'group_id': None}, 'group_id must be a string'),
    ({'auto_offset_reset': 'oldest'}, "auto_offset_reset must be 'earliest', 'latest' or 'none', not 'oldest'"),
    ({'bootstrap_servers': 'a:1'}, 'bootstrap_servers is called urls here'),
    ({'sesion_timeout_ms': 1}, 'sesion_timeout_ms is no argument, and no configuration of kafka.KafkaConsumer'),
    ({'value_deserializer': 7}, 'value_deserializer must be a function, or have a method deserialize'),
    ({'value_deserializer': later}, 'value_deserializer must be a plain function, and later is async def'),
    ({'key_deserializer': lambda: 0}, 'key_deserializer is called with the data'),
])  # fmt: skip
def test_a_wrong_argument_of_the_source_is_named(options, why):
    with pytest.raises(ArgumentError, match=why):
        KafkaSource(**{'topic': 'a', **options})


@pytest.mark.parametrize(('options', 'why'), [
    ({'topic': ['a']}, 'topic must be the name of a topic or a function'),
    ({'topic': 'a b'}, 'topic must have 1 to 249 letters'),
    ({'expand': 'a'}, 'expand must be True or False'),
    ({'key': 7}, 'key must be the name of a field or a function'),
    ({'acks': 1}, "acks must be 'all', not 1"),
    ({'transactional_id': 'a'}, 'transactional_id is not supported'),
    ({'group_id': 'a'}, 'group_id is no argument, and no configuration of kafka.KafkaProducer'),
    ({'value_serializer': 7}, 'value_serializer must be a function, or have a method serialize'),
    ({'value_serializer': later}, 'value_serializer must be a plain function'),
    ({'topic': later}, 'topic must be a plain function'),
    ({'key': lambda a, b: 0}, 'key is called with a message'),
])  # fmt: skip
def test_a_wrong_argument_of_the_sink_is_named(options, why):
    with pytest.raises(ArgumentError, match=why):
        KafkaSink(**{'topic': 'a', **options})


@pytest.mark.parametrize('adapter', [KafkaSource, KafkaSink])
def test_a_password_is_not_shown(adapter):
    with pytest.raises(ArgumentError) as caught:
        adapter('a', 'kafka://user:secret@host:9092')
    assert 'secret' not in str(caught.value)
    assert 'secret' not in repr(adapter('a', security_protocol='SASL_SSL', sasl_plain_password='secret'))


@pytest.mark.parametrize('adapter', [KafkaSource, KafkaSink])
def test_security_settings_reach_kafka(broker, stream, adapter):
    given = {'security_protocol': 'SASL_SSL', 'sasl_mechanism': 'PLAIN', 'sasl_plain_username': 'me',
             'sasl_plain_password': 'secret', 'ssl_cafile': 'nosuch.pem'}
    reached = {}

    def client(**configs):
        reached.update(configs)
        return KafkaConsumer.DEFAULT_CONFIG['kafka_client'](**configs)

    one = adapter('a', broker.url, kafka_client=client, bootstrap_timeout_ms=300, **given)
    with pytest.raises(ConnectionError, match='or the security settings are not right') as caught:
        one.stream(stream) if adapter is KafkaSource else one.put({})
    assert {name: reached[name] for name in given} == given
    assert 'secret' not in str(caught.value)


def test_without_a_broker_there_is_a_clear_error_and_nothing_is_left_behind(stream):
    before, url = threads_of_kafka(), f'127.0.0.1:{free_port()}'
    with pytest.raises(ConnectionError, match=f'no Kafka broker answers at {url}'):
        KafkaSource('a', url, bootstrap_timeout_ms=300).stream(stream)
    with pytest.raises(ConnectionError, match=f'no Kafka broker answers at {url}'):
        KafkaSink('a', url, bootstrap_timeout_ms=300).put({'a': 1})
    eventually(lambda: threads_of_kafka() <= before)


# --- faults

SOURCE = """
import json, logging, os, signal, sys
import minibatch as mb
from kafka import KafkaConsumer
from minibatch.contrib.kafka import KafkaSource
config = json.loads(sys.argv[1])
original, calls = KafkaConsumer.commit_async, 0

def commit_async(self, *args, **options):
    global calls
    calls += 1
    if calls == config['killed_at_commit']:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **options)

KafkaConsumer.commit_async = commit_async
logging.basicConfig(level=logging.WARNING)
logging.getLogger('kafka').setLevel(logging.ERROR)
logging.getLogger('minibatch.contrib.kafka').setLevel(logging.INFO)
with mb.stream('test', url=config['url'], **config['options']) as stream:
    KafkaSource(config['topic'], config['urls'], **config['configs']).stream(stream)
"""


def reader(url, broker, topic, killed_at_commit=0, options=None, **configs):
    """A source in a process of its own."""
    config = {'url': url, 'urls': broker.url, 'topic': topic, 'killed_at_commit': killed_at_commit,
              'options': options or {}, 'configs': {'group_id': topic, 'session_timeout_ms': 6000, **configs}}
    return running('-c', SOURCE, json.dumps(config), stderr=subprocess.DEVNULL)


def test_a_kill_between_append_and_commit_neither_loses_nor_doubles(broker, topic, url, db):
    broker.send(topic, numbers(*range(2000)))
    for commit_number, left in ((1, 1000), (2, 3000), (1, 3100)):
        with reader(url, broker, topic, commit_number, max_poll_records=1000) as process:
            if left == 3000:
                broker.send(topic, numbers(*range(2000, 3100)))
            assert process.wait(40) == -signal.SIGKILL
        assert (broker.committed(topic, group=topic) or 0) < len(datas(db)), 'the commit was not missing'
    with reader(url, broker, topic):
        broker.send(topic, numbers(3100))
        arrived(db, 3101)
    prove(db, 'kafka: source killed between append and commit', 3101)


def test_kills_at_random_moments_neither_lose_nor_double(broker, topic, url, db, rng):
    sent = Sender(broker, topic, 1)
    with sent:
        for _ in range(5):
            with reader(url, broker, topic) as process:
                before = len(datas(db))
                eventually(lambda: len(datas(db)) > before, 40, 'nothing arrives')  # noqa: B023
                time.sleep(rng.uniform(0, 0.3))  # a random moment, and no condition to wait for
                process.kill()
    with reader(url, broker, topic):
        arrived(db, sent.count)
    prove(db, 'kafka: source killed at 5 random moments', sent.count)


class Sender:
    """Sends numbers to all partitions of a topic, in a thread, until the block is left; `count` of them."""

    def __init__(self, broker, topic, partitions, pause=0.005):
        self.count, self._pause = 0, pause
        self._topic, self._partitions = topic, partitions
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._url = broker.url

    def _run(self):
        producer = KafkaProducer(bootstrap_servers=self._url, acks='all', delivery_timeout_ms=60_000)
        while not self._end.wait(self._pause):
            futures = []
            for _ in range(10):
                partition = self.count % self._partitions
                futures.append(producer.send(self._topic, *numbers(self.count), partition=partition))
                self.count += 1
            for future in futures:
                future.get(60)
        producer.close(10)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._end.set()
        self._thread.join(70)


def test_a_rebalance_with_one_killed_and_one_frozen_process_neither_loses_nor_doubles(broker, url, db):
    topic = f'shared-{uuid.uuid4().hex[:8]}'
    broker.create(topic, partitions=4)
    with Sender(broker, topic, 4) as sent, reader(url, broker, topic) as first:
        arrived(db, 1)
        with reader(url, broker, topic) as second, reader(url, broker, topic) as third:
            grown(db)
            first.kill()
            grown(db, partitions=4)
            second.send_signal(signal.SIGSTOP)
            eventually(lambda: is_stopped(second))
            grown(db, partitions=4)
            second.send_signal(signal.SIGCONT)
            grown(db, partitions=4)
            third.send_signal(signal.SIGSTOP)
            eventually(lambda: is_stopped(third))
            grown(db, partitions=4)
            third.send_signal(signal.SIGCONT)
            third.kill()
            sent._end.set()
            sent._thread.join(60)
            arrived(db, sent.count)
    prove(db, 'kafka: 3 processes, killed and frozen', sent.count, producers=4)


def grown(db, partitions=1):
    """Wait until so many partitions have got more messages."""
    def ends():
        found = db.buffer.aggregate([{'$group': {'_id': '$producer', 'end': {'$max': '$offset'}}}])
        return {doc['_id']: doc['end'] for doc in found}
    before = ends()
    eventually(lambda: sum(end > before.get(each, -1) for each, end in ends().items()) >= partitions, 60, 'no more')


def test_a_broker_that_is_killed_and_started_again_loses_and_doubles_nothing(stream, db):
    with Broker(durable=True) as broker:
        broker.create('lasting', partitions=2)
        stream.attach(source(broker, 'lasting'))  # it may fail, and is started again
        with Sender(broker, 'lasting', 2, pause=0.1) as sent:
            for _ in range(3):
                grown(db)
                broker.kill()
                broker.start()
                grown(db, partitions=2)
        # The broker itself may lose or double what is sent while it is killed: what it has got is what counts.
        there = [(each.partition, each.offset) for each in broker.received('lasting', sent.count // 2)]
        arrived(db, len(there))
        stream.stop()
        found = [(meta['partition'], meta['offset']) for _, meta in messages(db)]
        row = Row('kafka: broker killed 3 times', len(there), 0, lost=len(set(there) - set(found)),
                  doubled=len(found) - len(set(found)), ordered=found == sorted(found))
        FAULTS.append(row)
        assert (row.lost, row.doubled, row.ordered) == (0, 0, True), row
        assert set(found) == set(there)


def test_a_full_stream_holds_the_source_up_and_a_rebalance_meanwhile_does_no_harm(broker, url, db):
    topic = f'full-{uuid.uuid4().hex[:8]}'
    broker.create(topic, partitions=2)
    for partition in (0, 1):
        broker.send(topic, numbers(*range(partition, 2000, 2)), partition=partition)
    seen = []
    emitter = mb.make_emitter('test', lambda window: seen.extend(window.messages), url=url, size=100,
                              executor=InlineExecutor)
    options = {'options': {'max_backlog': 300}, 'max_poll_records': 200}
    emitter._run_once()  # from now on the group waits for all there is
    with reader(url, broker, topic, **options, max_poll_interval_ms=1000), reader(url, broker, topic, **options):
        arrived(db, 200)
        eventually(lambda: blocked_for(db, 5), 30)
        eventually(lambda: emitter._run_once() is not None and len(seen) == 2000, 120, 'not all arrived')
    order = [(message.meta['partition'], message.data['i']) for message in seen]
    found = sorted(i for _, i in order)
    FAULTS.append(Row('kafka: full stream and rebalances', 2000, 0, lost=2000 - len(set(found)),
                      doubled=len(found) - len(set(found))))
    assert found == list(range(2000))
    for partition in (0, 1):
        assert [i for each, i in order if each == partition] == list(range(partition, 2000, 2))


def blocked_for(db, seconds):
    """Whether nothing has been appended for so long."""
    last = db.buffer.find_one(sort=[('_id', -1)])
    return last and datetime.now(timezone.utc) - last['_id'].generation_time > timedelta(seconds=seconds)


BURST = 100_000


def test_a_burst_arrives_whole_and_its_rate_is_told_beside_that_of_a_bare_consumer(broker, stream, db, capsys):
    topic = f'burst-{uuid.uuid4().hex[:8]}'
    broker.create(topic, partitions=2)
    for partition in (0, 1):
        broker.send(topic, numbers(*range(partition, BURST, 2)), partition=partition)
    with attached(stream, source(broker, topic)):
        arrived(db, 1)
        started = time.perf_counter()
        arrived(db, BURST, timeout=120)
        rate = BURST / (time.perf_counter() - started)
    floor = bare_rate(broker, topic)
    prove(db, 'kafka: burst', BURST, producers=2)
    with capsys.disabled():
        print(f'\nkafka: {rate:,.0f} messages/s into the stream; a bare KafkaConsumer reads {floor:,.0f}/s')


def bare_rate(broker, topic):
    """How many messages a second a loop reads which does nothing with them but JSON."""
    consumer = KafkaConsumer(bootstrap_servers=broker.url, auto_offset_reset='earliest', max_poll_records=1000)
    try:
        consumer.assign([TopicPartition(topic, 0), TopicPartition(topic, 1)])
        count = started = 0
        while count < BURST:
            for records in consumer.poll(1000).values():
                started = started or time.perf_counter()
                count += len([json.loads(record.value) for record in records])
        return count / (time.perf_counter() - started)
    finally:
        consumer.close(autocommit=False)


# --- the sink


@pytest.fixture
def sink(broker):
    """Makes sinks, and closes them."""
    made = []

    def make(topic, *args, **options):
        made.append(KafkaSink(topic, broker.url, *args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def values(broker, topic, count):
    return [json.loads(record.value) for record in broker.received(topic, count)]


def test_each_item_of_a_list_is_a_message(broker, topic, sink):
    assert isinstance(sink(topic), Sink)
    assert not isinstance(sink(topic), ExactlyOnceSink)
    one = sink(topic)
    one.put([{'a': 1}, {'a': 2}, 'text', 3])
    one.put({'a': [4]})
    one.put(item for item in ({'a': 5},))
    one.put([])
    assert values(broker, topic, 6) == [{'a': 1}, {'a': 2}, 'text', 3, {'a': [4]}, {'a': 5}]


def test_without_expand_a_list_is_one_message(broker, topic, sink):
    one = sink(topic, expand=False)
    one.put([{'a': 1}, {'a': 2}])
    one.put({'a': 3})
    assert values(broker, topic, 2) == [[{'a': 1}, {'a': 2}], {'a': 3}]


def test_messages_of_the_same_key_are_in_the_same_partition_and_in_order(broker, sink):
    topic = f'keys-{uuid.uuid4().hex[:8]}'
    broker.create(topic, partitions=5)
    sink(topic, key='k').put([{'k': f'k{i % 20}', 'i': i} for i in range(200)])
    found = broker.received(topic, 200)
    partition_of = {record.key: record.partition for record in found}
    assert {record.key.decode() for record in found} == {f'k{i}' for i in range(20)}
    assert len(set(partition_of.values())) > 1
    for record in found:
        assert partition_of[record.key] == record.partition
    for key in partition_of:
        order = [json.loads(record.value)['i'] for record in found if record.key == key]
        assert order == sorted(order)


def test_a_key_may_be_a_function_and_what_has_no_value_is_a_tombstone(broker, topic, sink):
    def key(message):
        return message['k']
    one = sink(topic, key=key, value_serializer=lambda message: message.get('raw'))
    one.put([{'k': b'\xff', 'raw': b'1'}, {'k': 'a'}, {'k': {'b': 1}, 'raw': b'2'}, {'k': None, 'raw': b'3'}])
    found = [(record.key, record.value) for record in broker.received(topic, 4)]
    assert found == [(b'\xff', b'1'), (b'a', None), (b'{"b": 1}', b'2'), (None, b'3')]
    with pytest.raises(DataError, match='item 0 is a tombstone'):
        one.put({'k': None})


def test_the_topic_may_be_a_function_of_the_message(broker, sink):
    start = uuid.uuid4().hex[:8]
    one = sink(lambda message: f'{start}-{message["shop"]}')
    one.put([{'shop': 'a'}, {'shop': 'b'}, {'shop': 'a'}])
    assert values(broker, f'{start}-a', 2) == [{'shop': 'a'}, {'shop': 'a'}]
    assert values(broker, f'{start}-b', 1) == [{'shop': 'b'}]
    with pytest.raises(DataError, match=r"the topic of item 0 must be letters, digits, .*, not '[0-9a-f]+-a b'"):
        one.put({'shop': 'a b'})


def test_what_mongodb_stores_becomes_json(broker, topic, sink):
    utc = timezone.utc
    sink(topic).put({
        'naive': datetime(2026, 1, 2, 3, 4, 5, 678000), 'aware': datetime(2026, 1, 2, tzinfo=utc),
        'day': date(2026, 1, 2), 'id': ObjectId('0' * 24), 'price': Decimal('1.10'), 'text': 'ö', 'nothing': None,
        'mean': float('nan'), 'most': [float('inf')],
    })  # fmt: skip
    assert values(broker, topic, 1) == [{
        'naive': '2026-01-02T03:04:05.678000+00:00', 'aware': '2026-01-02T00:00:00+00:00', 'day': '2026-01-02',
        'id': '0' * 24, 'price': '1.10', 'text': 'ö', 'nothing': None, 'mean': None, 'most': [None],
    }]  # fmt: skip


def circle():
    inner = {}
    inner['a'] = inner
    return inner


@pytest.mark.parametrize(('item', 'why'), [
    ({'a': [{'b': b'raw'}]}, r"item 1 cannot be sent to Kafka: field 'a\.0\.b': JSON has no bytes"),
    ({'n': float('nan'), 'a': b'x'}, "item 1 cannot be sent to Kafka: field 'a': JSON has no bytes"),
    ({'a': {(1, 2): 3}}, r"item 1 cannot be sent to Kafka: field 'a\.\(1, 2\)': keys must be str"),
    ({'a': object()}, "item 1 cannot be sent to Kafka: field 'a': JSON has no object"),
    (circle(), 'item 1 cannot be sent to Kafka: '),
    ({'a': '\ud800'}, 'item 1 cannot be sent to Kafka: '),
    ({'a': 'x' * 2_000_000}, 'item 1 is too large for Kafka'),
    (object(), 'item 1 cannot be sent to Kafka: JSON has no object'),
])  # fmt: skip
def test_what_cannot_be_sent_is_named(broker, topic, sink, item, why):
    with pytest.raises(DataError, match=why):
        sink(topic).put([{'a': 1}, item])


@pytest.mark.parametrize(('item', 'why'), [
    ({'b': 1}, "item 1 has no field 'a', which is the key"),
    ('text', "item 1 has no field 'a', which is the key"),
    ({'a': {'b': b'raw'}}, "the key of item 1 cannot be sent to Kafka: field 'b': JSON has no bytes"),
    ({'a': '\ud800'}, 'the key of item 1 cannot be sent to Kafka: '),
])  # fmt: skip
def test_what_cannot_be_a_key_is_named(broker, topic, sink, item, why):
    with pytest.raises(DataError, match=why):
        sink(topic, key='a').put([{'a': 1}, item])
    with pytest.raises(DataError, match='the key of item 0 was not serialized to bytes, but to int'):
        sink(topic, key='a', key_serializer=int).put({'a': 1})


def test_nothing_is_sent_of_a_list_with_an_item_that_cannot_be(broker, topic, sink):
    one = sink(topic)
    with pytest.raises(DataError):
        one.put([{'a': 1}, {'a': b'raw'}])
    one.put({'a': 2})
    assert values(broker, topic, 1) == [{'a': 2}]


def test_messages_may_be_compressed(broker, topic, sink):
    sink(topic, compression_type='gzip').put([{'i': i, 'text': 'x' * 100} for i in range(500)])
    assert [value['i'] for value in values(broker, topic, 500)] == list(range(500))


@pytest.mark.parametrize('how', ['kill', 'pause'])
def test_a_broker_that_is_away_is_told_and_the_sink_goes_on_when_it_is_back(how):
    with Broker(durable=True) as broker:
        broker.create('results')
        one = KafkaSink('results', broker.url, delivery_timeout_ms=3000, request_timeout_ms=1000,
                        bootstrap_timeout_ms=1000)
        before = threads_of_kafka()
        one.put({'a': 1})
        getattr(broker, how)()
        for _ in range(3):
            with pytest.raises((TimeoutError, ConnectionError)):
                one.put({'a': 2})
        broker.start() if how == 'kill' else broker.resume()
        one.put({'a': 3})
        one.close()
        eventually(lambda: threads_of_kafka() <= before, message='threads are left')
        found = [value['a'] for value in values(broker, 'results', 2)]
        assert (found[0], found[-1]) == (1, 3)
        assert set(found) <= {1, 2, 3}


def threads_of_kafka():
    return {thread for thread in threading.enumerate() if 'kafka' in thread.name}


def test_from_kafka_through_windows_to_kafka(broker, topic, stream, url, sink):
    out = f'{topic}-out'
    broker.create(out)
    broker.send(topic, numbers(*range(100)))

    def total(window):
        return {'total': sum(data['i'] for data in window.data), 'window': window.id}

    consumer = mb.make_emitter('test', total, url=url, size=10, workers=1, sink=sink(out, key='window'),
                               source=source(broker, topic))
    with consumer_running(consumer):
        found = values(broker, out, 10)
    assert [value['total'] for value in found] == [45 + 100 * i for i in range(10)]
    assert len({value['window'] for value in found}) == 10


@contextmanager
def consumer_running(consumer):
    consumer.start()
    try:
        yield
    finally:
        consumer.stop()
