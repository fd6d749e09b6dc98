"""The command line, run as a user runs it."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from servers import Proxy, eventually, free_port

import minibatch as mb
from minibatch import dead, embedded, lease, ledger, store
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


@pytest.mark.parametrize('words', [
    'demo', 'server', 'server start', 'server stop', 'server status', 'groups', 'groups list', 'groups reset',
    'groups delete', 'dead', 'dead list', 'dead show', 'dead replay', 'dead discard', 'streams', 'lag', 'append',
    'tail', 'run', 'reset', 'app', 'completion',
])  # fmt: skip
def test_the_help_of_every_command_has_an_example(words):
    result = CliRunner().invoke(main, [*words.split(), '--help'])
    assert 'Example' in result.output
    assert f'  minibatch {words}' in result.output


def test_the_page_about_the_command_line_names_every_command():
    page = (Path(__file__).parent.parent / 'docs' / 'cli.rst').read_text(encoding='utf-8')
    assert [name for name in main.commands if f'``minibatch {name}' not in page] == []


def test_version_names_the_package_and_python():
    code, out, _ = minibatch('--version')
    assert code == 0
    assert out.startswith('minibatch ')
    assert sys.version.split()[0] in out


def test_help_loads_neither_the_demo_nor_rich():
    program = 'import sys, minibatch.cli as c; c.main(["--help"], standalone_mode=False); print(*sys.modules)'
    loaded = subprocess.check_output([sys.executable, '-c', program], text=True).split()
    assert {'rich', 'flask', 'minibatch.demo', 'minibatch.cli.service', 'minibatch.contrib'} & set(loaded) == set()


@pytest.mark.parametrize('words', [
    'nonsense', 'demo --workers 0', 'demo --window x', 'demo more', 'server x', 'groups reset s g',
    'groups reset s g --to tomorrow', 'groups reset s g --to 1712121300123',
    'dead replay', 'dead replay x --all s', 'dead discard x --group g',
    'dead list --group g', 'reset s g', 'append', 'append s no-such-file', 'append s --from 0', 'tail',
    'tail s --last -1', 'lag s --every 0', 'run', 'run m --workers 0', 'completion tcsh', 'app --port 70000',
    'groups --json list', 'groups --url mongodb://x/y list',
])  # fmt: skip
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


# --- consumer groups and dead letters

INTERRUPT = object()
ESCAPES = 'a\x1b[31mred\x07\u202e b'
FIRST, SECOND = (f'raw/s/default/{number:012d}' for number in (1, 2))


@pytest.fixture
def stream(url):
    """A stream of 20 messages, with the groups `default`, which is led and has two dead letters, and `idle`."""
    stream = mb.stream('raw/s', url=url)
    stream.append_many({'v': v, 'text': ESCAPES, 'at': datetime(2026, 1, 31)} for v in range(20))
    log = stream.target.majority
    (producer,) = store.log_ends(log, 'raw/s')
    for group in ('default', 'idle'):
        ledger.take_lease(log, 'raw/s', group, lease.owner('1'), 600, '', {'fingerprint': 'f', 'keep': False})
        ledger.write_positions(log, 'raw/s', group, 1, {producer: 10})
    ledger.release_lease(log, 'raw/s', 'idle', 1, clean=True)
    failed = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)
    for number in (1, 2):
        id_, span = ledger.window_id('raw/s', 'default', number), store.Span(producer, 5 * number - 5, 5 * number)
        log.window.insert_one({
            '_id': id_, 'stream': 'raw/s', 'group': 'default', 'number': number, 'spans': [list(span)], 'n': 5,
            'status': 'open', 'epoch': 1, 'attempts': 3, 'created': failed,
        })  # fmt: skip
        dead.keep(log, 'raw/s', 'default', id_, [span], failed)
        error = f'ValueError: {ESCAPES} ' + 'x' * 500
        epitaph = {'error': error, 'traceback': f'Traceback\n  there\n{error}\n', 'failed': failed, 'attempts': 3}
        dead.fail(log, {id_: epitaph}, 1)
        failed += timedelta(seconds=1)
    return stream


@pytest.fixture
def run(run, stream):
    return run


def terminal(width, answer, *words):
    """Run a command in a terminal, and answer its question; the exit code and what was on the screen.

    `answer` may be a function, called with the process and the screen again and again.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('HHHH', 40, width, 0, 0))
    env = {key: value for key, value in os.environ.items() if key != 'COLUMNS'}
    process = subprocess.Popen([sys.executable, '-m', 'minibatch', *words], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    screen, deadline = b'', time.monotonic() + 120
    with suppress(OSError):  # it has ended
        while True:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f'{words} has not ended:\n{screen.decode(errors="replace")}')
            silent = not select.select([ours], [], [], 2)[0]
            if not silent:
                screen += os.read(ours, 65536)
            if callable(answer):
                answer(process, screen)
            elif silent and screen.endswith(b'[y/N]: ') and answer is INTERRUPT:
                process.send_signal(signal.SIGINT)  # it waits now; readline may miss one that comes before
            elif answer is not INTERRUPT and b'[y/N]' in screen and answer is not None:
                os.write(ours, answer)
                answer = None
    os.close(ours)
    return process.wait(60), screen.decode().replace('\r\n', '\n')


