"""The source of Celery events, with real brokers and a real worker."""

import json
import logging
import pickle
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress

import amqp
import celery
import pytest
from processes import FAULTS, Row, running
from servers import Mongod, eventually
from servers_celery import RabbitMQ, Redis, publish, succeeded, worker

import minibatch as mb
from minibatch.contracts import SourceContract
from minibatch.contrib import celery as contrib
from minibatch.contrib.celery import CeleryEventSource
from minibatch.errors import ArgumentError

# Runs a source until it dies by its own hand: at the acknowledgement of the third append, before it is sent.
DIES_BEFORE_ACK = """
import os, signal, sys
import minibatch as mb
from celery import Celery
from kombu.message import Message
from minibatch.contrib.celery import CeleryEventSource

acks = []
def ack(self, multiple=False, sent=Message.ack):
    acks.append(self)
    if len(acks) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    sent(self, multiple)
Message.ack = ack
mb.stream('tasks', url=sys.argv[1]).attach(CeleryEventSource(Celery('tasks', broker=sys.argv[2])), background=False)
"""

RUNS = """
import sys
import minibatch as mb
from celery import Celery
from minibatch.contrib.celery import CeleryEventSource

mb.stream('tasks', url=sys.argv[1]).attach(CeleryEventSource(Celery('tasks', broker=sys.argv[2])), background=False)
"""

# Publishes ready-made messages as fast as it can, faster than any Python program reads them.
FLOODS = """
import sys, redis
client = redis.Redis(port=int(sys.argv[1]), password=sys.argv[2])
while True:
    with client.pipeline(transaction=False) as pipe:
        for _ in range(200):
            pipe.publish('/0.celeryev/task.multi', sys.argv[3])
        pipe.execute()
"""


@pytest.fixture(scope='module')
def redis(tmp_path_factory):
    with Redis(tmp_path_factory.mktemp('redis')) as broker:
        yield broker


@pytest.fixture(scope='module')
def rabbitmq(tmp_path_factory):
    with RabbitMQ(tmp_path_factory.mktemp('rabbitmq')) as broker:
        yield broker


