"""A consumer as a process of its own, which writes what its windows saw to the collection `seen`.

It takes one argument, JSON: url, stream, options of streaming, `work` (seconds which the function takes), `say`
(whether it prints the id of its window), `picks` (whether an emitter of its own picks the messages), and `interrupt`,
[signal, before or after, a function of ledger or store, which call]: there it sends itself that signal.
"""
import itertools
import json
import os
import signal
import sys
import threading
import time

import minibatch as mb
from minibatch import ledger, store

config = json.loads(sys.argv[1])
work, say = config['work'], config['say']
db = mb.connectdb(config['url'])


class Seen:
    def put(self, result):
        db.seen.insert_one({**result, 'planner': os.getpid()})


def process(window):
    if say:
        print(window.id, flush=True)
    time.sleep(work)
    seen = [[data['source'], data['seq']] for data in window.data]
    return {'window': window.id, 'number': window.number, 'attempt': window.attempt, 'seen': seen}


class EvenInOrder(mb.window.WindowEmitter):
    def window_ready(self):
        found = mb.Buffer.objects.no_cache().filter(processed=False)
        even = [obj for obj in sorted(found, key=lambda obj: obj.data['seq']) if obj.data['seq'] % 2 == 0]
        return len(even) >= self.interval, (even[:self.interval],)

    def query(self, picked):
        return picked


def interrupt(number, when, name, call):
    module = ledger if hasattr(ledger, name) else store
    original, calls = getattr(module, name), itertools.count(1)

    def interrupted(*args, **kwargs):
        mine = args[-1] != {} and next(calls) == call  # what has nothing to write is no write
        if mine and when == 'before':
            signal.pthread_kill(threading.get_ident(), number)  # this thread does not go on, not even one line
        result = original(*args, **kwargs)
        if mine and when == 'after':
            signal.pthread_kill(threading.get_ident(), number)
        return result

    setattr(module, name, interrupted)


if config['interrupt']:
    interrupt(signal.Signals[config['interrupt'][0]], *config['interrupt'][1:])
if config['picks']:
    config['options']['emitter'] = EvenInOrder
mb.streaming(config['stream'], process, sink=Seen(), **config['options'])
