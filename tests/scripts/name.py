"""A source that appends the numbers up to 2000 under one name, a few at a time: URL SEED."""
import random
import sys

import minibatch as mb
from minibatch.abc import SourceMessage

url, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
producer = mb.stream('test', url=url).producer('outside/log')
at = producer.token or 0
while at < 2000:
    end = min(at + chance.randint(1, 20), 2000)
    producer.append_many(SourceMessage({'i': i}, token=i + 1) for i in range(at, end))
    at = end