@pytest.fixture(params=['redis', 'rabbitmq'])
def broker(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def stream(url):
    stream = mb.stream('tasks', url=url)
    yield stream
    stream.stop()


@pytest.fixture
def attach(stream, caplog):
    """Start a source of a broker; it listens when this returns."""

    def attach(broker, *args, **options):
        source = CeleryEventSource(broker.app(), *args, **options)
        with caplog.at_level(logging.INFO, logger='minibatch'):
            said = caplog.text.count('events of tasks come from')
            stream.attach(source)
            listens(broker, lambda: caplog.text.count('events of tasks come from') > said)
        return source

    return attach


def listens(broker, said=lambda: True):
    eventually(said)
    if isinstance(broker, Redis):
        eventually(broker.sources)


def stored(db, stream='tasks'):
    """The messages of a stream."""
    docs = db.buffer.find({'stream': stream}, sort=[('_id', 1)])
    return [data for doc in docs for data in doc.get('batch') or [doc['data']]]


def ids(db):
    return Counter(int(message['task_id']) for message in stored(db))


def arrived(db, count, stream='tasks'):
    eventually(lambda: len(stored(db, stream)) >= count, 60, f'fewer than {count} messages in {stream}')
    return stored(db, stream)


def compare(scenario, db, sent, lost=range(0), doubled=range(1)):
    """What is in the stream against what was sent; it becomes a row of the table of faults."""
    got = ids(db)
    row = Row(scenario, len(sent), 0, len(set(sent) - set(got)), 0, sum(got.values()) - len(got))
    FAULTS.append(row)
    assert set(got) <= set(sent)
    assert row.lost in (lost or [0]), row
    assert row.doubled in doubled, row


class CeleryContract(SourceContract):
    resumes = False

    @pytest.fixture(autouse=True)
    def mongodb(self, url):
        self.url = url

    def make(self):
        return CeleryEventSource(self.broker.app())

    def send(self, numbers):
        publish(self.broker.app(), list(map(succeeded, numbers)))

    def number(self, data):
        return int(data['task_id'])


class TestCeleryEventSourceOnRedis(CeleryContract):
    keeps = False

    @pytest.fixture(autouse=True)
    def server(self, redis):
        self.broker = redis


class TestCeleryEventSourceOnRabbitMQ(CeleryContract):
    @pytest.fixture(autouse=True)
    def server(self, rabbitmq):
        self.broker = rabbitmq

    @contextmanager
    def _running(self, source, stream):
        # A queue keeps what is sent from when a source has made it, the first time.
        with super()._running(source, stream):
            with self.broker.app().connection_for_read() as connection:
                queue = f'celeryev.minibatch.{stream.id}'
                eventually(lambda: has_queue(connection, queue))
            yield


def has_queue(connection, name):
    with suppress(connection.channel_errors):
        return connection.channel().queue_declare(name, passive=True)


def test_the_events_of_a_worker_say_what_ran_with_which_outcome_and_how_long(broker, attach, db, tmp_path):
    attach(broker, ['task-sent', 'task-received', 'task-started', 'task-succeeded', 'task-failed', 'task-retried'])
    app = broker.app()
    app.conf.task_send_sent_event = True
    with worker(broker, tmp_path):
        for name, args in [('tasks.add', (1, 2)), ('tasks.fail', ('no',)), ('tasks.again', ())]:
            app.send_task(name, args)
        messages = arrived(db, 4 + 4 + 7)
    states = {name: [each['task_state'] for each in messages if each['task_name'] == name] for name in
              ('tasks.add', 'tasks.fail', 'tasks.again')}
    assert Counter(states['tasks.add']) == Counter(['PENDING', 'RECEIVED', 'STARTED', 'SUCCESS'])
    assert Counter(states['tasks.fail']) == Counter(['PENDING', 'RECEIVED', 'STARTED', 'FAILURE'])
    assert Counter(states['tasks.again'])['RETRY'] == 1
    by_event = {(each['task_name'], each['task_event']): each for each in messages}
    done = by_event['tasks.add', 'task-succeeded']
    assert done.keys() == {'task_event', 'task_name', 'task_id', 'task_info', 'task_state', 'task_runtime'}
    assert 0 < done['task_runtime'] < 5
    info = done['task_info']
    assert (info['args'], info['kwargs'], info['result'], info['retries']) == ('(1, 2)', '{}', '3', 0)
    assert info['hostname'].startswith('celery@')
    failed = by_event['tasks.fail', 'task-failed']
    assert (failed['task_runtime'], failed['task_info']['exception']) == (None, "ValueError('no')")
    assert 'ValueError: no' in failed['task_info']['traceback']


def test_each_finished_task_is_there_once_by_default(redis, attach, db):
    attach(redis)
    kinds = ['sent', 'received', 'started', 'succeeded', 'failed', 'retried', 'revoked', 'rejected']
    publish(redis.app(), [succeeded(1, type=f'task-{kind}') for kind in kinds], succeeded(2))
    arrived(db, 3)
    assert [each['task_event'] for each in stored(db)] == ['task-succeeded', 'task-failed', 'task-succeeded']


def test_one_event_can_be_asked_for_by_its_name_alone(redis, attach, db):
    attach(redis, 'task-revoked')
    publish(redis.app(), [succeeded(1), succeeded(2, type='task-revoked'), succeeded(3)])
    assert [each['task_id'] for each in arrived(db, 1)] == ['2']


def test_a_task_has_no_name_if_it_was_received_before_the_source_came_or_long_ago(redis, attach, db, monkeypatch):
    monkeypatch.setattr(contrib, 'REMEMBERED_TASKS', 2)
    source = attach(redis)
    publish(redis.app(), [succeeded(i, type='task-received', name=f't{i}', args='a' * i) for i in (4095, 4097, 3)])
    publish(redis.app(), [succeeded(i) for i in (1, 4095, 4097, 3)])
    assert [each['task_name'] for each in arrived(db, 4)] == [None, None, 't4097', 't3']
    assert not {'args', 'kwargs'} & stored(db)[2]['task_info'].keys()  # too long to be remembered, and never told
    assert stored(db)[3]['task_info']['args'] == 'aaa'
    assert len(source._tasks._told) == 2


def test_names_are_remembered_when_the_source_is_started_again(redis, attach, stream, db):
    source = attach(redis)
    publish(redis.app(), succeeded(1, type='task-received', name='t1'), succeeded(2))
    arrived(db, 1)
    stream.stop()
    eventually(lambda: not redis.sources())
    stream.attach(source)
    listens(redis)
    publish(redis.app(), succeeded(1))
    assert arrived(db, 2)[-1]['task_name'] == 't1'


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        ({'events': 'task-succeded'}, 'task-succeded'),
        ({'events': ['task-failed', 'worker-online']}, 'worker-online'),
        ({'events': []}, 'events'),
        ({'events': {'task-failed': 1}}, 'events'),
        ({'events': [7]}, '7'),
        ({'keep': -1}, 'keep'),
        ({'keep': True}, 'keep'),
        ({'keep': '1h'}, 'keep'),
        ({'celeryapp': 'redis://localhost'}, 'celeryapp'),
        ({'celeryapp': celery.Celery('tasks', broker='foo://x')}, 'No such transport: foo'),
    ],
)
def test_a_wrong_argument_is_refused_by_name(options, name):
    with pytest.raises(ArgumentError, match=name):
        CeleryEventSource(**{'celeryapp': celery.Celery('tasks'), **options})


