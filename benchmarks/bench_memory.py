"""Resident memory of a consumer while it drains a backlog.

It is in a process of its own, with 2 workers, and windows of 100 single messages or 1000 of record batches; "workers"
is the largest of them. "Growth" is the peak after a fifth of the messages by the peak until then: 1 is flat. To be
reached, by the design: 150 MB in the parent, and flat.
"""

import threading

import psutil
from common import Case, Totals, consuming, fill, in_process, summed

import minibatch as mb

BETTER = 'less'
MEGABYTE = 1e6
SAMPLE = 0.02  # seconds between two looks
NUMBERS = {'quick': (5000, 20_000), 'short': (100_000, 1_000_000), 'full': (1_000_000, 1_000_000)}
TO_REACH = {'parent, MB': 150, 'parent, growth': 1.0, 'workers, growth': 1.0}


def sizes(process):
    """Bytes of a process, and of the largest of its workers."""
    found = [0]
    for child in process.children():
        try:
            found.append(child.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return process.memory_info().rss, max(found)


def drain(place, name, number, size):
    mb.connectdb(*place)
    me, totals, samples, over = psutil.Process(), Totals(number), [], threading.Event()

    def watch():
        last = False
        while not last:
            last = over.wait(SAMPLE if samples else 0)
            samples.append((totals.messages, *sizes(me)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with consuming(mb.make_emitter(name, summed, size=size, workers=2, sink=totals)):
        totals.wait()
        over.set()
    watcher.join()
    totals.check()
    found = {}
    for i, who in enumerate(('parent', 'workers'), 1):
        early = max(sample[i] for sample in samples if sample[0] < number / 5)
        late = max(sample[i] for sample in samples if sample[0] >= number / 5)
        found[f'{who}, MB'] = max(early, late) / MEGABYTE
        found[f'{who}, growth'] = late / early
    return found


def cases(server, given):
    def case(kind, number, size, batch):
        def run():
            stream = server.stream()
            fill(stream, number, batch)
            return in_process(drain, server.place, stream.name, number, size)

        return Case(f'{number:,} {kind}', run, TO_REACH)

    singles, batched = NUMBERS[given.size]
    return [case('singles', singles, 100, False), case('batched', batched, 1000, True)]
