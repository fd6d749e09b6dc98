"""MQTTSource and MQTTSink on a real mosquitto."""
from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import threading
from contextlib import closing, contextmanager
from datetime import datetime

import pytest
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from servers import eventually, free_port
from servers_mqtt import Mosquitto, certificates, numbers, publish

import minibatch as mb
from minibatch.abc import Sink, Source
from minibatch.contrib.mqtt import MQTTSink, MQTTSource
from minibatch.contrib.mqtt import subscriber as subscribers
from minibatch.errors import ArgumentError, DataError
from minibatch.testing import InlineExecutor

URL = 'mqtt://127.0.0.1:1'


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


def arriving(monkeypatch):
    """The messages that a source was handed by the thread of its client."""
    messages, put = [], subscribers.HandOver.put

    def note(self, event):
        put(self, event)
        if isinstance(event, subscribers.Received):
            messages.append(event)
    monkeypatch.setattr(subscribers.HandOver, 'put', note)
    return messages


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
    thread = threading.Thread(target=run, daemon=True)
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


@contextmanager
def listening(broker, topic='#'):
    """What a client that is not ours gets, as (topic, JSON, qos, retain)."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    got, subscribed = [], threading.Event()
    client.on_subscribe = lambda *args: subscribed.set()
    client.on_message = lambda client, data, message: got.append(
        (message.topic, json.loads(message.payload), message.qos, message.retain)
    )
    client.connect('127.0.0.1', broker.port)
    client.subscribe(topic, 2)
    client.loop_start()
    assert subscribed.wait(10)
    try:
        yield got
    finally:
        client.disconnect()
        client.loop_stop()


# --- the source


def test_both_keep_their_contracts():
    assert isinstance(MQTTSource(URL, 'test'), Source)
    assert isinstance(MQTTSink(URL, 'test'), Sink)


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
@pytest.mark.parametrize('qos', [0, 1, 2])
def test_messages_are_stored_in_order(broker, stream, db, qos, protocol):
    with receiving(MQTTSource(broker.url, 'test/#', qos=qos, protocol=protocol), stream, broker):
        publish(broker.url, numbers(0, 0, 2000, qos))
        eventually(lambda: len(stored(db)) == 2000)
    assert stored(db) == [
        {'topic': 'test/0', 'payload': {'source': 0, 'seq': i}, 'qos': qos, 'retain': False} for i in range(2000)
    ]


OVERLAPPING = [
    (['plant/#', 'plant/+/alarm'], ['plant/1/alarm', 'plant/1', 'plant/2']),
    (['plant/+', '+/1'], ['plant/1', 'plant/2', 'office/1']),
]


@pytest.mark.parametrize(('topics', 'wanted'), OVERLAPPING)
@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
def test_a_message_that_matches_several_topics_comes_once(tmp_path, stream, db, protocol, topics, wanted):
    sent = ['plant/1/alarm', 'plant/1', 'office/2', 'plant/2', 'office/1']
    with Mosquitto(tmp_path, 'allow_duplicate_messages true') as broker:
        publish(broker.url, [(sent[1], b'0', 1)], retain=True)
        source = MQTTSource(broker.url, topics, qos=2, protocol=protocol, client_id='once')
        with receiving(source, stream, broker):
            publish(broker.url, [(topic, b'%d' % i, 2) for i in (1, 2) for topic in sent])
            publish(broker.url, [(wanted[0], b'"end"', 2)])
            eventually(lambda: any(message['payload'] == 'end' for message in stored(db)))
    expected = [topic for topic in sent if topic in wanted]
    assert [message['topic'] for message in stored(db)] == [sent[1], *expected, *expected, wanted[0]]


def test_topics_of_an_earlier_run_that_overlap_are_subscribed_no_more(tmp_path, stream, db):
    with Mosquitto(tmp_path, 'allow_duplicate_messages true') as broker:
        for topics, sign in (['plant/+/alarm'], 'SUBACK'), (['plant/#', 'plant/+/alarm'], 'UNSUBACK'):
            with receiving(MQTTSource(broker.url, topics, qos=2, client_id='once'), stream, broker, f'Sending {sign}'):
                publish(broker.url, [('plant/1/alarm', b'1', 2), ('plant/1/alarm', b'2', 2)])
                eventually(lambda: stored(db)[-1:] and stored(db)[-1]['payload'] == 2)
        assert [message['payload'] for message in stored(db)] == [1, 2, 1, 2]


@pytest.mark.parametrize('qos', [0, 1, 2])
def test_properties_that_the_client_of_mqtt_cannot_read_do_no_harm(broker, stream, db, qos):
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = ('text', '\ufeffwith the mark that Windows puts before it')
    with receiving(MQTTSource(broker.url, 'test', qos=qos, protocol='5', client_id='reader'), stream, broker):
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect('127.0.0.1', broker.port)
        client.loop_start()
        client.publish('test', b'{"i": 1}', 2, properties=properties).wait_for_publish(10)
        client.publish('test', b'{"i": 2}', 2).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()
        eventually(lambda: len(stored(db)) == 2)
    assert [message['payload'] for message in stored(db)] == [{'i': 1}, {'i': 2}]


def test_a_topic_that_is_no_utf8_is_a_dead_letter(stream, db):
    """No broker that is at hand lets one through."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        source = MQTTSource(f'mqtt://127.0.0.1:{listener.getsockname()[1]}', '#')
        stream.attach(source)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1000)[0] == paho.CONNECT
            connection.sendall(bytes([paho.CONNACK, 2, 0, 0]))
            connection.sendall(bytes([paho.PUBLISH, 5, 0, 1]) + b'\xff{}')
            connection.sendall(bytes([paho.PUBLISH, 5, 0, 1]) + b'a{}')
            eventually(lambda: stored(db) and stored(db, 'test.dead_letters'))
            stream.stop()
    assert [message['topic'] for message in stored(db)] == ['a']
    letter, = stored(db, 'test.dead_letters')
    assert letter['error'].startswith('the topic is not UTF-8: ')
    assert letter['data'] == {'topic': '\\xff', 'payload': b'{}', 'qos': 0, 'retain': False}


