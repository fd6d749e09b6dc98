"""What an MQTTSource loses and stores twice when processes are killed, brokers restart and connections are lost."""
from __future__ import annotations

import json
import signal
import subprocess
import threading
import time

import pytest
from paho.mqtt import client as paho
from processes import FAULTS, SCRIPTS, Row, compare, running
from servers import eventually
from servers_mqtt import Mosquitto, flood, numbers, publish
from test_mqtt import arriving, receiving, stored

import minibatch as mb
from minibatch.contrib.mqtt import MQTTSource
from minibatch.contrib.mqtt import subscriber as subscribers

SESSION = {'client_id': 'tests'}
# What mosquitto 2.0 has been seen to have in flight at once; it says 20.
IN_FLIGHT = 3000
TOTAL = [{'$group': {'_id': None, 'n': {'$sum': '$n'}}}]


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


def source(url, broker, kill=None, **options):
    config = {'mongo': url, 'broker': broker.url, 'kill': kill, 'options': {**SESSION, **options}}
    return running(str(SCRIPTS / 'mqtt_source.py'), json.dumps(config))


def seen(db):
    return [[data['payload']['source'], data['payload']['seq']] for data in stored(db)]


def subscribe(broker, **options):
    """Make the session, so that the broker keeps what is published from now on."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, 'tests', clean_session=False)
    client.connect('127.0.0.1', broker.port)
    subscribed = threading.Event()
    client.on_subscribe = lambda *args: subscribed.set()
    client.loop_start()
    client.subscribe('test/#', options.get('qos', 1))
    assert subscribed.wait(10)
    client.disconnect()
    client.loop_stop()


def count(db, counts, scenario):
    """Compare what is stored with what was sent, when all of it is; it becomes a row of the table of faults."""
    row = Row(scenario, sum(counts.values()), 0)
    FAULTS.append(row)
    row.repeated = compare(row, seen(db), counts)
    return row


def full_stream(url):
    """A stream that takes nothing until what is in it is deleted."""
    stream = mb.stream('test', url=url, max_backlog=100_000)
    stream.append_many({} for _ in range(100_000))
    return stream


def send_last(broker, db, counts, qos):
    """Publish one more message and wait until it is stored: what the broker sends again comes before it."""
    publish(broker.url, numbers(-1, 0, 1, qos))
    counts[-1] = 1
    eventually(lambda: [-1, 0] in seen(db), 60, 'the last message did not come')


@pytest.mark.parametrize(('qos', 'when', 'which'), [
    (1, 'before append', 2), (1, 'after append', 2), (1, 'before receipt', 70),
    (2, 'before append', 2), (2, 'after append', 2), (2, 'before receipt', 70), (2, 'before save', 1),
    (2, 'after save', 1),
])
def test_a_source_killed_between_append_and_receipt_loses_nothing(broker, url, db, qos, when, which):
    subscribe(broker, qos=qos)
    publish(broker.url, numbers(0, 0, 500, qos))
    with source(url, broker, [when, which], qos=qos) as process:
        assert process.wait(20) == -signal.SIGKILL
    publish(broker.url, numbers(0, 500, 600, qos))
    with source(url, broker, qos=qos):
        counts = {0: 600}
        send_last(broker, db, counts, qos)
    row = count(db, counts, f'MQTT QoS {qos}, killed {when}')
    assert row.lost == 0
    assert row.repeated <= (IN_FLIGHT if qos == 1 else 0)


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
@pytest.mark.parametrize('qos', [1, 2])
def test_a_source_killed_at_random_moments_loses_nothing(broker, url, db, rng, qos, protocol):
    subscribe(broker, qos=qos)
    kills, each = 6, 1500
    for kill in range(kills):
        thread = threading.Thread(target=publish, args=(broker.url, numbers(kill, 0, each, qos)))
        with source(url, broker, qos=qos, protocol=protocol) as process:
            thread.start()
            eventually(lambda kill=kill: any(number == kill for number, _ in seen(db)[-50:]))
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.4))
            process.kill()
            process.wait(10)
        thread.join(30)
    counts = dict.fromkeys(range(kills), each)
    with source(url, broker, qos=qos, protocol=protocol):
        send_last(broker, db, counts, qos)
    row = count(db, counts, f'MQTT {protocol} QoS {qos}, killed {kills} times')
    assert row.lost == 0
    assert row.repeated <= (IN_FLIGHT * kills if qos == 1 else 0)


@pytest.mark.parametrize('qos', [1, 2])
def test_a_source_outlives_a_clean_restart_of_the_broker(broker, stream, db, qos):
    counts = {0: 6000}
    subscribe(broker, qos=qos)
    publish(broker.url, numbers(0, 0, 6000, qos))
    with receiving(MQTTSource(broker.url, 'test/#', qos=qos, **SESSION), stream, broker):
        eventually(lambda: len(seen(db)) > 500)
        broker.stop()
        assert len(seen(db)) < 6000
        broker.start()
        send_last(broker, db, counts, qos)
    row = count(db, counts, f'MQTT QoS {qos}, broker restarted')
    assert row.lost == 0
    # Also of QoS 2: after a restart mosquitto 2.0 sends messages (PUBLISH) that it had released (PUBREL) before.
    assert row.repeated <= IN_FLIGHT


@pytest.mark.parametrize('qos', [1, 2])
def test_a_source_begins_anew_with_a_broker_that_was_killed(broker, stream, db, qos):
    """mosquitto saves every 30 minutes, and when it is stopped: killed, it has forgotten the session."""
    with receiving(MQTTSource(broker.url, 'test/#', qos=qos, **SESSION), stream, broker):
        publish(broker.url, numbers(0, 0, 1000, qos))
        eventually(lambda: len(seen(db)) == 1000)
        subscribed = broker.said('Sending SUBACK')
        broker.kill()
        broker.start()
        eventually(lambda: broker.said('Sending SUBACK') > subscribed, message='not subscribed again')
        counts = {0: 1000, 1: 1000}
        publish(broker.url, numbers(1, 0, 1000, qos))
        send_last(broker, db, counts, qos)
    row = count(db, counts, f'MQTT QoS {qos}, broker killed')
    assert (row.lost, row.repeated) == (0, 0)


@pytest.mark.parametrize('saves', [False, True], ids=['as it is', 'autosave_on_changes'])
def test_a_killed_broker_loses_what_it_has_not_saved(tmp_path, url, db, saves):
    """It has acknowledged these messages, and nobody else has them."""
    options = ['autosave_on_changes true', 'autosave_interval 1'] if saves else []
    with Mosquitto(tmp_path, *options) as broker:
        subscribe(broker)
        broker.stop()  # the session of the source is saved
        broker.start()
        publish(broker.url, numbers(0, 0, 500))
        broker.kill()
        broker.start()
        counts = {0: 500}
        with source(url, broker):
            send_last(broker, db, counts, 1)
    row = count(db, counts, f'MQTT QoS 1, broker killed{", autosave_on_changes" if saves else ""}, source away')
    assert row.lost <= 1 if saves else row.lost == 500  # it saves when more than autosave_interval have changed


def test_packet_ids_of_a_session_that_is_no_more_swallow_nothing(broker, url, db):
    """The same message under the same packet id, sent again in a new session, is a new message."""
    options = {'qos': 2}
    subscribe(broker, qos=2)
    publish(broker.url, numbers(0, 0, 1, 2))
    with source(url, broker, ['before receipt', 1], **options) as process:
        assert process.wait(20) == -signal.SIGKILL
    broker.kill()  # which had saved nothing
    broker.start()
    subscribed = broker.said('Sending SUBACK')
    with source(url, broker, ['before append', 1], **options) as process:
        eventually(lambda: broker.said('Sending SUBACK') > subscribed)
        publish(broker.url, numbers(0, 0, 1, 2))
        assert process.wait(20) == -signal.SIGKILL
    with source(url, broker, **options):
        send_last(broker, db, {}, 2)
    assert seen(db) == [[0, 0], [0, 0], [-1, 0]]


def test_an_identical_message_is_not_taken_for_one_sent_again(broker, url, db):
    subscribe(broker, qos=2)
    publish(broker.url, [('test/0', b'{"source": 0, "seq": 0}', 2)] * 200)
    with source(url, broker, ['before receipt', 30], qos=2) as process:
        assert process.wait(20) == -signal.SIGKILL
    with source(url, broker, qos=2):
        send_last(broker, db, {}, 2)
    assert seen(db) == [[0, 0]] * 200 + [[-1, 0]]


@pytest.mark.parametrize('qos', [1, 2])
def test_what_came_over_a_lost_connection_is_not_acknowledged_over_the_next(broker, url, db, qos):
    """There its packet id may be another message's. It is the next delivery that is acknowledged, once."""
    stream = full_stream(url)
    counts = {1: 10}
    with receiving(MQTTSource(broker.url, 'test/#', qos=qos, **SESSION), stream, broker):
        publish(broker.url, numbers(1, 0, 10, qos))
        eventually(lambda: broker.said('Sending PUBLISH to tests') == 10)
        broker.stop()
        sent = broker.said('Sending PUBLISH to tests')
        broker.start()
        eventually(lambda: broker.said('Sending PUBLISH to tests') == sent + 10, message='not sent again')
        before = {kind: broker.said(f'Received {kind} from tests') for kind in ('PUBACK', 'PUBREC')}
        assert set(before.values()) == {0}
        db.buffer.delete_many({})
        send_last(broker, db, counts, qos)
    eventually(lambda: broker.said('Received DISCONNECT from tests'))
    told = broker.said(f'Received {"PUBACK" if qos == 1 else "PUBREC"} from tests')
    assert told == 10 + 1
    row = count(db, counts, f'MQTT QoS {qos}, connection lost')
    assert (row.lost, row.repeated) == (0, 10 if qos == 1 else 0)