def test_groups_are_listed_as_a_table_and_as_json(run, stream):
    stream.target.majority.group.update_one({'group': 'idle'}, {'$set': {'stalled': datetime(2026, 1, 31)}})
    me = lease.owner('1')
    code, out, _ = run('groups list raw/s')
    heads, first, second = out.splitlines()
    assert code == 0
    assert heads.split() == [
        'stream', 'group', 'lag', 'seconds', 'led', 'by', 'windows', 'messages', 'late', 'dead', 'expired',
        'stalled',
    ]  # fmt: skip
    assert first.split()[:3] == ['raw/s', 'default', '10']
    assert first.split()[4:] == [f'{me["host"]}:{me["pid"]}', '0', '0', '0', '2', '0', '-']
    assert second.split()[4:] == ['-', '0', '0', '0', '0', '0', '2026-01-31', '00:00:00']
    assert run('groups list')[1].splitlines()[0] == run('groups')[1].splitlines()[0] == heads
    default, idle = json.loads(run('groups list --json')[1])['groups']
    assert [group['name'] for group in json.loads(run('groups --json')[1])['groups']] == ['default', 'idle']
    assert (default['name'], default['lag']['messages'], default['dead'], default['failed']) == ('default', 10, 2, 0)
    assert (idle['owner'], idle['stalled']) == (None, '2026-01-31T00:00:00+00:00')


def test_a_source_that_has_failed_is_told_below_the_groups_while_they_are_led(run, stream):
    stream.target.majority.group.update_many({}, {'$set': {'source_error': 'OSError: no \x1b[31mbroker'}})
    code, out, err = run('groups list raw/s')
    assert (code, len(out.splitlines())) == (0, 3)
    assert err == 'the source of raw/s, group default, has failed: OSError: no \\x1b[31mbroker\n'
    groups = json.loads(run('groups list --json')[1])['groups']
    assert [group['source_error'] for group in groups] == ['OSError: no \x1b[31mbroker'] * 2


def test_a_table_that_is_wider_than_the_terminal_becomes_blocks(stream, url):
    code, wide = terminal(120, None, 'dead', 'list', '--url', url)
    assert code == 0
    _, first, second = wide.splitlines()
    assert first.startswith(f'{FIRST}  2026-01-31 12:00:00         5         3  dead   ValueError: a\\x1b[31mred')
    assert len(first) == len(second) == 120
    code, narrow = terminal(60, None, 'dead', 'list', '--url', url)
    lines = narrow.splitlines()
    assert (code, lines[0]) == (0, f'id {FIRST}  failed 2026-01-31 12:00:00')
    assert lines[1] == '    messages 5  attempts 3  state dead  error ValueError:'
    assert 'x' * 100 in narrow.replace('\n    ', '')
    assert max(map(len, lines)) <= 60


def test_a_stream_or_group_that_is_not_there_is_an_error_and_is_not_made(run, db):
    for words in ('groups list x', 'groups reset x g --to latest --yes', 'groups delete x g --yes', 'dead list x',
                  'dead replay --all x', 'dead discard --all x --yes'):  # fmt: skip
        code, out, err = run(words)
        assert (code, out) == (1, '')
        assert "has no stream 'x'; there are: 'raw/s'" in err
        assert err.count('\n') == 1
    for words in ('groups reset raw/s g --to latest --yes', 'groups delete raw/s g --yes', 'dead list raw/s --group g'):
        assert run(words)[2] == "error: stream 'raw/s' has no consumer group 'g'; there are: 'default', 'idle'\n"
    for words in ('dead show x', f'dead replay {FIRST} x', f'dead discard {FIRST} x --yes'):
        assert run(words)[2].startswith("error: there is no dead letter 'x'")
    assert db.stream.count_documents({}) == 1
    assert db.window.count_documents({'status': 'failed'}) == 2


def test_a_group_is_reset(run, stream):
    assert run('groups reset raw/s idle --to earliest --yes')[:2] == (
        0, "consumer group 'idle' of stream 'raw/s' goes on with a lag of 20 messages\n"
    )  # fmt: skip
    out = run('groups reset raw/s idle --to 2100-01-31T12:00:00Z --yes --json')[1]
    assert json.loads(out) == {'stream': 'raw/s', 'group': 'idle', 'before': 20, 'lag': 0}
    code, _, err = run('groups reset raw/s default --to latest --yes')
    assert code == 1
    assert err.startswith("error: consumer group 'default' of stream 'raw/s' is led by process")


