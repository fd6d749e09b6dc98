"""A backlog processed in windows, until the last message is deleted.

The function sums a field. The clock runs from the start of the consumer, with that of its workers, until these are
gone, all windows are committed and all messages deleted. "Steady" is from the first result at the sink to the last,
when much of the deleting is still to come; the steady floor reads and sums only.
"""

import time

from common import Case, Totals, by_hand, consuming, fill, summed

import minibatch as mb
from minibatch.testing import InlineExecutor

BETTER = 'more'
STEADY = 10  # windows; fewer are no steady state


def drain(server, number, size, batch, **options):
    stream = server.stream()
    fill(stream, number, batch)
    totals = Totals(number)
    emitter = mb.make_emitter(stream.name, summed, size=size, sink=totals, **options)
    began = time.perf_counter()
    with consuming(emitter):
        totals.wait()
    seconds = time.perf_counter() - began
    totals.check()
    assert server.db.buffer.find_one({'stream': stream.name, 'offset': {'$gte': 0}}) is None, 'messages are left'
    steady = {'messages/s, steady': totals.rate} if number >= STEADY * size else {}
    return {'messages/s': number / seconds, **steady}


def floor(server, number, batch):
    stream = server.stream()
    fill(stream, number, batch)
    reading, deleting = by_hand(stream, number, batch)
    return {'messages/s': number / (reading + deleting), 'messages/s, steady': number / reading}


def cases(server, given):
    ways = given.some(
        ('1 worker', {'workers': 1}),
        ('2 workers', {'workers': 2}),
        ('inline', {'executor': InlineExecutor, 'workers': 1}),
    )
    found = []
    for batch, kind in ((False, 'singles'), (True, 'record batches')):
        number = given.count(1_000_000 if batch else 100_000)
        by_hand_of = f'{kind} read, summed and deleted'
        found.append(Case(by_hand_of, lambda number=number, batch=batch: floor(server, number, batch)))
        for size in given.some(1, 100, 1000):
            for way, options in ways:
                messages = given.count(10_000) if size == 1 else number

                def run(messages=messages, size=size, batch=batch, options=options):
                    return drain(server, messages, size, batch, **options)

                found.append(Case(f'{kind}, size={size}, {way}', run, by_hand_of))
    return found
