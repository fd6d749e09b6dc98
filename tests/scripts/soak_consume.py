"""A consumer of soak.py: python soak_consume.py URL GROUP FILE OPTIONS, options of streaming as JSON.

The function sums a window up in ranges [source, first seq, seq behind the last], which go to the collection named like
the group: in group a through an exactly-once sink, in group b through a plain one. Each call is a line in the file. In
group b the function fails at poisoned messages, and in one of a hundred windows at the first attempt.
"""
import json
import random
import sys

import minibatch as mb
from minibatch.contrib.mongodb import MongoSink

url, group, path, options = *sys.argv[1:4], json.loads(sys.argv[4])


def process(window):
    ranges = []
    for data in window.data:
        if ranges and ranges[-1][0] == data['source'] and ranges[-1][2] == data['seq']:
            ranges[-1][2] += 1
        else:
            ranges.append([data['source'], data['seq'], data['seq'] + 1])
    with open(path, 'a') as file:
        file.write(f'{window.number} {sum(end - start for _, start, end in ranges)}\n')
    if group == 'b' and any(data['poisoned'] for data in window.data):
        raise ValueError('poisoned')
    if group == 'b' and window.attempt == 1 and random.random() < 0.01:
        raise RuntimeError('now and then')
    return {'window': window.id, 'number': window.number, 'ranges': ranges} if ranges else []


sink = MongoSink(mb.connectdb(url)[group], exactly_once=group == 'a')
mb.streaming('soak', process, group=group, sink=sink, url=url, **options)
