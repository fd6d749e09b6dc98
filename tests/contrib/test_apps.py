"""Web apps around streams: consumers in processes of their own, endpoints, and who may do what."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone

import psutil
import pytest
from bson import ObjectId
from flask import Flask
from processes import gone, is_alive, running
from servers import Mongod, eventually, free_port
from webs import AUTH, TOKEN, children, get, post, program, tree

import minibatch as mb
from minibatch.contrib.apps import StreamingApp, supervisor, views, watching
from minibatch.contrib.apps.omegaml import StreamingApp as OmegaApp
from minibatch.errors import ArgumentError, MinibatchError
from minibatch.testing import InlineExecutor

JSON = {'Content-Type': 'application/json', **AUTH}
LINES = {'Content-Type': 'application/x-ndjson', **AUTH}


@pytest.fixture
def make(url):
    """Make apps on `url`, which are stopped at the end."""
    made = []

    def make(**options):
        made.append(StreamingApp(**{'uri': url, 'token': TOKEN, **options}))
        return made[-1]

    yield make
    for app in made:
        app.stop(0)


@pytest.fixture
def client(make):
    """A client of an app in this process."""
    return make().server.test_client()


@pytest.fixture
def quick(monkeypatch):
    """Consumers that end are started again at once."""
    monkeypatch.setattr(supervisor, 'PAUSES', (0.05, 0.2))
    monkeypatch.setattr(watching, 'MIN_AGE', 0.0)
    monkeypatch.setattr(watching, 'SAMPLE_PAUSE', 0.0)


def consume(url):
    @mb.streaming('test', size=2, url=url, workers=2, lease=2)
    def process(window):
        pass


def sleep(url):
    @mb.streaming('test', size=2, url=url, workers=1)
    def process(window):
        time.sleep(3600)


def broken(url):
    raise RuntimeError('no such sensor')


def processed(url, count):
    groups = mb.stream('test', url=url).groups()
    return groups and groups[0].messages == count


def at_work(url):
    """Whether a window of 'test' is claimed."""
    return any(group.in_flight for stream in mb.status(url, 'test') for group in stream.groups)


# --- consumers in processes of their own


def test_a_consumer_processes_in_a_process_of_its_own_and_stop_leaves_none(make, url):
    before = children()
    with make() as app:
        app.start_streaming(consume)
        mb.stream('test', url=url).append_many({'i': i} for i in range(10))
        eventually(lambda: processed(url, 10))
        mine = children() - before
        assert len(mine) > 2  # the consumer, and its workers
        assert app.consumers[0].pid in {process.pid for process in mine}
        assert app.consumers[0].as_dict()['state'] == 'running'
    assert not children() - before
    assert not any(map(is_alive, mine))


def test_a_stopped_consumer_finishes_what_is_in_flight(make, url):
    def consumer(url):
        @mb.streaming('test', size=1, url=url, workers=1)
        def process(window):
            time.sleep(1)

    app = make()
    app.start_streaming(consumer)
    mb.stream('test', url=url).append({'i': 0})
    eventually(lambda: at_work(url))
    app.stop()
    assert processed(url, 1)


def test_stop_kills_workers_that_do_not_end(make, url):
    before = children()
    app = make()
    app.start_streaming(sleep)
    mb.stream('test', url=url).append_many([{'i': 0}] * 2)
    eventually(lambda: at_work(url))
    mine = children() - before
    began = time.monotonic()
    app.stop(timeout=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert not any(map(is_alive, mine))


def test_what_a_consumer_started_ends_with_it(make, url, tmp_path):
    def consumer(url):
        child = subprocess.Popen(['sleep', '1000'])
        (tmp_path / 'pid').write_text(str(child.pid))
        time.sleep(1000)

    app = make()
    app.start_streaming(consumer)
    pid = int(eventually(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text()))
    child = psutil.Process(pid)
    app.stop()
    gone([child])


def test_a_killed_consumer_is_seen_and_started_again(make, url, quick, monkeypatch):
    monkeypatch.setattr(supervisor, 'SETTLED', 0.5)
    app = make()
    client = app.server.test_client()
    app.start_streaming(consume)
    mb.stream('test', url=url).append_many([{'i': 0}] * 2)
    eventually(lambda: processed(url, 2))
    assert client.get('/health').status_code == 200
    first = app.consumers[0].pid
    family = tree(first)
    os.kill(first, signal.SIGKILL)
    answer = eventually(lambda: (found := client.get('/health')).status_code == 503 and found)
    assert "consumer 'consume'" in answer.json['reasons'][0]
    assert 'signal SIGKILL' in answer.json['reasons'][0]
    gone(family)
    mb.stream('test', url=url).append_many([{'i': 0}] * 2)
    eventually(lambda: processed(url, 4))
    said = client.get('/status').json['consumers'][0]
    assert (said['restarts'], said['exit_code']) == (1, -signal.SIGKILL)
    assert said['pid'] != first
    eventually(lambda: client.get('/health').status_code == 200)


def test_the_last_words_of_a_consumer_are_kept_and_its_pauses_grow(make, quick, caplog):
    app = make()
    app.start_streaming(broken, name='mine')
    eventually(lambda: app.consumers[0].restarts >= 4)
    said = app.consumers[0].as_dict()
    assert (said['exit_code'], said['error']) == (1, 'RuntimeError: no such sensor')
    pauses = re.findall(r"consumer 'mine' ended with exit code 1, it is started again in (\S+) s", caplog.text)
    assert pauses[:4] == ['0.05', '0.1', '0.2', '0.2']


def test_a_consumer_that_dies_again_and_again_is_not_well_in_between(make, quick):
    def consumer(url):
        time.sleep(0.3)
        sys.exit(3)

    app = make()
    app.start_streaming(consumer)
    eventually(lambda: app.consumers[0].restarts)
    while app.consumers[0].restarts < 3:
        assert 'exit code 3' in app.problems()[0]


def test_a_consumer_that_returns_is_started_again(make, quick):
    app = make()
    app.start_streaming(lambda url: None, name='short')
    eventually(lambda: app.consumers[0].restarts > 1)
    assert app.consumers[0].exit_code == 0


def test_stop_while_a_consumer_waits_to_be_started_again(make):
    app = make()
    app.start_streaming(broken)
    eventually(lambda: app.consumers[0].pid is None)
    began = time.monotonic()
    app.stop()
    assert time.monotonic() - began < 0.9  # the pause is a second


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGINT])
def test_a_program_with_an_app_ends_with_all_its_processes(url, tmp_path, how):
    with program(tmp_path, url) as (process, address):
        assert post(f'{address}/streams/test', [{'i': 0}] * 2) == (201, {'appended': 2})
        eventually(lambda: processed(url, 2))
        family = tree(process.pid)
        assert len(family) > 3
        process.send_signal(how)
        assert process.wait(20) == 0
        gone(family)


@pytest.mark.parametrize('work', ['pass', 'time.sleep(3600)'])
def test_when_the_program_is_killed_its_processes_end(url, tmp_path, work, monkeypatch):
    with program(tmp_path, url, work) as (process, address):
        post(f'{address}/streams/test', [{'i': 0}] * 2)
        eventually(lambda: at_work(url) if 'sleep' in work else processed(url, 2))
        family = tree(process.pid)[1:]
        assert len(family) > 2
        process.kill()
        process.wait()
        eventually(lambda: not any(map(is_alive, family)), 25, f'still there: {family}')


def test_a_function_of_a_module_is_sent_without_importing_the_module_again(make, url, tmp_path, monkeypatch):
    (tmp_path / 'readings.py').write_text(
        'import os, pathlib, sys\n'
        'pathlib.Path(__file__).with_name(f"imported-{os.getpid()}").touch()\n'
        'ANSWER = 42\n'
        'def helper(): return ANSWER\n'
        'def consumer(url):\n'
        '    pathlib.Path(__file__).with_name("result").write_text(str(helper()))\n'
        '    import time; time.sleep(1000)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import readings  # made just now

    make().start_streaming(readings.consumer)
    eventually(lambda: (tmp_path / 'result').exists() and (tmp_path / 'result').read_text() == '42')
    assert [path.name for path in tmp_path.glob('imported-*')] == [f'imported-{os.getpid()}']


def test_a_consumer_starts_no_consumers(make, url, tmp_path):
    def consumer(url):
        inner = StreamingApp(uri=url)
        inner.start_streaming(consumer)
        (tmp_path / 'count').write_text(str(len(inner.consumers)))
        time.sleep(1000)

    make().start_streaming(consumer)
    assert eventually(lambda: (tmp_path / 'count').exists() and (tmp_path / 'count').read_text()) == '0'


def test_a_consumer_that_cannot_be_sent_is_refused_at_once(make):
    lock = threading.Lock()
    with pytest.raises(ArgumentError, match='sent to another process'):
        make().start_streaming(lambda url: lock)


def test_consumers_have_names_of_their_own(make):
    app = make()
    app.start_streaming(consume)
    with pytest.raises(ArgumentError, match="consumer 'consume' already"):
        app.start_streaming(consume)
    app.start_streaming(consume, name='other')
    assert [each.name for each in app.consumers] == ['consume', 'other']


# --- serving


def test_start_serves_in_a_thread_until_stop(make):
    app = make()
    address = app.start(port=0)
    assert get(f'{address}/health') == (200, {'status': 'ok'})
    with pytest.raises(ArgumentError, match='served already'):
        app.start(port=0)
    app.stop()
    assert app.address is None
    with pytest.raises(OSError, match='refused'):
        get(f'{address}/health')
    assert get(f'{app.start(port=0)}/health')[0] == 200


def test_a_port_that_is_taken_is_said(make):
    with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(MinibatchError, match='cannot listen at 127'):
        make().start(port=taken.getsockname()[1])


def test_listening_beyond_loopback_warns_unless_readers_need_the_token(make, caplog):
    make().start(host='0.0.0.0', port=0)
    assert 'can read all streams' in caplog.text
    caplog.clear()
    make(private=True).start(host='0.0.0.0', port=0)
    assert not caplog.text


@contextmanager
def webapp(url, *command):
    example = os.path.join(os.path.dirname(__file__), '..', '..', 'examples')
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MINIBATCH_MONGO_URL', url)
        patch.setenv('MINIBATCH_APP_TOKEN', TOKEN)
        with running(*(part.format(port=port) for part in command), cwd=example, stdout=-1, stderr=-2) as process:
            address = f'http://127.0.0.1:{port}'
            eventually(lambda: answers(address))
            yield process, address


def answers(address):
    try:
        return get(f'{address}/health')[0]
    except OSError:
        return None


@pytest.mark.parametrize('command', [
    ['-m', 'gunicorn', '--bind', '127.0.0.1:{port}', '--threads', '4', 'webapp:app'],
    ['-m', 'waitress', '--listen', '127.0.0.1:{port}', 'webapp:app'],
])
def test_the_example_runs_under_a_production_server(url, command):
    with webapp(url, *command) as (process, address):
        for celsius in (20, 21):
            assert post(f'{address}/streams/readings', {'celsius': celsius})[0] == 201
        assert any(line.strip() == '20.5' for line in process.stdout)
        family = tree(process.pid)
        assert len(family) > 2
        process.terminate()
        process.stdout.read()
        process.wait(20)
        gone(family)


def test_the_example_is_under_15_lines():
    path = os.path.join(os.path.dirname(__file__), '..', '..', 'examples', 'webapp.py')
    with open(path) as file:
        assert sum(1 for line in file if line.strip()) < 15


def test_the_service_alerts_of_the_sensor_that_is_too_hot(url, monkeypatch):
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    path = os.path.join(os.path.dirname(__file__), '..', '..', 'examples', 'service', 'app.py')
    with running(path, '--port', str(free_port()), '--sensors', '3', stdout=-1, stderr=-2) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if 'too hot' in line:
                break
        assert re.fullmatch(r'sensor 3 is too hot: 3\d\.\d °C, the mean of \d+\n', lines[-1]), lines
        assert any(line.startswith('the token of this run is ') for line in lines)
        family = tree(process.pid)
        process.terminate()
        process.stdout.read()
        assert process.wait(20) == 0
        gone(family)


# --- endpoints


def fail(window):
    raise ValueError(f'cannot read {window.data}')


def round_of(url, fn, name='test', size=2, **options):
    emitter = mb.make_emitter(name, fn, url=url, size=size, executor=InlineExecutor, **options)
    while emitter._run_once():
        pass


def test_status_tells_of_streams_groups_and_consumers(make, url):
    mb.stream('test', url=url).append_many({'i': i} for i in range(5))
    round_of(url, lambda window: None)
    app = make(name='hub')
    said = app.server.test_client().get('/status').json
    assert (said['name'], said['error'], said['problems'], said['consumers']) == ('hub', None, [], [])
    [stream] = said['streams']
    [group] = stream['groups']
    assert (stream['name'], stream['appended'], group['messages'], group['lag']['messages']) == ('test', 5, 4, 1)
    assert datetime.fromisoformat(group['committed']).tzinfo


def test_status_is_asked_for_once_a_second_however_many_look(make, monkeypatch):
    app, asked = make(), []
    monkeypatch.setattr(watching.mb, 'status', lambda url: asked.append(url) or [])
    threads = [threading.Thread(target=app.server.test_client().get, args=('/status',)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    eventually(lambda: app.server.test_client().get('/status').json and len(asked) == 2, 5)


def test_history_has_the_counters_of_what_was_seen(make, url, quick):
    stream, client = mb.stream('test', url=url), make().server.test_client()
    for i in range(3):
        stream.append({'i': i})
        client.get('/status')
    samples = client.get('/history').json['samples']
    assert [sample['streams']['test']['appended'] for sample in samples] == [1, 2, 3]


def test_history_is_bounded(make, url, quick, monkeypatch):
    monkeypatch.setattr(watching, 'MAX_POINTS', 6)
    for name in ('a', 'b'):
        mb.stream(name, url=url)
    client = make().server.test_client()
    for _ in range(5):
        client.get('/status')
    assert len(client.get('/history').json['samples']) == 3


def test_a_stalled_group_is_not_healthy_while_it_has_a_consumer(make, url, db, quick):
    client = make().server.test_client()
    mb.stream('test', url=url).append_many({'i': i} for i in range(2))
    emitter = mb.make_emitter('test', time.sleep, url=url, size=2, executor=InlineExecutor)
    emitter._run_once()
    db.group.update_one({}, {'$set': {'stalled': datetime(2026, 1, 31)}})
    assert client.get('/health').status_code == 200  # nobody is there to be stalled
    expires = datetime(2100, 1, 1)
    db.group.update_one({}, {'$set': {'lease': {'expires': expires, 'owner': {'host': 'h', 'pid': 1}, 'epoch': 1}}})
    answer = client.get('/health')
    assert (answer.status_code, answer.json['status']) == (503, 'unhealthy')
    assert answer.json['reasons'] == [
        "stream 'test', group 'default': windows wait, and none was finished since 2026-01-31 00:00:00 UTC"
    ]


def test_without_a_database_the_app_says_so_and_recovers(make, quick):
    with Mongod() as server:
        secret = server.url('test').replace('mongodb://', 'mongodb://me:hidden-word@')
        url = server.url('test') + '&serverSelectionTimeoutMS=300'
        app = make(uri=url, timeout=1)
        client = app.server.test_client()
        assert client.get('/health').status_code == 200
        mb.stream('test', url=url).append({'i': 0})
        server.kill()
        for path in ('/health', '/status', '/metrics', '/dead', '/streams/test/tail'):
            assert client.get(path).status_code == 503, path
        answer = client.post('/streams/test', json={'i': 1}, headers=AUTH)
        assert (answer.status_code, answer.headers['Retry-After']) == (503, '5')
        assert client.get('/').status_code == 200
        hidden = make(uri=secret.replace('test', 'test&serverSelectionTimeoutMS=300', 1)).server.test_client()
        assert 'hidden-word' not in hidden.get('/status').text
        server.start()
        eventually(lambda: client.get('/health').status_code == 200)
        eventually(lambda: client.post('/streams/test', json={'i': 1}, headers=AUTH).status_code == 201)


def test_a_frozen_database_holds_no_request_for_long(make, quick, monkeypatch):
    monkeypatch.setattr(watching, 'ANSWER_TIMEOUT', 0.5)
    with Mongod() as server:
        client = make(uri=server.url('test')).server.test_client()
        assert client.get('/health').status_code == 200
        server.pause()
        began = time.monotonic()
        assert client.get('/health').status_code == 503
        assert time.monotonic() - began < 3


# --- appending


def stored(url, name='test'):
    return [message.data for message in mb.stream(name, url=url).tail(last=100, follow=False)]


@pytest.mark.parametrize(('body', 'headers'), [
    ('{"i": 0}', JSON),
    ('[{"i": 0}, {"i": 1}]', JSON),
    ('\ufeff[{"i": 0}]', {**JSON, 'Content-Type': 'application/json; charset=utf-8'}),
    ('{"i": 0}\n\n{"i": 1}\r\n{"i": 2}', LINES),
    ('{"i": 0}\n', {**LINES, 'Content-Type': 'application/jsonl'}),
    ('[]', JSON),
    ('', LINES),
])
def test_messages_that_are_posted_are_stored_when_that_is_answered(client, url, body, headers):
    answer = client.post('/streams/test', data=body.encode(), headers=headers)
    expected = body.count('i')
    assert (answer.status_code, answer.json) == (201, {'appended': expected})
    assert stored(url) == [{'i': i} for i in range(expected)]


def test_a_name_may_have_slashes_and_anything(client, url):
    for name in ('plant/3//left', 'tail', 'a/tail', 'ümläut & <b>', 'x?y'):
        path = ''.join(f'%{byte:02X}' for byte in name.encode())
        assert client.post(f'/streams/{path}', json={'i': 0}, headers=AUTH).status_code == 201, name
        assert stored(url, name) == [{'i': 0}]


@pytest.mark.parametrize(('body', 'headers', 'status', 'reason'), [
    (b'{"i": 0', JSON, 400, 'the body is no JSON: Expecting'),
    (b'[{"i": 0}, 7]', JSON, 400, 'item 1 must be a JSON object, not 7'),
    (b'"text"', JSON, 400, 'the body must be a JSON object'),
    (b'{"i": 0}\n{"i": 1}\n{"i" 2}', LINES, 400, 'line 3 is no JSON'),
    (b'{"i": 0}\n[]', LINES, 400, 'line 2 must be a JSON object'),
    (b'{"i": NaN}', JSON, 400, 'NaN is no number of JSON'),
    (b'{"i": 0}\n{"i": "\xff"}', LINES, 400, 'not UTF-8: byte 16 is 0xff'),
    (b'[' * 100_000, JSON, 400, 'the body is nested too deeply'),
    (b'[{"i": 0}, {"i": ' + b'{"a":' * 500 + b'1' + b'}' * 501 + b']', JSON, 400, 'items[1]: data is nested'),
    (b'[{"i": 0}, {"i": 123456789012345678901234567890}]', JSON, 400, 'items[1]'),
    (b'{"i": "\\ud800"}', JSON, 400, ''),
    (b'{"a\\u0000b": 1}', JSON, 400, ''),
    (b'{"i": 0}', {**JSON, 'Content-Type': 'text/plain'}, 415, 'application/json'),
    (b'{"i": 0}', AUTH, 415, 'application/json'),
    (b'{"i": 0}', {**JSON, 'Content-Encoding': 'gzip'}, 415, 'must not be encoded'),
    (b'{"i": 0}', {'Content-Type': 'application/json'}, 401, 'Authorization: Bearer'),
    (b'{"i": 0}', {**JSON, 'Authorization': 'Bearer wrong'}, 401, 'the token is wrong'),
    (b'{"i": 0}', {**JSON, 'Authorization': 'Bearer w\xf6rng'}, 401, 'the token is wrong'),
    (b'{"i": 0}', {**JSON, 'Authorization': f'Basic {TOKEN}'}, 401, 'Authorization'),
    (b'{"i": 0}', {**JSON, 'Authorization': ''}, 401, 'Authorization: Bearer'),
])
def test_what_is_not_right_is_refused_and_nothing_is_written(client, url, db, body, headers, status, reason):
    answer = client.post('/streams/test', data=body, headers=headers)
    assert (answer.status_code, reason in answer.json['error']) == (status, True), answer.json
    assert db.buffer.count_documents({}) == 0
    assert status != 401 or answer.headers['WWW-Authenticate'] == 'Bearer'
    assert TOKEN not in answer.text


def test_without_a_token_nothing_can_be_changed(make, monkeypatch):
    client = make(token=None).server.test_client()
    for path in ('/streams/test', '/dead/test/default/1/replay', '/dead/test/default/1/discard', '/dead/replay'):
        answer = client.post(path, json={'i': 0}, headers=AUTH)
        assert (answer.status_code, 'token=' in answer.json['error']) == (403, True), path
    assert client.get('/status').json['read_only'] is True
    monkeypatch.setenv('MINIBATCH_APP_TOKEN', 'from-the-environment')
    client = make(token=None).server.test_client()
    headers = {'Authorization': 'bearer from-the-environment'}
    assert client.post('/streams/test', json={'i': 0}, headers=headers).status_code == 201


def sent(address, body, headers=JSON, **options):
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=20)
    with closing(connection):
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request('POST', '/streams/test', body, headers, **options)
        with connection.getresponse() as answer:
            return answer.status


@pytest.mark.parametrize('served', [False, True])
def test_a_body_that_is_too_large_is_refused(make, url, db, served):
    app = make(max_body=1000)
    body = json.dumps([{'text': 'x' * 2000}]).encode()
    if served:
        address = app.start(port=0)
        assert sent(address, body) == 413
        assert sent(address, body, headers={}) == 413  # by the server, which does not even keep it
        assert sent(address, iter([body[:500], body[500:]]), encode_chunked=True) == 413
        assert sent(address, iter([b'[{"i"', b': 0}]']), encode_chunked=True) == 201
    else:
        assert app.server.test_client().post('/streams/test', data=body, headers=JSON).status_code == 413
    assert db.buffer.count_documents({'data.text': {'$exists': True}}) == 0


def test_a_full_stream_is_answered_with_503(make, url):
    mb.stream('test', url=url, max_backlog=2, on_full='raise').append_many([{'i': 0}] * 2)
    answer = make().server.test_client().post('/streams/test', json={'i': 1}, headers=AUTH)
    assert (answer.status_code, answer.headers['Retry-After']) == (503, '5')
    assert (answer.json['written'], answer.json['queued']) == (0, 0)


def test_the_streams_kept_open_are_bounded(client, monkeypatch):
    monkeypatch.setattr(views, 'MAX_STREAMS', 2)
    for i in (0, 1, 2, 0):
        assert client.post(f'/streams/s{i}', json={'i': 0}, headers=AUTH).status_code == 201


# --- listening


@contextmanager
def listening(address, path):
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=20)
    connection.request('GET', path)
    with closing(connection), connection.getresponse() as response:
        yield response


def events(response):
    for line in response:
        if line.startswith(b'data: '):
            yield json.loads(line[6:])


def test_messages_are_sent_as_they_arrive(make, url):
    stream = mb.stream('test', url=url)
    stream.append_many({'i': i} for i in range(5))
    address = make().start(port=0)
    with listening(address, '/streams/test/tail?last=2') as response:
        assert response.headers['Content-Type'] == 'text/event-stream'
        found = events(response)
        assert [next(found)['data'] for _ in range(2)] == [{'i': 3}, {'i': 4}]
        stream.append({'i': 'line\n\ndata: {}', 'at': datetime(2026, 1, 31, tzinfo=timezone.utc)})
        assert next(found)['data'] == {'i': 'line\n\ndata: {}', 'at': {'$date': '2026-01-31T00:00:00Z'}}


def test_a_tail_says_that_it_is_alive(make, url):
    mb.stream('test', url=url)
    with listening(make().start(port=0), '/streams/test/tail') as response:
        assert [response.readline() for _ in range(4)] == [b'retry: 2000\n', b'\n', b':\n', b'\n']


def test_no_more_listen_than_there_is_room_for_and_one_that_goes_makes_room(make, url):
    mb.stream('test', url=url)
    address = make(listeners=2).start(port=0)
    path = '/streams/test/tail'
    with listening(address, path) as one, listening(address, path) as two:
        assert (one.status, two.status) == (200, 200)
        with listening(address, path) as three:
            assert (three.status, three.headers['Retry-After']) == (503, '5')
        assert get(f'{address}/health')[0] == 200  # the others are answered all the same

    def free():
        with listening(address, path) as response:
            return response.status == 200

    eventually(free)


def test_stop_ends_those_who_listen(make, url):
    mb.stream('test', url=url)
    app = make()
    with listening(app.start(port=0), '/streams/test/tail') as response:
        response.readline()
        began = time.monotonic()
        app.stop()
        assert time.monotonic() - began < 4
        response.read()


@pytest.mark.parametrize(('path', 'status'), [
    ('/streams/none/tail', 404), ('/streams/test/tail?last=-1', 400), ('/streams/test/tail?last=x', 400),
    ('/streams/test/tail?last=99999', 400), ('/dead?stream=none', 404), ('/dead?stream=test&group=none', 400),
    ('/dead?group=default', 400), ('/dead?limit=1000', 400),
])
def test_a_question_that_is_not_right_is_answered_with_what_is_wrong(client, url, path, status):
    mb.stream('test', url=url)
    answer = client.get(path)
    assert (answer.status_code, bool(answer.json['error'])) == (status, True)


# --- dead letters


@pytest.fixture
def letters(url):
    """Three dead letters, of a stream with a slash in its name."""
    mb.stream('plant/3', url=url).append_many({'i': i, 'id': ObjectId()} for i in range(6))
    round_of(url, fail, 'plant/3', max_attempts=1)
    found = mb.stream('plant/3', url=url).dead_letters()
    assert len(found) == 3
    return found


def test_dead_letters_are_listed_with_error_and_data(client, letters):
    for path in ('/dead', '/dead?stream=plant%2F3', '/dead?stream=plant/3&group=default'):
        said = client.get(path).json
        assert said['count'] == 3
        newest = said['dead'][0]
        assert (newest['id'], newest['n'], newest['attempts']) == (letters[-1].id, 2, 1)
        assert newest['error'].startswith('ValueError: cannot read')
        assert [data['i'] for data in newest['data']] == [4, 5]
        assert 'raise ValueError' in newest['traceback']
    assert len(client.get('/dead?limit=1').json['dead']) == 1


def test_a_large_dead_letter_is_not_loaded(client, letters, monkeypatch):
    monkeypatch.setattr(views, 'MAX_LOADED', 1)
    newest = client.get('/dead').json['dead'][0]
    assert (newest['data'], 'minibatch dead show' in newest['not_shown']) == ([], True)


def test_a_dead_letter_is_replayed_and_discarded(client, letters, url):
    assert client.post(f'/dead/{letters[0].id}/replay', headers=AUTH).json == {'replay': 1}
    assert client.post(f'/dead/{letters[1].id}/discard', headers=AUTH).json == {'discard': 1}
    left = mb.stream('plant/3', url=url).dead_letters()
    assert [(letter.id, letter.waiting) for letter in left] == [(letters[0].id, True), (letters[2].id, False)]
    assert client.post(f'/dead/{letters[0].id}/discard', headers=AUTH).status_code == 400  # it waits
    assert client.post(f'/dead/{letters[1].id}/replay', headers=AUTH).status_code == 404
    for id_ in ('x', 'x/y', 'x/y/z', 'plant/3/default/1'):
        assert client.post(f'/dead/{id_}/replay', headers=AUTH).status_code in (400, 404), id_
    assert client.post(f'/dead/{letters[2].id}/discard').status_code == 401


def test_all_dead_letters_of_a_group_are_replayed_and_discarded(client, letters, url):
    where = '?stream=plant/3&group=default'
    assert client.post(f'/dead/replay{where}').status_code == 401
    assert client.post('/dead/replay?stream=plant/3', headers=AUTH).status_code == 400
    assert client.post(f'/dead/{letters[0].id}/replay', headers=AUTH).json == {'replay': 1}
    assert client.post(f'/dead/discard{where}', headers=AUTH).json == {'discard': 2}
    assert client.post(f'/dead/replay{where}', headers=AUTH).json == {'replay': 0}


# --- who may ask


@pytest.mark.parametrize(('host', 'status'), [
    ('localhost', 200), ('localhost:5000', 200), ('127.0.0.1:5000', 200), ('[::1]:5000', 200), ('192.168.1.7', 200),
    ('my.localhost', 200), (socket.gethostname(), 200), ('hub.example.org:5000', 200), ('HUB.example.org.', 200),
    ('evil.example.com', 421), ('localhost.evil.example.com', 421), ('127.0.0.1.evil.example.com', 421), ('', 421),
    ('evil.example.com:80@localhost', 421),
])
def test_only_names_that_are_known_are_answered(make, host, status):
    app = make(hosts=['hub.example.org'])

    @app.route('/mine')
    def mine():
        return 'mine'

    for path in ('/', '/health', '/mine'):
        answer = app.server.test_client().get(path, headers={'Host': host})
        assert answer.status_code == status, path


def test_any_name_is_answered_if_that_is_asked_for(make):
    client = make(hosts=['*']).server.test_client()
    assert client.get('/health', headers={'Host': 'evil.example.com'}).status_code == 200


def test_a_private_app_shows_nothing_without_the_token(make, url, quick):
    mb.stream('secret-name', url=url)
    client = make(private=True).server.test_client()
    for path in ('/status', '/history', '/metrics', '/dead', '/streams/secret-name/tail'):
        assert client.get(path).status_code == 401, path
        answer = client.get(path, headers=AUTH)
        assert answer.status_code == 200, path
        answer.close()
    assert client.get('/health').json == {'status': 'ok'}
    assert 'secret-name' not in client.get('/').text


def test_answers_tell_browsers_to_be_careful(client):
    for path in ('/', '/status', '/streams/none/tail'):
        headers = client.get(path).headers
        assert headers['X-Content-Type-Options'] == 'nosniff'
        assert "frame-ancestors 'none'" in headers['Content-Security-Policy']
        assert 'unsafe' not in headers['Content-Security-Policy']
        assert not [name for name, _ in headers if name.startswith('Access-Control') or name == 'Set-Cookie']


@pytest.mark.parametrize(('options', 'reason'), [
    ({'token': 'short'}, 'token must be'), ({'token': 'with blanks in it'}, 'token must be'),
    ({'token': 12345678}, 'token'),
    ({'token': None, 'private': True}, 'private=True needs a token'), ({'hosts': 'hub'}, 'hosts must be a list'),
    ({'on': object(), 'uri': None}, 'omega'), ({'on': object()}, 'uri and on'), ({'uri': 'http://x'}, 'url must start'),
    ({'server': object()}, 'server must be a Flask app'), ({'max_body': 0}, 'max_body'),
    ({'listeners': True}, 'listeners'),
    ({'timeout': 'x'}, 'timeout'),
])
def test_an_argument_that_is_wrong_is_named(make, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        make(**options)


# --- as a part of something else


def test_the_endpoints_can_be_a_part_of_another_flask_app(make, url):
    server = Flask('mine')

    @server.route('/')
    def index():
        return 'mine'

    app = make(server=server, url_prefix='/minibatch')
    client = server.test_client()
    assert client.get('/').text == 'mine'
    assert client.get('/', headers={'Host': 'other.example.com'}).status_code == 200  # theirs to decide
    assert '<title>minibatch' in client.get('/minibatch/').text
    assert client.get('/minibatch/health').status_code == 200
    assert client.post('/minibatch/streams/test', json={'i': 0}, headers=AUTH).status_code == 201
    assert app.server is server


def test_a_route_is_added_unless_it_is_taken(make):
    app = make()

    @app.route('/hello/<name>', methods=['GET', 'POST'])
    def hello(name):
        return f'hello {name}'

    assert app.server.test_client().post('/hello/you').text == 'hello you'
    with pytest.raises(ArgumentError, match='/ is the endpoint'):
        app.route('/')


def test_an_omegaml_instance_says_where_mongodb_is(make, url):
    om = types.SimpleNamespace(datasets=types.SimpleNamespace(mongo_url=url))
    assert make(uri=None, on=om).url == url
    assert OmegaApp is StreamingApp


def test_an_app_means_what_connectdb_connected_to(make, url, monkeypatch):
    from minibatch import connection

    monkeypatch.setattr(connection, '_default', None)
    mb.connectdb(url, dbname='other', appname='mine', tz_aware=True)
    try:
        name = url.rsplit('/', 1)[1].split('?')[0]
        assert make(uri=None).url == url.replace(name, 'other') + '&appname=mine&tz_aware=true'
    finally:
        connection.choose(None)


def test_metrics_without_prometheus_client_say_what_to_install(client, monkeypatch):
    monkeypatch.setitem(sys.modules, 'minibatch.contrib.prometheus', None)
    monkeypatch.delattr('minibatch.contrib.prometheus', raising=False)
    monkeypatch.setitem(sys.modules, 'prometheus_client', None)
    monkeypatch.delitem(sys.modules, 'minibatch.contrib.prometheus')
    answer = client.get('/metrics')
    assert (answer.status_code, 'pip install minibatch[prometheus]' in answer.json['error']) == (501, True)
