"""A paho client that hands over what happens, and acknowledges a message when it is told to."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from paho.mqtt import client as mqtt
from paho.mqtt.properties import VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode

from .broker import BATCH_MESSAGES, Client, refusal

logger = logging.getLogger(__name__)

# JSON grows at most sixfold in BSON, so a batch is one record batch of the stream: all of it is stored or nothing.
BATCH_BYTES = 128 << 10
MESSAGE_BYTES = 20  # what one costs beside topic and payload
WAITING_MESSAGES = 100_000
WAITING_BYTES = 64 << 20


class Received(NamedTuple):
    """A message has arrived over the connection of this number."""

    connection: int
    message: mqtt.MQTTMessage
    size: int


class Released(NamedTuple):
    """The broker will not send a message of QoS 2 again, and uses its packet id for another when it is told."""

    connection: int
    mid: int


class Connected(NamedTuple):
    """The broker has taken this client, or not: the reason says why."""

    session_present: bool
    refused: str


class Subscribed(NamedTuple):
    """The answer to a subscription, for each topic."""

    codes: list[ReasonCode]


class Lost(NamedTuple):
    """The connection is lost."""

    reason: str


class Ended(NamedTuple):
    """The thread of the client has ended."""

    reason: str


class HandOver:
    """What the thread of the client hands to the thread of the source, in order. Bounded.

    Of QoS 0 what is too much is dropped; of the others it is not read from the connection, see `wait_for_room`.
    """

    def __init__(self, drop: Callable[[], None]) -> None:
        self._drop = drop
        self._changed = threading.Condition()
        self._events: deque[Any] = deque()
        self._load = {False: [0, 0], True: [0, 0]}  # whether acknowledged: [messages, bytes]
        self._closed = False

    def put(self, event: Any) -> None:
        """Hand over what happened. Nothing when closed."""
        with self._changed:
            if self._closed:
                return
            if isinstance(event, Received):
                acknowledged = event.message.qos > 0
                if not acknowledged and self._is_full(acknowledged):
                    self._drop()
                    return
                self._add(event, 1)
            self._events.append(event)
            self._changed.notify_all()

    def take(self, timeout: float) -> list[Any]:
        """What has happened, waiting up to `timeout` seconds for something.

        It is either one thing, or as many messages (and releases) as make one batch.
        """
        batch: list[Any] = []
        size = 0
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout)
            while self._events and len(batch) < BATCH_MESSAGES:
                event = self._events[0]
                if not isinstance(event, (Received, Released)):
                    return batch or [self._events.popleft()]
                if isinstance(event, Received):
                    size += event.size
                    if batch and size > BATCH_BYTES:
                        break
                    self._add(event, -1)
                batch.append(self._events.popleft())
            self._changed.notify_all()
        return batch

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until acknowledged messages may come; whether they may. For the thread of the client."""
        if not self._is_full(True):
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not self._is_full(True), timeout)

    def close(self) -> None:
        """Take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _is_full(self, acknowledged: bool) -> bool:
        messages, size = self._load[acknowledged]
        return messages >= WAITING_MESSAGES or size >= WAITING_BYTES

    def _add(self, event: Received, sign: int) -> None:
        load = self._load[event.message.qos > 0]
        load[0] += sign
        load[1] += sign * event.size


class Subscriber(Client):
    """A paho client that hands over what happens, and acknowledges only by `receipt`.

    paho itself confirms a message of QoS 2 (PUBREC) before anybody has seen it, and the broker then forgets it. Here a
    message is handed over when it arrives, and confirmed by `receipt`. So its packet id is ours to look after.
    """

    def __init__(self, handover: HandOver, **options: Any) -> None:
        super().__init__(manual_ack=True, **options)
        self._handover = handover
        self._connection = 0
        self._turn = threading.Lock()
        self.on_connect = self._hand_connected
        self.on_subscribe = lambda client, data, mid, codes, properties: handover.put(Subscribed(codes))
        self.on_message = lambda client, data, message: self._hand_over(message)
        self.on_disconnect = lambda client, data, flags, reason, properties: handover.put(Lost(str(reason)))

    def ended(self, reason: str) -> None:
        self._handover.put(Ended(reason))

    def receipt(self, event: Received | Released) -> None:
        """Tell the broker that a message is stored, or that its release is.

        Nothing is told over another connection than that of the message: there the packet id may be another message's.
        """
        with self._turn:
            if event.connection != self._connection:
                return
            if isinstance(event, Released):
                self.ack(event.mid, 2)
            elif event.message.qos == 1:
                self.ack(event.message.mid, 1)
            elif event.message.qos == 2:
                super()._send_pubrec(event.message.mid)

    def reconnect(self) -> Any:
        with self._turn:
            self._connection += 1
        return super().reconnect()  # which forgets what waits to be sent

    def loop_read(self, max_packets: int = 1) -> Any:
        self._ping_t = 0.0  # something has come, so the broker is there; its answer to a ping may be far behind
        if self._handover.wait_for_room(0.1):
            return super().loop_read(max_packets)
        return mqtt.MQTT_ERR_SUCCESS

    def _send_pubrec(self, mid: int) -> Any:
        return mqtt.MQTT_ERR_SUCCESS

    def _handle_publish(self) -> Any:
        try:
            result = super()._handle_publish()
        except Exception:
            # What paho cannot read are properties that nobody needs here. It would end, and again when they come again.
            self._in_packet['packet'] = _without_properties(self._in_packet['packet'], self._in_packet['command'])
            result = super()._handle_publish()
        while self._in_messages:
            _, message = self._in_messages.popitem()
            self._hand_over(message)
        return result

    def _handle_pubrel(self) -> Any:
        mid = int.from_bytes(self._in_packet['packet'][:2], 'big')
        self._handover.put(Released(self._connection, mid))
        return mqtt.MQTT_ERR_SUCCESS

    def _hand_over(self, message: mqtt.MQTTMessage) -> None:
        size = len(message.payload) + len(topic_of(message)) + MESSAGE_BYTES
        self._handover.put(Received(self._connection, message, size))

    def _hand_connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._handover.put(Connected(flags.session_present, refusal(reason) if reason.is_failure else ''))


def _without_properties(packet: Any, command: int) -> bytearray:
    """A PUBLISH of protocol 5 with an empty list of properties."""
    start = 2 + int.from_bytes(packet[:2], 'big') + (2 if command & 0b110 else 0)
    size, length = VariableByteIntegers.decode(packet[start:])  # type: ignore[no-untyped-call]
    return bytearray(packet[:start] + b'\0' + packet[start + length + size :])


def topic_of(message: mqtt.MQTTMessage) -> str:
    try:
        return message.topic
    except UnicodeDecodeError as exc:
        return exc.object.decode('utf-8', 'backslashreplace')


@functools.cache
def holds_receipts_back() -> bool:
    """Whether the paho-mqtt that is installed works as `Subscriber` needs it, tried with a message of QoS 2."""
    handover = HandOver(lambda: None)
    try:
        client = Subscriber(handover)
        for command, packet in ((mqtt.PUBLISH | 4, b'\0\1t\0\7{}'), (mqtt.PUBREL | 2, b'\0\7')):
            in_packet = {'command': command, 'packet': bytearray(packet), 'remaining_length': len(packet)}
            client._in_packet = {**client._in_packet, **in_packet}  # type: ignore[typeddict-item]
            client._packet_handle()
        silent = not client._out_packet
        events = handover.take(0)
        for event in events:
            client.receipt(event)
        told = [packet['command'] & 0xF0 for packet in client._out_packet]
        arrived = [type(event) for event in events] == [Received, Released] and events[0].message.mid == events[1].mid
    except Exception:
        logger.debug('paho-mqtt is not as expected', exc_info=True)
        return False
    return silent and arrived and told == [mqtt.PUBREC, mqtt.PUBCOMP]
