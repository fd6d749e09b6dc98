"""What a request asks for: the name in its path, and the parameters of its query, exactly as the client meant them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode

from flask import request
from werkzeug.routing import BaseConverter

from .security import Refused

MAX_PARAMETERS = 20
# Proxies and clients resolve dots, merge slashes, turn backslashes, and cut or refuse what is not printable.
CHANGED_ON_THE_WAY = re.compile(r'(?:^|/)(?:\.{0,2})(?:/|$)|[\\\x00-\x1f\x7f]')


class NameConverter(BaseConverter):
    """All of a path that there is: what begins with a slash must not be led to the name without it."""

    regex = r'[\s\S]*?'
    part_isolating = False
    weight = 200  # tried after what is more special


def path_name(name: str, instead: str, parameter: str) -> str:
    """The name in a path, refused if it may have been changed on its way; then `instead` takes it in its query."""
    if '\ufffd' in name:
        raise Refused(400, f'the path is not UTF-8, or has a character that stands for what is none: {name[:400]!r}')
    if CHANGED_ON_THE_WAY.search(name):
        query = urlencode({parameter: name[:400]})
        raise Refused(400, f'proxies and browsers may change {name[:400]!r} in a path; use {instead}?{query}')
    return name


def asked(*known: str) -> dict[str, str]:
    """The parameters of the query of these names, each at most once.

    What changes something takes no other: in the path of a name with a ``?`` that was not escaped, the rest of the name
    would be one.
    """
    try:
        query = request.query_string.decode()
        pairs = parse_qsl(query, keep_blank_values=True, errors='strict', max_num_fields=MAX_PARAMETERS)
    except ValueError as exc:
        why = 'is not UTF-8' if isinstance(exc, UnicodeDecodeError) else f'has more than {MAX_PARAMETERS} parameters'
        raise Refused(400, f'the query {why}') from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(400, f'{name} is given twice')
        if name in known:
            found[name] = value
        elif request.method == 'POST':
            takes = f'it takes {", ".join(known)}' if known else 'a ? in a name is %3F'
            raise Refused(400, f'there is no parameter {name[:100]!r}; {takes}')
    return found


def number(given: dict[str, str], name: str, default: int, most: int) -> int:
    """A parameter that is a whole number from 0 to `most`."""
    text = given.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise Refused(400, f'{name} must be a whole number from 0 to {most}, not {text[:100]!r}')
    return int(text)
