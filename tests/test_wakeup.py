"""Idle consumers are told of appends."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import eventually

import minibatch as mb
from minibatch import wakeup
from minibatch.connection import Target
from minibatch.wakeup import Listener


def test_a_listener_is_told_when_it_is_open_and_after_each_append_to_its_stream(url, db):
    stream, other = mb.Stream.get_or_create('s', url=url), mb.Stream.get_or_create('other', url=url)
    listener, told = Listener(Target(url, db.name)), []
    listener.add('key', 's', told.append)
    try:
        eventually(lambda: told, message='not told that it is open')
        assert listener.is_open
        told.clear()
        other.append({'a': 1})
        stream.append({'a': 1})
        eventually(lambda: told, message='not told of the append')
        (place,) = told
        assert (place['producer'], place['offset'], place['n']) == (stream._producer.id, 0, 1)
    finally:
        listener.remove('key')
    eventually(lambda: not listener.is_open, message='open although nobody listens')


@pytest.mark.parametrize('options', ['maxPoolSize=1', 'maxPoolSize=1&maxConnecting=1&waitQueueTimeoutMS=20'])
def test_a_consumer_works_with_a_pool_of_one_connection(url, options):
    done, limited, look = set(), f'{url}&{options}', mb.stream('s', url=url)
    stream = mb.stream('s', url=limited)
    with ThreadPoolExecutor(4) as executor:
        consumer = mb.make_emitter('s', lambda window: done.update(window.data[0].values()), url=limited, size=1,
                                   executor=executor)  # fmt: skip
        consumer.start()
        try:
            eventually(lambda: wakeup.listener(stream.target).is_open)
            for i in range(20):
                stream.append({'i': i})
            eventually(lambda: done == set(range(20)))
            eventually(lambda: look.group().lag().messages == 0)
        finally:
            consumer.stop()
    assert look.dead_letters() == []


def test_a_standalone_server_has_no_change_streams_and_that_is_found_out_once(standalone_url):
    listener, told = Listener(Target(standalone_url, 'x')), threading.Event()
    listener.add('key', 's', lambda record: told.set())
    eventually(lambda: not listener.supported)
    assert not listener.is_open
    listener.remove('key')
