"""Streams and consumer groups as Prometheus metrics: as text, and as a collector for an exporter of yours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minibatch.errors import install_hint

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
except ImportError:
    raise ImportError(
        f'minibatch.contrib.prometheus needs prometheus_client: {install_hint("prometheus")}'
    ) from None

import minibatch as mb

__all__ = ['CONTENT_TYPE', 'StreamCollector', 'metrics_text']

GROUP = ('stream', 'group')
COUNTERS = {
    'windows': ('windows', 'Windows processed.'),
    'processed': ('messages', 'Messages processed.'),
    'failed': ('failed', 'Windows that became dead letters.'),
    'retried': ('retried', 'Attempts that failed and were followed by another one.'),
    'late': ('late', 'Messages that came when all their windows were closed.'),
    'expired': ('expired', 'Messages that were deleted by their age before they were processed.'),
}
HISTOGRAMS = {
    'function_seconds': ('function', 'How long the function took for a window.'),
    'latency_seconds': ('latency', 'From the append of the newest message of a window to its commit.'),
    'window_messages': ('sizes', 'Messages in a window.'),
}


class StreamCollector:
    """All streams of a database, for `prometheus_client`; each scrape asks MongoDB once.

    Args:
        url: a MongoDB URL, see `minibatch.connectdb` for what holds without one.

    Example:
        >>> from prometheus_client import REGISTRY, start_http_server
        >>> REGISTRY.register(StreamCollector())    # doctest: +SKIP
        >>> start_http_server(9000, addr='127.0.0.1')    # doctest: +SKIP
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = url

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks no MongoDB."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now.

        Raises:
            UnreachableError: if MongoDB does not answer.
        """
        yield from _metrics(mb.status(self._url))


def metrics_text(streams: Iterable[Any], consumers: Iterable[Any] = ()) -> bytes:
    """Metrics in the text format of Prometheus.

    Args:
        streams: what `minibatch.status` returned.
        consumers: the `consumers` of a `minibatch.contrib.apps.StreamingApp`.
    """
    registry = CollectorRegistry()
    registry.register(_Found([*_metrics(list(streams)), *_consumer_metrics(list(consumers))]))
    text: bytes = generate_latest(registry)
    return text


class _Found:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _metrics(streams: list[Any]) -> Iterator[Metric]:
    appended = CounterMetricFamily('minibatch_appended', 'Messages ever appended.', labels=['stream'])
    stored = GaugeMetricFamily('minibatch_stored', 'Messages that are stored.', labels=['stream'])
    for stream in streams:
        appended.add_metric([stream.name], stream.appended)
        stored.add_metric([stream.name], stream.stored)
    yield from (appended, stored)
    found = [((stream.name, status.name), status) for stream in streams for status in stream.groups]
    for name, (attribute, text) in COUNTERS.items():
        counter = CounterMetricFamily(f'minibatch_{name}', text, labels=GROUP)
        for labels, status in found:
            counter.add_metric(labels, getattr(status.group, attribute))
        yield counter
    yield from _gauges(found)
    for name, (attribute, text) in HISTOGRAMS.items():
        family = HistogramMetricFamily(f'minibatch_{name}', text, labels=GROUP)
        for labels, status in found:
            family.add_metric(labels, *_cumulative(getattr(status.group, attribute)))
        yield family


def _gauges(found: list[tuple[tuple[str, str], Any]]) -> Iterator[Metric]:
    values: dict[str, tuple[str, Callable[[Any], float]]] = {
        'dead_letters': ('Dead letters now.', lambda status: status.dead),
        'lag_messages': ('Messages that the group has not finished.', lambda status: status.lag.messages),
        'lag_seconds': ('Age of the oldest of them.', lambda status: status.lag.seconds),
        'in_flight': ('Windows that are claimed and not finished.', lambda status: status.in_flight),
        'workers': (
            'Workers of the consumer that leads.', lambda status: status.group.workers if status.group.owner else 0,
        ),
        'stalled': ('1 if windows wait and none is finished.', lambda status: int(status.group.stalled is not None)),
        'source_failing': (
            '1 if its source has failed, and has not run well since.',
            lambda status: int(bool(status.group.owner and status.group.source_error)),
        ),
    }
    for name, (text, value) in values.items():
        gauge = GaugeMetricFamily(f'minibatch_{name}', text, labels=GROUP)
        for labels, status in found:
            gauge.add_metric(labels, float(value(status)))
        yield gauge
    committed = GaugeMetricFamily('minibatch_last_commit_timestamp_seconds', 'When a window was committed last.',
                                  labels=GROUP)  # fmt: skip
    owner = GaugeMetricFamily('minibatch_lease_owner', '1, and who leads the group.', labels=[*GROUP, 'owner'])
    for labels, status in found:
        if status.group.committed is not None:
            committed.add_metric(labels, status.group.committed.timestamp())
        if status.group.owner is not None:
            owner.add_metric([*labels, status.group.owner], 1)
    yield from (committed, owner)


def _consumer_metrics(consumers: list[Any]) -> Iterator[Metric]:
    healthy = GaugeMetricFamily('minibatch_consumer_healthy', '1 if the process of a consumer is well.',
                                labels=['consumer'])  # fmt: skip
    restarts = CounterMetricFamily('minibatch_consumer_restarts', 'How often it was started again.',
                                   labels=['consumer'])  # fmt: skip
    for consumer in consumers:
        healthy.add_metric([consumer.name], int(not consumer.problem))
        restarts.add_metric([consumer.name], consumer.restarts)
    yield from (healthy, restarts) if consumers else ()


def _cumulative(histogram: Any) -> tuple[list[tuple[str, float]], float]:
    buckets, total = [], 0
    for bound, count in zip((*map(str, histogram.bounds), '+Inf'), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets, histogram.sum
