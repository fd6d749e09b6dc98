"""Processes that append to one stream at once.

The clock runs from when all of them are connected until the last has stored its messages.
"""

from common import BATCH, Case, check_stored, in_processes, message, record

import minibatch as mb

BETTER = 'more'


def mine(process, processes, number):
    """The messages of a process, of those from 0 to `number`."""
    return [message(n) for n in range(process, number, processes)]


def inserting(process, processes, place, name, number, batch):
    collection = mb.connectdb(*place)[name]
    collection = collection.with_options(write_concern=mb.connection.current().db.write_concern)
    messages, step, producer = mine(process, processes, number), BATCH if batch else 1, f'floor{process}'
    collection.find_one()

    def work():
        for first in range(0, len(messages), step):
            collection.insert_one(record(first, messages[first : first + step], producer))

    return work


def appending(process, processes, place, name, number, batch):
    mb.connectdb(*place)
    stream, messages = mb.stream(name), mine(process, processes, number)

    def work():
        if batch:
            stream.append_many(messages)
        else:
            for each in messages:
                stream.append(each)

    return work


def cases(server, given):
    def floor(processes, number, batch):
        collection = server.collection()
        seconds = in_processes(processes, inserting, processes, server.place, collection.name, number, batch)
        check_stored(collection, number)
        return {'messages/s': number / seconds}

    def append(processes, number, batch):
        stream = server.stream()
        seconds = in_processes(processes, appending, processes, server.place, stream.name, number, batch)
        check_stored(server.db.buffer, number, stream=stream.name)
        return {'messages/s': number / seconds}

    found = []
    for batch, by_hand, ours in ((False, 'insert_one', 'append'), (True, 'documents of 1000', 'append_many')):
        for processes in given.some(1, 4, 16):
            given_to_each = processes, given.count(800_000) if batch else given.count(8000, step=16), batch
            who = '1 process' if processes == 1 else f'{processes} processes'
            against = f'{by_hand}, {who}'
            found.append(Case(against, lambda args=given_to_each: floor(*args)))
            found.append(Case(f'{ours}, {who}', lambda args=given_to_each: append(*args), against))
    return found
