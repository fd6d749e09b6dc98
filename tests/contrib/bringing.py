"""What the tests of the MongoDB sources share: a source at work, and what a stream then has."""
from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import contextmanager

from bson import ObjectId
from processes import SEED
from servers import eventually

import minibatch as mb
from minibatch.contrib.mongodb import MongoSource

DELAY = 0.02


@contextmanager
def running(source, url, name='test'):
    """A source at work on a stream."""
    with mb.stream(name, url=url) as stream:
        stream.attach(source)
        yield stream


def poll(things, **options):
    return MongoSource(things, **{'delay': DELAY, **options})


def messages(db, name='test'):
    """What a stream has: (data, meta), in the order of the logs of its producers."""
    found = []
    for doc in db.buffer.find({'stream': name}).sort([('producer', 1), ('offset', 1)]):
        data = doc['batch'] if 'batch' in doc else [doc['data']]
        found += zip(data, doc.get('meta') or [None] * len(data), strict=True)
    return found


def brought(db, name='test'):
    return [data for data, _ in messages(db, name)]


def numbers(db, name='test'):
    return [data['i'] for data in brought(db, name)]


def await_numbers(db, wanted, name='test'):
    """Wait until all of them are there, and see that nothing is there twice; returns them in their order."""
    wanted = set(wanted)
    eventually(lambda: wanted <= set(numbers(db, name)))
    found = numbers(db, name)
    assert Counter(found) == Counter(wanted), f'seed {SEED}'
    return found


def tokens(db, name='test'):
    return [doc['token'] for doc in db.buffer.find({'stream': name}).sort([('producer', 1), ('offset', 1)])]


def id_at(seconds):
    """An ObjectId made so many seconds from now."""
    time_ = int(time.time() + seconds)
    return ObjectId(time_.to_bytes(4, 'big') + random.randbytes(8))
