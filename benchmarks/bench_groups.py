"""Consumer groups that all read one stream.

Each is in a thread of this process, and reads windows of 1000 from record batches. Messages count once for each group.
They are deleted when the last group has processed them.
"""

import time

from common import Case, Totals, by_hand, consuming, fill, summed

import minibatch as mb
from minibatch.testing import InlineExecutor

BETTER = 'more'


def process(server, number, groups):
    stream = server.stream()
    totals = [Totals(number) for _ in range(groups)]
    emitters = [
        mb.make_emitter(
            stream.name, summed, size=1000, group=f'group{i}', executor=InlineExecutor, workers=1, sink=sink
        )
        for i, sink in enumerate(totals)
    ]
    for emitter in emitters:
        emitter.run(blocking=False)  # from now on the stream keeps messages for this group
    fill(stream, number, batch=True)
    began = time.perf_counter()
    with consuming(*emitters):
        for sink in totals:
            sink.wait()
    seconds = time.perf_counter() - began
    for sink in totals:
        sink.check()
    assert server.db.buffer.find_one({'stream': stream.name, 'offset': {'$gte': 0}}) is None, 'messages are left'
    return {'messages/s': number * groups / seconds}


def floor(server, number, readers):
    stream = server.stream()
    fill(stream, number, batch=True)
    return {'messages/s': number * readers / sum(by_hand(stream, number, batch=True, readers=readers))}


def cases(server, given):
    number = given.count(400_000)
    found = []
    for groups in given.some(1, 4, 16):
        plural = 's' if groups > 1 else ''
        readers = f'{groups} reader{plural}, then deleted'
        found.append(Case(readers, lambda groups=groups: floor(server, number, groups)))
        found.append(Case(f'{groups} group{plural}', lambda groups=groups: process(server, number, groups), readers))
    return found
