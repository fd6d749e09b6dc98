"""What consumers cost that have nothing to do.

The consumers are in one process; its CPU time is with that of its workers. That of mongod is of the same seconds, and
only known if it is on this machine. A message to each stream shows at the end that its consumer still listens. To be
reached, by the design: 1 % of a core for each consumer, and as much of mongod.
"""

import time

import psutil
from common import Case, Totals, consuming, in_process, summed

import minibatch as mb
from minibatch.testing import InlineExecutor

BETTER = 'less'
SECONDS = {'quick': (0.5, 1), 'short': (3, 5), 'full': (10, 60)}  # until it is at rest, and measured
SHARE = 0.01 * 60  # CPU seconds a minute


def cpu_seconds(process):
    family = [process, *process.children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in family)


class Meter:
    """CPU time of this process and of mongod, and commands of the server."""

    def __init__(self, db):
        self.db, self.me, self.mongod = db, psutil.Process(), None
        pid = db.command('serverStatus')['pid']
        if psutil.pid_exists(pid) and 'mongod' in psutil.Process(pid).name():
            self.mongod = psutil.Process(pid)

    def read(self):
        """(time, CPU seconds of ours, of mongod, commands)."""
        commands = sum(self.db.command('serverStatus')['opcounters'].values())
        return time.monotonic(), cpu_seconds(self.me), self.mongod and cpu_seconds(self.mongod), commands

    def measure(self, seconds):
        began, ours, theirs, commands = self.read()
        time.sleep(seconds)
        after = self.read()
        minutes = (after[0] - began) / 60
        found = {'consumer, CPU s/min': (after[1] - ours) / minutes}
        if self.mongod:
            found['mongod, CPU s/min'] = (after[2] - theirs) / minutes
        found['commands/s'] = (after[3] - commands - 1) / minutes / 60  # one is to read them
        return found


def idle(place, streams, seconds, options):
    db = mb.connectdb(*place)
    meter, totals = Meter(db), [Totals(1) for _ in range(streams)]
    opened = [mb.stream(f'idle-{streams}-{i}-{time.time_ns()}') for i in range(streams)]
    emitters = [
        mb.make_emitter(stream.name, summed, size=1, sink=sink, **options)
        for stream, sink in zip(opened, totals, strict=True)
    ]
    with consuming(*emitters):
        time.sleep(seconds[0] * (2 if streams > 10 else 1))
        found = meter.measure(seconds[1])
        for stream, sink in zip(opened, totals, strict=True):
            stream.append({'v': 0})
            sink.wait()
    return found


def cases(server, given):
    def case(name, streams, **options):
        to_reach = dict.fromkeys(('consumer, CPU s/min', 'mongod, CPU s/min'), SHARE * streams) if streams else None
        return Case(name, lambda: in_process(idle, server.place, streams, SECONDS[given.size], options), to_reach)

    return [
        case('no consumer', 0),
        case('1 stream, 2 workers', 1, workers=2),
        case('32 streams, inline', 32, executor=InlineExecutor, workers=1),
    ]
