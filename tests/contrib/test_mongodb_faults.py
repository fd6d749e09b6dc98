"""The MongoDB sources when processes and servers are killed, documents are malformed, and very many come at once."""
from __future__ import annotations

import json
import random
import threading
import time

import bson
import pytest
from bringing import await_numbers, brought, numbers, poll, running
from bson import DatetimeMS
from bson.raw_bson import RawBSONDocument
from processes import FAULTS, SEED, Row, kill
from processes import running as process
from pymongo import WriteConcern
from pymongo.errors import DuplicateKeyError, PyMongoError
from servers import Mongod, ReplicaSet, eventually

from minibatch.contrib.mongodb import MongoReplicasetSource, MongoSource

# --- malformed documents


def nested(levels):
    doc = {}
    for _ in range(levels):
        doc = {'a': doc}
    return doc


def malformed():
    """Documents that MongoDB has, and a stream cannot have, or Python cannot read."""
    bad_text = bson.encode({'_id': 2, 'text': 'xyz'}).replace(b'xyz', b'\xff\xfez')
    return {
        '$ref': {'_id': 1, 'ref': bson.DBRef('things', 1)}, 'utf-8': RawBSONDocument(bad_text),
        'year': {'_id': 3, 'date': DatetimeMS(10**15)}, 'nested': {'_id': 4, 'deep': nested(178)},
        'bytes': {'_id': 5, 'text': 'x' * (16 * 1024 * 1024 - 40)},
    }  # fmt: skip


@pytest.mark.parametrize('make', [poll, lambda things: MongoReplicasetSource(things, start='earliest'),
                                  lambda things: MongoReplicasetSource(things)], ids=['poll', 'rescan', 'changes'])
def test_malformed_documents_go_to_the_dead_letters_and_those_between_them_to_the_stream(url, db, things, make):
    good = [{'_id': i + 0.5, 'i': i} for i in range(6)]
    with running(make(things), url):
        eventually(lambda: db.source.count_documents({}) or make is poll)
        for i, doc in enumerate(malformed().values()):
            things.insert_many([good[i], doc])
        things.insert_one(good[5])
        await_numbers(db, range(6))
        dead = 'test.dead_letters'
        eventually(lambda: len(brought(db, dead)) == 5)
    with running(make(things), url):
        things.insert_one({'_id': 100, 'i': 6})
        await_numbers(db, range(7))
    assert all(wanted in doc['error'] for wanted, doc in zip(malformed(), brought(db, dead), strict=True))


# --- kills


OVERLAP = 60  # seconds; a busy machine takes long from the id of a document to its insertion

SOURCES = {
    'MongoSource': lambda things: poll(things, overlap=OVERLAP, size=50),
    'MongoReplicasetSource': lambda things: MongoReplicasetSource(things, start='earliest', size=50),
}

# A source as a process of its own, which kills itself before or after one of its inserts or appends.
SCRIPT = """
import itertools, json, os, signal, sys, time
from pymongo import MongoClient
import minibatch as mb
from minibatch import named, store
from minibatch.contrib.mongodb import MongoReplicasetSource, MongoSource

config = json.loads(sys.argv[1])
things = MongoClient(config['server'])[config['database']].things
if config['source'] == 'MongoSource':
    source = MongoSource(things, delay=0.02, overlap=config['overlap'], size=50)
else:
    source = MongoReplicasetSource(things, start='earliest', size=50)

def die_at(owner, name, when, call):
    original, calls = getattr(owner, name), itertools.count(1)
    def dying(*args, **kwargs):
        mine = next(calls) == call
        if mine and when == 'before':
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if mine and when == 'after':
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, dying)

if config['at']:
    name, when, call = config['at']
    die_at({'insert_records': store, 'append_many': named.NamedProducer}[name], name, when, call)
mb.stream('test', url=config['url']).attach(source, background=False)
"""


def source_process(kind, things, url, at=None):
    server = '{}:{}'.format(*things.database.client.address)
    config = {'server': f'mongodb://{server}/?directConnection=true', 'database': things.database.name, 'url': url,
              'overlap': OVERLAP}
    return process('-c', SCRIPT, json.dumps({**config, 'source': kind, 'at': at}))


class Writer(threading.Thread):
    """Inserts documents with the numbers 0, 1, 2 ..., again when it does not know whether one is there."""

    def __init__(self, things, count=None):
        super().__init__(daemon=True)
        self._things, self._count, self.ended = things, count, threading.Event()
        self.sent = 0

    def run(self):
        while not self.ended.is_set() and self.sent != self._count:
            doc = {'_id': bson.ObjectId(), 'i': self.sent}
            while not self._insert(doc):
                time.sleep(0.05)
            self.sent += 1

    def _insert(self, doc):
        try:
            self._things.insert_one(doc)
        except DuplicateKeyError:
            return True
        except PyMongoError:
            return False
        return True

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join(60)


