"""The command line, ``minibatch``: thin, over the modules that do the work and that are imported when needed."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .errors import MinibatchError

if TYPE_CHECKING:
    from .embedded import Status

NOT_RUNNING = 3
INTERRUPTED = 130


class _Main(click.Group):
    """A group whose commands end with one line for an error, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from pymongo.errors import PyMongoError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo('interrupted', err=True)
            ctx.exit(INTERRUPTED)
        except (MinibatchError, PyMongoError, OSError) as exc:
            if isinstance(exc, BrokenPipeError):
                raise  # of `minibatch ... | head`; click ends quietly
            if ctx.params['debug']:
                traceback.print_exc()
            kind = '' if isinstance(exc, MinibatchError) else f'{type(exc).__name__}: '
            click.echo(f'error: {kind}{exc}', err=True)
            ctx.exit(1)


def _version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        try:
            version = importlib.metadata.version('minibatch')
        except importlib.metadata.PackageNotFoundError:
            version = '(not installed)'
        click.echo(f'minibatch {version}, Python {sys.version.split()[0]}')
        ctx.exit()


@click.group(cls=_Main, context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 100})
@click.option('--debug', is_flag=True, help='Show the traceback of an error.')
@click.option('--version', is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help='Show the version and exit.')  # fmt: skip
def main(debug: bool) -> None:
    """Stream processing for humans, on MongoDB.

    \b
    Examples:
      minibatch demo             see it work, for 15 seconds
      minibatch server status    the embedded MongoDB: does it run, and where
      minibatch demo --help      every command has its own help

    \b
    Exit codes:
      0    done
      1    an error, said in one line on stderr; or the demo has lost messages
      2    a wrong command, option or argument
      3    `server status`: the embedded MongoDB is not running
      130  interrupted by Ctrl-C before there was anything to sum up

    \b
    Environment:
      MINIBATCH_MONGO_URL, MONGO_URL    where MongoDB is; without them, and without --url, the embedded one
      MINIBATCH_HOME                    the folder of the embedded MongoDB
      MINIBATCH_MONGOD                  the mongod program of the embedded MongoDB
    """


@main.command()
@click.option('--url', metavar='URL', help='A MongoDB URL. Default: MINIBATCH_MONGO_URL, else MONGO_URL, else the '
              'embedded MongoDB, which is started.')  # fmt: skip
@click.option('--seconds', type=click.FloatRange(1, 86400), default=15, show_default=True,
              help='How long to measure.')  # fmt: skip
@click.option('--rate', type=click.FloatRange(0.1, 100), default=10, show_default=True,
              help='Messages per second.')  # fmt: skip
@click.option('--window', type=click.FloatRange(0.1, 60), default=2, show_default=True,
              help='Seconds per window.')  # fmt: skip
@click.option('--workers', type=click.IntRange(1, 64), default=2, show_default=True, help='Worker processes.')
def demo(url: str | None, seconds: float, rate: float, window: float, workers: int) -> None:
    """A live stream of this machine's measurements, through windows, into a collection.

    CPU, memory, disk and network are measured and appended to a stream. Worker processes turn each window of it
    into means, maxima and rates, which a sink writes to the collection demo_windows. At the end the messages
    are counted, as read back from MongoDB. Each run has a stream of its own and removes those of earlier runs.

    Ctrl-C ends it early, with the same summary; a second Ctrl-C does not wait for the last windows.

    Exit code: 0 if every message was processed, 1 if not.

    \b
    Examples:
      minibatch demo
      minibatch demo --seconds 60 --window 5
      minibatch demo --url mongodb://localhost/test | tee demo.log
    """
    from .demo import Demo

    sys.exit(Demo(url, seconds, rate, window, workers).run())


@main.group()
def server() -> None:
    """The embedded MongoDB, used when no URL is given.

    There is one per user. It starts when it is needed, is shared by all your processes, and goes on running
    when they end.

    \b
    Examples:
      minibatch server status
      minibatch server stop
    """


as_json = click.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')


@server.command()
@as_json
def start(as_json: bool) -> None:
    """Start the embedded MongoDB, or find it running.

    \b
    Examples:
      minibatch server start
      export MINIBATCH_MONGO_URL=$(minibatch server start --json | jq -r .url)
    """
    from . import embedded

    _show(embedded.start(), as_json)


@server.command()
@as_json
def stop(as_json: bool) -> None:
    """Stop the embedded MongoDB, for all who use it. Its data stays.

    \b
    Example:
      minibatch server stop
    """
    from . import embedded

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
    from . import embedded

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
