"""How fast a backlog is drained, beside the same by hand with pymongo, all at w: majority.

    python benchmarks/bench_drain.py [--url URL] [--repeat 3] [--quick]

The function sums a field. The clock runs from the start of the consumer, with that of its workers, until all windows
are committed, all messages deleted and the workers gone; "steady" is from the first result at the sink to the last,
when most of the deleting is still to come.
The floor reads in bulk, sums and deletes by range, in one process; it keeps no windows, and would lose or repeat
messages in a crash.
"""

import threading
import time
from concurrent.futures import Future

from common import Server, arguments, compare, message, timed

import minibatch as mb

STEP = 5000  # messages the floor reads at once, if they are stored one by one


def summed(window):
    return len(window), sum(data['v'] for data in window.data)


class Inline:
    """An executor that runs in this process, at once."""

    def submit(self, fn):
        done = Future()
        done.set_result(fn())
        return done


class Totals:
    """A sink that adds up, and tells when it has seen enough."""

    def __init__(self, count):
        self.count, self.messages, self.total = count, 0, 0
        self.complete = threading.Event()
        self.first = self.last = 0.0

    def put(self, result):
        self.first = self.first or time.perf_counter()
        self.messages += result[0]
        self.total += result[1]
        if self.messages >= self.count:
            self.last = time.perf_counter()
            self.complete.set()


def fill(stream, count, batch):
    """A backlog, as record batches, or one message a document as `append` writes them."""
    if batch:
        stream.append_many(map(message, range(count)))
        return
    # The fastest way to what `append` stores: many threads, whose appends share an insert.
    def work(first):
        for number in range(first, count, 64):
            stream.append(message(number))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drain(server, count, size, batch, **options):
    """Messages a second: overall, and steady."""
    stream = server.stream()
    fill(stream, count, batch)
    totals = Totals(count)
    emitter = mb.make_emitter(stream.name, summed, size=size, sink=totals, **options)
    began = time.perf_counter()
    emitter.start()
    assert totals.complete.wait(600), f'{totals.messages} of {count} after 10 minutes'
    emitter.stop()
    seconds = time.perf_counter() - began
    assert (totals.messages, totals.total) == (count, count * (count - 1) // 2), 'not each message once'
    assert server.db.buffer.find_one({'stream': stream.name, 'offset': {'$gte': 0}}) is None, 'messages are left'
    return count / seconds, count / (totals.last - totals.first)


def floor(server, count, batch):
    """Messages a second, read in order of the offsets, summed, deleted."""
    stream = server.stream()
    fill(stream, count, batch)
    buffer = server.db.buffer
    producer = buffer.find_one({'stream': stream.name, 'offset': {'$gte': 0}})['producer']
    log = {'stream': stream.name, 'producer': producer}
    seen = [0, 0]

    def work():
        step = 20_000 if batch else STEP
        for first in range(0, count, step):
            span = {**log, 'offset': {'$gte': first, '$lt': first + step}}
            for record in buffer.find(span, batch_size=STEP).sort('offset', 1):
                messages = record['batch'] if 'batch' in record else [record['data']]
                seen[0] += len(messages)
                seen[1] += sum(data['v'] for data in messages)
            buffer.delete_many(span)

    seconds = timed(work)
    assert seen == [count, count * (count - 1) // 2]
    return count / seconds


def main():
    given = arguments(__doc__.splitlines()[0])
    singles, batched, ones = 100_000 // given.scale, 1_000_000 // given.scale, 10_000 // given.scale
    with Server(given.url) as server:
        floor_single, floor_batch = 'floor: single messages', 'floor: record batches of 1000'

        def case(what, count, size, batch, **options):
            against = floor_batch if batch else floor_single
            return what, lambda: drain(server, count, size, batch, **options), against

        compare([
            (floor_single, lambda: floor(server, singles, False), None),
            case('single messages, size=100, 2 workers', singles, 100, False, workers=2),
            case('single messages, size=100, inline', singles, 100, False, executor=Inline, workers=1),
            (floor_batch, lambda: floor(server, batched, True), None),
            case('record batches, size=1000, 2 workers', batched, 1000, True, workers=2),
            case('record batches, size=1000, inline', batched, 1000, True, executor=Inline, workers=1),
            case('single messages, size=1, 2 workers', ones, 1, False, workers=2),
            case('single messages, size=1, inline', ones, 1, False, executor=Inline, workers=1),
        ], given.repeat)  # fmt: skip


if __name__ == '__main__':
    main()
