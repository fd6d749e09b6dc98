"""Web apps around streams: endpoints, and who may do what."""

import http.client
import json
import math
import posixpath
import re
import socket
import sys
import threading
import time
import types
import uuid
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from urllib.parse import quote, urlencode

import pytest
from bson import ObjectId
from flask import Flask, abort
from servers import Mongod, eventually
from webs import AUTH, CHANGED, KEPT, TOKEN, get
from werkzeug.serving import make_server
from werkzeug.test import Client

import minibatch as mb
from minibatch import attached, producer
from minibatch.contrib.apps import StreamingApp, bodies, views, watching
from minibatch.contrib.apps.omegaml import StreamingApp as OmegaApp
from minibatch.errors import ArgumentError
from minibatch.testing import InlineExecutor

JSON = {'Content-Type': 'application/json', **AUTH}
LINES = {'Content-Type': 'application/x-ndjson', **AUTH}


@pytest.fixture
def client(make):
    """A client of an app in this process."""
    return make().server.test_client()


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
    eventually(lambda: app.server.test_client().get('/status').json and len(asked) == 2)


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


def test_a_group_whose_source_fails_is_not_healthy_until_it_has_run_well(make, url, quick, monkeypatch):
    monkeypatch.setattr(attached, 'PAUSES', (0.01, 0.01))
    monkeypatch.setattr(attached, 'WELL', 0.1)
    works, ended = threading.Event(), threading.Event()

    class Source:
        def stream(self, stream):
            if not works.is_set():
                raise ConnectionError('mongodb://ann:secret@h/ is\ud800 away')
            ended.wait(60)

        def cancel(self):
            ended.set()

    client = make().server.test_client()
    mb.stream('test', url=url)
    emitter = mb.make_emitter('test', time.sleep, url=url, size=2, source=Source(), executor=InlineExecutor)
    thread = threading.Thread(target=emitter.run)
    thread.start()
    try:
        eventually(lambda: client.get('/health').status_code == 503)
        assert client.get('/health').json['reasons'] == [
            "stream 'test', group 'default': its source has failed, and is started again: "
            'ConnectionError: mongodb://ann:***@h/ is\\ud800 away'
        ]
        works.set()
        eventually(lambda: client.get('/health').status_code == 200)
    finally:
        emitter.stop()
        thread.join(60)


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


@pytest.mark.parametrize('how', ['kill', 'pause'])
def test_the_timeout_of_an_app_holds_down_to_the_last_wait_of_the_driver(make, how):
    with Mongod() as server:
        app = make(uri=server.url('test'), timeout=0.5)
        mb.stream('known', url=app.url).append({'i': 0})
        with served_by('waitress', app) as host:
            assert request(host, 'POST', '/append?stream=test') == (201, {'appended': 1})
            getattr(server, how)()
            for method, path in [
                ('POST', '/append?stream=test'), ('POST', '/append?stream=known'), ('GET', '/dead'),
                ('GET', '/dead?stream=known'), ('GET', '/tail?stream=known'), ('POST', '/dead/replay?id=known/x/1'),
            ]:
                status, said = request(host, method, path)  # which waits for 20 s, the driver for 30 and more
                assert (status, bool(said['error'])) == (503, True), path


def test_a_frozen_database_holds_no_request_for_long(make, quick, monkeypatch):
    monkeypatch.setattr(watching, 'ANSWER_TIMEOUT', 0.5)
    with Mongod() as server:
        client = make(uri=server.url('test')).server.test_client()
        assert client.get('/health').status_code == 200
        server.pause()
        eventually(lambda: client.get('/health').status_code == 503)  # it may answer for another moment
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


def test_what_a_tail_shows_can_be_posted_again(client, url):
    data = {'at': datetime(2026, 1, 31), 'nan': math.nan, 'id': ObjectId(), 'bytes': b'x'}
    shown = bodies.as_json(data)
    assert client.post('/streams/test', data=shown, headers=JSON).status_code == 201
    [kept] = stored(url)
    assert (bodies.as_json(kept), type(kept['at'])) == (shown, datetime)
    answer = client.post('/streams/test', data='{"at": {"$date": "soon"}}', headers=JSON)
    assert answer.status_code == 400
    assert 'not Extended JSON' in answer.json['error']


