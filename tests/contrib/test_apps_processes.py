"""Web apps around streams: consumers in processes of their own, and the servers and programs that run an app."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
from processes import gone, is_alive, running
from servers import eventually, free_port
from webs import TOKEN, children, get, post, program, tree

import minibatch as mb
from minibatch.contrib.apps import StreamingApp, supervisor
from minibatch.errors import ArgumentError, MinibatchError
from minibatch.testing import ListSink


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


def test_while_a_consumer_ends_nobody_is_told_that_its_exit_code_is_none(make, monkeypatch):
    last_words, said, asked = supervisor.ConsumerProcess._last_words, [], threading.Event()

    def slowly(self):
        asking = threading.Thread(target=lambda: (said.append((self.problem, self.as_dict())), asked.set()))
        asking.start()
        time.sleep(0.3)
        return last_words(self)

    monkeypatch.setattr(supervisor.ConsumerProcess, '_last_words', slowly)
    app = make()
    app.start_streaming(broken)
    assert asked.wait(20)
    problem, status = said[0]
    assert problem == ''
    assert (status['state'], status['healthy'], status['exit_code']) == ('running', True, None)
    problem = eventually(lambda: app.consumers[0].problem)
    assert problem == (
        "consumer 'broken' is not running: it ended with exit code 1, RuntimeError: no such sensor; "
        'it will be started again'
    )
    status = app.consumers[0].as_dict()
    assert (status['state'], status['exit_code'], status['pid']) == ('waiting', 1, None)


def reveals(url):
    raise RuntimeError('cannot open mongodb://me:secret@host/db')


def test_no_password_is_in_what_a_consumer_leaves(make, quick, capfd):
    app = make()
    app.start_streaming(reveals)
    eventually(lambda: app.consumers[0].restarts)
    app.stop()
    said = capfd.readouterr().err
    assert 'Traceback' in said
    assert 'RuntimeError: cannot open mongodb://me:***@host/db' in said
    assert 'secret' not in said


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


def test_stop_while_a_consumer_waits_to_be_started_again(make, monkeypatch):
    monkeypatch.setattr(supervisor, 'PAUSES', (60.0, 60.0))
    app = make()
    app.start_streaming(broken)
    eventually(lambda: app.consumers[0].pid is None)
    began = time.monotonic()
    app.stop()
    assert time.monotonic() - began < 30


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


def test_an_app_at_the_top_of_a_module_is_not_started_by_a_worker_that_imports_it(url, tmp_path, monkeypatch):
    (tmp_path / 'has_app.py').write_text(
        'from minibatch.contrib.apps import StreamingApp\n'
        'def consumer(url): import time; time.sleep(1000)\n'
        f'app = StreamingApp(url={url!r})\n'
        'app.start_streaming(consumer)\n'
        'app.start(port=0)\n'
        'def started(window): return [len(app.consumers), app.address is not None]\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import has_app

    sink = ListSink()
    try:
        mb.stream('s', url=url).append({'v': 0})
        mb.make_emitter('s', has_app.started, size=1, url=url, workers=1, sink=sink).run(blocking=False)
        assert has_app.started(None) == [1, True], 'but here it is'
    finally:
        has_app.app.stop()
        sys.modules.pop('has_app')
    assert sink == [[0, False]]


def test_a_consumer_that_cannot_be_sent_is_refused_at_once(make):
    lock = threading.Lock()
    with pytest.raises(ArgumentError, match='sent to another process'):
        make().start_streaming(lambda url: lock)


async def later(url):
    consume(url)


def generated(url):
    yield consume(url)


@pytest.mark.parametrize('consumer', [lambda: 1, lambda a, b: 1, lambda *, url: 1, 5, later, generated])
def test_a_consumer_that_does_not_take_the_url_or_would_not_run_is_refused_at_once(make, consumer):
    with pytest.raises(ArgumentError, match=r'consumer (must be|is called with the URL)'):
        make().start_streaming(consumer)


@pytest.mark.parametrize('name', [5, '', 'a\0b', 'x' * 201])
def test_a_name_of_a_consumer_that_is_none_is_refused(make, name):
    with pytest.raises(ArgumentError, match='name must'):
        make().start_streaming(consume, name=name)


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


@pytest.mark.parametrize('port', [-1, 65536, 99999, 'abc', '5000', True, 5000.0, None])
def test_a_port_that_is_none_is_refused_by_name(make, port):
    app = make()
    for serve in (app.run, app.start):
        with pytest.raises(ArgumentError, match='port must be a whole number from 0 to 65535'):
            serve(port=port)
    assert app.address is None
    with pytest.raises(ArgumentError, match='host must be'):
        app.start(host=5)


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


PRELOADED = """
from minibatch.contrib.apps import StreamingApp

app = StreamingApp()

def broken(url):
    raise RuntimeError('no such sensor')

app.start_streaming(broken)
"""


def test_an_app_that_is_loaded_before_its_workers_are_forked_tells_of_consumers_that_crash(url, tmp_path):
    (tmp_path / 'preloaded.py').write_text(PRELOADED)
    command = ['-m', 'gunicorn', '--preload', '--chdir', str(tmp_path), '--bind', '127.0.0.1:{port}', 'preloaded:app']
    with webapp(url, *command) as (process, address):
        _, said = eventually(lambda: (found := get(f'{address}/health'))[0] == 503 and found)
        assert re.match("consumer 'broken' .*RuntimeError: no such sensor", said['reasons'][0])
        eventually(lambda: get(f'{address}/status')[1]['consumers'][0]['restarts'] > 1)
        process.terminate()
        process.stdout.read()
        process.wait(20)


FORKED = """
import os, sys, time
from minibatch.contrib.apps import StreamingApp, supervisor

app = StreamingApp(uri=sys.argv[1])
app.start_streaming(lambda url: time.sleep(1000), name='mine')
if not os.fork():
    app.stop(0)
    print(app.problems(), flush=True)
    supervisor.UNWATCHED = -1.0
    print(app.problems(), flush=True)
    os._exit(0)
os.wait()
print(os.getpid(), app.consumers[0].pid is not None, app.problems())
app.stop(0)
"""


def test_a_fork_tells_of_consumers_it_cannot_stop_and_when_nobody_watches_them(url):
    ran = subprocess.run([sys.executable, '-c', FORKED, url], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    well, unwatched, mine = ran.stdout.splitlines()
    pid = mine.split()[0]
    assert (well, mine) == ('[]', f'{pid} True []')
    assert unwatched == (
        f"""["consumer 'mine' is not watched: process {pid}, which has started it, is gone or hangs"]"""
    )


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
        process.send_signal(signal.SIGINT)
        assert 'not posted' not in process.stdout.read()
        assert process.wait(20) == 0
        gone(family)
