"""Run benchmarks, all of them or those that are named, and print a table of each.

    python benchmarks/run.py [--quick | --full] [--url URL] [NAME ... | --save]
"""

import argparse
import importlib
import json
import os
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pymongo
from common import Given, Server, compare, print_table

HERE = Path(__file__).parent
RESULTS = HERE / 'results.json'
CHART = HERE.parent / 'docs' / 'benchmarks.png'
NAMES = ['append', 'batched', 'producers', 'drain', 'groups', 'backlog', 'latency', 'idle', 'memory', 'engines']
PEERS = ['peer_bytewax']  # need packages of their own, so they are run by name only


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'{", ".join(NAMES)} (all); {", ".join(PEERS)}')
    parser.add_argument('--url', help='a MongoDB URL; default: the environment, else the embedded MongoDB')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--quick', dest='size', action='store_const', const='quick', help='to see that it works')
    size.add_argument('--full', dest='size', action='store_const', const='full', help='for figures to quote')
    parser.add_argument('--save', action='store_true', help=f'write {RESULTS.name} and {CHART.name}')
    given = parser.parse_args()
    for name in given.names:
        if name not in NAMES + PEERS:
            parser.error(f'there is no benchmark {name!r}; there are {", ".join(NAMES + PEERS)}')
    if given.save and given.names:
        parser.error('--save is for a run of all of them: leave the names out')
    return given


def run(name, url, given):
    """The machine, and the rows of one benchmark, which are printed, too."""
    module = importlib.import_module(name if name in PEERS else f'bench_{name}')
    title = module.__doc__.splitlines()[0]
    print(f'\n{name}: {title}', flush=True)
    with Server(url, name) as server:
        rows = compare(module.cases(server, given), given.repeat)
        machine = {
            'date': date.today().isoformat(),
            'size': given.size,
            'repeats': given.repeat,
            'cores': os.cpu_count(),
            'python': platform.python_version(),
            'pymongo': pymongo.version,
            'mongodb': server.version,
            'write concern': server.write_concern,
        }
        print_table(f'{name}: medians of {given.repeat}; {machine["cores"]} cores, Python {machine["python"]}, '
                    f'MongoDB {server.version}, w: {server.write_concern}', rows)
    return machine, {'title': title, 'better': module.BETTER, 'rows': [asdict(row) for row in rows]}


def main():
    args = arguments()
    given = Given(args.size or 'short')
    benchmarks = {}
    for name in args.names or NAMES:
        machine, benchmarks[name] = run(name, args.url, given)
    if args.save:
        results = {'machine': machine, 'benchmarks': benchmarks}
        RESULTS.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
        from chart import draw  # with matplotlib, which nothing else needs

        draw(results, CHART)
        print(f'{RESULTS.name} and {CHART.name} are written')


if __name__ == '__main__':
    main()
