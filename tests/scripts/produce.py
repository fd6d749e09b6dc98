"""A producer as a process of its own: python produce.py URL STREAM SOURCE COUNT appends one by one and in batches.

After each call it prints how many messages are acknowledged.
"""
import random
import sys

import minibatch as mb

url, name, source, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(source)
stream = mb.stream(name, url=url)
seq = 0
while seq < count:
    size = min(rng.choice((1, 7, 99, 100, 101, 1500)), count - seq)
    messages = [{'source': source, 'seq': seq + i} for i in range(size)]
    if size == 1:
        stream.append(messages[0])
    else:
        stream.append_many(messages)
    seq += size
    print(seq, flush=True)