def test_the_current_app_of_celery_is_an_app():
    CeleryEventSource(celery.current_app)


def test_what_cannot_be_read_is_a_dead_letter_and_nothing_is_unpickled(broker, attach, db, tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'run'), 'w')

    app = broker.app(accept_content=['pickle', 'json'])
    stream = attach(broker)
    pickled = pickle.dumps(Evil())
    raw = {'serializer': None, 'content_encoding': 'binary'}
    publish(app, pickled, content_type='application/x-python-serialize', **raw)
    publish(app, b'\xff{', content_type='application/json', **raw)
    publish(app, b'[' * 100_000, content_type='application/json', **raw)
    publish(app, b'zip', content_type='application/json', **raw, headers={'compression': 'application/x-gzip'})
    publish(app, b'plain', content_type='text/plain', **raw)
    publish(app, 7, None, 'text', {'uuid': '1'}, {'type': 5}, [[]])
    bad = [{'uuid': 9}, {'name': ['x']}, {'runtime': 'long'}, {'result': 1 << 70}]
    publish(app, [succeeded(0), *(succeeded(1, **fields) for fields in bad), succeeded(2)])
    letters = arrived(db, 15, 'tasks.dead_letters')
    assert len(letters) == 15
    arrived(db, 2)
    assert ids(db) == {0: 1, 2: 1}
    assert letters[0] == {'error': letters[0]['error'], 'data': pickled}
    assert letters[0]['error'].startswith('ContentDisallowed')
    assert all(letter['error'] for letter in letters)
    assert not (tmp_path / 'run').exists()
    assert 'could not be appended' in caplog.text
    assert 'it is started again' not in caplog.text
    assert stream


def test_a_message_of_rabbitmq_whose_properties_cannot_be_decoded_is_a_dead_letter(rabbitmq, attach, db):
    attach(rabbitmq)
    app = rabbitmq.app()
    with app.connection_for_write() as connection, connection.channel() as channel:
        message = amqp.Message(b'{"broken": true}', content_type='application/json', content_encoding=b'\xff')
        channel.basic_publish(message, 'celeryev', 'task.multi')
    publish(app, succeeded(1))
    arrived(db, 1)
    letter, = arrived(db, 1, 'tasks.dead_letters')
    assert letter['data'] == '{"broken": true}'


def test_what_is_no_message_of_celery_at_all_does_not_stop_the_source(redis, attach, db, caplog):
    attach(redis)
    nonsense = ['{}', '[]', '7', '"x"', '{"properties": 1}', '{"properties": {}}',
                '{"body": "x", "properties": {"delivery_tag": 1, "body_encoding": "none"}}']
    with redis.client() as client:
        for each in nonsense:
            client.publish('/0.celeryev/task.multi', each)
        client.publish('/0.celeryev/task.multi', '{')  # kombu itself logs and drops what is no JSON
    # What kombu has read together with that it gives out when more arrives.
    eventually(lambda: 'Cannot process event' in caplog.text)
    publish(redis.app(), succeeded(1))
    arrived(db, 1)
    letters = arrived(db, len(nonsense), 'tasks.dead_letters')
    assert [letter['data'] for letter in letters] == [json.loads(each) for each in nonsense]
    assert 'it is started again' not in caplog.text


