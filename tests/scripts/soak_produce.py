"""A producer of soak.py: python soak_produce.py URL SOURCE RATE FILE appends until it is ended, in all three ways.

It keeps two numbers in the file: how many messages it has begun to append, and how many are acknowledged. About one
of POISON messages is poisoned.
"""
import os
import random
import struct
import sys
import time

import minibatch as mb

POISON = 4000

url, source, rate, path = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
rng = random.Random(source)
one_by_one = mb.stream('soak', url=url)
batched = mb.stream('soak', url=url, batchsize=50)
file = os.open(path, os.O_WRONLY | os.O_CREAT)
seq = 0


def noted(acknowledged):
    os.pwrite(file, struct.pack('<qq', seq, acknowledged), 0)


def messages(count):
    global seq
    start, seq = seq, seq + count
    noted(start)
    return [{'source': source, 'seq': i, 'poisoned': i % POISON == POISON - 1} for i in range(start, seq)]


started = time.monotonic()
while True:
    way = rng.choice(('one', 'many', 'many', 'batched'))
    if way == 'one':
        for _ in range(10):
            one_by_one.append(messages(1)[0])
            noted(seq)
    elif way == 'many':
        one_by_one.append_many(messages(rng.choice((1, 7, 99, 250))))
    else:
        for message in messages(rng.randrange(1, 200)):
            batched.append(message)
        batched.flush()
    noted(seq)
    time.sleep(max(0.0, started + seq / rate - time.monotonic()))