@pytest.mark.parametrize('protocol', ['3.1.1', '5'])
def test_a_source_that_waits_for_its_stream_stays_connected_and_loses_nothing(
    tmp_path, url, db, monkeypatch, protocol
):
    """The broker sends whatever it has."""
    monkeypatch.setattr(subscribers, 'WAITING_MESSAGES', 30)
    stream, counts, arrived = full_stream(url), {0: 1000}, arriving(monkeypatch)
    options = {'keepalive': 1, 'protocol': protocol, **SESSION}
    with (
        Mosquitto(tmp_path, 'max_inflight_messages 0') as broker,
        receiving(MQTTSource(broker.url, 'test/#', **options), stream, broker),
    ):
        publish(broker.url, numbers(0, 0, 1000))
        pings = broker.said('Received PINGREQ from tests')
        eventually(lambda: broker.said('Received PINGREQ from tests') > pings + 3, message='it sends no pings')
        assert len(arrived) <= 60
        assert broker.said('as tests') == 1
        db.buffer.delete_many({})
        send_last(broker, db, counts, 1)
        assert broker.said('as tests') == 1
    row = count(db, counts, f'MQTT {protocol} QoS 1, stream full')
    assert (row.lost, row.repeated) == (0, 0)


def test_a_source_notices_that_its_broker_is_silent_and_goes_on_when_it_is_back(broker, stream, db, caplog):
    counts = {0: 10}
    with receiving(MQTTSource(broker.url, 'test/#', keepalive=1, **SESSION), stream, broker):
        broker.pause()
        eventually(lambda: 'is lost, trying again: Keep alive timeout' in caplog.text)
        broker.resume()
        publish(broker.url, numbers(0, 0, 10))
        send_last(broker, db, counts, 1)
    row = count(db, counts, 'MQTT QoS 1, broker silent')
    assert (row.lost, row.repeated) == (0, 0)


