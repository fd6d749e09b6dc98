"""Windows of one message, while so many more messages wait.

They are at the head of the backlog, and the clock runs from the first result on. The stream of each size is filled
once; each round goes on where the one before ended.
"""

from common import Case, Totals, by_hand, consuming, fill, sum_of, summed

import minibatch as mb

BETTER = 'more'
SIZES = {'quick': (100, 1000, 10_000), 'short': (10_000, 100_000, 1_000_000), 'full': (10_000, 100_000, 1_000_000)}


class Backlog:
    """A stream with `waiting` messages behind those that are processed in all rounds."""

    def __init__(self, server, waiting, at_once, rounds):
        self.server, self.at_once = server, at_once
        self.size = waiting + 2 * at_once * rounds  # of those that are in flight at a stop some are processed, too
        self.stream = None
        self.messages = self.total = 0

    def process(self):
        if self.stream is None:
            self.stream = self.server.stream()
            fill(self.stream, self.size, batch=False)
        totals = Totals(self.at_once)
        with consuming(mb.make_emitter(self.stream.name, summed, size=1, workers=1, sink=totals)):
            totals.wait()
        self.messages += totals.messages
        self.total += totals.total
        assert self.total == sum_of(self.messages), 'not each message once'
        return {'messages/s': totals.rate}


def floor(server, number):
    stream = server.stream()
    fill(stream, number, batch=False)
    reading, deleting = by_hand(stream, number, batch=False)
    return {'messages/s': number / (reading + deleting)}


def cases(server, given):
    number = given.count(10_000)
    smallest, *larger = SIZES[given.size]

    def case(waiting, against):
        backlog = Backlog(server, waiting, number, given.repeat)
        return Case(f'size=1, {waiting:,} waiting', backlog.process, against)

    first = case(smallest, 'read, summed and deleted')
    return [Case(first.against, lambda: floor(server, number)), first, *[case(n, first.name) for n in larger]]
