"""What commands print: one JSON object, tables that fit the terminal, and text that cannot steer it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click

from ..text import plain

LEAST_CUT = 20
UNLIMITED = 10_000


def prepare_streams() -> None:
    """Let what is printed lead nowhere if it was closed (`>&-`), and escape what its encoding does not have.

    The number of a closed one is taken, too: else a connection to MongoDB gets it, and what somebody prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            lowest_free = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(lowest_free, True)  # for workers
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 # as long as the process
        elif hasattr(stream, 'reconfigure') and stream.errors in ('strict', 'surrogateescape'):
            stream.reconfigure(errors='backslashreplace')


def drop_unwritten() -> None:
    """Let what could not be written lead nowhere, too: Python would try again at its end, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object, in one line, all that is not printable escaped."""
    from bson import json_util
    from bson.binary import UuidRepresentation

    options = json_util.RELAXED_JSON_OPTIONS.with_options(uuid_representation=UuidRepresentation.STANDARD)
    text = json_util.dumps(value, json_options=options, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or 'utf-8')
    except UnicodeEncodeError:
        text = json_util.dumps(value, json_options=options)
    click.echo(text if text.isprintable() else ''.join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose last column is cut to the terminal, or blocks if it is wider; > is for columns to the right.

    What is not a terminal gets the table, uncut.
    """
    names = [head.lstrip('>') for head in heads]
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
    if sum(widths[:-1]) + 2 * len(widths) + min(widths[-1], LEAST_CUT) > room:
        for row in cells:
            pairs = '  '.join(f'{name} {cell}' for name, cell in zip(names, row, strict=True) if cell not in ('', '-'))
            click.echo('\n'.join(textwrap.wrap(pairs, room, subsequent_indent='    ', break_on_hyphens=False)))
        return
    for i, row in enumerate([names, *cells]):
        aligned = (
            cell.rjust(width) if head[0] == '>' else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        )
        line = '  '.join(aligned)[:room].rstrip()
        click.echo(line if i else click.style(line, bold=True))


def time_text(time: datetime | None) -> str:
    return f'{time:%Y-%m-%d %H:%M:%S}' if time else ''


def count_text(number: int, what: str) -> str:
    return f'{number:,} {what}' + ('' if number == 1 else 's')
