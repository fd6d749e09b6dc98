"""What commands share: options, finding what they are about, and asking before something is changed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..text import plain

if TYPE_CHECKING:
    from ..connection import Target
    from ..groups import DeadLetter, Group
    from ..models import Stream

url_option = click.option(
    '--url', metavar='URL', help='A MongoDB URL. Default: MINIBATCH_MONGO_URL, else MONGO_URL, else the embedded '
    'MongoDB, which is started.',
)  # fmt: skip
as_json = click.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
yes_option = click.option('--yes', '-y', is_flag=True, help='Do not ask. Needed where nobody can be asked.')


def find_stream(name: str, url: str | None) -> Stream:
    from ..models import Stream

    return Stream.find(name, url)


def find_target(url: str | None, timeout: float | None = None) -> Target:
    from .. import connection

    where = connection.target(url)
    where.check(connection.CONNECT_TIMEOUT if timeout is None else timeout)
    return where


def title(group: Group) -> str:
    return f'consumer group {group.name!r} of stream {group.stream!r}'


def fields_of(item: Group | DeadLetter) -> dict[str, Any]:
    """What is known about it, for JSON."""
    values = {field.name: getattr(item, field.name) for field in fields(item) if field.repr}
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}


class InputFile(click.File):
    """A file to read, or standard input, as `-`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == '-' and sys.stdin is None:
            self.fail('standard input is closed; name a file, or pipe into it', param, ctx)
        return super().convert(value, param, ctx)


def ask(question: str, yes: bool) -> None:
    """Return if the user wants it."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError('nobody can be asked here; say --yes to do it')
    if not click.confirm(plain(question), err=True):
        click.echo('nothing was changed', err=True)
        raise click.exceptions.Exit(1)


# --- what the Tab key offers

SAFE = re.compile(r'[\w./@%+=,-]+')
QUICK: dict[str, Any] = {'serverSelectionTimeoutMS': 500, 'connectTimeoutMS': 500, 'socketTimeoutMS': 1000}


def stream_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The streams whose name begins so."""
    from .. import store

    return _offered(ctx, incomplete, lambda where: store.stream_names(where.majority, 1000))


def group_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The consumer groups, of the stream named before, whose name begins so."""
    from .. import groups

    stream = ctx.params.get('stream')
    return _offered(ctx, incomplete, lambda where: [group.name for group in groups.groups_of(where, stream)])


def _offered(ctx: click.Context, incomplete: str, names: Callable[[Target], list[str]]) -> list[str]:
    """Names that a shell can take as they are; none if there is no server. No server is started for it."""
    from .. import connection, embedded

    with suppress(Exception):
        given = ctx.params.get('url') or any(map(os.environ.get, connection.URL_VARIABLES))
        url = ctx.params.get('url') or (None if given else embedded.status().url)
        if given or url:
            found = names(connection.target(url, **QUICK))
            return sorted({name for name in found if name.startswith(incomplete) and SAFE.fullmatch(name)})
    return []