def prove(db, scenario, count):
    """Nothing is lost and nothing doubled; it becomes a row of the table."""
    # Of more than 10,000 documents in an overlap, MongoSource brings the others when that is over.
    eventually(lambda: set(range(count)) <= set(numbers(db)), OVERLAP + 60, f'lost, seed {SEED}')
    found = numbers(db)
    row = Row(scenario, count, 0, lost=len(set(range(count)) - set(found)), doubled=len(found) - len(set(found)))
    row.ordered = found == sorted(found)
    FAULTS.append(row)
    assert (row.lost, row.doubled) == (0, 0), f'seed {SEED}'


@pytest.mark.parametrize('kind', SOURCES)
def test_kills_between_the_append_and_what_is_read_next_lose_and_double_nothing(url, db, kind):
    chance = random.Random(SEED)
    points = [[name, when, chance.randint(1, 3)] for name in ('insert_records', 'append_many')
              for when in ('before', 'after')] * 2  # fmt: skip
    with Writer(db.things) as writer:
        for point in points:
            with source_process(kind, db.things, url, point) as victim:
                assert victim.wait(30) == -9, 'it did not come to the point'
    with running(SOURCES[kind](db.things), url):
        prove(db, f'{kind}: {len(points)} kills at an append', writer.sent)


@pytest.mark.parametrize('kind', SOURCES)
def test_kills_at_random_moments_lose_and_double_nothing(url, db, kind):
    chance = random.Random(SEED)
    with Writer(db.things) as writer:
        for _ in range(6):
            before = len(numbers(db))
            with source_process(kind, db.things, url) as victim:
                eventually(lambda before=before: len(numbers(db)) > before)
                moment = chance.random()
                writer.ended.wait(moment)
                kill(victim)
    with running(SOURCES[kind](db.things), url):
        prove(db, f'{kind}: 6 kills at random moments', writer.sent)


@pytest.mark.integration
@pytest.mark.parametrize('kind', SOURCES)
@pytest.mark.parametrize('same', [True, False], ids=['same server', 'other server'])
def test_a_server_that_is_killed_and_comes_back_loses_and_doubles_nothing(url, db, kind, same):
    with Mongod() as server:
        things = server.client.outside.things
        stream_url, stream_db = (server.url('outside'), server.client.outside) if same else (url, db)
        with Writer(things) as writer, running(SOURCES[kind](things), stream_url) as stream:
            for _ in range(3):
                seen = writer.sent
                eventually(lambda seen=seen: writer.sent > seen + 50, 60)
                server.kill()
                server.start()
            writer.ended.set()
            writer.join()
            prove(stream_db, f'{kind}: 3 kills of the {"same" if same else "other"} server', writer.sent)
            stream.stop()


@pytest.mark.integration
@pytest.mark.parametrize('kind', SOURCES)
def test_a_step_down_of_the_primary_loses_and_doubles_nothing(url, db, kind):
    with ReplicaSet() as servers:
        things = servers.client.get_database('outside', write_concern=WriteConcern('majority')).things
        with Writer(things) as writer, running(SOURCES[kind](things), url):
            for _ in range(2):
                seen = writer.sent
                eventually(lambda seen=seen: writer.sent > seen + 50, 60)
                servers.step_down(10)
            seen = writer.sent
            eventually(lambda: writer.sent > seen + 50, 60)
            writer.ended.set()
            writer.join()
            prove(db, f'{kind}: 2 step-downs', writer.sent)


@pytest.mark.parametrize('kind', SOURCES)
def test_two_processes_with_the_same_source_lose_and_double_nothing(url, db, kind):
    with Writer(db.things, 500) as writer, source_process(kind, db.things, url), source_process(kind, db.things, url):
        writer.join(60)
        prove(db, f'{kind}: two at once', 500)


# --- a burst


def bare(kind, things, count):
    """Seconds that a loop with pymongo alone takes to read as many."""
    began = time.monotonic()
    if kind == 'MongoSource':
        assert sum(1 for _ in things.find().sort('_id', 1)) == count
    else:
        changes = things.watch([{'$match': {'operationType': 'insert'}}], start_at_operation_time=bson.Timestamp(1, 1))
        with changes:
            assert sum(1 for _, _ in zip(range(count), changes, strict=False)) == count
    return time.monotonic() - began


@pytest.mark.integration
@pytest.mark.parametrize('kind', SOURCES)
def test_a_burst_of_100000_documents_is_brought_once_and_in_order(url, db, kind):
    count = 100_000
    with Mongod() as server:
        things = server.client.outside.things
        source = MongoSource(things) if kind == 'MongoSource' else MongoReplicasetSource(things)
        with running(source, url) as stream:
            eventually(lambda: kind == 'MongoSource' or db.source.count_documents({}))
            began = time.monotonic()
            things.insert_many([{'i': i, 'text': 'x' * 50} for i in range(count)])
            inserted = time.monotonic() - began
            eventually(lambda: sum(doc['n'] for doc in db.buffer.find({}, {'n': 1})) >= count, 120)
            took = time.monotonic() - began
            stream.stop()
        alone = bare(kind, things, count)
    print(f'{kind}: {count:,} inserted in {inserted:.1f} s, all in the stream {took:.1f} s after the first; '
          f'a bare loop of pymongo reads them in {alone:.1f} s')  # fmt: skip
    assert numbers(db) == list(range(count))
    prove(db, f'{kind}: a burst', count)
