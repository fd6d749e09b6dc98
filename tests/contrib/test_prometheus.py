"""Streams and groups as Prometheus metrics, read back by Prometheus's own parser."""

import math
import time
from datetime import datetime

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import minibatch as mb
from minibatch.contrib.apps import StreamingApp
from minibatch.contrib.prometheus import CONTENT_TYPE, StreamCollector, metrics_text
from minibatch.errors import UnreachableError
from minibatch.testing import InlineExecutor


def fail_at_first(window):
    if window.number == 1:
        raise ValueError('no')
    time.sleep(0.002)


@pytest.fixture
def consumed(url):
    """A stream of twelve messages; of its windows of five, one is a dead letter and one is processed."""
    mb.stream('test', url=url).append_many({'i': i} for i in range(12))
    options = {'size': 5, 'executor': InlineExecutor, 'workers': 3, 'max_attempts': 2}
    emitter = mb.make_emitter('test', fail_at_first, url=url, **options)
    while emitter._run_once():
        pass
    emitter._run_once()
    return emitter


def values(text):
    """{name: {labels: value}}"""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels not in [dict(labels) for labels in found.get(sample.name, ())], 'twice'
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


GROUP = (('group', 'default'), ('stream', 'test'))


def test_names_are_labels_and_no_lines_of_their_own(url):
    forged = 'x"} 1\nminibatch_stored{stream="forged\\\\"} 7\r\u2028{}'
    mb.stream(forged, url=url).append({'i': 0})
    emitter = mb.make_emitter(forged, lambda window: None, url=url, group=forged, size=1, executor=InlineExecutor)
    while emitter._run_once():
        pass
    found = values(metrics_text(mb.status(url)))
    assert set(found['minibatch_stored']) == {(('stream', forged),)}
    assert set(found['minibatch_processed_total']) == {(('group', forged), ('stream', forged))}


def test_metrics_tell_what_status_tells(url, consumed):
    found = values(metrics_text(mb.status(url)))
    [group] = mb.status(url)[0].groups
    assert found['minibatch_appended_total'] == {(('stream', 'test'),): 12}
    expected = {
        'processed_total': 5, 'windows_total': 1, 'failed_total': 1, 'retried_total': 1, 'dead_letters': 1,
        'late_total': 0, 'expired_total': 0, 'lag_messages': 2, 'in_flight': 0, 'workers': 0, 'stalled': 0,
        'source_failing': 0,
        'last_commit_timestamp_seconds': group.group.committed.timestamp(),
    }
    assert {name: found[f'minibatch_{name}'][GROUP] for name in expected} == expected
    assert 0 < found['minibatch_lag_seconds'][GROUP] < 60
    assert 'minibatch_lease_owner' not in found


def test_histograms_are_cumulative_and_end_with_all(url, consumed):
    found = values(metrics_text(mb.status(url)))
    for name in ('function_seconds', 'latency_seconds', 'window_messages'):
        buckets = {
            float(dict(labels)['le']): value for labels, value in found[f'minibatch_{name}_bucket'].items()
        }
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets[math.inf] == found[f'minibatch_{name}_count'][GROUP] == 1
    sizes = {float(dict(labels)['le']): value for labels, value in found['minibatch_window_messages_bucket'].items()}
    assert (sizes[2], sizes[5], found['minibatch_window_messages_sum'][GROUP]) == (0, 1, 5)
    assert found['minibatch_function_seconds_sum'][GROUP] >= 0.002


def test_who_leads_and_what_is_stalled_or_failing_can_be_seen(url, db, consumed):
    lease = {'expires': datetime(2100, 1, 1), 'owner': {'host': 'h"\\\n', 'pid': 7}, 'epoch': 1}
    db.group.update_one({}, {'$set': {'stalled': datetime(2026, 1, 31), 'source_error': 'E', 'lease': lease}})
    found = values(metrics_text(mb.status(url)))
    assert found['minibatch_lease_owner'] == {(('group', 'default'), ('owner', 'h"\\\n:7'), ('stream', 'test')): 1}
    assert (found['minibatch_stalled'][GROUP], found['minibatch_workers'][GROUP]) == (1, 3)
    assert found['minibatch_source_failing'][GROUP] == 1


def test_names_with_anything_in_them_are_escaped(url):
    name = 'a"b\\c\nd{e}=f,'
    mb.stream(name, url=url)
    assert values(metrics_text(mb.status(url)))['minibatch_appended_total'] == {(('stream', name),): 0}


def test_no_streams_are_no_error():
    assert 'minibatch_appended_total' not in values(metrics_text([]))


def test_a_collector_asks_at_every_scrape(url):
    registry = CollectorRegistry()
    registry.register(StreamCollector('mongodb://127.0.0.1:1/x'))  # asks nothing
    with pytest.raises(UnreachableError):
        generate_latest(registry)
    registry = CollectorRegistry()
    registry.register(StreamCollector(url))
    stream = mb.stream('test', url=url)
    for count in (1, 2):
        stream.append({'i': 0})
        assert values(generate_latest(registry))['minibatch_appended_total'] == {(('stream', 'test'),): count}


def test_an_app_serves_them_with_its_consumers(url, consumed):
    def consumer(url):
        time.sleep(1000)

    with StreamingApp(uri=url) as app:
        app.start_streaming(consumer)
        answer = app.server.test_client().get('/metrics')
    assert (answer.status_code, answer.headers['Content-Type']) == (200, CONTENT_TYPE)
    found = values(answer.data)
    assert found['minibatch_appended_total'] == {(('stream', 'test'),): 12}
    assert found['minibatch_consumer_healthy'] == {(('consumer', 'consumer'),): 1}
    assert found['minibatch_consumer_restarts_total'] == {(('consumer', 'consumer'),): 0}
