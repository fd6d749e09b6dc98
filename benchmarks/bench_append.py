"""How fast messages are appended, each way beside the same by hand with pymongo, all at w: majority.

    python benchmarks/bench_append.py [--url URL] [--repeat 3] [--quick]
"""

import threading

from common import Server, arguments, compare, message, timed


def in_threads(append, count, threads):
    """Call `append` for `count` messages, from several threads."""
    def work(first):
        for number in range(first, count, threads):
            append(message(number))

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main():
    given = arguments(__doc__.splitlines()[0])
    single, many = 4000 // given.scale, 500_000 // given.scale
    with Server(given.url) as server:
        def checked(count, seconds, stored):
            assert stored == count, f'{stored} of {count} stored'
            return count / seconds

        def stream_of(append, count, **options):
            def run():
                stream = server.stream(**options)
                seconds = timed(append, stream)
                records = server.db.buffer.find({'stream': stream.name, 'offset': {'$gte': 0}}, {'n': 1})
                return checked(count, seconds, sum(doc['n'] for doc in records))
            return run

        def floor_of(insert, count):
            def run():
                collection = server.collection()
                seconds = timed(insert, collection)
                return checked(count, seconds, sum(doc.get('n', 1) for doc in collection.find({}, {'n': 1})))
            return run

        def insert_one(collection):
            for number in range(single):
                collection.insert_one(record(number, 1, {'data': message(number)}))

        def insert_one_in_threads(collection):
            in_threads(lambda data: collection.insert_one(record(data['v'], 1, {'data': data})), single, 8)

        def insert_thousands(collection):
            for first in range(0, many, 1000):
                collection.insert_many([record(n, 1, {'data': message(n)}) for n in range(first, first + 1000)])

        def insert_batches(collection):
            for first in range(0, many, 1000):
                collection.insert_one(record(first, 1000, {'batch': [message(n) for n in range(first, first + 1000)]}))

        def append_with_batchsize(stream):
            for number in range(many):
                stream.append(message(number))
            stream.flush()

        compare([
            ('floor: insert_one', floor_of(insert_one, single), None),
            ('append, one by one', stream_of(lambda s: in_threads(s.append, single, 1), single),
             'floor: insert_one'),
            ('floor: insert_one from 8 threads', floor_of(insert_one_in_threads, single), None),
            ('append from 8 threads', stream_of(lambda s: in_threads(s.append, single, 8), single),
             'floor: insert_one from 8 threads'),
            ('floor: insert_many of 1000 documents', floor_of(insert_thousands, many), None),
            ('floor: one document of 1000 messages', floor_of(insert_batches, many), None),
            ('append, batchsize=1000', stream_of(append_with_batchsize, many, batchsize=1000),
             'floor: one document of 1000 messages'),
            ('append_many', stream_of(lambda s: s.append_many(map(message, range(many))), many),
             'floor: one document of 1000 messages'),
        ], given.repeat)  # fmt: skip


def record(offset, n, content):
    """A document like those of the log."""
    return {'stream': 'floor', 'producer': 'floor', 'offset': offset, 'n': n, 'processed': False, **content}


if __name__ == '__main__':
    main()
