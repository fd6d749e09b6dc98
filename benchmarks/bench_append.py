"""Messages appended, one a call, each until it is stored for certain."""

from common import Case, check_stored, in_threads, message, record, timed

BETTER = 'more'
THREADS = 8


def cases(server, given):
    number = given.count(8000, step=THREADS)

    def calls(call, threads):
        """`call` for each message, from as many threads."""
        def work(first):
            for n in range(first, number, threads):
                call(n)

        return [lambda first=first: work(first) for first in range(threads)]

    def floor(threads):
        collection = server.collection()
        seconds = timed(in_threads, calls(lambda n: collection.insert_one(record(n, [message(n)])), threads))
        check_stored(collection, number)
        return {'messages/s': number / seconds}

    def append(threads):
        stream = server.stream()
        seconds = timed(in_threads, calls(lambda n: stream.append(message(n)), threads))
        check_stored(server.db.buffer, number, stream=stream.name)
        return {'messages/s': number / seconds}

    one, many = 'insert_one', f'insert_one from {THREADS} threads'
    return [
        Case(one, lambda: floor(1)),
        Case('append', lambda: append(1), one),
        Case(many, lambda: floor(THREADS)),
        Case(f'append from {THREADS} threads', lambda: append(THREADS), many),
    ]
