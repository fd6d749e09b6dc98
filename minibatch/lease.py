"""Who plans: the lease of a consumer group, taken and renewed in the server's time."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import psutil
from pymongo.errors import PyMongoError

from . import clock, connection, ledger, store
from .connection import Target, reason_of
from .errors import GroupConflictError, LeaseLostError
from .text import plain

logger = logging.getLogger(__name__)

START_TOLERANCE = 2.0
ADOPTION_LEASE = 10.0


class Lease:
    """The right to plan for a consumer group, for one epoch; get it with `take`.

    It is renewed by a thread until `release`. It is over, `valid` false, when this process has not renewed it in
    time by its own monotonic clock, whatever the reason; whoever takes it then has the next epoch.
    """

    def __init__(self, target: Target, stream: str, group: str, seconds: float, doc: dict[str, Any], asked: float):
        self._target, self._stream, self._group, self._seconds = target, stream, group, seconds
        self.epoch: int = doc['lease']['epoch']
        self.doc = doc
        self._clock = clock.ServerClock(clock.aware(doc['taken']), time.monotonic())
        self._deadline = asked + seconds
        self._released = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._renew, name=f'minibatch-lease-{stream}', daemon=True)
        self._thread.start()

    @property
    def valid(self) -> bool:
        """Whether functions may be started and sinks called."""
        return not self._lost and time.monotonic() < self._deadline

    def now(self) -> datetime:
        """The server's time, aware."""
        return self._clock.at(time.monotonic())

    def check(self) -> None:
        """Renew it if it has run out, as while MongoDB was away; else ask nobody.

        Raises:
            LeaseLostError: if another consumer has taken it.
        """
        if self._lost:
            raise LeaseLostError
        if not self.valid:
            self.renew()

    def renew(self) -> None:
        """Extend the lease; one that has run out too, as long as nobody has taken it.

        Raises:
            LeaseLostError: if another consumer has.
        """
        asked = time.monotonic()
        try:
            with self._target.within(self._seconds):
                server_time = ledger.renew_lease(
                    self._target.majority, self._stream, self._group, self.epoch, self._seconds
                )
        except LeaseLostError:
            self._lost = True
            raise
        self._deadline = max(self._deadline, asked + self._seconds)
        self._clock.adjust(clock.aware(server_time), time.monotonic())

    def release(self, clean: bool) -> None:
        """Give the lease up at once; `clean` if all that was begun under it is finished."""
        self._released.set()
        connection.join(self._thread, self._target)
        if not self._lost and not self._target.is_away:
            with suppress(PyMongoError), self._target.within(self._seconds):  # then it runs out by itself
                ledger.release_lease(self._target.majority, self._stream, self._group, self.epoch, clean)

    def _renew(self) -> None:
        while not self._released.wait(self._seconds / 4):
            try:
                self.renew()
            except LeaseLostError:
                return
            except PyMongoError as exc:
                if not self._target.is_away:  # which is said by the consumer
                    name = plain(f'{self._stream}/{self._group}')
                    logger.warning('lease of %s not renewed yet: %s', name, reason_of(exc))


def take(
    target: Target, stream: str, group: str, seconds: float, token: str, fields: dict[str, Any]
) -> Lease | dict[str, Any]:
    """Take the lease if it is free or its owner on this host is dead; `fields` go into the group's document.

    Returns:
        The lease, or else the owner.

    Raises:
        GroupConflictError: if another function has the lease.
    """
    db = target.majority
    doc = ledger.find_group(db, stream, group)
    holder = (doc or {}).get('lease', {}).get('owner', {})
    dead = holder and (holder['token'] == token or is_dead(holder))
    asked = time.monotonic()
    taken = ledger.take_lease(db, stream, group, owner(token), seconds, holder['token'] if dead else '', fields)
    if taken is not None:
        return Lease(target, stream, group, seconds, taken, asked)
    doc = ledger.find_group(db, stream, group) or {}
    if doc.get('fingerprint') != fields['fingerprint']:
        raise GroupConflictError(
            f"stream {stream!r} is being consumed as group {group!r} by {doc.get('fingerprint')}, not by "
            f'{fields["fingerprint"]}; give one of them another group=, or stop the other one first'
        )
    return dict(doc['lease']['owner'])


def new_token() -> str:
    """What tells this consumer from all others."""
    return secrets.token_hex(8)


def owner(token: str) -> dict[str, Any]:
    """How this process is named in a lease."""
    process = psutil.Process()
    return {'token': token, 'pid': process.pid, 'started': process.create_time(), **_host()}


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the owner of a lease ran on this host and certainly runs no more."""
    if any(holder.get(key) != value for key, value in _host().items()):
        return False
    try:
        process = psutil.Process(holder['pid'])
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return bool(abs(process.create_time() - holder['started']) > START_TOLERANCE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _host() -> dict[str, Any]:
    """This host, boot and process namespace: a process id means nothing outside of it."""
    host = {'host': socket.gethostname(), 'boot': '', 'namespace': ''}
    with suppress(OSError):
        with open('/proc/sys/kernel/random/boot_id') as file:
            host['boot'] = file.read().strip()
        host['namespace'] = os.readlink('/proc/self/ns/pid')
    return host


class Adoption:
    """Gives messages that were stored without an offset a place in the log.

    One process at a time does it for a stream, under a lease of its own, through a producer of its own.
    """

    def __init__(self, target: Target, stream: str, new_producer: Callable[[], str]) -> None:
        self._target, self._stream, self._new_producer = target, stream, new_producer
        self._producer, self._offset = new_producer(), 0

    def run(self) -> int:
        """Adopt what there is; returns how many. Does nothing while another process does it."""
        db, adopted = self._target.majority, 0
        if not store.has_without_offset(db, self._stream):
            return 0
        deadline = time.monotonic() + ADOPTION_LEASE / 2
        taken = ledger.take_lease(db, self._stream, '', owner(new_token()), ADOPTION_LEASE, '', {})
        while taken is not None and time.monotonic() < deadline:
            try:
                found = store.adopt_without_offset(db, self._stream, self._producer, self._offset)
            except PyMongoError:
                self._producer, self._offset = self._new_producer(), 0
                raise
            self._offset += found
            adopted += found
            if not found:
                break
        if taken is not None:
            ledger.release_lease(db, self._stream, '', taken['lease']['epoch'], clean=True)
        return adopted
