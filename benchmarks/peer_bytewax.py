"""The same windows by bytewax, with one worker each.

Messages are stored one by one; the sum of each window is stored at majority. bytewax reads the collection through a
source with resume state, of one partition, 1000 documents at a time, and its recovery is on, with snapshots every
second (its default is ten) in SQLite files. It repeats what came after the last snapshot when it is killed, and leaves
the messages where they are; minibatch stores each window before it is run, commits it after its result, and deletes its
messages. The clock runs until each is done and has stopped.
"""

import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.run import cli_main
from common import BATCH, Case, consuming, fill, in_process, message, sum_of, timed

import minibatch as mb
from minibatch.contrib.mongodb import MongoSink

BETTER = 'more'
EPOCH = timedelta(seconds=1)
SIZES = (1, 100, 1000)


class Reading(StatefulSourcePartition):
    """The documents of a collection by number, from the one after the last snapshot on."""

    def __init__(self, collection, following):
        self.collection, self.following = collection, following

    def next_batch(self):
        span = {'_id': {'$gte': self.following, '$lt': self.following + BATCH}}
        found = list(self.collection.find(span, batch_size=BATCH).sort('_id', 1))
        if not found:
            raise StopIteration
        self.following = found[-1]['_id'] + 1
        return found

    def snapshot(self):
        return self.following


class CollectionSource(FixedPartitionedSource):
    def __init__(self, collection):
        self.collection = collection

    def list_parts(self):
        return ['all']

    def build_part(self, step_id, for_part, resume_state):
        return Reading(self.collection, resume_state or 0)


class Writing(StatelessSinkPartition):
    def __init__(self, collection):
        self.collection = collection

    def write_batch(self, items):
        self.collection.insert_many(items)


class CollectionSink(DynamicSink):
    def __init__(self, collection):
        self.collection = collection

    def build(self, step_id, worker_index, worker_count):
        return Writing(self.collection)


def total(messages):
    return {'n': len(messages), 'v': sum(data['v'] for data in messages)}


def total_of(window):
    return total(window.data)


def run_bytewax(place, source, target, size):
    """Seconds until the dataflow is at the end of the collection."""
    mb.connectdb(*place)
    db = mb.connection.current().db
    flow = Dataflow('peer')
    messages = op.input('read', flow, CollectionSource(db[source]))
    windows = op.collect('window', op.key_on('key', messages, lambda _: 'all'), timedelta(seconds=60), size)
    op.output('write', op.map('sum', windows, lambda window: total(window[1])), CollectionSink(db[target]))
    with TemporaryDirectory() as folder:
        init_db_dir(Path(folder), 1)
        recovery = RecoveryConfig(folder)
        return timed(lambda: cli_main(flow, epoch_interval=EPOCH, recovery_config=recovery))


def check_results(collection, number):
    added = {'$group': {'_id': None, 'n': {'$sum': '$n'}, 'v': {'$sum': '$v'}}}
    found = next(collection.aggregate([added]))
    assert (found['n'], found['v']) == (number, sum_of(number)), f'not each of the {number} messages once: {found}'


def cases(server, given):
    def peer(number, size):
        source, target = server.collection(index=False), server.collection(index=False)
        for first in range(0, number, BATCH):
            source.insert_many([{'_id': n, **message(n)} for n in range(first, first + BATCH)])
        seconds = in_process(run_bytewax, server.place, source.name, target.name, size)
        check_results(target, number)
        return {'messages/s': number / seconds}

    def ours(number, size):
        stream, target = server.stream(), server.collection(index=False)
        fill(stream, number, batch=False)
        began = time.perf_counter()
        with consuming(mb.make_emitter(stream.name, total_of, size=size, workers=1, sink=MongoSink(target))):
            while target.estimated_document_count() < number // size:
                time.sleep(0.01)
        seconds = time.perf_counter() - began
        check_results(target, number)
        return {'messages/s': number / seconds}

    found = []
    for size in SIZES:
        number = given.count(10_000 if size == 1 else 100_000)
        by_peer = f'bytewax, size={size}'
        found.append(Case(by_peer, lambda number=number, size=size: peer(number, size)))
        found.append(Case(f'minibatch, size={size}', lambda number=number, size=size: ours(number, size), by_peer))
    return found
