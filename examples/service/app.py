"""A complete service: readings of sensors come in over HTTP, and alerts go to another stream.

    python examples/service/app.py            # with five sensors that are made up; see the dashboard it names
    python examples/service/app.py --sensors 0

README.rst says how to run it for good, with Docker or systemd.
"""

import argparse
import json
import os
import random
import secrets
import threading
import urllib.request
from statistics import fmean

import minibatch as mb
from minibatch.contrib.apps import StreamingApp

LIMIT = 30.0  # degrees Celsius


def watch_sensors(url):
    """Look at each sensor by itself, ten readings at a time or those of two seconds."""

    @mb.streaming('readings', key='sensor', size=10, max_wait=2, sink=mb.stream('alerts', url=url), url=url, workers=2)
    def check(window):
        mean = fmean(reading['celsius'] for reading in window.data)
        if mean <= LIMIT:
            return []  # nothing for the sink
        # A window that is tried again after a crash may alert twice, with the same id.
        return {'id': window.id, 'sensor': window.key, 'celsius': round(mean, 1), 'readings': len(window)}


def tell_people(url):
    """Here a mail would be sent. A group of its own, which reads the alerts as they come."""

    @mb.streaming('alerts', size=1, group='people', url=url, workers=1)
    def tell(window):
        for alert in window.data:
            print('{sensor} is too hot: {celsius} °C, the mean of {readings}'.format(**alert), flush=True)


def make_up(app, token, sensors, stopped):
    """Post what sensors might say, four times a second; the last of them gets warmer and warmer, and cools down."""
    headers = {'Authorization': f'Bearer {token}', 'Content-Type': 'application/x-ndjson'}
    warmer = 0.0
    while not stopped.wait(0.25):
        address = app.address
        if address is None:
            continue  # it is about to listen
        warmer = (warmer + 0.2) % 20
        means = [20.0] * (sensors - 1) + [20.0 + warmer]
        readings = [{'sensor': f'sensor {n}', 'celsius': random.gauss(mean, 1)} for n, mean in enumerate(means, 1)]
        body = '\n'.join(map(json.dumps, readings)).encode()
        try:
            urllib.request.urlopen(urllib.request.Request(f'{address}/streams/readings', body, headers)).close()
        except OSError as exc:
            if not app.ending:  # else nobody listens any more
                print(f'not posted: {exc}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=5000)
    parser.add_argument('--sensors', type=int, default=5, help='how many are made up')
    args = parser.parse_args()
    token = os.environ.get('MINIBATCH_APP_TOKEN')
    if not token:
        token = secrets.token_urlsafe()
        print(f'the token of this run is {token}', flush=True)
    stopped = threading.Event()
    with StreamingApp('sensors', token=token) as app:
        app.start_streaming(watch_sensors)
        app.start_streaming(tell_people)
        if args.sensors:
            threading.Thread(target=make_up, args=(app, token, args.sensors, stopped), daemon=True).start()
        app.run(args.host, args.port)
        stopped.set()


if __name__ == '__main__':
    main()
