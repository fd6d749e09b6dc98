"""MQTTSource and MQTTSink on a real mosquitto."""
from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
from servers import eventually
from servers_mqtt import Mosquitto, numbers, publish

import minibatch as mb
from minibatch.contrib.mqtt import MQTTSink, MQTTSource


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture
def stream(url):
    with mb.stream('test', url=url) as stream:
        yield stream


def stored(db, name='test'):
    """The messages of a stream, in the order of its producers' logs."""
    docs = db.buffer.find({'stream': name}).sort([('producer', 1), ('offset', 1)])
    return [data for doc in docs for data in (doc['batch'] if 'batch' in doc else [doc['data']])]


@contextmanager
def receiving(source, stream, broker, sign='Sending SUBACK'):
    """Run a source in a thread; it is subscribed when this begins, and must end when it is cancelled."""
    before = broker.said(sign)
    failed = []

    def run():
        try:
            source.stream(stream)
        except Exception as exc:
            failed.append(exc)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: broker.said(sign) > before or failed)
        assert not failed, failed
        yield
    finally:
        source.cancel()
        thread.join(10)
    assert not thread.is_alive(), 'does not end'
    assert not failed, failed


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
@pytest.mark.parametrize('qos', [0, 1, 2])
def test_messages_are_stored_in_order(broker, stream, db, qos, protocol):
    with receiving(MQTTSource(broker.url, 'test/#', qos=qos, protocol=protocol), stream, broker):
        publish(broker.url, numbers(0, 0, 2000, qos))
        eventually(lambda: len(stored(db)) == 2000)
    assert stored(db) == [
        {'topic': 'test/0', 'payload': {'source': 0, 'seq': i}, 'qos': qos, 'retain': False} for i in range(2000)
    ]
