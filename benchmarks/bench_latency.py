"""From when a message is due to be appended until the function has it.

Windows are of one message. One process appends at a steady rate from 8 threads; a message that waits for one of them is
late, and that counts. The maximum is how many a second are through when they append as fast as they can. The floor
inserts each message at majority; its consumer has a change stream, which brings the document.
"""

import threading
import time

from common import PATIENCE, Case, consuming, in_processes, in_threads, number_text, record, sum_of

import minibatch as mb

BETTER = 'less'
THREADS = 8
SECONDS = {'quick': (0.5, 0.2), 'short': (5, 2), 'full': (60, 20)}  # at 20/s, at other rates
PERCENTILES = {'p50': 0.5, 'p99': 0.99, 'p99.9': 0.999}
WARM_UP = -1  # the value of the message that shows that the consumer listens


class Arrivals:
    """A sink for (value, seconds late, time) of messages."""

    def __init__(self, number):
        self.number, self.seen, self.warm, self.complete = number, [], threading.Event(), threading.Event()

    def put(self, arrival):
        if arrival[0] == WARM_UP:
            self.warm.set()
            return
        self.seen.append(arrival)
        if len(self.seen) == self.number:
            self.complete.set()

    def figures(self):
        """Percentiles in milliseconds, those that so few messages can tell."""
        assert self.complete.wait(PATIENCE), f'{len(self.seen)} of {self.number} after {PATIENCE:g} seconds'
        assert sum(value for value, _, _ in self.seen) == sum_of(self.number), 'not each message once'
        late = sorted(seconds for _, seconds, _ in self.seen)
        return {
            f'{name}, ms': late[int(share * self.number)] * 1000
            for name, share in PERCENTILES.items()
            if self.number * (1 - share) >= 1 or name == 'p50'
        }

    @property
    def rate(self):
        """Messages a second, from when the first was due until the last was there."""
        return self.number / (max(at for _, _, at in self.seen) - min(at - late for _, late, at in self.seen))


def arrival(data):
    now = time.monotonic()  # the same clock in all processes
    return data['v'], now - data['due'], now


def arrived(window):
    return arrival(window.data[0])


def appending(process, ours, place, name, rate, number):
    """Append `number` messages at `rate` a second, or as fast as it goes, to a stream or by hand to a collection."""
    mb.connectdb(*place)
    if ours:
        append = mb.stream(name).append
    else:
        collection = mb.connection.current().db[name]

        in_threads([collection.find_one] * THREADS)  # a connection for each

        def append(data):
            collection.insert_one(record(data['v'], [data]))

    def work():
        began = time.monotonic()

        def thread(first):
            for n in range(first, number, THREADS):
                due = began + n / rate if rate else time.monotonic()
                time.sleep(max(due - time.monotonic(), 0))
                append({'v': n, 'due': due})

        in_threads([lambda first=first: thread(first) for first in range(THREADS)])

    return work


def process(server, rate, number):
    stream, arrivals = server.stream(), Arrivals(number)
    with consuming(mb.make_emitter(stream.name, arrived, size=1, workers=1, sink=arrivals)):
        stream.append({'v': WARM_UP, 'due': 0.0})
        assert arrivals.warm.wait(PATIENCE)
        in_processes(1, appending, True, server.place, stream.name, rate, number)
        return arrivals.figures(), arrivals.rate


def floor(server, rate, number):
    collection, arrivals = server.collection(), Arrivals(number)

    def consume():
        for event in changes:
            arrivals.put(arrival(event['fullDocument']['data']))
            if arrivals.complete.is_set():
                return

    with collection.watch([{'$match': {'operationType': 'insert'}}], batch_size=1000) as changes:
        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        collection.insert_one(record(WARM_UP, [{'v': WARM_UP, 'due': 0.0}]))
        assert arrivals.warm.wait(PATIENCE)
        in_processes(1, appending, False, server.place, collection.name, rate, number)
        figures = arrivals.figures()
        thread.join()
    return figures


def cases(server, given):
    slow, fast = SECONDS[given.size]
    _, maximum = process(server, None, int(1000 * fast))
    print(f'  the maximum: {number_text(maximum)} messages/s')
    found = []
    for rate, seconds, what in (
        (20, slow, '20/s'), (500, fast, '500/s'), (maximum / 2, fast, f'{maximum / 2:,.0f}/s, half of max')
    ):  # fmt: skip
        load, by_hand = (rate, max(round(rate * seconds), 2)), f'by hand, {what}'
        found.append(Case(by_hand, lambda load=load: floor(server, *load)))
        found.append(Case(f'minibatch, {what}', lambda load=load: process(server, *load)[0], by_hand))
    return found
