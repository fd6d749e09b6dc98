"""Kafka: bring the messages of topics into a stream, and write the results of windows to topics."""

from minibatch.errors import install_hint

try:
    import kafka.net  # noqa: F401 - from version 3 on
except ImportError as exc:
    raise ImportError(f'minibatch.contrib.kafka needs kafka-python 3: {install_hint("kafka")}') from exc

from .sink import KafkaSink
from .source import KafkaSource

__all__ = ['KafkaSink', 'KafkaSource']
