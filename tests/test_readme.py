"""What the README shows is what happens."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import eventually

README = Path(__file__).parent.parent / 'README.rst'


def code_blocks():
    blocks = re.findall(r'\.\. code-block:: python\n\n((?:    .*\n|\n)+)', README.read_text(encoding='utf-8'))
    return [re.sub('^    ', '', block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.integration
def test_the_quick_start_prints_what_the_readme_says(tmp_path):
    produce, consume = code_blocks()
    subprocess.run([sys.executable, '-c', produce], check=True, timeout=60)
    script, output = tmp_path / 'consume.py', tmp_path / 'output'
    script.write_text('print("begun", flush=True)\n' + consume)
    with output.open('w') as out, subprocess.Popen([sys.executable, script], stdout=out) as process:
        try:
            eventually(lambda: '}' in output.read_text(), message='no window was printed')
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert output.read_text().splitlines() == ['begun', "[{'a': 1}, {'a': 2}]"]
    assert "``[{'a': 1}, {'a': 2}]``" in README.read_text(encoding='utf-8')
