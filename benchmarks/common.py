"""What the benchmarks share: arguments, the server, interleaved repeats, and the table."""

import argparse
import statistics
import time

import pymongo

import minibatch as mb
from minibatch.connection import masked

MESSAGE = {'name': 'sensor', 'x': 1.5}
DBNAME = 'minibatch_benchmark'


def arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--url', help='a MongoDB URL; default: the environment, else the embedded MongoDB')
    parser.add_argument('--repeat', type=int, default=3, help='how often; the medians are printed (3)')
    parser.add_argument('--quick', action='store_true', help='a tenth of the messages, once')
    given = parser.parse_args()
    given.scale = 10 if given.quick else 1
    given.repeat = 1 if given.quick else given.repeat
    return given


def message(number):
    return {'v': number, **MESSAGE}


class Server:
    """A database of its own on the server, dropped at the end; writes are at majority."""

    def __init__(self, url):
        mb.connectdb(url, DBNAME)
        from minibatch.connection import current

        self.target = current()
        self.db = self.target.majority
        self.streams = 0

    def __enter__(self):
        self.target.client.drop_database(DBNAME)
        version = self.target.client.server_info()['version']
        print(f'MongoDB {version} at {masked(self.target.url)}, w: {self.target.db.write_concern.document["w"]}, '
              f'pymongo {pymongo.version}')
        return self

    def __exit__(self, *exc):
        self.target.client.drop_database(DBNAME)

    def stream(self, **options):
        """A stream nothing was appended to yet."""
        self.streams += 1
        return mb.stream(f'benchmark-{self.streams}', **options)

    def collection(self):
        """A collection for the floor, with the index that the log has."""
        self.streams += 1
        collection = self.db[f'floor_{self.streams}']
        collection.create_index([('stream', 1), ('producer', 1), ('offset', 1)], unique=True)
        return collection


def timed(fn, *args):
    began = time.perf_counter()
    fn(*args)
    return time.perf_counter() - began


def compare(cases, repeat):
    """Run the cases in turn, `repeat` times; print what each reaches beside its floor.

    Args:
        cases: (what, run, floor's name or None). `run()` returns messages a second, or (that, the same steady).
            A floor is a case itself, and stands before those that are compared with it.
    """
    reached = {what: [] for what, *_ in cases}
    for _ in range(repeat):
        for what, run, _ in cases:
            rates = run()
            reached[what].append(rates if isinstance(rates, tuple) else (rates, rates))
    print(f'{f"messages per second, medians of {repeat}":45}{"":>12}{"of floor":>10}{"steady":>12}')
    for what, _, floor in cases:
        overall, steady = ([rates[i] for rates in reached[what]] for i in (0, 1))
        # Each with the floor of its own round, so that a noisy neighbour slows both.
        shares = [a / b[0] for a, b in zip(overall, reached[floor], strict=True)] if floor else []
        share = f'{statistics.median(shares):.2f}' if shares else 'floor'
        apart = f'{statistics.median(steady):12,.0f}' if steady != overall else ''
        print(f'{what:45}{statistics.median(overall):12,.0f}{share:>10}{apart}')
