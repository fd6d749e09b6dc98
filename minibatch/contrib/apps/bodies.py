"""JSON in and out: what a client posts as messages, and messages as a client is shown them."""

from __future__ import annotations

import json
import re
from typing import Any

from bson import json_util
from bson.binary import UuidRepresentation

from minibatch import jsontext
from minibatch.errors import DataError

LINES_TYPES = {'application/x-ndjson', 'application/ndjson', 'application/jsonl', 'application/x-jsonlines'}
TYPES = {'application/json', *LINES_TYPES}
MAX_SHOWN = 200
OPTIONS = json_util.RELAXED_JSON_OPTIONS.with_options(uuid_representation=UuidRepresentation.STANDARD)


def read_messages(body: bytes, content_type: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a request: a JSON object, a JSON array of objects, or an object a line.

    Returns:
        the messages, and how errors call each: its line or item, counted from 1.

    Raises:
        DataError: naming the line or item that is wrong, and what is wrong with it.
    """
    try:
        text = body.decode('utf-8-sig')
    except UnicodeDecodeError as exc:
        before, byte = exc.object[: exc.start], exc.object[exc.start]
        place = f'line {before.count(10) + 1} column {exc.start - before.rfind(10)}'
        raise DataError(f'the body is not UTF-8: byte {byte:#04x} at {place}') from None
    if content_type in LINES_TYPES:
        lines = [(f'line {number}', line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
        return [_message(_parse(line, where), where) for where, line in lines], [where for where, _ in lines]
    found = _parse(text, 'the body')
    if isinstance(found, list):
        places = [f'item {number}' for number in range(1, len(found) + 1)]
        return [_message(item, where) for item, where in zip(found, places, strict=True)], places
    return [_message(found, 'the body')], ['the body']


def placed(exc: DataError, places: list[str]) -> DataError:
    """The error of an append with the place in the request, for that in a list, which is counted from 0."""
    match = re.fullmatch(r'items\[(\d+)\]: (.*?)(?:; items\[:(\d+)\] are stored)?', str(exc), re.DOTALL)
    if not match:
        return exc
    number, reason, stored = match.groups()
    so_far = f'; the first {stored} messages are stored' if stored else ''
    said = DataError(f'{places[int(number)]}: {reason}{so_far}')
    said.written = exc.written
    return said


def _parse(text: str, where: str) -> Any:
    try:
        return jsontext.loads_extended(text)
    except RecursionError:
        raise DataError(f'{where} is nested too deeply') from None
    except json.JSONDecodeError as exc:
        place = f'line {exc.lineno} column {exc.colno}' if '\n' in text else f'column {exc.colno}'
        raise DataError(f'{where} is no JSON: {exc.msg} at {place}') from None
    except ValueError as exc:
        raise DataError(f'{where} is no JSON: {exc}') from None


def _message(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        shown = json.dumps(found)
        shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + ' ...'
        raise DataError(f'{where} must be a JSON object, not {shown}')
    return found


def as_json(value: Any) -> str:
    """JSON text of anything that MongoDB can store; what JSON has no word for is relaxed extended JSON."""
    text: str = json_util.dumps(value, json_options=OPTIONS, separators=(',', ':'))
    return text