def test_a_burst_of_100_000_events_arrives_completely(broker, attach, db):
    attach(broker)
    publish(broker.app(), *([succeeded(i) for i in range(k, k + 100)] for k in range(0, 100_000, 100)))
    eventually(lambda: sum(ids(db).values()) >= 100_000, 100)
    compare(f'{type(broker).__name__}: burst', db, range(100_000))


def test_rabbitmq_keeps_the_events_while_the_source_is_away(rabbitmq, attach, stream, db):
    attach(rabbitmq)
    publish(rabbitmq.app(), *map(succeeded, range(10)))
    arrived(db, 10)
    stream.stop()
    publish(rabbitmq.app(), *map(succeeded, range(10, 3000)))
    attach(rabbitmq)
    arrived(db, 3000)
    compare('RabbitMQ: source away', db, range(3000))


def test_rabbitmq_keeps_nothing_if_it_is_told_so(rabbitmq, attach, stream, db):
    attach(rabbitmq, keep=0)
    publish(rabbitmq.app(), succeeded(1))
    arrived(db, 1)
    stream.stop()
    publish(rabbitmq.app(), succeeded(2))
    attach(rabbitmq, keep=0)
    publish(rabbitmq.app(), succeeded(3))
    arrived(db, 2)
    assert ids(db) == {1: 1, 3: 1}


def test_rabbitmq_refuses_another_value_of_keep(rabbitmq, attach, stream, caplog):
    attach(rabbitmq, keep=600)
    stream.stop()
    stream.attach(CeleryEventSource(rabbitmq.app(), keep=700))
    eventually(lambda: 'x-expires' in caplog.text)
    assert 'guest:guest' not in caplog.text
    assert 'Traceback' not in caplog.text


def test_a_source_that_stops_leaves_no_queue_but_the_lasting_one(broker, attach, stream):
    def queues():
        with broker.app().connection_for_read() as connection:
            if isinstance(broker, Redis):
                return list(connection.default_channel.client.scan_iter('*celeryev*'))
            connection.default_channel.queue_declare(f'celeryev.minibatch.{stream.id}', passive=True)
            return []

    attach(broker)
    stream.stop()
    assert queues() == []


def test_stopping_with_many_events_under_way_says_nothing_and_loses_nothing(rabbitmq, attach, stream, db, caplog):
    attach(rabbitmq)
    stream.stop()
    publish(rabbitmq.app(), *map(succeeded, range(5000)))
    attach(rabbitmq)
    arrived(db, 1)
    stream.stop()
    assert len(stored(db)) < 5000, 'the source was not stopped in the middle'
    attach(rabbitmq)
    arrived(db, 5000)
    compare('RabbitMQ: source stopped and started', db, range(5000), doubled=range(1001))
    assert 'during closing' not in caplog.text


def test_the_source_stops_while_more_events_arrive_than_it_can_read(redis, attach, stream, db):
    attach(redis)
    message = {'body': 'e30=', 'content-type': 'application/json', 'content-encoding': 'utf-8', 'headers': {},
               'properties': {'body_encoding': 'base64', 'delivery_tag': 't', 'delivery_info': {}}}
    with redis.client() as client:
        client.config_set('client-output-buffer-limit', 'pubsub 0 0 0')
    with running('-c', FLOODS, str(redis.port), redis.password, json.dumps(message)):
        arrived(db, 2000, 'tasks.dead_letters')
        stream.stop(timeout=5)
        ended = not stream._attached.running
    with redis.client() as client:
        client.config_set('client-output-buffer-limit', 'pubsub 33554432 8388608 60')
    assert ended


def test_killed_between_append_and_acknowledgement_no_event_is_lost(rabbitmq, attach, stream, url, db):
    attach(rabbitmq)
    stream.stop()
    publish(rabbitmq.app(), *map(succeeded, range(5000)))
    with running('-c', DIES_BEFORE_ACK, url, rabbitmq.url) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert 0 < len(stored(db)) < 5000
    attach(rabbitmq)
    arrived(db, 5000 + 1)
    eventually(lambda: len(ids(db)) == 5000)
    compare('RabbitMQ: killed before ack', db, range(5000), doubled=range(1, 1001))


