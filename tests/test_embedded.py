"""The embedded MongoDB: found, started once, shared, stopped, and its data kept."""
from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from servers import eventually, missing

from minibatch import embedded
from minibatch.errors import DataFolderInUseError, EmbeddedServerError, NoMongodError

ROOT = Path(__file__).parent.parent
PRINT_URL = 'from minibatch import embedded; print(embedded.url(), flush=True)'


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path: pytest's own may not fit a socket."""
    folder = Path(tempfile.mkdtemp(prefix='mb-'))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def home(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own for the embedded server, which is stopped afterwards."""
    try:
        embedded.find_mongod()
    except NoMongodError as error:
        missing(str(error))
    home = short / 'home'
    monkeypatch.setenv('MINIBATCH_HOME', str(home))
    yield home
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MINIBATCH_HOME', str(home))
        embedded.stop()


@pytest.fixture
def database() -> Iterator[Callable[[], Any]]:
    """Opens the default database of the embedded server, with a new client."""
    clients: list[MongoClient[dict[str, Any]]] = []

    def open_() -> Any:
        clients.append(MongoClient(embedded.url(), serverSelectionTimeoutMS=1000))
        return clients[-1].get_default_database()
    yield open_
    for client in clients:
        client.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def program(*, stdin: int = subprocess.DEVNULL, code: str = PRINT_URL) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE,
                            text=True, start_new_session=True)


def kill_server() -> int:
    """SIGKILL the embedded server, wait until it is gone, and return its process id."""
    (server,) = embedded._find(embedded.status().home)
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not embedded._listens(server.path))
    return server.process.pid


# -- starting, sharing, surviving

def test_processes_that_start_at_once_get_one_server(home):
    programs = [program() for _ in range(4)]
    urls = {started.communicate(timeout=60)[0].strip() for started in programs}
    assert len(urls) == 1
    assert urls == {embedded.status().url}
    assert len(embedded._find(home)) == 1
    log = (home / 'mongod.log').read_text()
    assert log.count('Waiting for connections') == 1


def test_the_server_outlives_the_process_group_that_started_it(home, database):
    with program(stdin=subprocess.PIPE, code=f'{PRINT_URL}; input()') as starter:
        starter.stdout.readline()
        os.killpg(starter.pid, signal.SIGKILL)
    database().command('ping')
    assert embedded.status().running


def test_a_start_whose_starter_was_killed_is_finished_by_the_next(home, database):
    with program() as starter:
        eventually((home / 'data' / 'mongod.lock').exists)
        os.killpg(starter.pid, signal.SIGKILL)
    database()['things'].insert_one({})
    assert len(embedded._find(home)) == 1


def test_data_is_kept_over_kill_9_of_the_server(home, database):
    database()['things'].insert_one({'_id': 1})
    killed = kill_server()
    assert database()['things'].find_one() == {'_id': 1}
    assert embedded.status().pid != killed


def test_data_is_kept_over_stop_and_start(home, database):
    database()['things'].insert_one({'_id': 1})
    assert embedded.stop() is True
    assert database()['things'].find_one() == {'_id': 1}


def test_change_streams_and_transactions_work(home, database):
    things = database()['things']
    things.insert_one({'_id': 0})
    client = things.database.client
    with things.watch() as stream:
        with client.start_session() as session, session.start_transaction():
            things.insert_one({'_id': 1}, session=session)
        assert next(stream)['documentKey'] == {'_id': 1}
    with client.start_session() as session:
        session.start_transaction()
        things.insert_one({'_id': 2}, session=session)
        session.abort_transaction()
    assert things.count_documents({}) == 2


def test_the_url_of_a_running_server_is_known_without_starting_anything(home, monkeypatch):
    url = embedded.url()
    monkeypatch.setattr(embedded, 'start', lambda: pytest.fail('started'))
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: pytest.fail('ran a program'))
    assert embedded.url() == url


def test_the_seconds_of_a_first_start_and_of_a_restart_are_recorded(home, record_testsuite_property):
    for name in ('first start', 'restart'):
        began = time.monotonic()
        embedded.start()
        record_testsuite_property(f'seconds of a {name}', round(time.monotonic() - began, 3))
        assert embedded.stop()


# -- stop and status

def test_status_follows_start_and_stop(home):
    assert embedded.status() == embedded.Status(False, home, mongod=str(embedded.find_mongod()))
    started = embedded.start()
    now = embedded.status()
    assert (now.running, now.pid, now.url, now.home) == (True, started.pid, embedded.url(), home)
    assert now.version[0].isdigit()
    assert Path(now.mongod).name == 'mongod'
    assert 0 <= started.uptime <= now.uptime < 60
    assert embedded.stop() is True
    assert not psutil.pid_exists(now.pid) or psutil.Process(now.pid).status() == psutil.STATUS_ZOMBIE
    assert embedded.status().running is False
    assert embedded.stop() is False


def test_status_and_stop_make_no_home_folder(home):
    assert (embedded.status().running, embedded.stop()) == (False, False)
    assert not home.exists()


def test_stop_says_what_to_do_when_the_server_does_not_end_in_time(home):
    pid = embedded.start().pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EmbeddedServerError, match=f'kill -9 {pid}'):
        embedded.stop(timeout=0.1)
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: not embedded.status().running)


def test_a_process_that_only_mentions_the_data_folder_is_not_taken_for_the_server(home):
    words = [sys.executable, '-c', 'input()', '--dbpath', str(home / 'data')]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as other:
        assert embedded.status().running is False
        assert embedded.stop() is False
        assert other.poll() is None
        other.communicate(b'\n')


def test_a_server_whose_state_file_is_lost_is_found_again(home):
    pid = embedded.start().pid
    (home / 'state.json').unlink()
    assert embedded.start().pid == pid


def test_a_server_whose_socket_was_removed_is_replaced(home, database):
    database()['things'].insert_one({'_id': 1})
    pid = embedded.status().pid
    (home / embedded.SOCKET_NAME).unlink()
    assert database()['things'].find_one() == {'_id': 1}
    assert embedded.status().pid != pid


# -- closed to others

def test_folders_and_socket_are_closed_to_others_and_no_port_is_open(home):
    home.mkdir(mode=0o755)
    pid = embedded.start().pid
    assert [mode(path) for path in (home, home / 'data', home / embedded.SOCKET_NAME)] == [0o700] * 3
    assert psutil.Process(pid).net_connections('inet') == []
    assert len(list(home.rglob('*.sock'))) == 1


def test_a_folder_of_other_things_is_left_as_it_is(home):
    home.mkdir(mode=0o755)
    (home / 'theirs').touch()
    with pytest.raises(EmbeddedServerError, match='has other things, and others may use it'):
        embedded.start()
    assert (mode(home), [path.name for path in home.iterdir()]) == (0o755, ['theirs'])
    home.chmod(0o700)
    embedded.start()


@pytest.mark.parametrize('name', ['long' * 40, 'com,ma', 'co:lon', 'ümläut', 'blank space'])
def test_a_home_whose_path_does_not_fit_a_socket_listens_in_a_short_private_folder(
        home, short, database, monkeypatch, name):
    monkeypatch.setenv('MINIBATCH_HOME', str(home / name))
    monkeypatch.setenv('XDG_RUNTIME_DIR', str(short))
    database()['things'].insert_one({})
    (path,) = short.glob(f'minibatch-*/*/{embedded.SOCKET_NAME}')
    assert [mode(path), mode(path.parent), mode(path.parent.parent)] == [0o700] * 3
    assert (home / name / 'data').is_dir()
    monkeypatch.delenv('XDG_RUNTIME_DIR')  # another session of the same user finds it all the same
    assert embedded.url().count(path.parent.name) == 1
    assert embedded.stop()


def test_a_link_in_place_of_the_short_folder_is_not_followed(home, short, monkeypatch):
    (short / 'elsewhere').mkdir()
    (short / f'minibatch-{os.getuid()}').symlink_to(short / 'elsewhere')
    monkeypatch.setenv('MINIBATCH_HOME', str(home / ('long' * 40)))
    monkeypatch.delenv('XDG_RUNTIME_DIR', raising=False)
    monkeypatch.setattr(tempfile, 'tempdir', str(short))
    with pytest.raises(EmbeddedServerError, match='MINIBATCH_HOME'):
        embedded.url()
    assert list((short / 'elsewhere').iterdir()) == []


def test_a_home_of_another_user_is_refused(home, monkeypatch):
    home.mkdir()
    owner = os.getuid()
    monkeypatch.setattr(os, 'getuid', lambda: owner + 1)
    with pytest.raises(EmbeddedServerError, match=r'not yours.*MINIBATCH_HOME'):
        embedded.url()


def test_a_server_of_another_user_is_not_taken_for_ones_own(home, monkeypatch):
    embedded.start()
    owner = os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'getuid', lambda: owner + 1)
        assert embedded.status().running is False


# -- the home on another host, moved, not usable

def write_state(home: Path, **changes: str) -> None:
    home.mkdir()
    state = {'host': socket.gethostname(), 'boot': embedded._boot_id(), 'socket': '', 'version': ''}
    (home / 'state.json').write_text(json.dumps(state | changes))


def test_a_home_in_use_on_another_host_is_refused_until_its_state_is_deleted(home):
    write_state(home, host='elsewhere.example', boot='another boot')
    with pytest.raises(DataFolderInUseError, match=r'elsewhere\.example.*MINIBATCH_HOME.*state\.json'):
        embedded.url()
    assert not (home / 'data').exists()
    (home / 'state.json').unlink()
    assert embedded.start().running


@pytest.mark.parametrize('changes', [{'boot': 'before the reboot'}, {'host': 'renamed.example'}])
def test_the_state_of_this_host_before_a_reboot_or_a_new_name_is_stale(home, changes):
    write_state(home, **changes, socket=str(home / embedded.SOCKET_NAME))
    assert embedded.start().running


def test_a_damaged_state_file_is_ignored(home):
    home.mkdir()
    (home / 'state.json').write_text('{"host": ')
    assert embedded.start().running


def test_a_copied_home_works_beside_the_one_it_was_copied_from(home, short, database, monkeypatch):
    database()['things'].insert_one({'_id': 1})
    embedded.stop()
    shutil.copytree(home, short / 'copy', ignore=shutil.ignore_patterns('*.sock'))
    embedded.start()
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'copy'))
    things = database()['things']
    things.insert_one({'_id': 2})
    assert things.count_documents({}) == 2
    assert embedded.stop()
    monkeypatch.setenv('MINIBATCH_HOME', str(home))
    assert database()['things'].count_documents({}) == 1


def test_a_home_renamed_under_a_running_server_is_refused(home, short, monkeypatch):
    embedded.start()
    home.rename(short / 'renamed')
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'renamed'))
    with pytest.raises(DataFolderInUseError, match='renamed'):
        embedded.url()
    (short / 'renamed').rename(home)


def test_a_home_that_cannot_be_written_to_is_an_error_that_names_the_variable(short, monkeypatch):
    (short / 'file').touch()
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'file' / 'home'))
    with pytest.raises(EmbeddedServerError, match=r'cannot write to .*MINIBATCH_HOME'):
        embedded.url()


def test_an_empty_HOME_is_an_error_that_names_the_variable(monkeypatch):
    for name in ('MINIBATCH_HOME', 'XDG_DATA_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', '')
    with pytest.raises(EmbeddedServerError, match='MINIBATCH_HOME'):
        embedded.url()


@pytest.mark.parametrize('named', [None, '~/minibatch'])
def test_a_user_without_a_home_is_told_the_variable(monkeypatch, named):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ('MINIBATCH_HOME', 'XDG_DATA_HOME', 'HOME'):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv('MINIBATCH_HOME', named)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    for ask in (embedded.url, embedded.status, embedded.stop):
        with pytest.raises(EmbeddedServerError, match=r'no home of user \d+\. Set MINIBATCH_HOME'):
            ask()


@pytest.mark.parametrize(('limit', 'value', 'advice'), [
    ('RLIMIT_NOFILE', 64, 'Too few files may be open'),  # it starts, and dies when it has opened more
    ('RLIMIT_FSIZE', 100_000, 'Files may not grow'),  # its log, too
    ('RLIMIT_FSIZE', 0, 'Files may not grow'),
])  # fmt: skip
def test_a_server_that_a_limit_of_the_system_ends_is_an_error_that_names_the_limit(home, limit, value, advice):
    code = f'import resource; resource.setrlimit(resource.{limit}, ({value}, {value})); {PRINT_URL}'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          check=False)
    assert 'EmbeddedServerError: ' in (last := done.stderr.splitlines()[-1])
    assert advice in last


def test_a_full_disk_is_an_error_that_says_so(wheel, short, monkeypatch):
    entry = {'s': 'E', 'msg': 'WiredTiger error message', 'attr': {'error': 28, 'message': {
        'msg': 'journal: failed to write', 'error_str': 'No space left on device'}}}
    last = {'s': 'F', 'msg': 'Fatal assertion', 'attr': {'msgid': 28520}}
    said = '\n'.join(map(json.dumps, [entry, last]))
    wheel.write_text(f"#!/bin/sh\necho '{said}' > $3\nexit 14\n")
    wheel.chmod(0o755)
    monkeypatch.setenv('MINIBATCH_MONGOD', str(wheel))
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'home'))
    with pytest.raises(EmbeddedServerError) as error:
        embedded.url()
    assert f'The disk of {short / "home"} is full' in str(error.value)
    assert 'journal: failed to write, No space left on device. Its log is' in str(error.value)


def test_a_file_system_without_locks_is_an_error_that_says_so(short, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(embedded.fcntl, 'flock', flock)
    monkeypatch.setenv('MINIBATCH_HOME', str(short))
    with pytest.raises(EmbeddedServerError, match=r'without file locks.*MINIBATCH_HOME'):
        embedded.url()


# -- finding mongod

def hide_mongod(monkeypatch: pytest.MonkeyPatch, wheel: Path | None = None) -> None:
    spec = wheel and types.SimpleNamespace(submodule_search_locations=[str(wheel)])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('MINIBATCH_MONGOD', raising=False)


@pytest.fixture
def wheel(short: Path) -> Path:
    """A mongod as a wheel brings it: not executable."""
    path = short / 'wheel' / 'db' / 'bin' / 'mongod'
    path.parent.mkdir(parents=True)
    path.write_text('#!/bin/sh\n')
    path.chmod(0o644)
    return path


def test_a_wrong_MINIBATCH_MONGOD_is_an_error_that_names_it(short, monkeypatch):
    monkeypatch.setenv('MINIBATCH_HOME', str(short))
    monkeypatch.setenv('MINIBATCH_MONGOD', '/no/such/mongod')
    with pytest.raises(NoMongodError, match="MINIBATCH_MONGOD is '/no/such/mongod'"):
        embedded.url()


def test_no_mongod_is_an_error_with_the_three_ways_to_get_one(short, monkeypatch):
    hide_mongod(monkeypatch)
    monkeypatch.setenv('MINIBATCH_HOME', str(short))
    with pytest.raises(NoMongodError) as error:
        embedded.url()
    for way in ("pip install '.[embedded]'", 'PATH', 'MINIBATCH_MONGO_URL'):
        assert way in str(error.value)
    assert embedded.status().mongod == ''
    assert not (short / 'state.json').exists()


def test_MINIBATCH_MONGOD_comes_before_the_PATH(wheel, monkeypatch):
    wheel.chmod(0o755)
    monkeypatch.setenv('MINIBATCH_MONGOD', str(wheel))
    assert embedded.find_mongod() == wheel


def test_the_mongod_of_the_wheel_is_made_executable(wheel, monkeypatch):
    hide_mongod(monkeypatch, wheel.parents[2])
    assert embedded.find_mongod() == wheel
    assert os.access(wheel, os.X_OK)


def test_a_mongod_that_may_not_be_made_executable_is_copied_to_the_home(wheel, short, monkeypatch):
    hide_mongod(monkeypatch, wheel.parents[2])
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'home'))
    chmod = Path.chmod

    def refuse(path: Path, mode: int) -> None:
        if path == wheel:
            raise PermissionError('not the owner')
        chmod(path, mode)
    monkeypatch.setattr(Path, 'chmod', refuse)
    found = embedded.find_mongod()
    assert found == short / 'home' / 'mongod'
    assert os.access(found, os.X_OK)
    assert found.read_text() == wheel.read_text()
    assert embedded.find_mongod() == found


def test_a_mongod_that_does_not_start_is_an_error_with_its_last_words(wheel, short, monkeypatch):
    wheel.write_text('#!/bin/sh\necho error while loading shared libraries: libcurl.so.4 >&2\nexit 127\n')
    wheel.chmod(0o755)
    monkeypatch.setenv('MINIBATCH_MONGOD', str(wheel))
    monkeypatch.setenv('MINIBATCH_HOME', str(short / 'home'))
    with pytest.raises(EmbeddedServerError, match=r'(?s)code 127.*MINIBATCH_MONGO_URL.*libcurl\.so\.4'):
        embedded.url()
    assert not (short / 'home' / 'state.json').exists()


def test_what_mongod_logs_before_it_gives_up_is_in_the_error(home):
    (home / 'data').mkdir(parents=True)
    (home / 'data' / 'storage.bson').write_text('damaged')
    with pytest.raises(EmbeddedServerError, match='storage engine metadata file'):
        embedded.url()


def test_a_big_log_is_put_aside_at_the_next_start(home):
    home.mkdir()
    with (home / 'mongod.log').open('wb') as log:
        log.truncate(embedded.LOG_SIZE + 1)
    embedded.start()
    assert (home / 'mongod.log.1').stat().st_size == embedded.LOG_SIZE + 1
    assert (home / 'mongod.log').stat().st_size < embedded.LOG_SIZE


def test_on_windows_the_error_asks_for_a_url(short, monkeypatch):
    monkeypatch.setenv('MINIBATCH_HOME', str(short))
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(EmbeddedServerError, match='MINIBATCH_MONGO_URL'):
        embedded.url()
    assert embedded.status().running is False
