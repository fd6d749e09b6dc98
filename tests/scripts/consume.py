"""A consumer as a process of its own, and the two ways to see what its windows saw.

It takes one argument, JSON: url, stream, options of streaming, `once` (whether the function notes its calls in the
collection `seen`, and its messages go to the collection `once` through an exactly-once sink; else a plain sink notes
the results in `seen`), `work` (seconds which the function takes), `say` (whether it prints the id of its window),
`trouble` (what it does at which messages, {'raise', 'exit' or 'hold': [seq, ...]}), `clock` (seconds by which the
clock of this process is wrong), `picks` (whether an emitter of its own picks the messages), and `interrupt`, [signal,
before or after, a function of ledger or store (or several, with " or "), which call]: there it sends itself the signal.
"""
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta

from bson import ObjectId
from pymongo.errors import DuplicateKeyError, PyMongoError

import minibatch as mb
from minibatch import clock, connection, dead, ledger, store
from minibatch.contrib.mongodb import MongoSink

config = json.loads(sys.argv[1])
db = mb.connectdb(config['url'])


class Seen:
    def put(self, result):
        db.seen.insert_one({**result, 'planner': os.getpid()})


def process(window):
    if config['say']:
        print(window.id, flush=True)
    seen = [[data['source'], data['seq']] for data in window.data]
    place = {'window': window.id, 'number': window.number, 'start': window.start, 'end': window.end}
    result = {**place, 'attempt': window.attempt, 'seen': seen}
    if config['once']:
        note({**result, 'planner': os.getppid()})
    time.sleep(config['work'])
    for trouble, messages in config['trouble'].items():
        if any(seq in messages for _, seq in seen):
            run_into(trouble)
    once = [{'source': source, 'seq': seq, 'window': window.id} for source, seq in seen]
    return once if config['once'] else result


def note(call):
    """Write it down once, also when the server has to come back first."""
    call['_id'] = ObjectId()
    while True:
        try:
            connection.target(config['url']).db.seen.insert_one(call)
            return
        except DuplicateKeyError:
            return
        except PyMongoError:
            time.sleep(0.1)


def run_into(trouble):
    if trouble == 'raise':
        raise ValueError('poisoned')
    if trouble == 'exit':
        os._exit(7)
    ctypes.PyDLL(None).usleep(3_000_000)  # no other thread of this worker runs


class EvenInOrder(mb.window.WindowEmitter):
    def window_ready(self):
        found = mb.Buffer.objects.no_cache().filter(processed=False)
        even = [obj for obj in sorted(found, key=lambda obj: obj.data['seq']) if obj.data['seq'] % 2 == 0]
        return len(even) >= self.interval, (even[:self.interval],)

    def query(self, picked):
        return picked


def interrupt(number, when, names, call):
    calls = itertools.count(1)
    for name in names.split(' or '):
        interrupt_at(number, when, name, call, calls)


def interrupt_at(number, when, name, call, calls):
    module = next(module for module in (ledger, store, dead) if hasattr(module, name))
    original = getattr(module, name)

    def interrupted(*args, **kwargs):
        mine = args[-1] != {} and next(calls) == call  # what has nothing to write is no write
        if mine and when == 'before':
            signal.pthread_kill(threading.get_ident(), number)  # this thread does not go on, not even one line
        result = original(*args, **kwargs)
        if mine and when == 'after':
            signal.pthread_kill(threading.get_ident(), number)
        return result

    setattr(module, name, interrupted)


def set_clock(seconds):
    right = clock.now
    clock.now = lambda: right() + timedelta(seconds=seconds)


if config['interrupt']:
    interrupt(signal.Signals[config['interrupt'][0]], *config['interrupt'][1:])
if config['picks']:
    config['options']['emitter'] = EvenInOrder
if config['clock']:
    set_clock(config['clock'])
sink = MongoSink(db.once, exactly_once=True) if config['once'] else Seen()
mb.streaming(config['stream'], process, sink=sink, **config['options'])
