"""`minibatch run` and `minibatch app`, as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from processes import gone, workers_of
from servers import eventually

import minibatch as mb
from minibatch import api
from minibatch.cli import main
from minibatch.signals import SAME_SIGNAL

ROOT = str(Path(mb.__file__).parent.parent)

PIPELINE = """
import os
import minibatch as mb
from helpers import total
print('imported', __name__, flush=True)

@mb.streaming('a', size=2, sink=mb.stream('sums'))
def sums(window):
    return {'sum': total(window), 'pid': os.getpid()}

def counts(window):
    if any(d['n'] < 0 for d in window.data):
        raise ValueError('negative')
    return {'count': len(window)}

mb.streaming('b', counts, size=2, on_error='stop', max_attempts=1, sink=mb.stream('counts'))

if __name__ == '__main__':
    mb.stream('never').append({})
"""
HELPERS = """
def total(window):
    return sum(d['n'] for d in window.data)
"""


@pytest.fixture
def service(tmp_path, url):
    """Start `minibatch run` in a folder with pipeline.py; killed at the end, with its workers."""
    (tmp_path / 'pipeline.py').write_text(PIPELINE)
    (tmp_path / 'helpers.py').write_text(HELPERS)
    processes = []

    def start(*words):
        env = {**os.environ, 'PYTHONPATH': ROOT, 'MINIBATCH_MONGO_URL': url}
        process = subprocess.Popen([sys.executable, '-m', 'minibatch', 'run', *words], cwd=tmp_path, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        children = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        gone(children)


CHAIN = """
import minibatch as mb

@mb.streaming('seconds', timestamp='at', interval=60, key='of', sink=mb.stream('minutes'))
def minute(window):
    return {'at': window.start, 'of': window.key, 'n': len(window)}

@mb.streaming('minutes', timestamp='at', interval=3600, key='of', sink=mb.stream('hours'))
def hour(window):
    return {'of': window.key, 'n': sum(data['n'] for data in window.data)}
