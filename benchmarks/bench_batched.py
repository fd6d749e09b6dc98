"""Messages appended many at a time, from one thread."""

from common import BATCH, Case, check_stored, message, record, timed

BETTER = 'more'


def cases(server, given):
    number = given.count(500_000)

    def floor(insert):
        collection = server.collection()
        seconds = timed(insert, collection)
        check_stored(collection, number)
        return {'messages/s': number / seconds}

    def insert_many(collection):
        for first in range(0, number, BATCH):
            collection.insert_many([record(n, [message(n)]) for n in range(first, first + BATCH)])

    def insert_batches(collection):
        for first in range(0, number, BATCH):
            collection.insert_one(record(first, [message(n) for n in range(first, first + BATCH)]))

    def stream(append, **options):
        opened = server.stream(**options)
        seconds = timed(append, opened)
        check_stored(server.db.buffer, number, stream=opened.name)
        return {'messages/s': number / seconds}

    def append(opened):
        for n in range(number):
            opened.append(message(n))
        opened.flush()

    documents, batches = f'insert_many of {BATCH} documents', f'one document of {BATCH} messages'
    return [
        Case(documents, lambda: floor(insert_many)),
        Case(batches, lambda: floor(insert_batches)),
        Case(f'append, batchsize={BATCH}', lambda: stream(append, batchsize=BATCH), batches),
        Case('append_many', lambda: stream(lambda opened: opened.append_many(map(message, range(number)))), batches),
    ]