@pytest.mark.parametrize(('topics', 'expected'), [
    ('house/+/heat', ['house/1/heat', 'house/2/heat']),
    ('house/1/#', ['house/1/heat', 'house/1/rain/mm']),
    (['house/2/heat', 'garden'], ['house/2/heat', 'garden']),
])
def test_topics_have_wildcards_and_may_be_several(broker, stream, db, topics, expected):
    with receiving(MQTTSource(broker.url, topics), stream, broker):
        topics = ['house/1/heat', 'house/1/rain/mm', 'house/2/heat', 'garden']
        publish(broker.url, [(topic, b'1', 1) for topic in topics])
        eventually(lambda: len(stored(db)) == len(expected))
    assert [message['topic'] for message in stored(db)] == expected


@pytest.mark.parametrize(('payload', 'sent', 'expected'), [
    ('json', b'[1, {"a": null}]', [1, {'a': None}]), ('text', 'grün'.encode(), 'grün'), ('raw', b'\xff\0', b'\xff\0'),
    ('raw', b'', b''),
])
def test_the_payload_is_decoded_as_asked(broker, stream, db, payload, sent, expected):
    with receiving(MQTTSource(broker.url, 'test', payload=payload), stream, broker):
        publish(broker.url, [('test', sent, 1)])
        eventually(lambda: stored(db))
    assert stored(db)[0]['payload'] == expected


