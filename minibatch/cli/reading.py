"""JSON and NDJSON as messages: as they arrive, in little memory, each with the number of its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from .. import jsontext

CHUNK = 1 << 20
BOM = b'\xef\xbb\xbf'
NAMES = {list: 'an array', str: 'a string', int: 'a number', float: 'a number', bool: 'true or false'}

Batch = tuple[list[dict[str, Any]], list[int]]
"""Messages, and the number of the line (or of the item of an array) that each is on."""


class BadInput(Exception):
    """A line, or an item of an array, that is no message; `number` says which one, counted from 1.

    It is 0 if all of the input is to be corrected, as an array is read as a whole.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class Input:
    """What is appended: lines with an object each, or one JSON array (or object) over any number of lines.

    Attributes:
        what: what is counted, 'line' or 'item'.
        bytes: how many were read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.what, self.bytes = 'line', 0

    def batches(self, start: int = 1) -> Iterator[Batch]:
        """The messages from line `start` on, in portions that have arrived together.

        Raises:
            BadInput: after the messages before it were given out.
        """
        head = b''
        while data := self._read():
            head += data
            if b'\n' in head.lstrip(BOM + b' \t\r\n') or len(head) >= CHUNK:
                break
        head = head.removeprefix(BOM)
        first = head.lstrip().split(b'\n', 1)[0].strip()
        if first[:1] == b'[' or first == b'{':
            self.what = 'item'
            yield from _document(head + b''.join(iter(self._read, b'')), start)
        else:
            yield from self._lines(head, start)

    def _read(self) -> bytes:
        data: bytes = self._file.read1(CHUNK)  # type: ignore[attr-defined]
        self.bytes += len(data)
        return data

    def _lines(self, head: bytes, start: int) -> Iterator[Batch]:
        number, rest = 1, []
        for data in chain([head], iter(self._read, b'')):
            rest.append(data)
            if b'\n' in data:
                lines = b''.join(rest).split(b'\n')
                rest = [lines.pop()]
                yield from _messages(lines, number, start)
                number += len(lines)
        yield from _messages([b''.join(rest)], number, start)


def _messages(lines: list[bytes], first: int, start: int) -> Iterator[Batch]:
    messages: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, first):
        if number < start or not line.strip():
            continue
        try:
            messages.append(_parsed(line))
        except ValueError as exc:
            if messages:
                yield messages, numbers
            raise BadInput(number, str(exc)) from None
        numbers.append(number)
    if messages:
        yield messages, numbers


def _document(text: bytes, start: int) -> Iterator[Batch]:
    try:
        value = _load(text)
    except ValueError as exc:
        raise BadInput(0, str(exc)) from None
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise BadInput(0, f'item {number:,}: {_not_an_object(item)}')
    if items[start - 1 :]:
        yield items[start - 1 :], list(range(start, len(items) + 1))


def _parsed(line: bytes) -> dict[str, Any]:
    value = _load(line)
    if type(value) is not dict:
        raise ValueError(_not_an_object(value))
    return value


def _load(raw: bytes) -> Any:
    """The value of a JSON text; of MongoDB Extended JSON, as `minibatch tail` prints it, what it stands for."""
    try:
        return jsontext.loads_extended(raw.decode())
    except json.JSONDecodeError as exc:
        place = f'line {exc.lineno} column {exc.colno}' if b'\n' in raw else f'column {exc.colno}'
        raise ValueError(f'not JSON: {exc.msg} at {place}') from None
    except UnicodeDecodeError as exc:
        raise ValueError(f'not UTF-8: byte {raw[exc.start]:#04x} at column {exc.start + 1}') from None
    except RecursionError:
        raise ValueError('nested too deeply') from None


def _not_an_object(value: Any) -> str:
    name = 'null' if value is None else NAMES.get(type(value), 'a value of Extended JSON')
    return f'a message must be a JSON object, not {name}'
