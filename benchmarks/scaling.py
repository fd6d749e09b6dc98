"""The figures of docs/scaling.rst: how far one planner goes, what messages take in MongoDB, what listeners cost.

    python benchmarks/scaling.py [--url URL] [--quick] [planner] [storage] [listeners]

A planner is measured with an executor for which every window is done at once. So this is what planning, claiming,
committing and deleting can do, however many workers there are.
"""

import argparse
import os
import threading
import time
from concurrent.futures import Future

import bson
import psutil
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from common import PROCESSES, Server, fill, message, number_text

import minibatch as mb
from minibatch import connection, store
from minibatch.worker import Outcome

SECTIONS = ('planner', 'storage', 'listeners')


class NoWork:
    """An executor for which every window is done when it is submitted."""

    workers = 8

    def submit(self, task):
        done = Future()
        done.set_result([Outcome(work.number, seconds=1e-4) for work in task.works])
        return done


# --- planner


def plan(place, size, windows, ready, begin, results):
    """Put (windows, seconds, CPU seconds of this process) of a planner that goes through a backlog."""
    mb.connectdb(*place)
    with mb.stream(f'planner-{os.getpid()}') as stream:
        stream.append_many({'v': i, 'name': 'sensor', 'x': 1.5} for i in range(windows * size))
        emitter = mb.make_emitter(stream.name, len, stream=stream, size=size, executor=NoWork())
        ready.wait()
        begin.wait()
        cpu, began = time.process_time(), time.perf_counter()
        emitter.run(blocking=False)
        results.put((windows, time.perf_counter() - began, time.process_time() - cpu))


def planners(server, quick):
    print('planners  size  windows/s  messages/s  CPU of each planner  CPU of mongod, us a window')
    for count, size, windows in ((1, 1, 40_000), (1, 100, 20_000), (1, 1000, 4000), (2, 1, 40_000), (4, 1, 20_000)):
        windows //= 20 if quick else 1
        ready, begin, results = PROCESSES.Barrier(count + 1), PROCESSES.Event(), PROCESSES.Queue()
        given = server.place, size, windows, ready, begin, results
        each = [PROCESSES.Process(target=plan, args=given, daemon=True) for _ in range(count)]
        for process in each:
            process.start()
        ready.wait()
        mongod = cpu_of(server)
        begin.set()
        done = [results.get(timeout=600) for _ in each]
        mongod = (cpu_of(server) - mongod) / (count * windows)
        rate = sum(windows / seconds for windows, seconds, _ in done)
        cpu = sum(cpu for _, _, cpu in done) / (count * windows)
        print(f'{count:8}  {size:4}  {number_text(rate):>9}  {number_text(rate * size):>10}  {cpu * 1e6:19.0f}  '
              f'{mongod * 1e6:26.0f}', flush=True)  # fmt: skip
        for process in each:
            process.join()


# --- storage


def storage(server, quick):
    """Bytes a message: as BSON, on disk, in the indexes, and in the oplog, from which the replicas read."""
    number, sample = 5000 if quick else 200_000, 5000  # the oplog keeps no more than its size
    print(f'a message of {len(bson.encode(message(0)))} bytes, stored in  BSON  on disk  indexes  oplog   (bytes each)')
    for kind, batch in (('a document each', False), ('record batches of 1000', True)):
        server.db.buffer.drop()
        store.ensure_indexes(server.db)
        fill(server.stream(), number, batch)
        server.target.client.admin.command('fsync')
        found = server.db.command('collStats', 'buffer')
        figures = [found[name] / number for name in ('size', 'storageSize', 'totalIndexSize')]
        stream, before = server.stream(), oplog_of(server).find_one(sort=[('$natural', -1)])['ts']
        fill(stream, sample, batch)
        added = sum(len(entry.raw) for entry in oplog_of(server).find({'ts': {'$gt': before}}))
        print(f'{kind:32}', *(f'{figure:7.1f}' for figure in [*figures, added / sample]), flush=True)


def oplog_of(server):
    options = CodecOptions(document_class=RawBSONDocument)
    return server.target.client.local.get_collection('oplog.rs', codec_options=options)


# --- listeners


def listeners(server, quick):
    """What change streams cost mongod: CPU for each event and listener, at 200 messages a second, or what it can."""
    seconds, stream = 1 if quick else 10, server.stream()
    print('listeners  messages/s  CPU of mongod, s/s  more than without, us an event and listener')
    alone = 0.0
    for count in (0, 1, 8, 32):
        stop, counts = threading.Event(), [0] * count
        threads = [threading.Thread(target=listen, args=(server, stop, counts, i)) for i in range(count)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        began, cpu, sent = time.perf_counter(), cpu_of(server), 0
        while time.perf_counter() < began + seconds:
            stream.append({'v': sent})
            sent += 1
            time.sleep(max(began + sent / 200 - time.perf_counter(), 0))
        share = (cpu_of(server) - cpu) / (time.perf_counter() - began)
        alone = alone or share
        each = (share - alone) / (sent / seconds * count) * 1e6 if count else 0
        print(f'{count:9}  {sent / seconds:10.0f}  {share:18.2f}  {each:42.0f}', flush=True)
        deadline = time.monotonic() + 60
        while count and min(counts) < sent:
            assert time.monotonic() < deadline, 'a listener has not heard all'
            time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join()


def listen(server, stop, counts, i):
    with store.watch_inserts(server.target.majority, 0.2) as events:
        while not stop.is_set():
            counts[i] += events.try_next() is not None


def cpu_of(server):
    pid = server.db.command('serverStatus')['pid']
    return sum(psutil.Process(pid).cpu_times()[:2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sections', nargs='*', help=', '.join(SECTIONS))
    parser.add_argument('--url', help='a MongoDB URL; default: the environment, else the embedded MongoDB')
    parser.add_argument('--quick', action='store_true', help='to see that it works')
    given = parser.parse_args()
    for section in given.sections or SECTIONS:
        with Server(given.url, 'scaling') as server:
            print(f'\nload of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
            {'planner': planners, 'storage': storage, 'listeners': listeners}[section](server, given.quick)
    connection.disconnect()


if __name__ == '__main__':
    main()
