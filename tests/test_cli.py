"""The command line, run as a user runs it."""

import json
import signal
import subprocess
import sys
import tempfile

import psutil
import pytest
from click.testing import CliRunner
from servers import Proxy, eventually, free_port

from minibatch import embedded
from minibatch.cli import main


@pytest.fixture
def home(monkeypatch):
    """An embedded MongoDB of its own, not started."""
    with tempfile.TemporaryDirectory(prefix='mb-') as folder:
        monkeypatch.setenv('MINIBATCH_HOME', folder)
        yield folder
        embedded.stop()


def minibatch(*words):
    """Run a command to its end; the exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, '-m', 'minibatch', *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_help_documents_the_exit_codes():
    code, out, _ = minibatch('--help')
    assert code == 0
    for line in ('0    done', '1    an error', '2    a wrong command', '3    `server status`', '130  interrupted'):
        assert line in out


@pytest.mark.parametrize('words', [['demo'], ['server'], ['server', 'start'], ['server', 'stop'], ['server', 'status']])
def test_the_help_of_every_command_has_an_example(words):
    result = CliRunner().invoke(main, [*words, '--help'])
    assert 'Example' in result.output
    assert f'  minibatch {" ".join(words)}' in result.output


def test_version_names_the_package_and_python():
    code, out, _ = minibatch('--version')
    assert code == 0
    assert out.startswith('minibatch ')
    assert sys.version.split()[0] in out


def test_help_loads_neither_the_demo_nor_rich():
    program = 'import sys, minibatch.cli as c; c.main(["--help"], standalone_mode=False); print(*sys.modules)'
    loaded = subprocess.check_output([sys.executable, '-c', program], text=True).split()
    assert {'rich', 'minibatch.demo', 'minibatch.contrib.mongodb'} & set(loaded) == set()


@pytest.mark.parametrize('words', ['nonsense', 'demo --workers 0', 'demo --window x', 'demo more', 'server x'])
def test_wrong_usage_ends_with_code_2(words):
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2


def test_an_error_is_one_line_without_a_password():
    code, out, err = minibatch('demo', '--url', f'mongodb://me:secret@127.0.0.1:{free_port()}/x')
    assert (code, out) == (1, '')
    assert err.startswith('error: MongoDB does not answer at mongodb://me:***@127.0.0.1')
    assert err.count('\n') == 1
    assert 'secret' not in err


def test_debug_adds_the_traceback():
    code, _, err = minibatch('--debug', 'demo', '--url', 'http://example.org')
    assert code == 1
    assert 'Traceback' in err
    assert 'error: url must start with mongodb://' in err.splitlines()[-1]


def test_ctrl_c_before_there_is_anything_to_sum_up_ends_with_code_130():
    with Proxy(free_port()) as proxy, \
            subprocess.Popen([sys.executable, '-m', 'minibatch', 'demo', '--url', proxy.url()],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # It waits for the server then: pymongo has its monitor threads.
        eventually(lambda: psutil.Process(process.pid).num_threads() > 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ('', 'interrupted')


def test_the_server_commands_start_find_and_stop_the_embedded_mongodb(home):
    code, out, _ = minibatch('server', 'status')
    assert (code, out) == (3, f'not running\nhome     {home}\nmongod   {embedded.find_mongod()}\n')

    code, out, _ = minibatch('server', 'start', '--json')
    started = json.loads(out)
    assert (code, started['running'], started['home']) == (0, True, home)

    code, out, _ = minibatch('server', 'status', '--json')
    found = json.loads(out)
    assert (code, found['pid'], found['url']) == (0, started['pid'], started['url'])
    assert started['url'] in minibatch('server', 'status')[1]

    assert minibatch('server', 'stop')[:2] == (0, 'stopped\n')
    assert minibatch('server', 'stop', '--json')[:2] == (0, '{"stopped": false}\n')
    assert json.loads(minibatch('server', 'status', '--json')[1])['running'] is False


def test_without_a_mongod_the_error_says_the_ways_to_get_one(home, monkeypatch):
    monkeypatch.setenv('MINIBATCH_MONGOD', 'no-such-mongod')
    code, _, err = minibatch('server', 'start')
    assert code == 1
    assert err.startswith('error: MINIBATCH_MONGOD is ')
    assert minibatch('server', 'status')[0] == 3
