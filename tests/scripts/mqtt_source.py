"""An MQTTSource as a process of its own.

It takes one argument, JSON: mongo (the URL), broker (the URL), options of MQTTSource, and `kill`: null, or
[when, which call]: it kills itself then, where `when` is 'before append', 'after append', 'before save', 'after save',
or 'before receipt'.
"""
import json
import os
import signal
import sys

import minibatch as mb
from minibatch.contrib.mqtt import MQTTSource
from minibatch.contrib.mqtt.subscriber import Subscriber
from minibatch.named import NamedProducer

config = json.loads(sys.argv[1])
PLACES = {'append': (NamedProducer, 'append_many'), 'save': (NamedProducer, 'save'), 'receipt': (Subscriber, 'receipt')}


def kill_at(when, which):
    time, name = when.split()
    owner, name = PLACES[name]
    function, calls = getattr(owner, name), []

    def wrapped(*args):
        calls.append(args)
        dies = len(calls) == which
        if dies and time == 'before':
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)


source = MQTTSource(config['broker'], 'test/#', **config['options'])
if config['kill']:
    kill_at(*config['kill'])
source.stream(mb.stream('test', url=config['mongo']))
