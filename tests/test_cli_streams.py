"""`minibatch streams`, `lag` and `completion`, as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime

import pytest
from click.testing import CliRunner
from servers import eventually
from test_cli import terminal

import minibatch as mb
from minibatch import embedded, ledger, store
from minibatch.cli import main


@pytest.fixture
def stream(url):
    """The streams `a`, without groups, and `raw/s`: 20 messages, of which its group has finished 5."""
    mb.stream('a', url=url).append({})
    stream = mb.stream('raw/s', url=url)
    stream.append_many({'v': v} for v in range(20))
    mb.make_emitter('raw/s', fails, size=5, url=url, executor='inline', max_attempts=1).run(blocking=False)
    return stream


def fails(window):
    if window.number > 1:
        raise ValueError('on purpose')


@pytest.fixture
def run(run, stream):
    return run


def test_streams_are_listed_as_a_table_and_as_json(run, url):
    code, out, _ = run('streams')
    heads, first, second = (line.split() for line in out.splitlines())
    assert code == 0
    assert heads == ['stream', 'appended', 'stored', 'groups', 'lag', 'seconds', 'dead']
    assert first == ['a', '1', '1', '0', '-', '-', '0']
    (status,) = mb.status(url, 'raw/s')
    (group,) = status.groups
    assert second[:5] == ['raw/s', '20', str(status.stored), '1', str(group.lag.messages)]
    assert second[6] == str(group.dead)
    listed = json.loads(run('streams --json')[1])['streams']
    assert [each['name'] for each in listed] == ['a', 'raw/s']
    assert listed[1]['groups'][0]['lag']['messages'] == group.lag.messages
    assert re.search(r'T.*\+00:00$', listed[1]['groups'][0]['committed'])


def test_an_empty_database_has_no_streams_and_no_groups(url):
    for words, said in (('streams', 'no streams\n'), ('lag', 'no consumer groups\n')):
        result = CliRunner().invoke(main, [words, '--url', url])
        assert (result.exit_code, result.stdout) == (0, said)
    assert json.loads(CliRunner().invoke(main, ['lag', '--json', '--url', url]).stdout)['groups'] == []


def test_lag_is_shown_of_all_streams_or_one(run, stream):
    code, out, _ = run('lag')
    heads, row = out.splitlines()
    (status,) = mb.status(stream.target.url, 'raw/s')
    assert code == 0
    assert ' '.join(heads.split()) == 'stream group lag seconds in/s out/s windows late dead led by'
    assert row.split()[:3] == ['raw/s', 'default', str(status.groups[0].lag.messages)]
    assert row.split()[4:] == ['-', '-', str(status.groups[0].in_flight), '0', str(status.groups[0].dead), '-']
    assert run('lag raw/s')[1].split()[:11] == out.split()[:11]
    assert run('lag a')[:2] == (0, 'no consumer groups\n')
    code, out, err = run('lag nosuch')
    assert (code, out) == (1, '')
    assert "has no stream 'nosuch'; there are: 'a', 'raw/s'" in err


def watching(url, *words):
    command = [sys.executable, '-m', 'minibatch', 'lag', '--watch', '--every', '0.3', *words, '--url', url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_lag_is_watched_as_json_lines_with_rates_until_ctrl_c(stream, url):
    with watching(url, '--json') as process:
        first = json.loads(process.stdout.readline())['groups'][0]
        assert (first['stream'], first['group'], first['appended_per_second']) == ('raw/s', 'default', None)
        before = first['lag']['messages']
        look = json.loads(process.stdout.readline())
        assert look['groups'][0]['appended_per_second'] == 0
        stream.append_many({'v': v} for v in range(300))
        while not look['groups'][0]['appended_per_second']:
            since, look = datetime.fromisoformat(look['time']), json.loads(process.stdout.readline())
        (seen,), seconds = look['groups'], (datetime.fromisoformat(look['time']) - since).total_seconds()
        assert seen['lag']['messages'] == before + 300
        assert seen['appended_per_second'] * seconds == pytest.approx(300, rel=0.1)
        assert seen['processed_per_second'] == 0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, '')


def test_lag_is_watched_as_lines_where_there_is_no_terminal(stream, url):
    with watching(url, 'raw/s') as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        process.wait(60)
    for line in lines:
        when, rest = line[:19], line[19:]
        assert datetime.fromisoformat(when)
        assert re.fullmatch(r'  raw/s/default  lag [\d,]+  seconds .*  late 0  dead \d\n', rest)


def test_lag_is_watched_live_in_a_terminal(stream, url):
    sent = []

    def interrupt(process, screen):
        if screen.count(b'Ctrl-C ends') > 1 and not sent:
            sent.append(process.send_signal(signal.SIGINT))

    code, screen = terminal(100, interrupt, 'lag', '--watch', '--every', '0.2', '--url', url)
    assert code == 0
    assert 'raw/s' in screen
    assert '\x1b[' in screen


def completed(words, url='', **env):
    """What the Tab key offers after these words."""
    environment = {**os.environ, '_MINIBATCH_COMPLETE': 'bash_complete', 'COMP_WORDS': ' '.join(words),
                   'COMP_CWORD': str(len(words) - 1), **env}  # fmt: skip
    if url:
        environment['MINIBATCH_MONGO_URL'] = url
    program = "from minibatch.cli import main; main(prog_name='minibatch')"
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ''
    return [line.partition(',')[2] for line in done.stdout.split()]


def test_commands_streams_and_groups_are_completed(stream, url):
    # A shell would run what such a name says.
    store.open_stream(stream.target.majority, 'raw $(reboot)', {}, stream.created)
    assert completed(['minibatch', 'st'], url) == ['streams']
    assert completed(['minibatch', 'tail', ''], url) == ['a', 'raw/s']
    assert completed(['minibatch', 'tail', 'r'], url) == ['raw/s']
    assert completed(['minibatch', 'lag', '--url', url, 'r']) == ['raw/s']
    assert completed(['minibatch', 'reset', 'raw/s', ''], url) == ['default']
    assert completed(['minibatch', 'groups', 'delete', 'a', ''], url) == []
    assert ledger.groups_now(stream.target.majority, 'raw/s')


def test_completion_starts_no_server_and_is_silent_without_one(tmp_path, monkeypatch):
    assert completed(['minibatch', 'tail', ''], 'mongodb://127.0.0.1:1/x') == []
    assert completed(['minibatch', 'tail', ''], 'quatsch') == []
    monkeypatch.setenv('MINIBATCH_HOME', str(tmp_path))
    assert completed(['minibatch', 'tail', '']) == []
    assert not embedded.status().running
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which('bash') is None, reason='there is no bash')
def test_the_script_for_bash_completes(url, stream, tmp_path):
    script = subprocess.check_output([sys.executable, '-m', 'minibatch', 'completion', 'bash'], text=True)
    program = tmp_path / 'minibatch'
    program.write_text(f"#!{sys.executable}\nfrom minibatch.cli import main\nmain(prog_name='minibatch')\n")
    program.chmod(0o755)
    tab = (
        f'{script}\nCOMP_WORDS=(minibatch tail r) COMP_CWORD=2\n'
        '$(complete -p minibatch | sed "s/.*-F \\([^ ]*\\).*/\\1/") minibatch\necho "${COMPREPLY[@]}"'
    )
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'MINIBATCH_MONGO_URL': url}
    assert subprocess.check_output(['bash', '-c', tab], text=True, env=env) == 'raw/s\n'


@pytest.mark.parametrize('shell', ['zsh', 'fish'])
def test_there_is_a_script_for_each_shell(shell):
    result = CliRunner().invoke(main, ['completion'], env={'SHELL': f'/usr/bin/{shell}'})
    assert result.exit_code == 0
    assert f'_MINIBATCH_COMPLETE={shell}_complete' in result.output
    assert CliRunner().invoke(main, ['completion', shell]).output == result.output


def test_a_gone_reader_of_the_output_ends_it_quietly(stream, url):
    stream.append_many({'v': v} for v in range(10_000))
    command = [sys.executable, '-m', 'minibatch', 'tail', 'raw/s', '--last', '10000', '--no-follow', '--url', url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert eventually(lambda: process.poll() is not None)
        assert (process.returncode, process.stderr.read()) == (1, '')
