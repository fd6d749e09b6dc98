"""The sources and sinks of outside systems through the public contract suites, each on its real server."""
from __future__ import annotations

import copy
import json
import pickle
import uuid
from contextlib import closing

import pytest
from kafka import KafkaConsumer
from paho.mqtt import client as paho
from servers import eventually
from servers_kafka import Broker
from servers_mqtt import Mosquitto, publish

import minibatch as mb
from minibatch.contracts import SinkContract, SourceContract
from minibatch.contrib.kafka import KafkaSink, KafkaSource
from minibatch.contrib.mqtt import MQTTSink, MQTTSource

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures('collected'),
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::ResourceWarning'),
]


@pytest.fixture(scope='module')
def kafka():
    with Broker() as broker:
        yield broker


class TestKafkaSource(SourceContract):
    @pytest.fixture(autouse=True)
    def topic(self, url, kafka):
        self.url, self.broker, self.topic = url, kafka, f'topic-{uuid.uuid4().hex[:8]}'
        kafka.create(self.topic)

    def make(self):
        # The position is in MongoDB. In one group the broker of the tests would wait for the source before, if that
        # was cancelled while it joined.
        group = f'{self.topic}-{uuid.uuid4().hex[:8]}'
        return KafkaSource(self.topic, self.broker.url, group_id=group, session_timeout_ms=6000)

    def send(self, numbers):
        self.broker.send(self.topic, [json.dumps({'i': i}).encode() for i in numbers])


class TravellingSinkContract(SinkContract):
    """Of a sink that is also used in another process, as by a function that refers to it."""

    def test_after_it_was_used_it_travels_and_delivers_from_there(self):
        sink = self.make()
        sink.put({'i': 1})
        pickle.loads(pickle.dumps(sink)).put({'i': 2})
        copy.copy(sink).put({'i': 3})
        sink.put({'i': 4})
        assert sorted(message['i'] for message in self.received()) == [1, 2, 3, 4]


class TestKafkaSink(TravellingSinkContract):
    @pytest.fixture(autouse=True)
    def topic(self, kafka):
        self.broker, self.topic = kafka, f'topic-{uuid.uuid4().hex[:8]}'
        kafka.create(self.topic)

    def make(self):
        return KafkaSink(self.topic, self.broker.url)

    def received(self):
        consumer = KafkaConsumer(
            self.topic, bootstrap_servers=self.broker.url, auto_offset_reset='earliest', consumer_timeout_ms=1000
        )
        with closing(consumer):
            return [json.loads(record.value) for record in consumer]


@pytest.fixture
def mosquitto(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


class MQTTContract(SourceContract):
    """In a session that the broker knows already."""

    @pytest.fixture(autouse=True)
    def session(self, url, mosquitto):
        self.url, self.broker = url, mosquitto
        source = self.make()
        with mb.stream('first', url=url) as stream:
            stream.attach(source)
            eventually(source.subscribed.is_set)

    def make(self):
        return MQTTSource(self.broker.url, 'test', qos=self.qos, client_id='minibatch-contract')

    def send(self, numbers):
        publish(self.broker.url, [('test', json.dumps({'i': i}).encode(), self.qos) for i in numbers])

    def number(self, data):
        return int(data['payload']['i'])


class TestMQTTSourceQoS1(MQTTContract):
    qos, resumes = 1, False


class TestMQTTSourceQoS2(MQTTContract):
    qos, resumes = 2, True


class TestMQTTSink(TravellingSinkContract):
    @pytest.fixture(autouse=True)
    def subscriber(self, mosquitto):
        self.broker, self.messages = mosquitto, []
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        subscribed = []
        client.on_message = lambda client, userdata, message: self.messages.append(json.loads(message.payload))
        client.on_subscribe = lambda *about: subscribed.append(about)
        client.connect('127.0.0.1', mosquitto.port)
        client.loop_start()
        client.subscribe('results', 1)
        eventually(lambda: subscribed)
        yield
        client.disconnect()
        client.loop_stop()

    def make(self):
        return MQTTSink(self.broker.url, 'results')

    def received(self):
        """What has come when a last message, behind them all, has."""
        publish(self.broker.url, [('results', b'"end"', 1)])
        eventually(lambda: 'end' in self.messages)
        found, self.messages[:] = self.messages[:], []
        return [message for message in found if message != 'end']
