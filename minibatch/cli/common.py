"""What commands share: options, finding what they are about, and asking before something is changed."""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from .output import plain

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


def find_target(url: str | None) -> Target:
    from .. import connection

    where = connection.target(url)
    where.check()
    return where


def title(group: Group) -> str:
    return f'consumer group {group.name!r} of stream {group.stream!r}'


def fields_of(item: Group | DeadLetter) -> dict[str, Any]:
    """What is known about it, for JSON."""
    values = {field.name: getattr(item, field.name) for field in fields(item) if field.repr}
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}


def ask(question: str, yes: bool) -> None:
    """Return if the user wants it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError('nobody can be asked here; say --yes to do it')
    if not click.confirm(plain(question), err=True):
        click.echo('nothing was changed', err=True)
        raise click.exceptions.Exit(1)
