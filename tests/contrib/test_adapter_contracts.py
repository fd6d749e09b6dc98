"""The sources and sinks of outside systems through the public contract suites, each on its real server."""
from __future__ import annotations

import json
import uuid
from contextlib import closing

import pytest
from kafka import KafkaConsumer
from servers_kafka import Broker

from minibatch.contracts import SinkContract, SourceContract
from minibatch.contrib.kafka import KafkaSink, KafkaSource

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
        return KafkaSource(self.topic, self.broker.url, group_id=self.topic, session_timeout_ms=6000)

    def send(self, numbers):
        self.broker.send(self.topic, [json.dumps({'i': i}).encode() for i in numbers])


class TestKafkaSink(SinkContract):
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
