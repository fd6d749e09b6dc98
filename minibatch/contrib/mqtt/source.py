"""A source that subscribes to topics of an MQTT broker."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from paho.mqtt import __version__ as paho_version
from paho.mqtt import client as mqtt
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from minibatch import jsontext
from minibatch.abc import SourceMessage
from minibatch.errors import ArgumentError

from .broker import CONNECT_TIMEOUT, Broker, check_bool, check_qos, check_topic
from .subscriber import (
    Connected,
    Ended,
    HandOver,
    Lost,
    Received,
    Released,
    Subscribed,
    Subscriber,
    holds_receipts_back,
    topic_of,
)
from .topics import subscriptions

if TYPE_CHECKING:
    from minibatch import Stream
    from minibatch.named import NamedProducer

logger = logging.getLogger(__name__)

PAYLOADS: dict[str, Callable[[bytes], Any]] = {'json': jsontext.loads, 'text': bytes.decode, 'raw': bytes}
CANCEL_PAUSE = 0.2
SAID_PAUSE = 60.0


class MQTTSource:
    """A source that subscribes to topics of an MQTT broker.

    A message of the stream is ``{'topic': str, 'payload': ..., 'qos': 0, 1 or 2, 'retain': bool}``, where the payload
    is what the JSON of the MQTT message says. What is no JSON, or has a topic that is no UTF-8, goes to the stream
    ``<stream>.dead_letters``. Properties of protocol 5 are not brought.

    Topics may overlap, as ``plant/#`` and ``plant/+/alarm``: each message comes once all the same. Where none matches
    all that the other does, as with ``a/+`` and ``+/b``, the narrowest topic that covers both is subscribed (``+/+``),
    and what only that matches is dropped here; a warning says so.

    The broker is told that a message has arrived when it is stored in the stream, not before. What may be lost or come
    twice then depends on the quality of service (the lower of the publisher's and of ``qos=``), and on whether there is
    a *session*: with ``client_id=`` the broker keeps the topics of a client that is away, and what comes for it.

    ==============================  ======================  ======================  ===========================
    what happens                    QoS 2, session          QoS 1, session          QoS 1 and 2, no session
    ==============================  ======================  ======================  ===========================
    this process is killed          0 lost, 0 twice         0 lost; twice what was  lost what is published until
                                                            in flight               it is back, and in flight
    the connection is lost, or the  0 lost, 0 twice; see    0 lost; twice what was  lost what is published until
    broker restarts                 below for mosquitto     in flight               it is back
    the broker is killed            what it had not saved   the same                the same
                                    is lost or comes twice
    a message is malformed          a dead letter           a dead letter           a dead letter
    the stream is full, or MongoDB  0 lost, 0 twice         0 lost, 0 twice         0 lost, 0 twice
    is away
    ==============================  ======================  ======================  ===========================

    - *QoS 0*: the broker sends each message once and forgets it. Lost is what a killed process had not stored, and what
      comes while 100,000 of them (or 64 MB) wait for the stream; that is counted in `dropped`, and a warning says so.
    - *QoS 1* may repeat what is in flight: what the broker has sent and has no answer for. The broker limits it:
      mosquitto to 20 (``max_inflight_messages``), but mosquitto 2.0 was seen to repeat up to 600. With protocol='5'
      this source sets a limit of 1,000.
    - *QoS 2* repeats nothing, because the packet ids of what is stored are stored with it, by the same write, until the
      broker has released them. If another program uses the client_id in between, messages may come twice. And
      mosquitto 2.0.11, after a restart, was seen to send up to 360 messages again that it had released already.
    - *A broker that is killed*: mosquitto saves every 30 minutes (``autosave_interval``, ``autosave_on_changes``).

    The broker keeps a session, and all messages for it, until it is told otherwise: a client_id that is used no more
    fills the broker, and topics of an earlier run stay subscribed. A client_id is for one process at a time. The
    consumers of one group take turns, so they share one. With it, the messages of all runs also come to the stream from
    one producer; without, each run is a new one, and event time waits ``idle=`` seconds for the last.

    The connection is made again when it is lost, after 1, 2, 4 ... 60 seconds. With each new subscription a broker
    sends the retained messages of the topics, marked ``'retain': True``, so they come again after each start (with
    protocol='5' and a session, only for new topics).

    Args:
        url: ``'mqtt://user:password@host:1883'``, or ``mqtts://`` for TLS (port 8883); 'localhost' and 'host:port' will
            do. Special characters of user and password are percent-encoded.
        topic: the topic, or a list of topics, with the wildcards ``+`` (one level) and ``#`` (all below). A shared
            one (``$share/name/topic``) may not overlap with one that is not.
        qos: the highest quality of service at which messages are taken: 0, 1 or 2.
        payload: 'json'; 'text', which must be UTF-8; or 'raw', bytes.
        client_id: a name for this client at the broker, to have a session there; it must be the same at each start, and
            nobody else's.
        clean_session: True: no session, in spite of the client_id.
        protocol: '3.1.1' or '5'.
        keepalive: after so many seconds without a message broker and client make sure that the other is there.
        ca_certs: with mqtts, the file with the certificates that are trusted, instead of the system's.
        certfile, keyfile, keyfile_password: with mqtts, the certificate and key by which the broker knows this client.
        tls_insecure: with mqtts, True: the name in the broker's certificate may be another one than the host's.

    Attributes:
        subscribed: a `threading.Event`, set when the broker has confirmed the topics.
        dropped: how many messages of QoS 0 were dropped because the stream did not take them in time.

    Raises:
        ArgumentError: naming the argument that is wrong. The password is in no error and no log line.

    Example:
        >>> import minibatch as mb
        >>> source = MQTTSource('mqtt://localhost', 'sensors/#', client_id='minibatch-sensors')
        >>> @mb.streaming('sensors', interval=60, key='topic', source=source)    # doctest: +SKIP
        ... def mean(window):
        ...     values = [data['payload']['value'] for data in window.data]
        ...     return {'sensor': window.key, 'mean': sum(values) / len(values)}
    """

    def __init__(
        self,
        url: str,
        topic: str | Sequence[str],
        *,
        qos: int = 1,
        payload: str = 'json',
        clean_session: bool | None = None,
        **options: Any,
    ) -> None:
        self._broker = Broker(url, options)
        self._topics = [topic] if isinstance(topic, str) else topic
        if not isinstance(self._topics, (list, tuple)) or not self._topics:
            raise ArgumentError(f'topic must be a topic or a list of topics, not {topic!r}')
        for each in self._topics:
            check_topic(each, wildcards=True)
        self._subscriptions = subscriptions(self._topics)
        self._qos = check_qos(qos)
        if qos == 2 and not holds_receipts_back():
            raise ArgumentError(
                f'qos=2 is not safe with paho-mqtt {paho_version}, which minibatch does not know: '
                'it would confirm messages before they are stored. Use qos=1, or paho-mqtt 2.2'
            )
        if payload not in PAYLOADS:
            raise ArgumentError(f'payload must be one of {", ".join(map(repr, PAYLOADS))}, not {payload!r}')
        self._payload = payload
        if clean_session is not None:
            check_bool('clean_session', clean_session)
        if clean_session is False and not self._broker.client_id:
            raise ArgumentError('clean_session=False needs a client_id=, by which the broker knows this client again')
        self._session = bool(self._broker.client_id) and not clean_session
        self._cancelled = threading.Event()
        self.subscribed = threading.Event()
        self.dropped = 0
        self._said = -SAID_PAUSE

    def __repr__(self) -> str:
        return f'<MQTTSource {self._broker} {", ".join(self._topics)}>'

    def stream(self, stream: Stream) -> None:
        """Append what arrives until `cancel` is called.

        Raises:
            ConnectionError: if the broker cannot be reached at first, or refuses the client or a topic.
            TimeoutError: if it does not answer.
        """
        self._cancelled.clear()
        self.subscribed.clear()
        name = f'mqtt/{self._broker.host}:{self._broker.port}/{self._broker.client_id}' if self._session else None
        handover = HandOver(self._drop)
        client = Subscriber(handover, **self._broker.options(self._session))
        reception = _Reception(self, client, stream.producer(name), durable=self._session)
        self._broker.connect(client, self._session)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        try:
            while not self._cancelled.is_set():
                reception.process(handover.take(CANCEL_PAUSE))
                if not reception.connected and time.monotonic() > deadline:
                    raise TimeoutError(f'{self._broker} does not answer')
            handover.close()
            while events := handover.take(0):
                reception.process(events)
        finally:
            client.close()

    def cancel(self) -> None:
        """Make `stream` return when it has stored what has arrived."""
        self._cancelled.set()

    def _subscribe(self, client: Subscriber) -> None:
        topics = [each.topic for each in self._subscriptions]
        if self._broker.protocol == mqtt.MQTTv5:  # a topic that is subscribed already brings no retained messages again
            options = SubscribeOptions(self._qos, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
            client.subscribe([(topic, options) for topic in topics])
        else:
            client.subscribe([(topic, self._qos) for topic in topics])
        if self._session and (covered := [topic for topic in self._topics if topic not in topics]):
            client.unsubscribe(covered)  # an earlier run may have subscribed them

    def _check_subscription(self, codes: Sequence[ReasonCode]) -> None:
        for (topic, wanted), code in zip(self._subscriptions, codes, strict=True):
            if code.is_failure:
                raise ConnectionRefusedError(f'{self._broker} refused the subscription to {topic!r}: {code}')
            if code.value < self._qos:
                logger.warning('%s sends %r with QoS %d at most', self._broker, topic, code.value)
            if topic not in wanted:
                logger.warning(
                    '%s overlap: so that each message comes once, %r is subscribed, and what they do not match dropped',
                    ', '.join(map(repr, wanted)), topic,
                )  # fmt: skip
        self.subscribed.set()

    def _wants(self, message: mqtt.MQTTMessage) -> bool:
        topic = topic_of(message)
        return not any(each.is_superfluous(topic) for each in self._subscriptions if each.topic not in each.wanted)

    def _decode(self, message: mqtt.MQTTMessage) -> SourceMessage:
        payload = bytes(message.payload)
        data = {'topic': topic_of(message), 'payload': payload, 'qos': message.qos, 'retain': message.retain}
        try:
            message.topic  # noqa: B018
        except UnicodeDecodeError as exc:
            return SourceMessage(data, error=f'the topic is not UTF-8: {exc}')
        try:
            return SourceMessage({**data, 'payload': PAYLOADS[self._payload](payload)})
        except (ValueError, RecursionError) as exc:
            return SourceMessage(data, error=f'the payload is not {self._payload}: {exc}')

    def _drop(self) -> None:
        self.dropped += 1
        if time.monotonic() >= self._said + SAID_PAUSE:
            self._said = time.monotonic()
            text = 'messages of QoS 0 from %s come faster than the stream takes them; %d are lost so far'
            logger.warning(text, self._broker, self.dropped)


class _Reception:
    """One run of a source: stores what its client hands over, and then lets the broker know.

    A message of QoS 2 that is stored is known by its packet id until the broker has released it: if it is sent again
    meanwhile, it is the same message. What is known is kept with the messages, by the same write, and a release is kept
    before the broker is told, because after that the id may be another message's.
    """

    def __init__(self, source: MQTTSource, client: Subscriber, producer: NamedProducer, durable: bool) -> None:
        self._source, self._client, self._producer, self._durable = source, client, producer, durable
        self._stored = _unpack(producer.token)
        self._run = secrets.token_bytes(8)
        self._tokens = count()
        self.connected = False

    def process(self, events: Sequence[Any]) -> None:
        """Deal with what `HandOver.take` returned."""
        match events:
            case []:
                pass
            case [Connected() as event]:
                self._resume(event)
            case [Subscribed() as event]:
                self._source._check_subscription(event.codes)
            case [Lost() as event]:
                self._wait_for_connection(event.reason)
            case [Ended() as event]:
                raise ConnectionError(f'the connection to {self._source._broker} has ended: {event.reason}')
            case _:
                self._store(events)

    def _store(self, events: Sequence[Received | Released]) -> None:
        before = _pack(self._stored)
        good: list[SourceMessage] = []
        bad: list[SourceMessage] = []
        for event in events:
            if isinstance(event, Released):
                self._stored.pop(event.mid, None)
            elif self._source._wants(event.message) and self._is_new(event.message):
                message = self._source._decode(event.message)
                (bad if message.error else good).append(message)
        messages, after = bad + good, _pack(self._stored)
        if not self._durable:
            self._producer.append_many(messages)
        elif messages:
            # Only the last of them says that all are stored. No two tokens are equal, each message has its own.
            tokens = [self._token(before) for _ in messages[1:]] + [self._token(after)]
            self._producer.append_many(
                message._replace(token=token) for message, token in zip(messages, tokens, strict=True)
            )
        elif after != before:
            self._producer.save(self._token(after))
        for event in events:
            self._client.receipt(event)

    def _is_new(self, message: mqtt.MQTTMessage) -> bool:
        if message.qos < 2:
            return True
        digest = hashlib.blake2b(topic_of(message).encode() + b'\0' + message.payload, digest_size=8).digest()
        if message.dup and self._stored.get(message.mid) == digest:
            return False
        self._stored[message.mid] = digest
        return True

    def _token(self, packed: bytes) -> bytes:
        return self._run + next(self._tokens).to_bytes(8, 'big') + packed

    def _resume(self, event: Connected) -> None:
        broker = self._source._broker
        if event.refused:
            if not self.connected:
                raise ConnectionRefusedError(f'{broker} refused the connection: {event.refused}')
            logger.warning('%s refused the connection: %s', broker, event.refused)
            return
        if not event.session_present and self._stored:  # these packet ids were those of another session
            self._stored.clear()
            if self._durable:
                self._producer.save(self._token(b''))
        if not (event.session_present and self.connected):
            self._source._subscribe(self._client)
        logger.info('connected to %s%s', broker, ', the session goes on' if event.session_present else '')
        self.connected = True

    def _wait_for_connection(self, reason: str) -> None:
        if not self.connected:
            raise ConnectionError(f'{self._source._broker} closed the connection: {reason}')
        logger.warning('the connection to %s is lost, trying again: %s', self._source._broker, reason)


def _pack(stored: Mapping[int, bytes]) -> bytes:
    return b''.join(mid.to_bytes(2, 'big') + digest for mid, digest in stored.items())


def _unpack(token: bytes | None) -> dict[int, bytes]:
    packed = (token or b'')[16:]
    return {int.from_bytes(packed[i : i + 2], 'big'): packed[i + 2 : i + 10] for i in range(0, len(packed), 10)}
