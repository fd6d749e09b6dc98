"""What is seen of streams and groups from outside: status, histograms, the tail of a stream."""

import json
from datetime import datetime, timedelta, timezone
from itertools import islice

import pytest

import minibatch as mb
from minibatch import clock, ledger, metrics
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError
from minibatch.testing import InlineExecutor


def consume(url, fn=lambda window: None, size=5, **options):
    emitter = mb.make_emitter('test', fn, url=url, size=size, executor=InlineExecutor, workers=3, **options)
    while emitter._run_once():
        pass
    return emitter


def test_status_tells_of_every_stream_and_group(url, db):
    mb.stream('empty', url=url)
    mb.stream('test', url=url).append_many({'i': i} for i in range(12))
    consume(url)
    empty, test = mb.status(url)
    assert (empty.name, empty.appended, empty.stored, empty.groups) == ('empty', 0, 0, [])
    assert (test.name, test.appended) == ('test', 12)
    [group] = test.groups
    assert group.name == 'default'
    assert (group.lag.messages, group.dead, group.in_flight) == (2, 0, 0)
    assert (group.group.windows, group.group.messages, group.group.workers) == (2, 10, 3)
    assert abs(group.group.committed - clock.now()) < timedelta(seconds=60)


def test_status_is_what_json_can_say(url):
    mb.stream('test', url=url).append_many({'i': i} for i in range(10))
    consume(url)
    [said] = json.loads(json.dumps([stream.as_dict() for stream in mb.status(url, 'test')]))
    [group] = said['groups']
    assert datetime.fromisoformat(group['committed']).tzinfo is not None
    assert group['lag'] == {'messages': 0, 'seconds': 0.0}
    assert sum(group['sizes']['counts']) == 2
    assert '_target' not in group


def test_what_was_appended_counts_after_it_was_processed_deleted_and_forgotten(url, db):
    for _ in range(2):
        producer = mb.stream('test', url=url).producer()
        producer.append_many([SourceMessage({'i': i}) for i in range(5)])
    consume(url)
    assert mb.status(url)[0].appended == 10
    ledger.prune_positions(db, 'test', 'default', [], clock.now() + timedelta(days=2))
    assert db.position.count_documents({}) == 0
    assert mb.status(url)[0].appended == 10


def test_the_position_of_a_named_producer_is_not_forgotten(url, db):
    mb.stream('test', url=url).producer('a').append_many([SourceMessage({'i': i}) for i in range(5)])
    consume(url)
    ledger.prune_positions(db, 'test', 'default', [], clock.now() + timedelta(days=2))
    assert db.position.count_documents({}) == 1


def test_histograms_have_every_window_once(url):
    mb.stream('test', url=url).append_many({'i': i} for i in range(50))
    consume(url, size=10)
    group = mb.stream('test', url=url).group()
    assert group.sizes.count == group.function.count == group.latency.count == 5
    assert dict(zip(group.sizes.bounds, group.sizes.counts, strict=False))[10] == 5
    assert group.sizes.sum == 50
    assert 0 < group.function.sum < group.latency.sum


def test_a_value_is_counted_at_the_first_bound_that_is_not_below_it():
    doc = {}
    for value in (0.0, 0.001, 0.0011, 300.0, 1e6):
        for key, count in metrics.observed(function=value).items():
            name, part = key.split('.')
            doc.setdefault(name, {}).setdefault(part, 0)
            doc[name][part] += count
    found = metrics.histogram(doc, 'function')
    assert (found.counts[0], found.counts[1], found.counts[-2], found.counts[-1]) == (2, 1, 1, 1)
    assert found.sum == pytest.approx(1000300.0021)
    assert found.mean == pytest.approx(found.sum / 5)


def test_an_unknown_stream_has_no_groups(url):
    assert mb.status(url, 'nowhere')[0].groups == []


def test_the_tail_begins_with_the_last_messages_and_goes_on_with_new_ones(url):
    stream = mb.stream('test', url=url)
    stream.append_many({'i': i} for i in range(20))
    other = stream.producer()
    other.append_many([SourceMessage({'i': i}, meta={'m': i}) for i in range(20, 25)])
    tail = stream.tail(last=7)
    assert [next(tail).data['i'] for _ in range(7)] == list(range(18, 25))
    assert next(tail) is None
    stream.append({'i': 25})
    other.append({'i': 26}, meta={'m': 26})
    found = list(islice(filter(None, tail), 2))
    assert [message.data['i'] for message in found] == [25, 26]
    assert (found[1].meta, found[1].created.tzinfo) == ({'m': 26}, timezone.utc)


def test_the_tail_ends_when_it_is_not_to_follow(url):
    stream = mb.stream('test', url=url)
    stream.append_many({'i': i} for i in range(3))
    assert [message.data['i'] for message in stream.tail(last=100, follow=False)] == [0, 1, 2]
    assert list(stream.tail(follow=False)) == []


def test_the_tail_shows_a_producer_that_comes_back(url, db):
    stream = mb.stream('test', url=url)
    stream.producer('a').append_many([SourceMessage({'i': i}, token=i) for i in range(5)])
    consume(url)
    tail = stream.tail()
    assert next(tail) is None
    stream.producer('a').append({'i': 5}, token=5)
    assert next(filter(None, tail)).offset == 5


def test_a_flood_is_shown_whole(url):
    stream = mb.stream('test', url=url)
    tail = stream.tail()
    assert next(tail) is None
    stream.append_many({'i': i} for i in range(5500))
    assert [next(tail).data['i'] for _ in range(5500)] == list(range(5500))


@pytest.mark.parametrize('last', [-1, 1.5, True, '3'])
def test_the_number_of_last_messages_is_checked(url, last):
    with pytest.raises(ArgumentError, match='last must be an int'):
        mb.stream('test', url=url).tail(last=last)
