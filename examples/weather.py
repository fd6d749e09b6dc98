"""Replay recorded weather as a stream; write what each week was like to a collection.

    python examples/weather.py

The data is four years of daily measurements in Seattle, see data/README.rst.
"""

import csv
import math
import os
import time
from pathlib import Path

import minibatch as mb
from minibatch.contrib.mongodb import MongoSink

with open(Path(__file__).parent / 'data' / 'seattle-weather.csv', newline='') as file:
    rows = list(csv.DictReader(file))
days = [
    {
        'date': row['date'],
        'rain': float(row['precipitation']),
        'high': float(row['temp_max']),
        'low': float(row['temp_min']),
    }
    for row in rows[: len(rows) // 7 * 7]  # whole weeks
]

weeks = mb.connectdb()['example_weather_weeks']
weeks.delete_many({})
stream = mb.stream('example-weather')
stream.clear()


def week(window):
    return {
        'week': window.data[0]['date'],
        'rain': math.fsum(day['rain'] for day in window.data),
        'high': max(day['high'] for day in window.data),
        'low': min(day['low'] for day in window.data),
        'process': os.getpid(),
    }


consumer = mb.make_emitter('example-weather', week, size=7, workers=2, sink=MongoSink(weeks))
consumer.start()
for day in days:
    stream.append(day)
while stream.buffer().count():
    time.sleep(0.1)
consumer.stop()

print('year   weeks   rain mm   wettest week       highest   lowest')
for year in ('2012', '2013', '2014', '2015'):
    found = list(weeks.find({'week': {'$regex': f'^{year}'}}))
    wettest = max(found, key=lambda doc: doc['rain'])
    print(
        f'{year}   {len(found):5}   {math.fsum(doc["rain"] for doc in found):7.1f}'
        f'   {wettest["week"]} ({wettest["rain"]:5.1f})'
        f'   {max(doc["high"] for doc in found):5.1f}   {min(doc["low"] for doc in found):6.1f}'
    )

streamed = math.fsum(doc['rain'] for doc in weeks.find())
plain = math.fsum(day['rain'] for day in days)
print(f'{len(days)} days in {weeks.count_documents({})} weeks; rain {streamed:.1f} mm, by plain Python {plain:.1f} mm')
assert round(streamed, 6) == round(plain, 6)
