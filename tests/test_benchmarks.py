"""All benchmarks in their quickest form. Each checks itself that its work was done; no figure is looked at."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
NAMES = sorted(path.stem.removeprefix('bench_') for path in BENCHMARKS.glob('bench_*.py'))
NUMBER = re.compile(r'-?[\d,]+(\.\d+)?(e-?\d+)?')


@pytest.fixture
def run():
    """Run benchmarks; what was printed."""

    def run(*arguments, code=0):
        program = [sys.executable, str(BENCHMARKS / 'run.py'), *arguments]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def tables(out):
    """{benchmark: rows of cells}; a row that goes on with the case above has no name."""
    table = re.compile(r'^(\w+): medians of .*\n\n +figure .* compared with\n((?:.+\n)+)', re.MULTILINE)
    return {
        name: [re.split(r' {2,}', line.rstrip()) for line in lines.splitlines()] for name, lines in table.findall(out)
    }


def test_every_benchmark_does_its_work_and_compares_it(run, url):
    found = tables(run('--quick', '--url', url))
    assert sorted(found) == NAMES
    for name, rows in found.items():
        figures = [row[1:] for row in rows]
        assert all(NUMBER.fullmatch(cell) for _, *cells in figures for cell in cells[:3]), name
        assert {len(cells) for cells in figures} == {2, 5}, f'{name}: either a floor, or a figure with floor and ratio'


def test_a_benchmark_that_is_not_there_is_named_with_those_that_are(run):
    error = run('drains', code=2)
    assert "there is no benchmark 'drains'" in error
    assert 'drain' in error.partition('there are')[2]
