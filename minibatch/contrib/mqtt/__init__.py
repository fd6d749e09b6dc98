"""MQTT: bring the messages of topics into a stream, and publish the results of windows."""

try:
    from paho.mqtt.enums import CallbackAPIVersion  # noqa: F401 - version 1 has none
except ImportError as exc:
    raise ImportError('minibatch.contrib.mqtt needs paho-mqtt 2: pip install minibatch[mqtt]') from exc

from .sink import MQTTSink
from .source import MQTTSource

__all__ = ['MQTTSink', 'MQTTSource']