@pytest.mark.parametrize(('payload', 'qos', 'options'), [
    ('json', 1, {}), ('json', 2, {'client_id': 'tests'}), ('text', 1, {}),
])
def test_what_is_malformed_is_a_dead_letter_and_holds_nothing_up(broker, stream, db, payload, qos, options):
    wrong = [b'\xff\xfe\xfd'] if payload == 'text' else [b'', b'{"a": ', b'\xff\xfe\xfd', b'9' * 5000, b'[' * 100_000]
    messages = [('test', each, qos) for bad in wrong for each in (b'1', bad, b'2')]
    with receiving(MQTTSource(broker.url, 'test', payload=payload, qos=qos, **options), stream, broker):
        publish(broker.url, messages)
        eventually(lambda: len(stored(db)) + len(stored(db, 'test.dead_letters')) == len(messages))
        publish(broker.url, [('test', b'3', qos)])
        eventually(lambda: str(stored(db)[-1]['payload']) == '3')
    assert [str(message['payload']) for message in stored(db)] == ['1', '2'] * len(wrong) + ['3']
    dead = stored(db, 'test.dead_letters')
    assert [letter['data']['payload'] for letter in dead] == wrong
    assert {letter['data']['topic'] for letter in dead} == {'test'}
    assert all(letter['error'].startswith(f'the payload is not {payload}: ') for letter in dead)


@pytest.mark.parametrize('options', [{}, {'client_id': 'tests'}, {'qos': 2, 'client_id': 'tests'}])
def test_what_mongodb_cannot_store_is_a_dead_letter(broker, stream, db, options):
    """Each of them, also where all of them have the same packet ids to remember."""
    wrong = [b'{"a\\u0000b": 1}', b'99999999999999999999', b'"\\ud800"']
    with receiving(MQTTSource(broker.url, 'test', **options), stream, broker):
        for i, payload in enumerate(wrong, 1):
            publish(broker.url, [('test', payload, 2)])
            eventually(lambda i=i: len(stored(db, 'test.dead_letters')) == i)
        publish(broker.url, [('test', b'1', 2)])
        eventually(lambda: stored(db))


def test_a_retained_message_is_marked(broker, stream, db):
    publish(broker.url, [('test', b'1', 1)], retain=True)
    with receiving(MQTTSource(broker.url, 'test'), stream, broker):
        eventually(lambda: stored(db))
    assert stored(db) == [{'topic': 'test', 'payload': 1, 'qos': 1, 'retain': True}]


def test_a_session_goes_on_without_retained_messages_with_protocol_5(broker, stream, db):
    publish(broker.url, [('test', b'1', 1)], retain=True)
    for i in range(2):
        with receiving(MQTTSource(broker.url, 'test', client_id='tests', protocol='5'), stream, broker):
            publish(broker.url, [('test', b'2', 1)])
            eventually(lambda i=i: len(stored(db)) == 2 * i + 2)
        publish(broker.url, [('test', b'3', 1)])
    with receiving(MQTTSource(broker.url, 'test', client_id='tests', protocol='5'), stream, broker):
        eventually(lambda: len(stored(db)) == 5)
    assert sorted(message['payload'] for message in stored(db)) == [1, 2, 2, 3, 3]


def test_a_clean_session_forgets_what_came_while_the_source_was_away(broker, stream, db):
    for i in range(2):
        with receiving(MQTTSource(broker.url, 'test', client_id='tests', clean_session=True), stream, broker):
            publish(broker.url, [('test', b'1', 1)])
            eventually(lambda i=i: len(stored(db)) == i + 1)
        publish(broker.url, [('test', b'2', 1)])
    assert [message['payload'] for message in stored(db)] == [1, 1]


def test_what_has_arrived_is_stored_when_the_source_is_cancelled(broker, stream, db, monkeypatch):
    arrived = arriving(monkeypatch)
    monkeypatch.setattr(subscribers, 'BATCH_MESSAGES', 1)  # so that they wait for a while
    with receiving(MQTTSource(broker.url, 'test/#', qos=0), stream, broker):
        publish(broker.url, numbers(0, 0, 300, 0))
        eventually(lambda: len(arrived) == 300)
        assert len(stored(db)) < 300
    assert [message['payload']['seq'] for message in stored(db)] == list(range(300))
    eventually(lambda: broker.said('Received DISCONNECT from auto') == 2)