def test_what_is_dropped_of_qos_0_is_counted_and_said_once(broker, url, db, monkeypatch, caplog):
    monkeypatch.setattr(subscribers, 'WAITING_MESSAGES', 100)
    stream = full_stream(url)
    mqtt = MQTTSource(broker.url, 'test/#', qos=0)
    with receiving(mqtt, stream, broker):
        publish(broker.url, numbers(0, 0, 5000, 0))
        eventually(lambda: mqtt.dropped >= 3000)
        db.buffer.delete_many({})
        eventually(lambda: len(seen(db)) + mqtt.dropped == 5000)
    assert [record.levelname for record in caplog.records if 'QoS 0' in record.message] == ['WARNING']


@pytest.mark.parametrize('qos', [0, 1, 2])
def test_a_burst_is_stored_to_the_last_message(tmp_path, stream, db, qos):
    with Mosquitto(tmp_path, talks=False) as broker:
        alone = rate(broker, qos, 20_000)
        mqtt = MQTTSource(broker.url, 'test/#', qos=qos)
        with receiving(mqtt, stream, broker, ' test/#'):
            began = time.monotonic()
            flood(broker.port, 100_000, qos)
            eventually(lambda: db.buffer.aggregate(TOTAL).next()['n'] == 100_000, 120)
            took = time.monotonic() - began
    row = count(db, {0: 100_000}, f'MQTT QoS {qos}, burst, {100_000 / took:,.0f}/s (paho alone {alone:,.0f}/s)')
    assert (row.lost, row.repeated, row.ordered, mqtt.dropped) == (0, 0, True, 0)


def rate(broker, qos, number):
    """Messages a second which a paho client gets that does nothing with them."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    got, subscribed, done = [], threading.Event(), threading.Event()
    client.on_subscribe = lambda *args: subscribed.set()
    client.on_message = lambda client, data, message: got.append(message) or len(got) < number or done.set()
    client.connect('127.0.0.1', broker.port)
    client.subscribe('test/#', qos)
    client.loop_start()
    assert subscribed.wait(10)
    began = time.monotonic()
    flood(broker.port, number, qos)
    assert done.wait(60)
    client.disconnect()
    client.loop_stop()
    return number / (time.monotonic() - began)
