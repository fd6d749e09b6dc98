"""The executors: windows of one and of 1000 messages, with a cheap and with a costly function.

All with two workers, Dask on a LocalCluster of two processes that is running already, on this machine. The cheap
function sums a field. The costly one also computes for some 10 ms a window, in Python, so that threads must take turns.
Rates are from the first result at the sink to the last. The floors: for the cheap function, the log read and summed by
hand in one process; for the costly one, the computation alone, in two processes that are given nothing but numbers.
"""

import atexit
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

from common import PROCESSES, Case, Totals, by_hand, consuming, fill, summed
from dask.distributed import LocalCluster

import minibatch as mb

BETTER = 'more'
WORKERS = 2


def compute(number):
    return sum(i * i for i in range(150_000))


def computed(window):
    compute(window.number)
    return summed(window)


@cache
def dask():
    """The address of a cluster, which is closed at the end."""
    cluster = LocalCluster(n_workers=WORKERS, threads_per_worker=1, host='127.0.0.1', dashboard_address='127.0.0.1:0')
    atexit.register(cluster.close)
    return cluster.scheduler_address.replace('tcp', 'dask')


def process(server, executor, fn, windows, size):
    number = windows * size
    stream, totals = server.stream(), Totals(number)
    fill(stream, number, batch=True)
    emitter = mb.make_emitter(
        stream.name, fn, size=size, sink=totals, executor=executor() if callable(executor) else executor,
        workers=None if callable(executor) else WORKERS,
    )  # fmt: skip
    with consuming(emitter):
        totals.wait()
    totals.check()
    return {'windows/s': totals.rate / size, 'messages/s': totals.rate}


def read_by_hand(server, windows, size):
    stream = server.stream()
    fill(stream, windows * size, batch=True)
    return {'messages/s': windows * size / by_hand(stream, windows * size, batch=True)[0]}


def compute_alone(windows):
    with ProcessPoolExecutor(WORKERS, PROCESSES) as pool:
        list(pool.map(compute, range(2 * WORKERS)))
        began = time.perf_counter()
        list(pool.map(compute, range(windows)))
        return {'windows/s': windows / (time.perf_counter() - began)}


def cases(server, given):
    ways = given.some(('inline', 'inline'), ('threads', 'threads'), ('processes', 'processes'), ('Dask', dask))
    found = []
    for size in (1, 1000):
        windows = given.count(30_000 if size == 1 else 1000, 20)
        floor = f'cheap, size={size}: read and summed'
        found.append(Case(floor, partial(read_by_hand, server, windows, size)))
        for name, executor in ways:
            run = partial(process, server, executor, summed, windows, size)
            found.append(Case(f'cheap, size={size}, {name}', run, floor))
    windows = given.count(600, 20)
    floor = 'costly: computed, nothing else'
    found.append(Case(floor, partial(compute_alone, windows)))
    for size in given.some(1, 1000):
        for name, executor in ways:
            run = partial(process, server, executor, computed, windows, size)
            found.append(Case(f'costly, size={size}, {name}', run, floor))
    return found
