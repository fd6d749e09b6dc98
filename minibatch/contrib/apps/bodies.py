"""JSON in and out: what a client posts as messages, and messages as a client is shown them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any, NoReturn

from bson import Decimal128, ObjectId

from minibatch.errors import DataError

JSON_TYPES = {'application/json'}
LINES_TYPES = {'application/x-ndjson', 'application/ndjson', 'application/jsonl', 'application/x-jsonlines'}
MAX_SHOWN = 200
MAX_DEPTH = 100


def read_messages(body: bytes, content_type: str) -> list[dict[str, Any]]:
    """The messages of a request: a JSON object, a JSON array of objects, or an object a line.

    Raises:
        DataError: naming the line or item that is wrong, and what is wrong with it.
    """
    try:
        text = body.decode('utf-8-sig')
    except UnicodeDecodeError as exc:
        raise DataError(f'the body is not UTF-8: byte {exc.start} is 0x{body[exc.start]:02x}') from None
    if content_type in LINES_TYPES:
        lines = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
        return [_message(_parse(line, f'line {number}'), f'line {number}') for number, line in lines]
    found = _parse(text, 'the body')
    if isinstance(found, list):
        return [_message(item, f'item {number}') for number, item in enumerate(found)]
    return [_message(found, 'the body')]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        why = 'it is nested too deeply' if isinstance(exc, RecursionError) else exc
        raise DataError(f'{where} is no JSON: {why}') from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is no JSON number')


def _message(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        shown = json.dumps(found)
        shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + ' ...'
        raise DataError(f'{where} must be a JSON object, not {shown}')
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON can carry, of anything that MongoDB can store; datetimes are ISO 8601 in UTC."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, datetime):
        value = value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)
        return value.isoformat().replace('+00:00', 'Z')
    if isinstance(value, (ObjectId, Decimal128)) or depth > MAX_DEPTH:
        return str(value)
    if isinstance(value, dict):
        return {str(name): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, Iterable):
        return [plain(item, depth + 1) for item in value]
    return str(value)


def as_json(value: Any) -> str:
    """`plain` as compact JSON text."""
    return json.dumps(plain(value), separators=(',', ':'), ensure_ascii=False)