@pytest.mark.parametrize(('body', 'headers'), [(b'[{"i": NaN, "unit": "$"}]', JSON), (b'{"i": NaN}', LINES)])
def test_nan_is_taken_as_everywhere_and_shown_as_json_can(client, url, body, headers):
    assert client.post('/streams/test', data=body, headers=headers).status_code == 201
    assert math.isnan(stored(url)[0]['i'])
    assert bodies.as_json(stored(url)[0]).startswith('{"i":{"$numberDouble":"NaN"}')


@pytest.mark.parametrize(('body', 'headers', 'status', 'reason'), [
    (b'{"i": 0', JSON, 400, "the body is no JSON: Expecting ',' delimiter at column 8"),
    (b'{"i":\n 0', JSON, 400, "the body is no JSON: Expecting ',' delimiter at line 2 column 3"),
    (b'[{"i": 0}, 7]', JSON, 400, 'item 2 must be a JSON object, not 7'),
    (b'"text"', JSON, 400, 'the body must be a JSON object'),
    (b'{"i": 0}\n{"i": 1}\n{"i" 2}', LINES, 400, "line 3 is no JSON: Expecting ':' delimiter at column 6"),
    (b'{"i": 0}\n[]', LINES, 400, 'line 2 must be a JSON object'),
    (b'{"i": 0}\n{"i": "\xff"}', LINES, 400, 'not UTF-8: byte 0xff at line 2 column 8'),
    (b'[' * 100_000, JSON, 400, 'the body is nested too deeply'),
    (b'[{"i": 0}, {"i": ' + b'{"a":' * 500 + b'1' + b'}' * 501 + b']', JSON, 400, 'item 2: data is nested'),
    (b'[{"i": 0}, {"i": 123456789012345678901234567890}]', JSON, 400, 'item 2: '),
    (b'\n{"i": 0}\n\n{"i": 123456789012345678901234567890}', LINES, 400, 'line 4: '),
    (b'{"i": 123456789012345678901234567890}', JSON, 400, 'the body: '),
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


def test_what_was_stored_before_an_item_that_is_refused_is_said(client, url, monkeypatch):
    monkeypatch.setattr(producer, 'CHECKED_BYTES', 10)
    answer = client.post('/streams/test', data=b'[{"i": 0}, {"i": 123456789012345678901234567890}]', headers=JSON)
    assert (answer.status_code, answer.json['written']) == (400, 1)
    assert re.fullmatch('item 2: .*; the first 1 messages are stored', answer.json['error'])
    assert stored(url) == [{'i': 0}]


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


# --- names


@contextmanager
def served_by(server, app):
    """An app behind a real server; its host and port."""
    if server == 'waitress':
        yield app.start(port=0).removeprefix('http://')
        return
    flask_dev_server = make_server('127.0.0.1', 0, app, threaded=True)
    thread = threading.Thread(target=flask_dev_server.serve_forever)
    thread.start()
    try:
        yield f'127.0.0.1:{flask_dev_server.server_port}'
    finally:
        flask_dev_server.shutdown()
        thread.join()
        flask_dev_server.server_close()


def request(host, method, path):
    """What is answered, and nothing followed: status, and JSON or the first event."""
    with closing(http.client.HTTPConnection(host, timeout=20)) as connection:
        connection.request(method, path, '{"i": 0}' if method == 'POST' else None, JSON)
        with connection.getresponse() as answer:
            if answer.getheader('Content-Type') == 'text/event-stream':
                return answer.status, next(events(answer))
            return answer.status, json.load(answer)


@pytest.mark.parametrize('server', ['waitress', 'flask'])
def test_each_name_in_a_query_is_that_name_and_in_a_path_it_is_that_or_refused(make, url, server):
    with served_by(server, make(listeners=100)) as host:
        for name in [*CHANGED, *KEPT]:
            assert request(host, 'POST', f'/append?{urlencode({"stream": name})}') == (201, {'appended': 1})
            assert request(host, 'GET', f'/tail?{urlencode({"stream": name})}')[1]['data'] == {'i': 0}
            path = '/streams/' + quote(name, safe='')
            status, said = request(host, 'POST', path)
            assert status == (400 if name in CHANGED else 201), (name, said)
            assert request(host, 'GET', f'{path}/tail')[0] == (400 if name in CHANGED else 200), name
            if name in CHANGED:
                assert f'use /append?{urlencode({"stream": name})}' in said['error']
    appended = {stream.name: stream.appended for stream in mb.status(url)}
    assert appended == {**dict.fromkeys(CHANGED, 1), **dict.fromkeys(KEPT, 2)}


def test_a_dead_letter_is_discarded_by_its_own_name_alone(make, url):
    names = ['odom', '/odom', 'x/../odom', 'x//odom', '../odom', 'odom\n', 'x?y', '%2Fodom']
    for name in names:
        mb.stream(name, url=url).append({'i': 0})
        round_of(url, fail, name, size=1, max_attempts=1)
    letters = {letter.stream: letter.id for name in names for letter in mb.stream(name, url=url).dead_letters()}
    with served_by('waitress', make()) as host:
        for name in set(names) & set(CHANGED):
            path = f'/dead/{quote(letters[name], safe="")}/discard'
            status, said = request(host, 'POST', path)
            assert (status, '/dead/discard?id=' in said['error']) == (400, True), name
        for name in names[::-1]:
            assert request(host, 'POST', f'/dead/discard?{urlencode({"id": letters.pop(name)})}')[0] == 200, name
            left = [letter.stream for each in names for letter in mb.stream(each, url=url).dead_letters()]
            assert sorted(left) == sorted(letters)


def test_a_query_is_right_behind_a_proxy_that_tidies_paths_up(make, url):
    app = make()

    def proxy(environ, start_response):
        path = environ['PATH_INFO']
        return app({**environ, 'PATH_INFO': posixpath.normpath(path)}, start_response)

    client = Client(proxy)
    for name in CHANGED:
        answer = client.post(f'/append?{urlencode({"stream": name})}', json={'i': 0}, headers=AUTH)
        assert answer.status_code == 201
    assert {stream.name for stream in mb.status(url)} == set(CHANGED)


@pytest.mark.parametrize(('path', 'reason'), [
    ('/streams/odom?left', "there is no parameter 'left'; a ? in a name is %3F"),
    ('/append?stream=odom&left', "there is no parameter 'left'; it takes stream"),
    ('/append?stream=odom&stream=camera', 'stream is given twice'), ('/append', '?stream= must name the stream'),
    ('/append?stream=', 'the name of a stream must be'), ('/append?stream=a%00b', 'the name of a stream must'),
    ('/append?stream=caf%E9', 'the query is not UTF-8'), ('/streams/caf%E9', 'the path is not UTF-8'),
    ('/append?' + '&' * 30, 'more than 20 parameters'), ('/streams/', 'may change'), ('/streams//odom', 'may change'),
    ('/dead/replay?id=odom/default/1&stream=odom', 'either ?id='), ('/dead//replay', 'may change'),
    ('/dead/odom/default/1/replay?x', 'there is no parameter'), ('/append?stream=' + 'x' * 201, 'at most 200'),
])
def test_a_name_that_may_not_be_what_was_meant_is_refused(client, url, path, reason):
    mb.stream('odom', url=url)
    answer = client.post(path, json={'i': 0}, headers=AUTH)
    assert (answer.status_code, reason in answer.json['error']) == (400, True), answer.json
    assert [(stream.name, stream.appended) for stream in mb.status(url)] == [('odom', 0)]


def test_a_name_of_a_producer_makes_no_event_of_its_own(make, url):
    stream = mb.stream('test', url=url)
    producer = stream.producer('x\n\ndata: {"forged": true}\r\rdata: {"forged": true}\n\n%')
    producer.append({'i': 0}, token=1)
    with listening(make().start(port=0), '/streams/test/tail') as response:
        lines = [response.readline() for _ in range(5)]
    assert lines[2] == b'id: source:x%0A%0Adata: {"forged": true}%0D%0Ddata: {"forged": true}%0A%0A%25/0\n'
    assert json.loads(lines[3].removeprefix(b'data: '))['data'] == {'i': 0}
    assert lines[4] == b'\n'


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


def test_a_path_that_is_none_is_answered_in_json(client):
    answer = client.get('/nothing/here')
    assert (answer.status_code, answer.json['error'][:36]) == (404, "there is nothing at '/nothing/here';")
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    answer = client.get('/streams/test')
    assert (answer.status_code, answer.json['error']) == (405, "'/streams/test' takes OPTIONS, POST, not GET")
    assert answer.headers['Allow'] == 'OPTIONS, POST'
    assert client.get('/nothing', headers={'Host': 'evil.example.com'}).status_code == 421


def test_what_a_page_of_the_user_refuses_and_a_server_of_theirs_are_left_to_flask(make):
    app, theirs = make(), Flask('theirs')
    make(server=theirs)

    @app.route('/mine')
    def mine():
        abort(404, 'not mine')

    for answer in (app.server.test_client().get('/mine'), theirs.test_client().get('/nothing')):
        assert (answer.status_code, answer.mimetype) == (404, 'text/html')


# --- dead letters


@pytest.fixture
def letters(url):
    """Three dead letters, of a stream with a slash in its name."""
    mb.stream('plant/3', url=url).append_many({'i': i, 'id': ObjectId(), 'uuid': uuid.uuid4()} for i in range(6))
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
    for id_ in ('x', 'xx', 'x/y', 'x/y/z', 'plant/3/none/1', 'plant/3/default/x'):
        answer = client.post(f'/dead/{id_}/replay', headers=AUTH)
        assert answer.status_code == 404, id_
        assert answer.json['error'].startswith(f'there is no dead letter {id_!r};')
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


@pytest.mark.parametrize('server', ['waitress', 'flask'])
def test_a_probe_of_http_1_0_that_names_no_host_is_answered(make, server):
    with served_by(server, make()) as host, socket.create_connection(host.split(':'), timeout=20) as connection:
        connection.sendall(b'GET /health HTTP/1.0\r\n\r\n')
        answer = b''.join(iter(lambda: connection.recv(4096), b''))
    assert re.match(rb'HTTP/1\.\d 200 OK\r\n', answer)
    assert answer.endswith(b'{"status":"ok"}\n')


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
    ({'hosts': [5]}, 'hosts must be a list'), ({'hosts': None}, 'hosts must be a list'),
    ({'hosts': ['']}, 'hosts must be a list'),
    ({'name': 5}, 'name must be'), ({'name': ''}, 'name must be'), ({'url_prefix': 'streams'}, 'url_prefix must be'),
    ({'url_prefix': 5}, 'url_prefix must be'), ({'url': 'mongodb://x/y'}, 'url and uri both'),
    ({'uri': None, 'url': 'mongodb://x/y', 'on': object()}, 'url and on both'),
    ({'on': object(), 'uri': None}, 'omega'), ({'on': object()}, 'uri and on'), ({'uri': 'http://x'}, 'url must start'),
    ({'server': object()}, 'server must be a Flask app'), ({'max_body': 0}, 'max_body'),
    ({'listeners': True}, 'listeners'),
    ({'timeout': 'x'}, 'timeout'),
])
def test_an_argument_that_is_wrong_is_named(make, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        make(**options)


def test_the_url_may_be_given_as_url(make, url):
    assert make(uri=None, url=url).url == make(uri=url).url == url
    with pytest.raises(ArgumentError, match='url must start'):
        make(uri=None, url='http://x')


@pytest.mark.parametrize('timeout', ['x', -1, None, True, float('nan'), float('inf')])
def test_stop_refuses_a_timeout_that_is_none(make, timeout):
    app = make()
    with pytest.raises(ArgumentError, match='timeout must be'):
        app.stop(timeout)
    assert not app.ending


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


def test_the_app_is_a_blueprint_of_flask(make, url):
    server, app = Flask('mine'), make()
    server.register_blueprint(app, url_prefix='/one')
    server.register_blueprint(make(name='two v1.1'), url_prefix='/two')
    with pytest.raises(ArgumentError, match="has a blueprint 'minibatch' already; give this one another name="):
        make(server=server, url_prefix='/three')
    client = server.test_client()
    assert [client.get(f'/{path}/status').json['name'] for path in ('one', 'two')] == ['minibatch', 'two v1.1']
    assert client.post('/two/streams/test', json={'i': 0}, headers=AUTH).status_code == 201
    assert app.server is server
    with pytest.raises(ArgumentError, match="'minibatch' is in a Flask app already"):
        Flask('other').register_blueprint(app)


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
    assert (answer.status_code, "pip install '.[prometheus]'" in answer.json['error']) == (501, True)