def test_killed_on_redis_what_is_sent_until_it_is_back_is_lost(redis, attach, url, db):
    with running('-c', RUNS, url, redis.url) as process:
        eventually(redis.sources)
        publish(redis.app(), *map(succeeded, range(100)))
        arrived(db, 100)
        process.kill()
        process.wait(10)
    eventually(lambda: not redis.sources())
    publish(redis.app(), *map(succeeded, range(100, 110)))
    attach(redis)
    publish(redis.app(), *map(succeeded, range(110, 200)))
    arrived(db, 190)
    compare('Redis: killed, 10 events sent meanwhile', db, range(200), lost=[10])


def test_the_source_is_back_when_redis_is(attach, db, tmp_path, caplog):
    with Redis(tmp_path) as redis:
        attach(redis)
        publish(redis.app(), *map(succeeded, range(100)))
        arrived(db, 100)
        redis.kill()
        eventually(lambda: 'it is started again' in caplog.text)
        with pytest.raises(Exception, match='onnect'):
            publish(redis.app(), succeeded(100))
        redis.start()
        eventually(redis.sources)
        publish(redis.app(), *map(succeeded, range(101, 200)))
        arrived(db, 199)
    compare('Redis: restart, 1 event could not be sent', db, range(200), lost=[1])
    assert Redis.password not in caplog.text
    assert 'Traceback' not in caplog.text


def test_the_source_is_back_when_rabbitmq_is(attach, stream, db, tmp_path, caplog):
    with RabbitMQ(tmp_path) as rabbitmq:
        attach(rabbitmq)
        publish(rabbitmq.app(), *map(succeeded, range(100)))
        arrived(db, 100)
        rabbitmq.kill()
        eventually(lambda: 'it is started again' in caplog.text)
        said = caplog.text.count('events of tasks come from')
        rabbitmq.start()
        with caplog.at_level(logging.INFO, logger='minibatch'):
            eventually(lambda: caplog.text.count('events of tasks come from') > said, 90)
        publish(rabbitmq.app(), *map(succeeded, range(100, 200)))
        arrived(db, 200)
        compare('RabbitMQ: restart', db, range(200))
        assert 'Traceback' not in caplog.text
        stream.stop()
        publish(rabbitmq.app(), *map(succeeded, range(200, 250)))
        rabbitmq.kill()
        rabbitmq.start()
        attach(rabbitmq)
        publish(rabbitmq.app(), *map(succeeded, range(250, 300)))
        arrived(db, 250)
        compare('RabbitMQ: restart while 50 events wait in it', db, range(300), lost=[50])
        stream.stop()


def test_redis_closes_the_connection_of_a_source_that_cannot_append_and_it_comes_back(redis, caplog, tmp_path):
    events = [[succeeded(i) for i in range(k, k + 100)] for k in range(0, 50_000, 100)]
    with redis.client() as client, Mongod() as mongod:
        client.config_set('client-output-buffer-limit', 'pubsub 256kb 256kb 60')
        stream = mb.stream('tasks', url=mongod.url())
        stream.attach(CeleryEventSource(redis.app()))
        eventually(redis.sources)
        mongod.pause()
        publish(redis.app(), succeeded(-1), *events)
        eventually(lambda: not redis.sources(), message='Redis keeps the connection')
        mongod.resume()
        eventually(lambda: 'it is started again' in caplog.text, 60)
        eventually(redis.sources)
        publish(redis.app(), succeeded(-2))
        db = mongod.client.test
        eventually(lambda: ids(db)[-2])
        compare('Redis: MongoDB away, 256 KB allowed', db, [-2, -1, *range(50_000)], lost=range(1, 50_001))
        stream.stop()
        client.config_set('client-output-buffer-limit', 'pubsub 33554432 8388608 60')


def test_a_broker_that_refuses_the_password_is_reported_without_it(redis, stream, caplog):
    app = celery.Celery('tasks', broker=f'redis://:verraten@127.0.0.1:{redis.port}/0', set_as_current=False)
    with caplog.at_level(logging.DEBUG):
        stream.attach(CeleryEventSource(app))
        eventually(lambda: 'it is started again' in caplog.text)
    assert 'verraten' not in caplog.text


def test_without_celery_the_import_says_what_to_install():
    program = 'import sys; sys.modules["celery"] = None; import minibatch.contrib.celery'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert "pip install '.[celery]'" in done.stderr