def test_a_source_runs_again_after_it_was_cancelled(broker, stream, db):
    source = MQTTSource(broker.url, 'test/#')
    for i in range(2):
        source.cancel()
        with receiving(source, stream, broker):
            publish(broker.url, numbers(i, 0, 10))
            eventually(lambda i=i: len(stored(db)) == 10 * (i + 1))


def test_a_source_in_a_consumer_brings_messages_to_its_windows(broker, url, db):
    source = MQTTSource(broker.url, 'test/#', client_id='tests')
    seen = []
    emitter = mb.make_emitter(
        'test', lambda window: seen.append([data['payload']['seq'] for data in window.data]), url=url, size=10,
        source=source, executor=InlineExecutor,
    )
    emitter.start()
    eventually(lambda: broker.said('Sending SUBACK'))
    publish(broker.url, numbers(0, 0, 100))
    eventually(lambda: len(seen) == 10)
    emitter.stop()
    assert [seq for window in seen for seq in window] == list(range(100))


# --- the connection


def test_an_unreachable_broker_is_a_connection_error(stream):
    with pytest.raises(ConnectionError, match=r'the MQTT broker 127\.0\.0\.1:\d+ cannot be reached: .*refused'):
        MQTTSource(f'127.0.0.1:{free_port()}', 'test').stream(stream)


