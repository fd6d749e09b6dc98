"""What commands print, where it cannot be printed, or not in these letters."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import minibatch as mb
from minibatch.cli import main

NAME, DATA = 'sträm☃', {'a': 'ü☃😀€'}
COMMANDS = (
    '--version', '--help', 'streams', 'streams --json', 'lag', f'lag {NAME} --json', 'groups', 'groups list --json',
    f'tail {NAME} --no-follow', f'tail {NAME} --no-follow --json', 'dead list', f'dead show {NAME}/g/1',
    f'groups reset {NAME} g --to latest', f'append {NAME} FILE', f'append {NAME} BAD', f'append {NAME}', f'lag {NAME}x',
    'completion bash', 'server status', f'nonsense{NAME}', 'run nowhere.py',
)  # fmt: skip


@pytest.fixture
def files(tmp_path, url, monkeypatch):
    """Takes the words of a command, on a database with a stream and a group, and the files FILE and BAD."""
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    (tmp_path / 'FILE').write_text(json.dumps(DATA), encoding='utf-8')
    (tmp_path / 'BAD').write_text('{"b": ☃}', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    stream = mb.stream(NAME, url=url)
    mb.make_emitter(NAME, len, stream=stream, size=1, group='g', executor='inline').run(blocking=False)
    stream.append(DATA)


@pytest.mark.parametrize('closed', [('stdin',), ('stdout',), ('stderr',), ('stdin', 'stdout', 'stderr')])
def test_no_command_minds_that_it_has_no_standard_streams(files, monkeypatch, closed, capsys):
    codes = {}
    for words in COMMANDS:
        with monkeypatch.context() as patch, open(os.devnull) as nothing:
            patch.setattr(sys, 'stdin', nothing)
            for name in closed:
                patch.setattr(sys, name, None)
            with pytest.raises(SystemExit) as ended:
                main(words.split())
            for name in {'stdout', 'stderr'}.intersection(closed):
                getattr(sys, name).close()
        codes[words] = ended.value.code or 0
    assert set(codes.values()) <= {0, 1, 2, 3}
    del codes['server status']  # another test may have started the server of this run
    assert [words for words, code in codes.items() if code == 0] == [
        words for words in codes if not words.startswith(
            ('dead show', 'groups reset', f'append {NAME} BAD', f'lag {NAME}x', 'nonsense', 'run')
        ) and (words != f'append {NAME}' or 'stdin' not in closed)
    ]  # fmt: skip
    if closed == ('stdin',):
        assert "Error: Invalid value for '[FILE]': standard input is closed; name a file" in capsys.readouterr().err


@pytest.mark.parametrize('encoding', ['latin-1', 'cp1252'])
def test_every_command_prints_in_the_letters_that_the_terminal_has(files, encoding):
    runner = CliRunner(charset=encoding)
    for words in COMMANDS:
        result = runner.invoke(main, words.split())
        assert isinstance(result.exception, SystemExit | None), words
    shown = runner.invoke(main, ['tail', NAME, '--no-follow']).stdout_bytes.decode(encoding)
    assert json.loads(shown.splitlines()[-1]) == DATA
    row = runner.invoke(main, ['streams']).stdout_bytes.decode(encoding).splitlines()[1]
    assert r'\u2603' in row.split()[0]


def test_a_connection_never_gets_the_number_of_a_standard_stream_that_was_closed_nor_one_of_a_worker(tmp_path):
    program = (
        'import socket, sys; from minibatch.cli.output import prepare_streams; prepare_streams(); '
        'open(sys.argv[1], "w").write(str(socket.socket().fileno())); print(1, file=sys.stderr); print(1); '
        'import subprocess; worker = "import os; [os.fstat(number) for number in range(3)]"; '
        'subprocess.run([sys.executable, "-c", worker], check=True)'
    )
    command = [sys.executable, '-c', program, str(tmp_path / 'number')]
    assert subprocess.run(['sh', '-c', '"$@" <&- >&- 2>&-', 'sh', *command]).returncode == 0
    assert int((tmp_path / 'number').read_text()) > 2


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('words', ['--version', 'streams --help', 'completion bash'])
def test_output_on_a_full_disk_is_an_error_in_one_line(words, unbuffered):
    command = [sys.executable, '-m', 'minibatch', *words.split()]
    env = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
    with open('/dev/full', 'w') as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr.count('\n')) == (1, 1)
    assert 'No space left on device' in done.stderr


@pytest.mark.parametrize('words', [
    'dead show {}', 'dead list s --group {}', 'dead discard {} --yes', 'dead replay --all s --group {}', 'tail {}',
    'groups reset s {} --to latest --yes', 'groups delete s {} --yes', 'lag {}', 'append {}', 'streams --url {}',
])  # fmt: skip
def test_an_argument_that_is_no_text_is_an_error_in_one_line(url, monkeypatch, words):
    mb.stream('s', url=url)
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    result = CliRunner().invoke(main, words.format('\udcff').split())
    assert (result.exit_code, result.stderr.count('\n')) == (1, 1)
    assert result.stderr.startswith('error: ')
