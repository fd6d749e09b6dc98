"""A sink that publishes the results of windows to an MQTT broker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from minibatch import functions, jsontext
from minibatch.errors import ArgumentError, DataError

from .broker import BATCH_MESSAGES, CONNECT_TIMEOUT, Broker, Client, check_bool, check_qos, check_topic, refusal

LARGEST = 0xFFFFFFF
HEADER_BYTES = 16


class MQTTSink:
    """A sink that publishes the result of each window to an MQTT broker.

    A mapping becomes one MQTT message, a list (or other iterable) of mappings one each, as JSON; NaN and infinities,
    which JSON has not, are null in it. `put` returns when the
    broker has acknowledged all of them (with ``qos=0``: when they are sent, which proves nothing). When the connection
    is lost meanwhile, the window is tried again, and what had arrived is published a second time.

    While the broker cannot be reached, the window waits. A message that the broker refuses counts as a failed attempt;
    only with protocol='5' does a broker say so, others let it disappear.

    Args:
        url: as of `MQTTSource`.
        topic: where to, or a function that is given the message (what becomes the JSON) and returns the topic.
        qos: 0, 1 or 2.
        retain: whether the broker keeps the last message of each topic for those who subscribe later.
        expand: False: a list is one message.
        timeout: seconds in which the broker must acknowledge something, while there is something to acknowledge.
        client_id, protocol, keepalive, ca_certs, certfile, keyfile, keyfile_password, tls_insecure: as of `MQTTSource`.

    Raises:
        ArgumentError: naming the argument that is wrong.

    Example:
        >>> import minibatch as mb
        >>> sink = MQTTSink('mqtt://localhost', lambda message: f'means/{message["sensor"]}', retain=True)
        >>> @mb.streaming('sensors', size=100, sink=sink)    # doctest: +SKIP
        ... def mean(window):
        ...     return {'sensor': 'roof', 'mean': sum(data['payload'] for data in window.data) / 100}
    """

    def __init__(
        self,
        url: str,
        topic: str | Callable[[Any], str],
        *,
        qos: int = 1,
        retain: bool = False,
        expand: bool = True,
        timeout: float = 30.0,
        **options: Any,
    ) -> None:
        self._broker = Broker(url, options)
        if callable(topic):
            functions.check('topic', topic, 'a message', plain=True)
        else:
            check_topic(topic, wildcards=False)
        self._topic = topic
        self._qos = check_qos(qos)
        self._retain = check_bool('retain', retain)
        self._expand = check_bool('expand', expand)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ArgumentError(f'timeout must be a positive number of seconds, not {timeout!r}')
        self._timeout = timeout
        self._client: _Publisher | None = None

    def __repr__(self) -> str:
        return f'<MQTTSink {self._broker} {self._topic}>'

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_client': None}  # a copy, or one in another process, has a connection of its own

    def put(self, messages: Any) -> None:
        """Publish the result of one window, and return when the broker has it.

        Raises:
            DataError: naming item and field, if it is no JSON, or the broker refuses it.
            ConnectionError: if the broker cannot be reached, or the connection is lost.
            TimeoutError: if it does not answer.
        """
        packets = self._packets(messages)
        if not packets:
            return
        if self._client is not None and self._client.lost:
            self.close()
        try:
            if self._client is None:
                self._client = self._open()
            self._publish(self._client, packets)
        except BaseException:
            self.close()  # what was not acknowledged must not be sent later, too
            raise

    def close(self) -> None:
        """End the connection; the next `put` makes a new one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _packets(self, messages: Any) -> list[tuple[str, bytes]]:
        if not isinstance(messages, (Mapping, Iterable)) or isinstance(messages, (str, bytes)):
            raise DataError(f'MQTTSink takes a mapping or a list of mappings, not {type(messages).__name__}')
        packets = []
        for i, item in enumerate(messages if self._expand and not isinstance(messages, Mapping) else [messages]):
            if self._expand and not isinstance(item, Mapping):
                raise DataError(f'MQTTSink takes a list of mappings; item {i} is of type {type(item).__name__}')
            value = dict(item) if isinstance(item, Mapping) else list(item)
            topic = self._topic(item) if callable(self._topic) else self._topic
            check_topic(topic, wildcards=False)
            packets.append((topic, _encode(value, i)))
        return packets

    def _open(self) -> _Publisher:
        client = _Publisher(**self._broker.options(False))
        self._broker.connect(client, False)
        try:
            client.wait_for(0, CONNECT_TIMEOUT, self._broker)
        except BaseException:
            client.close()
            raise
        return client

    def _publish(self, client: _Publisher, packets: Sequence[tuple[str, bytes]]) -> None:
        for i, (topic, payload) in enumerate(packets):
            if len(payload) + len(topic.encode()) + HEADER_BYTES > client.largest:
                raise DataError(f'item {i} has {len(payload):,} bytes, which is more than {self._broker} takes')
        for first in range(0, len(packets), client.window):
            client.begin()
            part = packets[first : first + client.window]
            mids = [client.publish(*packet, self._qos, self._retain).mid for packet in part]
            client.wait_for(len(part), self._timeout, self._broker)
            for mid, reason in client.refused.items():
                raise DataError(f'{self._broker} refused item {first + mids.index(mid)}: {reason}')


class _Publisher(Client):
    """A paho client that counts what the broker has acknowledged; it connects once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(reconnect_on_failure=False, **options)
        self._changed = threading.Condition()
        self.open = False
        self.lost = ''
        self.largest = LARGEST
        self.window = BATCH_MESSAGES
        self.on_connect = self._connected
        self.on_publish = self._acknowledged
        self.on_disconnect = lambda client, data, flags, reason, properties: self.ended(str(reason))
        self.begin()

    def begin(self) -> None:
        """Count from 0 again; nothing is under way."""
        self.done = 0
        self.refused: dict[int, str] = {}

    def wait_for(self, count: int, timeout: float, broker: Broker) -> None:
        """Wait until `count` are acknowledged, up to `timeout` seconds for each; 0: until the connection is open.

        Raises:
            ConnectionError: if the connection is lost, or was refused.
            TimeoutError: if it takes longer.
        """
        with self._changed:
            while not self.open or self.done < count:
                if self.lost:
                    raise ConnectionError(f'no connection to {broker}: {self.lost}')
                if not self._changed.wait(timeout):
                    raise TimeoutError(f'{broker} does not answer')

    def ended(self, reason: str) -> None:
        with self._changed:
            self.lost = self.lost or reason
            self._changed.notify_all()

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.ended(refusal(reason))
            return
        with self._changed:
            self.open = True
            self.largest = getattr(properties, 'MaximumPacketSize', LARGEST)
            # paho does not look at it, but never has more than these under way.
            if (receives := getattr(properties, 'ReceiveMaximum', BATCH_MESSAGES)) < self.max_inflight_messages:
                self.window = receives
            self._changed.notify_all()

    def _acknowledged(self, client: Any, data: Any, mid: int, reason: Any, properties: Any) -> None:
        with self._changed:
            self.done += 1
            if reason.is_failure:
                self.refused[mid] = str(reason)
            self._changed.notify_all()


def _encode(value: Any, item: int) -> bytes:
    try:
        return jsontext.dumps(value)
    except (TypeError, ValueError, RecursionError) as exc:
        fields = value if isinstance(value, Mapping) else {}
        wrong = next((f'{name!r} of ' for name, inner in fields.items() if not _is_json(inner)), '')
        raise DataError(f'{wrong}item {item} is no JSON: {exc}') from exc


def _is_json(value: Any) -> bool:
    try:
        jsontext.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