def test_a_group_is_deleted_with_its_dead_letters(run, stream):
    ledger.release_lease(stream.target.majority, 'raw/s', 'default', 1, clean=True)
    code, out, _ = run('groups delete raw/s default --yes')
    assert (code, out) == (0, "deleted consumer group 'default' of stream 'raw/s' with its 2 dead letters\n")
    assert [group.name for group in stream.groups()] == ['idle']


@pytest.mark.parametrize(
    'words', ['groups reset raw/s idle --to latest', 'groups delete raw/s idle', f'dead discard {FIRST}']
)
def test_where_nobody_can_be_asked_yes_is_needed(run, db, words):
    before = list(db.group.find()), list(db.window.find())
    code, out, err = run(words)
    assert (code, out) == (2, '')
    assert 'say --yes to do it' in err
    assert (list(db.group.find()), list(db.window.find())) == before


def test_the_question_says_what_will_be_done_and_no_changes_nothing(stream, url):
    words = 'groups', 'reset', 'raw/s', 'idle', '--to', 'latest', '--url', url
    code, screen = terminal(200, b'n\n', *words)
    assert code == 1
    assert "Reset consumer group 'idle' of stream 'raw/s' to latest, from a lag of 10 messages to 0? [y/N]" in screen
    assert 'nothing was changed' in screen
    assert stream.group('idle').lag().messages == 10
    code, screen = terminal(200, INTERRUPT, 'dead', 'discard', '--all', 'raw/s', '--url', url)
    assert code == 130
    assert len(stream.dead_letters()) == 2
    code, screen = terminal(200, b'y\n', *words)
    assert code == 0
    assert stream.group('idle').lag().messages == 0


def test_what_a_message_says_does_not_reach_the_terminal_as_it_is(run):
    for words in ('dead list', f'dead show {FIRST}', f'dead show {FIRST} --json', 'dead list --json'):
        code, out, _ = run(words)
        assert code == 0
        assert all(char.isprintable() for char in out.replace('\n', ''))
        assert '\\x1b[31mred' in out or '\\u001b[31mred' in out


def test_a_dead_letter_is_cut_in_the_list_and_shown_in_full(run):
    _, listed, _ = run('dead list raw/s --group default')
    assert [line.split()[0] for line in listed.splitlines()] == ['id', FIRST, SECOND]
    assert 'x' * 100 in listed
    assert 'x' * 500 not in listed
    _, out, _ = run(f'dead show {FIRST}')
    lines = out.splitlines()
    assert lines[0] == f'{FIRST}  (dead letter)'
    assert lines[1] == 'failed    2026-01-31 12:00:00, 3 attempts'
    assert lines[2].startswith('error     ValueError: a\\x1b[31mred')
    assert lines[2].endswith('x' * 500)
    assert lines[3:5] == ['          Traceback', '            there']
    assert lines[6].startswith('span      ')
    assert lines[6].endswith(' 0 to 4')
    assert lines[7] == 'messages  5'
    data = [json.loads(line) for line in lines[8:]]
    assert [each['v'] for each in data] == [0, 1, 2, 3, 4]
    assert data[0] == {'v': 0, 'text': ESCAPES, 'at': {'$date': '2026-01-31T00:00:00Z'}}
    shown = json.loads(run(f'dead show {FIRST} --json')[1])
    assert (shown['data'], shown['spans'][0]['end'], shown['waiting']) == (data, 5, False)
    assert shown['traceback'].startswith('Traceback\n  there\n')


def test_dead_letters_are_replayed_by_who_leads_or_comes_next(run, stream):
    me = lease.owner('1')
    code, out, _ = run(f'dead replay {FIRST}')
    leader = f'the consumer that leads now, {me["host"]}:{me["pid"]}'
    assert (code, out) == (0, f'raw/s/default: 1 dead letter will be run again by {leader}\n')
    assert [letter.waiting for letter in stream.dead_letters()] == [True, False]
    ledger.release_lease(stream.target.majority, 'raw/s', 'default', 1, clean=True)
    code, out, _ = run('dead replay --all raw/s --group default')
    assert out.splitlines() == [
        '1 dead letter waited for it already',
        'raw/s/default: 2 dead letters will be run again by the next consumer of this group that starts',
    ]
    assert json.loads(run(f'dead replay {SECOND} --json')[1]) == {'replayed': 0, 'waiting': 1}
    assert f'{SECOND}  (waits to be run again)' in run(f'dead show {SECOND}')[1]
    assert run('dead replay --all raw/s --group idle')[:2] == (0, 'no dead letters\n')


def test_dead_letters_are_discarded_but_for_those_that_wait(run, stream):
    run(f'dead replay {FIRST}')
    assert run('dead discard --all raw/s --yes')[:2] == (
        0, 'deleted 1 dead letter\n1 dead letter waited to be run again and stayed\n'
    )  # fmt: skip
    assert [letter.id for letter in stream.dead_letters()] == [FIRST]
    assert json.loads(run(f'dead discard {FIRST} --yes --json')[1]) == {'discarded': 0, 'left': 1}
    assert run('dead discard --all raw/s --group idle --yes')[1] == 'no dead letters\n'
