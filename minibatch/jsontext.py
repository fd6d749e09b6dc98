"""JSON in and out, by one rule wherever it is read or written.

JSON has no NaN and no infinities, but floats have them, MongoDB stores them, and a sensor without a reading sends them.
So ``NaN``, ``Infinity`` and ``-Infinity``, as Python and many devices write them, are read as the floats they mean; and
what is written for other programs, which would refuse such words, has ``null`` in their place, as JavaScript and pandas
write it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is none.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text)


def loads_extended(text: str) -> Any:
    """The value of a JSON text; of MongoDB Extended JSON, as `minibatch tail` and web apps show it, what it stands for.

    Raises:
        ValueError, RecursionError: as `loads` does.
    """
    if '"$' not in text:
        return loads(text)
    from bson import json_util

    try:
        return json_util.loads(text, json_options=_options())
    except (json.JSONDecodeError, RecursionError):
        raise
    except Exception as exc:  # of many kinds
        raise ValueError(f'not Extended JSON: {exc}') from None


@cache
def _options() -> Any:
    from bson import json_util
    from bson.codec_options import DatetimeConversion

    return json_util.JSONOptions(tz_aware=False, datetime_conversion=DatetimeConversion.DATETIME_AUTO)


def dumps(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The JSON text of a value, in UTF-8; `default` is called with what JSON has not, for something that it has.

    Raises:
        TypeError, ValueError: if it has what JSON has not, contains itself, or text that is no Unicode.
        RecursionError: if it is nested too deeply.
    """
    try:
        text = json.dumps(value, default=default, allow_nan=False, ensure_ascii=False)
    except ValueError:  # of a NaN or an infinity, or because it contains itself, which is said again
        words = json.dumps(value, default=default, ensure_ascii=False)
        text = json.dumps(json.loads(words, parse_constant=lambda word: None), ensure_ascii=False)
    return text.encode()
