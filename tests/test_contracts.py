"""Every source and sink that needs no server of its own, and what breaks a contract, through the public suites."""

import asyncio
import json
import sys
import uuid
from pathlib import Path

import pytest
from pymongo import MongoClient

import minibatch as mb
from minibatch.contracts import SinkContract, SourceContract
from minibatch.contrib.mongodb import MongoSink

sys.path.append(str(Path(__file__).parent.parent / 'examples'))
from lines import LinesSink, LinesSource

# --- lines


class TestLinesSource(SourceContract):
    @pytest.fixture(autouse=True)
    def file(self, url, tmp_path):
        self.url, self.path = url, tmp_path / 'lines.txt'
        self.path.touch()

    def make(self):
        return LinesSource(self.path)

    def send(self, numbers):
        with open(self.path, 'a', encoding='utf-8') as file:
            file.writelines(f'{i}\n' for i in numbers)

    def number(self, data):
        return int(data['line'])


class TestLinesSink(SinkContract):
    @pytest.fixture(autouse=True)
    def file(self, tmp_path):
        self.path = tmp_path / 'lines.txt'

    def make(self):
        return LinesSink(self.path)

    def received(self):
        return [json.loads(line) for line in self.path.read_text(encoding='utf-8').splitlines()]


class AsyncLinesSource(LinesSource):
    async def stream(self, stream):
        await asyncio.sleep(0)
        super().stream(stream)


class TestAsyncLinesSource(TestLinesSource):
    def make(self):
        return AsyncLinesSource(self.path)


class AsyncLinesSink(LinesSink):
    async def put(self, messages):
        await asyncio.sleep(0)
        super().put(messages)


class TestAsyncLinesSink(TestLinesSink):
    def make(self):
        return AsyncLinesSink(self.path)


# --- the others


class TestMongoSink(SinkContract):
    ordered = False

    @pytest.fixture(autouse=True)
    def collection(self, url):
        self.collection = MongoClient(url).get_default_database()[f'sink_{uuid.uuid4().hex}']

    def make(self):
        return MongoSink(self.collection)

    def received(self):
        return list(self.collection.find({}, {'_id': 0}))


class TestStreamAsSink(SinkContract):
    @pytest.fixture(autouse=True)
    def target(self, url):
        self.stream = mb.stream('sink', url=url)

    def make(self):
        return self.stream

    def received(self):
        return [data for doc in self.stream.buffer() for data in doc.batch or [doc.data]]


class Forgetful(LinesSource):
    """A source that tells nobody where it is, and so begins anew each time."""

    def stream(self, stream):
        self.cancelled.clear()
        producer = stream.producer()
        with open(self.path, 'rb') as file:
            while not self.cancelled.wait(0.05):
                for line in file:
                    producer.append({'line': line.decode()})


class Hasty(LinesSource):
    """A source that says it has taken messages before they are stored."""

    taken = 0

    def stream(self, stream):
        self.cancelled.clear()
        producer = stream.producer()
        with open(self.path, 'rb') as file:
            file.seek(Hasty.taken)
            while not self.cancelled.wait(0.05):
                for line in file:
                    Hasty.taken += len(line)
                    producer.append({'line': line.decode()})


class Deaf(LinesSource):
    """A source that cannot be cancelled in time."""

    def cancel(self):
        pass


@pytest.mark.parametrize(
    ('source', 'test'),
    [
        (Forgetful, 'test_it_brings_what_was_sent_while_it_was_away'),
        (Hasty, 'test_nothing_is_lost_when_the_append_fails'),
        (Deaf, 'test_it_ends_soon_when_it_is_cancelled_also_twice_and_leaves_no_thread'),
    ],
)
def test_a_source_that_breaks_the_contract_is_found_out(source, test, url, tmp_path, monkeypatch):
    monkeypatch.setattr('minibatch.contracts.PATIENCE', 3.0)
    monkeypatch.setattr(mb.Stream.stop, '__defaults__', (1.0,))
    contract = TestLinesSource()
    contract.url, contract.path = url, tmp_path / 'lines.txt'
    contract.path.touch()
    contract.make = lambda: source(contract.path)
    with pytest.raises(AssertionError):
        getattr(contract, test)()
