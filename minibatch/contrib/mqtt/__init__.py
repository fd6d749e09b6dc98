"""MQTT: bring the messages of topics into a stream, and publish the results of windows."""

from minibatch.errors import install_hint

try:
    from paho.mqtt.enums import CallbackAPIVersion  # noqa: F401 - version 1 has none
except ImportError as exc:
    raise ImportError(f'minibatch.contrib.mqtt needs paho-mqtt 2: {install_hint("mqtt")}') from exc

from .sink import MQTTSink
from .source import MQTTSource

__all__ = ['MQTTSink', 'MQTTSource']
