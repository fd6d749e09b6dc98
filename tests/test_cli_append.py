"""`minibatch append` and `minibatch tail`, as a user runs them."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import uuid
from datetime import datetime

import psutil
import pytest
from bson.datetime_ms import DatetimeMS
from click.testing import CliRunner
from servers import Mongod, Proxy, eventually

import minibatch as mb
from minibatch.cli import main, reading


def stored(url, name='s'):
    return [message.data for message in mb.stream(name, url=url).tail(last=10_000, follow=False)]


def program(*words, **options):
    return subprocess.Popen([sys.executable, '-m', 'minibatch', *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)  # fmt: skip


def ndjson(*values):
    return ''.join(f'{json.dumps(value)}\n' for value in values).encode()


@pytest.mark.parametrize('given', [
    b'{"a": 1}\n{"a": 2}\n', b'\n{"a": 1}\r\n\r\n  {"a": 2}', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}',
    b'[{"a": 1}, {"a": 2}]', b'\n[\n  {"a": 1},\n  {"a": 2}\n]\n', b'\xef\xbb\xbf [{"a": 1}, {"a": 2}]',
])  # fmt: skip
def test_lines_and_arrays_are_appended_in_order(run, url, given):
    code, out, err = run('append s', given)
    assert (code, err) == (0, '')
    assert out.startswith('appended 2 messages to s in ')
    assert stored(url) == [{'a': 1}, {'a': 2}]


def test_one_object_may_be_on_many_lines(run, url):
    assert json.loads(run('append s --json', b'{\n  "a": {\n  "b": 1}\n}\n')[1]) == {'stream': 's', 'appended': 1}
    assert stored(url) == [{'a': {'b': 1}}]


def test_a_line_to_go_on_from_that_is_not_there_is_an_error(run):
    code, _, err = run('append s --from 5', b'{"a": 1}\n')
    assert (code, err) == (1, 'error: there is no line 5, so nothing was appended\n')


@pytest.mark.parametrize('given', [b'', b'\n \n', b'[]'])
def test_nothing_is_appended_from_nothing(run, db, given):
    code, out, _ = run('append s', given)
    assert (code, out[:28]) == (0, 'appended 0 messages to s in ')
    assert db.list_collection_names() == []


@pytest.mark.parametrize(('line', 'reason'), [
    (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
    (b'quatsch', 'not JSON: Expecting value at column 1'),
    (b'{"a": "\xff"}', 'not UTF-8: byte 0xff at column 8'),
    (b'[1]', 'a message must be a JSON object, not an array'),
    (b'"x"', 'a message must be a JSON object, not a string'),
    (b'null', 'a message must be a JSON object, not null'),
    (b'{"$date": "2026-01-31T12:00:00Z"}', 'a message must be a JSON object, not a value of Extended JSON'),
    (b'{"a": {"$date": "quatsch"}}', "not Extended JSON: time data 'quatsch' does not match"),
    (b'{"a": {"$oid": "quatsch"}}', "not Extended JSON: 'quatsch' is not a valid ObjectId"),
    (b'{"a": nan}', 'not JSON: Expecting value at column 7'),
    (b'{"a": ' + b'[' * 100_000, 'nested too deeply'),
    (b'{"a": 99999999999999999999}', "MongoDB cannot store data['a']: MongoDB can only handle up to 8-byte ints"),
    (b'{"a": {"b\\u0000": 1}}', "MongoDB cannot store data['a']: its key 'b\\x00' contains a NUL"),
])  # fmt: skip
def test_a_bad_line_is_named_and_all_before_it_is_appended(run, url, line, reason):
    given = ndjson(*({'n': n} for n in range(25))) + b'\n' + line + b'\n' + ndjson({'n': 25})
    code, out, err = run('append s --batch 10', given)
    assert (code, out) == (1, '')
    assert err.startswith(f'error: standard input: line 27: {reason}')
    assert err.endswith(
        '; 25 messages appended. Correct it and go on with --from 27, or leave it out with --from 28\n'
    )  # fmt: skip
    assert err.count('\n') == 1
    code, out, _ = run('append s --from 28', given)
    assert (code, out[:14]) == (0, 'appended 1 mes')
    assert stored(url) == [{'n': n} for n in range(26)]


@pytest.mark.parametrize('unit', ['C', '$'])
def test_nan_and_infinity_are_appended_as_what_they_are_and_come_back_from_tail(run, url, unit):
    given = b'{"t": NaN, "high": Infinity, "low": -Infinity, "unit": "%b"}\n' % unit.encode()
    assert run('append s', given)[0] == 0
    code, out, err = run('tail s --no-follow')
    assert code == 0, err
    assert json.loads(out)['t'] == {'$numberDouble': 'NaN'}
    assert run('append s', out.encode())[0] == 0
    for message in stored(url):
        assert math.isnan(message['t'])
        assert (message['high'], message['low'], message['unit']) == (math.inf, -math.inf, unit)


def test_for_scripts_it_is_said_as_json_where_to_go_on(run, tmp_path):
    path = tmp_path / 'data.ndjson'
    path.write_bytes(ndjson({'a': 1}, {'a': 2}) + b'{')
    code, out, _ = run(f'append s {path} --json')
    assert code == 1
    assert json.loads(out) == {
        'stream': 's', 'appended': 2, 'go_on_from': 3, 'unconfirmed': 0,
        'error': f'{path}: line 3: not JSON: Expecting property name enclosed in double quotes at column 2',
    }  # fmt: skip


@pytest.mark.parametrize('given', [b'', b'{"a": 1}\n'])
def test_a_stream_without_a_name_is_refused_before_anything_is_read(url, db, given):
    done = CliRunner().invoke(main, ['append', '', '--url', url], input=given)
    assert (done.exit_code, done.stdout) == (1, '')
    assert done.stderr == "error: the name of a stream must be a string that is not empty, not ''\n"
    assert db.list_collection_names() == []


@pytest.mark.parametrize('given', [b'[{"a": 1}, 5]', b'[{"a": 1}, {"b": 2}', b'{\n"a": 1,\n}'])
def test_of_an_array_that_is_wrong_nothing_is_appended(run, db, given):
    code, _, err = run('append s', given)
    assert code == 1
    assert err.endswith('; 0 messages appended. Correct it\n')
    assert db.list_collection_names() == []


def test_an_item_of_an_array_that_cannot_be_stored_is_named(run, url):
    _, _, err = run('append s', b'[{"a": 1}, {"a": 99999999999999999999}, {"a": 3}]')
    assert err.startswith("error: standard input: item 2: MongoDB cannot store data['a']")
    assert 'leave it out with --from 3' in err
    run('append s --from 3', b'[{"a": 1}, {"a": 99999999999999999999}, {"a": 3}]')
    assert stored(url) == [{'a': 1}, {'a': 3}]


def test_what_a_stream_refuses_for_want_of_room_is_said(run, url):
    mb.stream('s', url=url, max_backlog=20, on_full='raise')
    code, _, err = run('append s --batch 8', ndjson(*({'n': n} for n in range(50))))
    count = len(stored(url))
    assert code == 1
    assert 0 < count <= 20
    assert f'; {count} messages appended. Go on with --from {count + 1}\n' in err


def test_what_is_not_confirmed_is_said_and_no_other_message_is_lost_or_doubled(mongod, url):
    values = [{'n': n} for n in range(50)]
    with Proxy(mongod.port) as proxy:
        where = proxy.url(url.rpartition('/')[2].partition('?')[0]) + '&serverSelectionTimeoutMS=1000'
        with program('append', 's', '--url', where, '--timeout', '3', '--json') as process:
            process.stdin.write(ndjson(*values[:20]))
            process.stdin.flush()
            eventually(lambda: len(stored(url)) == 20)
            proxy.refuse()
            proxy.cut()
            process.stdin.write(ndjson(*values[20:]))
            process.stdin.close()
            said = json.loads(process.stdout.readline())
            proxy.allow()  # it tries again at its end, for three seconds
            assert process.wait(90) == 1
            line = process.stderr.read().decode().splitlines()[-1]
    appended = said['appended']
    unclear = {0: 20, 20: 30}[appended]  # the first were stored, but the cut may have come before that was heard
    assert (said['go_on_from'], said['unconfirmed']) == (appended + 1, unclear)
    first, behind = appended + 1, appended + unclear + 1
    assert line.endswith(f'lines {first} to {behind - 1} may be stored or not. Go on with --from {first} or {behind}')
    assert stored(url) in (values[: behind - 1], values[:20])


def test_an_append_ends_in_its_time_when_mongodb_dies():
    with Mongod() as server, program('append', 's', '--url', server.url('test'), '--timeout', '0.5') as process:
        process.stdin.write(ndjson({'n': 1}))
        process.stdin.flush()
        eventually(lambda: len(stored(server.url('test'))) == 1)
        server.kill()
        process.stdin.write(ndjson({'n': 2}))
        process.stdin.close()
        assert process.wait(25) == 1  # the driver alone would wait for 30 s, and the end of the process for 60
        assert b'Go on with --from 2 or 3' in process.stderr.read()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_messages_are_appended_as_they_arrive_and_a_signal_makes_it_say_how_far_it_is(url, number):
    with program('append', 's', '--url', url) as process:
        process.stdin.write(ndjson({'a': 1}, {'a': 2}) + b'{"a": 3')
        process.stdin.flush()
        eventually(lambda: stored(url) == [{'a': 1}, {'a': 2}])
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == b'interrupted: standard input: after line 2; 2 messages appended. Go on with --from 3\n'


def test_memory_stays_flat_over_a_large_file(url, tmp_path):
    path = tmp_path / 'large.ndjson'
    line = ndjson({'text': 'x' * 1000})
    path.write_bytes(line * 40_000)
    with program('append', 's', str(path), '--url', url) as process:
        most = 0
        while process.poll() is None:
            most = max(most, psutil.Process(process.pid).memory_info().rss) if process.poll() is None else most
        out = process.stdout.read()
    assert out.startswith(b'appended 40,000 messages to s in ')
    assert most < 100 << 20


def test_lines_are_cut_right_however_they_arrive():
    text = ndjson(*({'n': n} for n in range(100)))

    class Slowly(io.BytesIO):
        def read1(self, size=-1):
            return super().read(7)

    found = list(reading.Input(Slowly(text)).batches())
    assert [message['n'] for messages, _ in found for message in messages] == list(range(100))
    assert [number for _, numbers in found for number in numbers] == list(range(1, 101))


def test_what_tail_prints_can_be_appended_again(run, url):
    data = {'at': datetime(2026, 1, 31), 'v': 1.5, 'text': 'a\x1b[31m\u202eb', 'big': 2**40, 'none': None,
            'id': uuid.UUID(int=5), 'far': DatetimeMS(2**60)}  # fmt: skip
    mb.stream('one', url=url).append(data)
    _, out, _ = run('tail one --no-follow')
    assert out.replace('\n', '').isprintable()
    assert run('append two', out.encode())[0] == 0
    assert stored(url, 'two') == [data]


def test_tail_prints_the_last_messages_and_with_json_their_place(run, url):
    with mb.stream('s', url=url) as stream:
        stream.append_many({'n': n} for n in range(20))
        stream.append({'n': 20}, meta={'from': 'me'})
    assert run('tail s --no-follow')[1] == ''.join(f'{{"n": {n}}}\n' for n in range(11, 21))
    assert run('tail s --last 0 --no-follow')[1] == ''
    (message,) = stream.tail(last=1, follow=False)
    assert json.loads(run('tail s --last 1 --no-follow --json')[1]) == {
        'created': message.created.isoformat(), 'producer': message.producer, 'offset': 20, 'data': {'n': 20},
        'meta': {'from': 'me'},
    }  # fmt: skip
    code, out, err = run('tail nosuch')
    assert (code, out) == (1, '')
    assert "has no stream 'nosuch'; there are: 's'" in err


def test_tail_follows_until_ctrl_c(url):
    stream = mb.stream('s', url=url)
    stream.append({'n': 1})
    with program('tail', 's', '--url', url) as process:
        assert process.stdout.readline() == b'{"n": 1}\n'
        stream.append({'n': 2})
        assert process.stdout.readline() == b'{"n": 2}\n'
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b'', b'')


@pytest.mark.skipif(os.name != 'posix', reason='pipes are looked at by poll')
def test_tail_ends_when_nobody_reads_it_although_no_message_comes(url):
    mb.stream('s', url=url).append({'n': 1})
    with program('tail', 's', '--url', url) as process:
        assert process.stdout.readline() == b'{"n": 1}\n'
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b''
