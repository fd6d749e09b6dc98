"""The examples, each run as a user runs it."""

import os
import re
import shutil
import subprocess
import sys
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
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, '')
        return done.stdout

    return run


def test_quickstart_processes_every_pair_once(run):
    out = run('quickstart.py')
    assert sorted(re.findall(r'mean of \[(.*?)\]', out)) == sorted(
        ['20.5, 20.7', '21.0, 21.4', '21.6, 21.5', '21.1, 20.8', '20.6, 20.2']
    )
    assert out.splitlines()[-1] == '10 messages appended, all processed'


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


def test_the_sensors_lose_nothing_while_the_consumer_is_away(run, db):
    if not shutil.which('mosquitto', path=f'{os.environ.get("PATH", "")}:/usr/sbin:/usr/local/sbin'):
        missing('there is no mosquitto; on Debian and Ubuntu: apt-get install mosquitto')
    out = run('sensors.py', '1200')
    assert out.splitlines()[-1] == '1,200 measurements, 109.4 mm; by pandas 1,200 and 109.4 mm'
    assert sum(doc['hours'] for doc in db.example_sensors_days.find()) == 1200


@pytest.mark.parametrize('command', [['weather.py'], ['flights.py', '1000']])
def test_an_example_can_be_run_again(run, command):
    assert run(*command).splitlines()[-1] == run(*command).splitlines()[-1]


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.py')), ids=lambda path: path.name)
def test_every_example_is_in_the_list_and_short(path):
    assert f'`{path.name} <{path.name}>`_' in (EXAMPLES / 'README.rst').read_text(encoding='utf-8')
    assert len(path.read_text(encoding='utf-8').splitlines()) < 80
