"""The demo, run as a user runs it, and the count of what was lost."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import psutil
import pytest
from servers import eventually

import minibatch as mb
from minibatch import demo
from minibatch.connection import target
from minibatch.errors import ServerError

COMMAND = [sys.executable, '-m', 'minibatch', 'demo', '--seconds', '1.5', '--rate', '20', '--window', '0.5']
COUNTS = re.compile(r'^  (messages \w+|duplicates|windows processed) +(\d+)$', re.MULTILINE)


def counts(out):
    """{what: how many} of the summary."""
    return {what: int(number) for what, number in COUNTS.findall(out)}


@pytest.fixture
def run(url):
    """Run the demo to its end."""

    def run(*words):
        return subprocess.run([*COMMAND, '--url', url, *words], capture_output=True, text=True, timeout=60)

    return run


def test_without_a_terminal_it_prints_plain_lines_and_loses_nothing(run):
    done = run()
    assert (done.returncode, done.stderr) == (0, '')
    assert '\x1b' not in done.stdout
    assert re.search(r'^window \d\d:\d\d:\d\d +\d+ messages  cpu .* worker \d+$', done.stdout, re.MULTILINE)
    found = counts(done.stdout)
    assert found['messages appended'] >= 20
    assert found['messages processed'] == found['messages appended']
    assert (found['messages lost'], found['duplicates']) == (0, 0)
    assert found['windows processed'] >= 3


def test_the_first_line_says_where_mongodb_is(run, url):
    assert run().stdout.splitlines()[0].endswith(f', at {url}')


def test_the_counts_are_those_in_mongodb(run, db):
    found = counts(run().stdout)
    results = list(db.demo_windows.find())
    assert sorted(n for doc in results for n in doc['numbers']) == list(range(found['messages appended']))
    assert all(0 <= doc['cpu']['mean'] <= doc['cpu']['max'] for doc in results)
    assert set(results[0]['rates']) == {'read', 'written', 'received', 'sent'}


def test_windows_are_processed_in_other_processes(run, db):
    done = run()
    workers = {doc['worker'] for doc in db.demo_windows.find()}
    assert workers
    assert all(f'worker {worker}' in done.stdout for worker in workers)


def test_a_run_removes_what_earlier_ones_left_and_nothing_else(run, url, db):
    mb.stream('demo-mine', url=url).append({'a': 1})
    run()
    first = db.demo_runs.find_one()['_id']
    run()
    second = db.demo_runs.find_one()['_id']
    assert first != second
    names = {'demo-mine', second}
    for collection in ('buffer', 'window', 'position', 'group', 'demo_windows'):
        assert set(db[collection].distinct('stream')) <= names, collection
    assert set(db.stream.distinct('name')) == names
    assert db.buffer.count_documents({'stream': 'demo-mine'}) == 1


def test_a_run_leaves_one_that_is_still_going_alone(url, db):
    began = datetime.now(timezone.utc)
    db.demo_runs.insert_many([
        {'_id': 'going', 'began': began, 'ended': False},
        {'_id': 'dead', 'began': began - timedelta(days=2), 'ended': False},
    ])
    demo.remove_old_runs(target(url))
    assert db.demo_runs.distinct('_id') == ['going']


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


@contextlib.contextmanager
def running(url, *words):
    """The demo, in a process group of its own as in a terminal, once its first window was processed."""
    process = subprocess.Popen([*COMMAND, '--url', url, '--seconds', '600', *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        first = process.stdout.readline() + process.stdout.readline()
        assert '\nwindow ' in first, first
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_summary_and_without_orphans(url, number):
    with running(url) as process:
        children = children_of(process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, '')
    found = counts(out)
    assert found['messages processed'] == found['messages appended'] > 0
    assert found['messages lost'] == 0
    assert children
    eventually(lambda: not [child for child in children if alive(child)])


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_second_ctrl_c_does_not_wait_and_counts_what_was_not_processed(url):
    with running(url, '--window', '1') as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    found = counts(out)
    assert found['messages lost'] == found['messages appended'] - found['messages processed']
    assert process.returncode == (1 if found['messages lost'] else 0)


def test_the_first_ctrl_c_leaves_time_for_what_was_fed(url):
    run = demo.Demo(url, 1, 1, 1, 1)
    run._streaming = run._draining = True
    run._interrupt()
    assert not run._interrupted.is_set()
    run._insist(signal.SIGINT)
    assert run._interrupted.is_set()


def test_a_reader_that_goes_away_leaves_no_process_behind(url):
    with running(url) as process:
        children = children_of(process)
        process.stdout.close()
        eventually(lambda: process.poll() is not None)
        process.stdout = None
    eventually(lambda: not [child for child in children if alive(child)])


def test_in_a_terminal_it_shows_a_live_table(url):
    ours, theirs = pty.openpty()
    environment = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '100', 'LINES': '40', 'PYTHONIOENCODING': 'utf-8'}
    process = subprocess.Popen([*COMMAND, '--url', url], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                               close_fds=True)
    os.close(theirs)
    out = b''
    with contextlib.suppress(OSError):  # at its end
        while chunk := os.read(ours, 65536):
            out += chunk
    os.close(ours)
    assert process.wait(60) == 0
    seen = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', out.decode())
    assert re.search(r'window +msgs +cpu % +max +mem % +disk B/s +net B/s +worker', seen)
    assert re.search(r'^\d\d:\d\d:\d\d +\d+ +\d+ +\d+ ', seen, re.MULTILINE)
    assert re.search(r'^cpu +\d+ % +[▁▂▃▄▅▆▇█]+', seen, re.MULTILINE)
    assert re.search(r'\d+ messages appended, \d+ processed in \d+ windows \(\d s left', seen)
    assert counts(seen.replace('\r', ''))['messages lost'] == 0


@pytest.fixture
def finished(run, url, db):
    """A run that lost nothing: (where, name of its stream, messages acknowledged)."""
    appended = counts(run().stdout)['messages appended']
    return target(url), db.demo_runs.find_one()['_id'], appended


def test_a_result_that_is_missing_counts_as_lost(finished, db):
    missing = db.demo_windows.find_one_and_delete({})
    assert demo.tally(*finished).lost == len(missing['numbers'])


def test_a_message_that_is_no_longer_in_the_log_counts_as_lost(finished, db):
    db.buffer.delete_one({})
    found = demo.tally(*finished)
    assert (found.lost, found.appended) == (1, finished[2] - 1)


def test_a_result_that_came_twice_counts_as_duplicates_and_not_as_lost(finished, db):
    doc = db.demo_windows.find_one({}, {'_id': 0})
    db.demo_windows.insert_one(doc)
    found = demo.tally(*finished)
    assert (found.duplicates, found.lost) == (len(doc['numbers']), 0)


def test_a_message_that_was_acknowledged_and_never_stored_counts_as_lost(finished):
    where, name, acknowledged = finished
    assert demo.tally(where, name, acknowledged + 2).lost == 2


def test_lost_messages_make_the_exit_code_1(url, monkeypatch, capsys):
    honest = demo.tally
    monkeypatch.setattr(demo, 'tally', lambda where, name, acknowledged: honest(where, name, acknowledged + 1))
    assert demo.Demo(url, seconds=1, rate=10, window=0.5, workers=1).run() == 1
    assert counts(capsys.readouterr().out)['messages lost'] == 1


def test_a_feeder_that_fails_ends_the_demo_with_its_error(url, monkeypatch, capsys):
    def fail(self, number):
        if number == 5:
            raise ServerError('the disk is full')
        return read(self, number)

    read = demo.Meter.read
    monkeypatch.setattr(demo.Meter, 'read', fail)
    assert demo.Demo(url, seconds=600, rate=50, window=0.5, workers=1).run() == 1
    captured = capsys.readouterr()
    assert counts(captured.out) | {'windows processed': 0} == {
        'messages appended': 5, 'messages processed': 5, 'messages lost': 0, 'duplicates': 0, 'windows processed': 0
    }  # fmt: skip
    assert captured.err == 'error: ServerError: the disk is full\n'


def test_rates_are_per_second_of_the_time_the_messages_cover():
    messages = [{'seconds': 0.1, 'gained': {'sent': 300}}, {'seconds': 0.2, 'gained': {'sent': 0}}]
    assert demo.rates(messages) == {'sent': pytest.approx(1000)}


def test_a_message_has_the_counters_and_what_they_gained():
    meter = demo.Meter()
    first, second = meter.read(0), meter.read(1)
    assert second['gained']['read'] == second['counters']['read'] - first['counters']['read'] >= 0
    assert second['seconds'] > 0


@pytest.mark.parametrize(('value', 'text'), [(950, '950 '), (1200, '1.2 k'), (3.4e6, '3.4 M'), (2e9, '2.0 G')])
def test_amounts_are_short(value, text):
    assert demo.amount(value) == text