"""


def test_until_done_ends_when_all_went_through_all_consumers(service, tmp_path, url):
    (tmp_path / 'chain.py').write_text(CHAIN)
    mb.stream('seconds', url=url).append_many([{'at': at, 'of': 'ab'[at % 2]} for at in range(200)])
    process = service('chain', '--until-done', '--workers', '1')
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert sorted(found(url, 'hours'), key=lambda data: data['of']) == [{'of': 'a', 'n': 100}, {'of': 'b', 'n': 100}]
    assert said.count('all is processed') == 2


def found(url, name):
    return [message.data for message in mb.stream(name, url=url).tail(last=1000, follow=False)]


def append(url, name, *numbers):
    mb.stream(name, url=url).append_many([{'n': n} for n in numbers])


@pytest.mark.parametrize('name', ['pipeline', 'pipeline.py', './pipeline.py'])
def test_all_consumers_of_a_module_run_together_until_sigterm(service, url, name):
    append(url, 'a', 1, 2, 3, 4)
    append(url, 'b', 1, 2)
    process = service(name, '--workers', '1')
    eventually(lambda: len(found(url, 'sums')) == 2 and found(url, 'counts') == [{'count': 2}], 30)
    sums = found(url, 'sums')
    assert [each['sum'] for each in sums] == [3, 7]
    workers = workers_of(process)
    assert len(workers) == 2
    assert {each['pid'] for each in sums} <= {worker.pid for worker in workers}
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    gone(workers)
    assert out == 'imported pipeline\n', 'by the workers, too'
    assert 'a/default (sums): CountWindow(size=2)' in err
    assert [group.owner for name in 'ab' for group in mb.stream(name, url=url).groups()] == [None, None]


def test_one_consumer_that_fails_ends_the_service_and_is_named(service, url):
    process = service('pipeline.py', '--workers', '1', '--log-level', 'error')
    append(url, 'b', 1, -1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith('error: the consumer b/default (counts) has ended: window b/default/')
    assert last.endswith('ValueError: negative')
    assert 'INFO' not in err
    assert mb.stream('a', url=url).group().owner is None, 'the other one was not stopped in the clean way'


def test_the_second_ctrl_c_does_not_wait(service, url, tmp_path):
    (tmp_path / 'slow.py').write_text(
        "import time\nimport minibatch as mb\n@mb.streaming('a', size=1, workers=1)\ndef slow(window):\n"
        "    mb.stream('begun').append({})\n    time.sleep(600)\n"
    )
    append(url, 'a', 1)
    process = service('slow')
    eventually(lambda: found(url, 'begun'), 30)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert 'stopping' in next(line for line in process.stderr if 'stopping' in line)
    first = time.monotonic()
    eventually(lambda: time.monotonic() - first > 2 * SAME_SIGNAL)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    gone(children)


@pytest.mark.parametrize(('text', 'error'), [
    ('x = 1', 'wrong.py has no function decorated with @streaming(...) at its top level'),
    ('\nx = 1 / 0', 'wrong.py, line 2: ZeroDivisionError: division by zero'),
    ('import nosuch', "wrong.py, line 1: ModuleNotFoundError: No module named 'nosuch'"),
    ('def (', 'line 1: SyntaxError: '),
    ("import minibatch as mb\nmb.streaming('a', print, size=2, sise=1)", 'wrong.py, line 2: streaming has no option'),
    ("import minibatch as mb\nfor _ in 'ab':\n    @mb.streaming('a', size=2)\n    def f(w): ...",
     'a/default (f) and a/default (f) are one consumer group'),
    ("import minibatch as mb\nmb.connectdb('mongodb://me:geheim@127.0.0.1:1/x?serverSelectionTimeoutMS=200')",
     'wrong.py, line 2: MongoDB does not answer at mongodb://me:***@127.0.0.1:1/x'),
    ("raise ValueError('mongodb://me:geheim@h/x')", 'wrong.py, line 1: ValueError: mongodb://me:***@h/x'),
])  # fmt: skip
def test_a_module_that_is_wrong_is_an_error_of_one_line(service, tmp_path, text, error):
    (tmp_path / 'wrong.py').write_text(text)
    process = service('wrong.py')
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, '')
    assert err.startswith('error: ')
    assert error in err
    assert err.count('\n') == 1
    assert 'geheim' not in err


@pytest.mark.parametrize(('name', 'error'), [
    ('nosuch', "there is no module 'nosuch'"), ('nosuch.py', 'there is no file nosuch.py'),
    ('a..b', "there is no module 'a..b'"), ('.x', "'.x' is not the name of a module"),
])  # fmt: skip
def test_a_module_that_is_not_there_is_an_error(name, error):
    result = CliRunner().invoke(main, ['run', name])
    assert result.exit_code == 1
    assert result.stderr.startswith(f'error: {error}')


def test_a_round_that_does_not_block_is_done_while_consumers_are_collected(url):
    append(url, 'a', 1, 2, 3, 4)
    seen = []
    with api.collecting() as emitters:
        mb.streaming('a', seen.append, size=2, url=url, blocking=False, executor=Inline())
        decorated = mb.streaming('a', size=2, url=url, group='other')(print)
    assert decorated is print
    assert [window.data for window in seen] == [[{'n': 1}, {'n': 2}], [{'n': 3}, {'n': 4}]]
    assert [emitter.name for emitter in emitters] == ['a/other']


class Inline:
    """An executor in this thread."""

    def submit(self, fn):
        from concurrent.futures import Future

        future = Future()
        future.set_result(fn())
        return future


def test_a_worker_that_imports_a_module_to_find_a_function_does_not_consume(tmp_path, url):
    # As `streaming(name, fn)` names a function that can be imported, workers do so, and meet this very call.
    (tmp_path / 'service.py').write_text(
        "import os\nimport minibatch as mb\nmb.stream('imports').append({'pid': os.getpid()})\n"
        "def work(window):\n    mb.stream('done').append({'n': len(window)})\n"
        "mb.streaming('a', work, size=2, workers=1)\n"
    )
    append(url, 'a', 1, 2)
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}:{tmp_path}', 'MINIBATCH_MONGO_URL': url}
    with subprocess.Popen([sys.executable, '-c', 'import service'], env=env, start_new_session=True) as process:
        try:
            eventually(lambda: found(url, 'done') == [{'n': 2}], 30)
            assert len(workers_of(process)) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert len(found(url, 'imports')) == 2


@pytest.mark.skipif(find_spec('minibatch.contrib.apps') is None, reason='there is no StreamingApp')
def test_without_flask_the_dashboard_says_what_to_install():
    program = (
        "import sys\nsys.modules['flask'] = None\nfrom minibatch.cli import main\n"
        "main(['app', '--url', 'mongodb://127.0.0.1:1/x'])"
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
    assert "pip install '.[apps]'" in done.stderr
    assert done.stderr.count('\n') == 1


LEAVES = """import threading
import minibatch as mb
import minibatch.cli.run as command
command.END_TIMEOUT = 0.2

@mb.streaming('a', size=1, executor='inline')
def leaves_a_thread(window):
    threading.Thread(target=threading.Event().wait, name='left', daemon=False).start()
    mb.stream('begun').append({})
"""


def test_a_thread_that_a_function_has_left_does_not_keep_the_service_from_its_end(service, url, tmp_path):
    (tmp_path / 'leaves.py').write_text(LEAVES)
    append(url, 'a', 1)
    process = service('leaves')
    eventually(lambda: found(url, 'begun'), 30)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert 'threads of it go on: left' in err
