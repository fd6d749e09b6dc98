"""Append messages, and process them two at a time in worker processes.

    python examples/quickstart.py
"""

import os
import time

import minibatch as mb

# A stream is opened by its name; with no URL, on a MongoDB that starts by itself.
stream = mb.stream('example-quickstart')
stream.clear()


# This is called with each window, in a worker process. What it returns goes to the sink.
def average(window):
    celsius = [message['celsius'] for message in window.data]
    return {'window': window.number, 'celsius': celsius, 'mean': sum(celsius) / len(celsius), 'process': os.getpid()}


# A sink is anything with a method `put`. It is called here, in this process.
class Printer:
    def put(self, result):
        print('window {window}: mean of {celsius} is {mean:.2f}, says process {process}'.format(**result))


consumer = mb.make_emitter('example-quickstart', average, size=2, workers=2, sink=Printer())
consumer.start()

# When append returns, the message is safe in MongoDB. Usually another program does this.
for celsius in (20.5, 20.7, 21.0, 21.4, 21.6, 21.5, 21.1, 20.8, 20.6, 20.2):
    stream.append({'celsius': celsius})
    time.sleep(0.2)

# Messages are deleted once their window was processed; so none left means all done.
while stream.buffer().count():
    time.sleep(0.1)
consumer.stop()
print('10 messages appended, all processed')