def test_a_broker_that_does_not_answer_is_a_timeout_error(broker, stream, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.mqtt.source.CONNECT_TIMEOUT', 0.5)
    monkeypatch.setattr('minibatch.contrib.mqtt.broker.CLOSE_TIMEOUT', 0.5)
    broker.pause()
    with pytest.raises(TimeoutError, match='does not answer'):
        MQTTSource(broker.url, 'test').stream(stream)


@pytest.fixture
def guarded(tmp_path):
    """A broker that asks for a password, and tells one user that he may not publish to 'secret'."""
    subprocess.run(['mosquitto_passwd', '-b', '-c', str(tmp_path / 'users'), 'me@home', 'p:/@ ss'], check=True,
                   capture_output=True)
    (tmp_path / 'acl').write_text('user me@home\ntopic readwrite test/#\n')
    with Mosquitto(tmp_path, f'password_file {tmp_path}/users', f'acl_file {tmp_path}/acl') as broker:
        broker.user_url = f'mqtt://me%40home:p%3A%2F%40%20ss@127.0.0.1:{broker.port}'
        yield broker


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
def test_user_and_password_come_from_the_url(guarded, stream, db, protocol):
    with receiving(MQTTSource(guarded.user_url, 'test/#', protocol=protocol), stream, guarded):
        MQTTSink(guarded.user_url, 'test/a', protocol=protocol).put({'a': 1})
        eventually(lambda: stored(db))


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
def test_a_wrong_password_is_said_and_not_shown(guarded, stream, protocol, caplog):
    caplog.set_level('DEBUG')
    url = guarded.user_url.replace('ss@', 'wrong@')
    with pytest.raises(ConnectionError, match='refused the connection: Not authorized; check user and password'):
        MQTTSource(url, 'test', protocol=protocol).stream(stream)
    with pytest.raises(ConnectionError, match='Not authorized; check user and password') as error:
        MQTTSink(url, 'test', protocol=protocol).put({})
    shown = f'{error.value} {caplog.text} {MQTTSource(url, "test")!r} {MQTTSink(url, "test")!r}'
    assert 'wrong' not in shown
    assert 'me@home' not in shown
    assert 'me%40home' not in shown


@pytest.fixture
def many_open_files():
    """As many as select() cannot take: it ends at descriptor 1023."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for file in files:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize('tls', [False, True])
def test_both_work_in_a_process_with_many_open_files(tmp_path, stream, db, many_open_files, tls):
    authority, own = certificates(tmp_path)
    trusting = {'ca_certs': f'{authority}.crt'} if tls else {}
    with (
        Mosquitto(tmp_path, tls=(authority, own) if tls else None) as broker,
        receiving(MQTTSource(broker.url, 'test', **trusting), stream, broker),
        closing(MQTTSink(broker.url, 'test', **trusting)) as sink,
    ):
        sink.put([{'i': i} for i in range(2500)])
        eventually(lambda: len(stored(db)) == 2500)


# paho leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_tls_with_an_authority_of_our_own(tmp_path, stream, db):
    authority, own = certificates(tmp_path)
    with Mosquitto(tmp_path, tls=(authority, own)) as broker:
        trusting = {'ca_certs': f'{authority}.crt'}
        with receiving(MQTTSource(broker.url, 'test', **trusting), stream, broker):
            MQTTSink(broker.url, 'test', **trusting).put({'a': 1})
            eventually(lambda: stored(db))
        with pytest.raises(ConnectionError, match='certificate verify failed'):
            MQTTSource(broker.url, 'test').stream(stream)
        elsewhere = broker.url.replace('127.0.0.1', 'localhost')
        with pytest.raises(ConnectionError, match='certificate verify failed: Hostname mismatch'):
            MQTTSink(elsewhere, 'test', **trusting).put({})
        MQTTSink(elsewhere, 'test', tls_insecure=True, **trusting).put({})
        with pytest.raises(ConnectionError):
            MQTTSource(broker.url.replace('mqtts', 'mqtt'), 'test').stream(stream)


def test_a_certificate_of_our_own_is_shown_to_the_broker(tmp_path, stream, db):
    authority, own = certificates(tmp_path)
    with Mosquitto(tmp_path, 'require_certificate true', tls=(authority, own)) as broker:
        trusting = {'ca_certs': f'{authority}.crt'}
        shown = {'certfile': f'{own}.crt', 'keyfile': f'{own}.key', **trusting}
        with receiving(MQTTSource(broker.url, 'test', **shown), stream, broker):
            MQTTSink(broker.url, 'test', **shown).put({'a': 1})
            eventually(lambda: stored(db))
        with pytest.raises(ConnectionError):
            MQTTSink(broker.url, 'test', **trusting).put({})


def test_a_refused_subscription_is_an_error_and_a_lower_qos_a_warning(caplog):
    """mosquitto accepts every subscription."""
    source = MQTTSource(URL, ['a', 'b'], qos=2)
    source._check_subscription([ReasonCode(PacketTypes.SUBACK, identifier=code) for code in (2, 1)])
    assert caplog.messages == ["the MQTT broker 127.0.0.1:1 sends 'b' with QoS 1 at most"]
    with pytest.raises(ConnectionError, match="refused the subscription to 'b': Not authorized"):
        source._check_subscription([ReasonCode(PacketTypes.SUBACK, identifier=code) for code in (2, 0x87)])


# --- arguments


@pytest.mark.parametrize(('arguments', 'options', 'message'), [
    ((None, 'a'), {}, 'url must be a text'),
    (('http://localhost', 'a'), {}, 'url must begin with mqtt://'),
    (('mqtt://localhost/a', 'a'), {}, 'url must be like'),
    (('mqtt://u:p#1@localhost', 'a'), {}, 'wrong host or port'),
    (('mqtt://u:sec/ret@localhost', 'a'), {}, 'wrong host or port'),
    (('mqtt://:secret@localhost', 'a'), {}, 'password and no user'),
    (('localhost:99999', 'a'), {}, 'wrong host or port'),
    ((URL, ''), {}, 'topic must be'),
    ((URL, []), {}, 'topic must be'),
    ((URL, [1]), {}, 'topic must be'),
    ((URL, 'a/#/b'), {}, 'topic has'),
    ((URL, 'a+'), {}, 'topic has'),
    ((URL, 'a'), {'qos': 3}, 'qos must be'),
    ((URL, 'a'), {'qos': True}, 'qos must be'),
    ((URL, 'a'), {'payload': 'pickle'}, "payload must be one of 'json', 'text', 'raw'"),
    ((URL, 'a'), {'client_id': 1}, 'client_id must be'),
    ((URL, 'a'), {'clean_session': False}, 'clean_session=False needs a client_id'),
    ((URL, 'a'), {'clean_session': 1}, 'clean_session must be'),
    ((URL, 'a'), {'protocol': 3}, "protocol must be '3.1.1' or '5'"),
    ((URL, 'a'), {'keepalive': 0}, 'keepalive must be'),
    ((URL, 'a'), {'ca_certs': '/x'}, 'ca_certs: for TLS only'),
    (('mqtts://localhost', 'a'), {'ca_certs': '/x'}, 'ca_certs must be a file'),
    (('mqtts://localhost', 'a'), {'certfile': '/x'}, 'certfile and keyfile must be'),
    (('mqtts://localhost', 'a'), {'keyfile': '/x'}, 'need a certfile'),
    ((URL, 'a'), {'userdata': 1, 'host': 2}, 'host, userdata: unknown; there are .*client_id'),
])
def test_a_wrong_argument_of_the_source_is_named(arguments, options, message):
    with pytest.raises(ArgumentError, match=message) as error:
        MQTTSource(*arguments, **options)
    assert 'secret' not in str(error.value)
    assert 'sec/ret' not in str(error.value)


@pytest.mark.parametrize(('topic', 'options', 'message'), [
    (lambda: 'a', {}, 'topic is called with a message'),
    ('a/+', {}, 'without'), ('', {}, 'topic must be'), ('a', {'qos': 5}, 'qos'), ('a', {'retain': 1}, 'retain must be'),
    ('a', {'expand': None}, 'expand must be'), ('a', {'timeout': 0}, 'timeout must be'), ('a', {'x': 0}, 'x: unknown'),
])
def test_a_wrong_argument_of_the_sink_is_named(topic, options, message):
    with pytest.raises(ArgumentError, match=message):
        MQTTSink(URL, topic, **options)


def test_a_paho_that_would_confirm_too_early_is_refused_with_qos_2(monkeypatch):
    subscribers.holds_receipts_back.cache_clear()
    MQTTSource(URL, 'a', qos=2)
    for name in ('_send_pubrec', '_handle_publish', '_handle_pubrel', 'receipt'):
        subscribers.holds_receipts_back.cache_clear()
        with monkeypatch.context() as patch:
            patch.delattr(subscribers.Subscriber, name)
            with pytest.raises(ArgumentError, match='qos=2 is not safe with paho-mqtt'):
                MQTTSource(URL, 'a', qos=2)
            MQTTSource(URL, 'a', qos=1)
    subscribers.holds_receipts_back.cache_clear()


# --- the sink


@pytest.fixture
def sink(broker):
    """Makes sinks for this broker, and closes them."""
    sinks = []

    def make(topic='results', **options):
        sinks.append(MQTTSink(broker.url, topic, **options))
        return sinks[-1]
    yield make
    for each in sinks:
        each.close()


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
@pytest.mark.parametrize('qos', [0, 1, 2])
def test_each_mapping_is_one_message(broker, sink, qos, protocol):
    with listening(broker) as got:
        to = sink(qos=qos, protocol=protocol)
        to.put({'a': 'ü', 'n': float('nan')})
        to.put(iter([{'b': i} for i in range(2500)]))
        to.put([])
        eventually(lambda: len(got) == 2501)
    expected = [{'a': 'ü', 'n': None}, *({'b': i} for i in range(2500))]
    assert got == [('results', message, qos, False) for message in expected]
    assert broker.said('New client connected') == 2


def test_a_list_is_one_message_without_expand(broker, sink):
    with listening(broker) as got:
        sink(expand=False).put([{'a': 1}, 2])
        eventually(lambda: got)
    assert got == [('results', [{'a': 1}, 2], 1, False)]


def test_the_topic_may_come_from_the_message(broker, sink):
    with listening(broker) as got:
        sink(lambda message: f'means/{message["sensor"]}').put([{'sensor': 'a'}, {'sensor': 'b'}])
        eventually(lambda: len(got) == 2)
    assert [topic for topic, *_ in got] == ['means/a', 'means/b']


def test_a_result_is_retained_on_request(broker, sink):
    sink(retain=True).put({'a': 1})
    with listening(broker) as got:
        eventually(lambda: got)
    assert got == [('results', {'a': 1}, 1, True)]


@pytest.mark.parametrize(('result', 'message'), [
    (7, 'a mapping or a list of mappings, not int'), ('text', 'not str'), ([{}, 1], 'item 1 is of type int'),
    ([{}, {'a': 1, 'at': datetime(2020, 1, 1)}], "'at' of item 1 is no JSON: .*datetime"),
    ({'n': float('nan'), 'a': object()}, "'a' of item 0 is no JSON"), ({'a': '\ud800'}, "'a' of item 0 is no JSON"),
    ({(1, 2): 3}, 'item 0 is no JSON: keys must be str'),
])
def test_what_cannot_be_sent_is_named_and_nothing_is_sent(broker, sink, result, message):
    with pytest.raises(DataError, match=message):
        sink().put(result)
    assert broker.said('as auto') == 0


def test_a_message_to_a_wrong_topic_is_refused(sink):
    with pytest.raises(ArgumentError, match='topic must be'):
        sink(lambda message: 'a/#').put({})


def test_a_message_larger_than_the_broker_takes_is_refused_before_any_is_sent(tmp_path):
    with Mosquitto(tmp_path, 'max_packet_size 1000') as broker:
        sink = MQTTSink(broker.url, 'results', protocol='5')
        with pytest.raises(DataError, match=r'item 1 has 2,009 bytes, which is more than .* takes'):
            sink.put([{}, {'a': 'x' * 2000}])
        assert broker.said('Received PUBLISH') == 0
        sink.put({})
        sink.close()


def test_what_the_broker_refuses_is_an_error_with_protocol_5(guarded):
    sink = MQTTSink(guarded.user_url, lambda message: message['to'], protocol='5')
    with pytest.raises(DataError, match='refused item 1: Not authorized'):
        sink.put([{'to': 'test/a'}, {'to': 'secret'}])
    sink.close()


def test_a_sink_without_a_broker_raises_and_goes_on_when_it_is_back(broker, sink):
    to = sink()
    to.put({'a': 1})
    broker.stop()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            to.put({'a': 2})
    broker.start()
    with listening(broker) as got:
        to.put({'a': 3})
        eventually(lambda: got)
    assert [payload for _, payload, *_ in got] == [{'a': 3}]


@pytest.mark.parametrize('qos', [1, 2])
def test_a_broker_that_acknowledges_nothing_is_a_timeout_and_gets_nothing_later(broker, sink, qos, monkeypatch):
    monkeypatch.setattr('minibatch.contrib.mqtt.broker.CLOSE_TIMEOUT', 0.5)
    to = sink(timeout=0.5, qos=qos)
    to.put({'a': 1})
    with listening(broker) as got:
        broker.pause()
        with pytest.raises(TimeoutError, match='does not answer'):
            to.put([{'a': 2}] * 500)
        broker.resume()
        to.put({'a': 3})
        eventually(lambda: got and got[-1][1] == {'a': 3})
    assert len(got) <= 20 + 1  # what was under way


def test_a_result_is_published_by_the_sink_of_a_consumer(broker, url, sink):
    stream = mb.stream('test', url=url)
    stream.append_many({'a': i} for i in range(10))
    emitter = mb.make_emitter(
        'test', lambda window: {'total': sum(data['a'] for data in window.data)}, url=url, size=5, sink=sink(),
        executor=InlineExecutor,
    )
    with listening(broker) as got:
        emitter._run_once()
        eventually(lambda: len(got) == 2)
    assert [payload for _, payload, *_ in got] == [{'total': 10}, {'total': 35}]
