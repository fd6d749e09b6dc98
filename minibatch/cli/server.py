"""``minibatch server``: the embedded MongoDB."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .common import as_json

if TYPE_CHECKING:
    from ..embedded import Status

NOT_RUNNING = 3


@click.group()
def server() -> None:
    """The embedded MongoDB, used when no URL is given.

    There is one per user. It starts when it is needed, is shared by all your processes, and goes on running
    when they end.

    \b
    Examples:
      minibatch server status
      minibatch server stop
    """


@server.command()
@as_json
def start(as_json: bool) -> None:
    """Start the embedded MongoDB, or find it running.

    \b
    Examples:
      minibatch server start
      export MINIBATCH_MONGO_URL=$(minibatch server start --json | jq -r .url)
    """
    from .. import embedded

    _show(embedded.start(), as_json)


@server.command()
@as_json
def stop(as_json: bool) -> None:
    """Stop the embedded MongoDB, for all who use it. Its data stays.

    \b
    Example:
      minibatch server stop
    """
    from .. import embedded

    stopped = embedded.stop()
    if as_json:
        click.echo(json.dumps({'stopped': stopped}))
    else:
        click.echo('stopped' if stopped else 'not running')


@server.command()
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Say whether the embedded MongoDB runs, and where. Starts nothing.

    Exit code: 0 if it runs, 3 if not.

    \b
    Examples:
      minibatch server status
      minibatch server status --json
    """
    from .. import embedded

    found = embedded.status()
    _show(found, as_json)
    ctx.exit(0 if found.running else NOT_RUNNING)


def _show(found: Status, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**asdict(found), 'home': str(found.home)}))
        return
    if found.running:
        click.echo(f'running for {found.uptime:.0f} s, MongoDB {found.version}, process {found.pid}')
        click.echo(f'url      {found.url}')
    else:
        click.echo('not running')
    click.echo(f'home     {found.home}')
    click.echo(f'mongod   {found.mongod or "none found; see the README for the three ways to get one"}')
