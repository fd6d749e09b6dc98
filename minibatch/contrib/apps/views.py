"""The endpoints of a `StreamingApp`, and its dashboard."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.resources import files
from typing import Any, Protocol
from urllib.parse import quote

import pymongo
from flask import Blueprint, Response, request
from pymongo.errors import PyMongoError
from werkzeug.exceptions import HTTPException

import minibatch as mb
from minibatch.errors import ArgumentError, DataError, ServerError

from . import bodies, security
from .asked import asked, number, path_name
from .security import Guard, Refused
from .supervisor import ConsumerProcess
from .watching import Look, Watcher

logger = logging.getLogger(__name__)

MAX_STREAMS = 1000  # kept open for appends
MAX_LETTERS = 100
LETTERS = 20
SHOWN_MESSAGES = 10
MAX_LOADED = 10_000
RETRY_SECONDS = 5
TAIL_TIMEOUT = 5.0
SAFE = ''.join(map(chr, range(0x20, 0x7F))).replace('%', '')  # in the id of an event, which is a line


class Served(Protocol):
    """What the endpoints show and use of an app."""

    title: str
    guard: Guard
    watcher: Watcher
    max_body: int
    listeners: int
    timeout: float
    ending: bool

    @property
    def url(self) -> str:
        """The URL of its database."""

    @property
    def consumers(self) -> list[ConsumerProcess]:
        """The consumers that were started."""

    def problems(self, look: Look | None = None) -> list[str]:
        """What is not well, in words."""


def add_views(blueprint: Blueprint, app: Served) -> None:
    """Add the endpoints of an app to its blueprint."""
    views = _Views(app)
    for rule, view, method in (
        ('/', views.dashboard, 'GET'),
        ('/health', views.health, 'GET'),
        ('/status', views.status, 'GET'),
        ('/history', views.history, 'GET'),
        ('/metrics', views.metrics, 'GET'),
        ('/append', views.append, 'POST'),
        ('/streams/<minibatch_name:name>', views.append, 'POST'),
        ('/tail', views.tail, 'GET'),
        ('/streams/<minibatch_name:name>/tail', views.tail, 'GET'),
        ('/dead', views.dead, 'GET'),
        ('/dead/<minibatch_name:letter>/replay', views.replay, 'POST'),
        ('/dead/<minibatch_name:letter>/discard', views.discard, 'POST'),
        ('/dead/replay', views.replay, 'POST'),
        ('/dead/discard', views.discard, 'POST'),
    ):
        blueprint.add_url_rule(rule, view_func=view, methods=[method])
    blueprint.before_request(app.guard.check_host)
    blueprint.after_request(security.harden)
    blueprint.register_error_handler(Exception, _on_error)


class _Views:
    def __init__(self, app: Served) -> None:
        self._app, self._guard, self._watcher = app, app.guard, app.watcher
        self._streams: dict[str, mb.Stream] = {}
        self._lock = threading.Lock()
        self._seats = threading.BoundedSemaphore(app.listeners)
        self._page = files(__package__).joinpath('dashboard.html').read_text(encoding='utf-8')
        self._policy = security.policy(self._page)

    # --- what anybody may see

    def dashboard(self) -> Response:
        return Response(self._page, headers={'Content-Security-Policy': self._policy}, mimetype='text/html')

    def health(self) -> Response:
        problems = self._app.problems()
        if not problems:
            return _answer({'status': 'ok'})
        try:
            self._guard.check_reader()
        except Refused:
            return _answer({'status': 'unhealthy'}, 503)  # names are not for everybody
        return _answer({'status': 'unhealthy', 'reasons': problems}, 503)

    # --- what readers may see

    def status(self) -> Response:
        self._guard.check_reader()
        look = self._watcher.look()
        return _answer(
            {
                'name': self._app.title,
                'time': look.time,
                'error': look.error or None,
                'problems': self._app.problems(look),
                'read_only': self._guard.read_only,
                'consumers': [consumer.as_dict() for consumer in self._app.consumers],
                'streams': [stream.as_dict() for stream in look.streams],
            },
            503 if look.error else 200,
        )

    def history(self) -> Response:
        self._guard.check_reader()
        return _answer({'samples': self._watcher.history()})

    def metrics(self) -> Response:
        self._guard.check_reader()
        try:
            from minibatch.contrib import prometheus
        except ImportError as exc:
            raise Refused(501, str(exc)) from None
        look = self._watcher.look()
        if look.error:
            raise Refused(503, look.error)
        text = prometheus.metrics_text(look.streams, self._app.consumers)
        return Response(text, content_type=prometheus.CONTENT_TYPE)

    def tail(self, name: str | None = None) -> Response:
        self._guard.check_reader()
        given = asked('stream', 'last') if name is None else asked('last')
        last = number(given, 'last', 10, 1000)
        stream = self._found(_stream_name(name, given, 'tail'))
        if not self._seats.acquire(blocking=False):
            raise Refused(503, f'{self._app.listeners} others listen already', Retry_After=str(RETRY_SECONDS))
        messages = _patiently(stream.tail(last=last), max(self._app.timeout, TAIL_TIMEOUT))
        response = Response(self._events(messages), content_type='text/event-stream')
        response.headers['X-Accel-Buffering'] = 'no'
        response.call_on_close(self._seats.release)
        return response

    def _events(self, messages: Iterator[mb.Message | None]) -> Iterator[str]:
        yield 'retry: 2000\n\n'
        try:
            for message in messages:
                if self._app.ending:
                    return
                if message is None:
                    yield ':\n\n'
                    continue
                place = {'created': message.created, 'producer': message.producer, 'offset': message.offset}
                said = bodies.as_json({**place, 'data': message.data, 'meta': message.meta})
                yield f'id: {quote(message.producer, SAFE)}/{message.offset}\ndata: {said}\n\n'
        except (PyMongoError, ServerError) as exc:
            logger.warning('the tail of a stream has ended: %s', exc)

    def dead(self) -> Response:
        self._guard.check_reader()
        given = asked('stream', 'group', 'limit')
        name, group = given.get('stream'), given.get('group')
        if group is not None and name is None:
            raise Refused(400, 'group goes with stream')
        limit = number(given, 'limit', LETTERS, MAX_LETTERS)
        found: list[mb.DeadLetter] = []
        streams = [self._found(name)] if name is not None else map(self._found, self._names())
        for stream in streams:
            with pymongo.timeout(self._app.timeout):
                found += stream.dead_letters(group)
        found.sort(key=lambda letter: (letter.failed, letter.number), reverse=True)
        with pymongo.timeout(self._app.timeout):
            return _answer({'count': len(found), 'dead': list(map(_letter, found[:limit]))})

    def _names(self) -> list[str]:
        with pymongo.timeout(self._app.timeout):
            return [stream.name for stream in mb.status(self._app.url)]

    def _found(self, name: str) -> mb.Stream:
        try:
            return mb.Stream.find(name, self._app.url, timeout=self._app.timeout)
        except ArgumentError as exc:
            raise Refused(404, str(exc)) from None

    # --- what writers may do

    def append(self, name: str | None = None) -> Response:
        self._guard.check_writer()
        name = _stream_name(name, asked('stream') if name is None else asked(), 'append')
        if request.content_encoding:
            raise Refused(415, f'the body must not be encoded, as {request.content_encoding[:100]!r} says it is')
        if request.mimetype not in bodies.TYPES:
            raise Refused(415, 'the content type must be application/json or application/x-ndjson')
        request.max_content_length = self._app.max_body
        messages, places = bodies.read_messages(request.get_data(cache=False), request.mimetype)
        try:
            return _answer({'appended': self._opened(name).append_many(messages)}, 201)
        except DataError as exc:
            raise bodies.placed(exc, places) from None

    def _opened(self, name: str) -> mb.Stream:
        with self._lock:
            stream = self._streams.pop(name, None)
        stream = stream or mb.stream(name, url=self._app.url, timeout=self._app.timeout)
        with self._lock:
            self._streams[name] = stream  # as the last one
            if len(self._streams) > MAX_STREAMS:
                del self._streams[next(iter(self._streams))]
        return stream

    def replay(self, letter: str | None = None) -> Response:
        return self._change('replay', letter)

    def discard(self, letter: str | None = None) -> Response:
        return self._change('discard', letter)

    def _change(self, action: str, id_: str | None) -> Response:
        """Replay or discard one dead letter, or, without its id, all of a group."""
        self._guard.check_writer()
        given = asked('id', 'stream', 'group') if id_ is None else asked()
        if given.keys() == {'stream', 'group'}:
            letters = self._found(given['stream']).dead_letters(given['group'])
            return _answer({action: getattr(letters, action)()})
        if id_ is not None:
            id_ = path_name(id_, f'/dead/{action}', 'id')
        elif given.keys() == {'id'}:
            id_ = given['id']
        else:
            raise Refused(400, 'either ?id= must say which dead letter, or ?stream= and &group= which ones')
        name, group = [*id_.rsplit('/', 2)[:-1], '', ''][:2]
        found: Iterable[mb.DeadLetter] = ()
        with suppress(ArgumentError):  # there is no such stream or group, or this is no id
            found = mb.Stream.find(name, self._app.url, timeout=self._app.timeout).dead_letters(group)
        for letter in found:
            if letter.id == id_:
                getattr(letter, action)()
                return _answer({action: 1})
        raise Refused(404, f'there is no dead letter {id_[:400]!r}; it was replayed or discarded, or never there')


def _letter(letter: mb.DeadLetter) -> dict[str, Any]:
    data, why, trace = [], '', ''
    try:
        trace = letter.traceback
        if letter.n <= MAX_LOADED:
            data = letter.data[:SHOWN_MESSAGES]
        else:
            why = f'too many to show here; see `minibatch dead show {letter.id}`'
    except ArgumentError:
        why = 'it was replayed or discarded just now'
    fields = {name: getattr(letter, name) for name in (
        'id', 'stream', 'group', 'number', 'n', 'attempts', 'error', 'failed', 'start', 'end', 'key', 'waiting',
    )}  # fmt: skip
    return {**fields, 'traceback': trace, 'data': data, 'not_shown': why}


def _patiently(messages: Iterator[mb.Message | None], seconds: float) -> Iterator[mb.Message | None]:
    while True:
        with pymongo.timeout(seconds):
            try:
                message = next(messages)
            except StopIteration:
                return
        yield message


def _stream_name(in_path: str | None, given: dict[str, str], endpoint: str) -> str:
    if in_path is not None:
        return path_name(in_path, f'/{endpoint}', 'stream')
    if 'stream' not in given:
        raise Refused(400, f'?stream= must name the stream, as in /{endpoint}?stream=readings')
    return given['stream']


def _answer(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(bodies.as_json(value) + '\n', status, headers, content_type='application/json')


def refusal(exc: Refused) -> Response:
    """The answer to a request that is refused."""
    return _answer({'error': exc.reason}, exc.status, exc.headers)


def not_routed(exc: HTTPException) -> Response | HTTPException:
    """The answer to a request for which there is no endpoint; what a page of the user refuses is left to Flask."""
    if exc is not request.routing_exception:
        return exc
    path, allowed = request.path[:400], ', '.join(sorted(getattr(exc, 'valid_methods', None) or ()))
    if allowed:
        said = _answer({'error': f'{path!r} takes {allowed}, not {request.method}'}, 405, {'Allow': allowed})
    else:
        said = _answer({'error': f'there is nothing at {path!r}; the dashboard is at /'}, 404)
    return security.harden(said)


def _on_error(exc: Exception) -> Response:
    """Every error as JSON, with what to do."""
    if isinstance(exc, Refused):
        return refusal(exc)
    if isinstance(exc, HTTPException):
        return _answer({'error': exc.description}, exc.code or 500)
    if isinstance(exc, (ArgumentError, DataError)):
        written = getattr(exc, 'written', 0)  # more than 64 MB are not checked as one
        return _answer({'error': str(exc), **({'written': written} if written else {})}, 400)
    if isinstance(exc, (ServerError, PyMongoError)):
        logger.warning('a request could not be answered: %s', exc)
        written = {name: getattr(exc, name, 0) for name in ('written', 'queued')}
        said = str(exc) if isinstance(exc, ServerError) else f'MongoDB has failed: {type(exc).__name__}'
        return _answer({'error': said, **written}, 503, {'Retry-After': str(RETRY_SECONDS)})
    logger.error('a request has failed', exc_info=exc)
    return _answer({'error': 'the app has failed; its log says why'}, 500)
