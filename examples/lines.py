"""A source and a sink of your own: the lines of a file, and lines that are added to a file.

    python examples/lines.py

follows a file while it is written, and writes the sum of every ten numbers in it to another one.
"""

import json
import os
import tempfile
import threading
import time
from pathlib import Path

import minibatch as mb


class LinesSource:
    """Brings the lines of a file, also those that are added later."""

    def __init__(self, path):
        self.path, self.cancelled = Path(path).resolve(), threading.Event()

    def stream(self, stream):
        self.cancelled.clear()
        producer = stream.producer(f'lines{self.path}')
        with open(self.path, 'rb') as file:
            while not self.cancelled.wait(0.05):
                file.seek(producer.token or 0)
                while (line := file.readline()).endswith(b'\n'):
                    producer.append({'line': line.decode(errors='replace')}, token=file.tell())

    def cancel(self):
        self.cancelled.set()


class LinesSink:
    """Adds each result to a file, as a line of JSON."""

    def __init__(self, path):
        self.path = path

    def put(self, messages):
        results = messages if isinstance(messages, list) else [messages]
        lines = ''.join(json.dumps(result) + '\n' for result in results)
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())  # when put returns, the result is safe


def total(window):
    return {'window': window.number, 'total': sum(int(message['line']) for message in window.data)}


def main():
    with tempfile.TemporaryDirectory() as folder:
        numbers, totals = Path(folder, 'numbers.txt'), Path(folder, 'totals.txt')
        numbers.touch()
        stream = mb.stream('example-lines')
        stream.clear()
        source, sink = LinesSource(numbers), LinesSink(totals)
        consumer = mb.make_emitter('example-lines', total, size=10, workers=1, source=source, sink=sink)
        consumer.start()
        with open(numbers, 'a', encoding='utf-8') as file:
            for number in range(50):
                print(number, file=file, flush=True)
        while not totals.exists() or totals.read_text().count('\n') < 5:
            time.sleep(0.1)
        consumer.stop()
        print(totals.read_text(), end='')


if __name__ == '__main__':
    main()
