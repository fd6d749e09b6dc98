"""The command line, ``minibatch``: thin, over the modules that do the work and that are imported when needed."""

from __future__ import annotations

import importlib.metadata
import sys
import traceback
from typing import Any

import click

from ..errors import MinibatchError
from ..text import plain
from . import completion, dead, groups, messages, run, server, streams
from .output import drop_unwritten, prepare_streams

INTERRUPTED = 130


class _Main(click.Group):
    """A group whose commands end with one line for an error, instead of a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        prepare_streams()
        try:
            return super().main(*args, **extra)
        except OSError as exc:  # of what is printed before a command runs
            click.echo(f'error: what is printed cannot be written: {exc}', err=True)
            sys.exit(1)
        finally:
            drop_unwritten()

    def invoke(self, ctx: click.Context) -> Any:
        from pymongo.errors import PyMongoError

        from ..connection import leave_quickly, masked_text, reason_of

        leave_quickly()  # a second Ctrl-C would meet it waiting
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo('interrupted', err=True)
            ctx.exit(INTERRUPTED)
        except (MinibatchError, PyMongoError, OSError) as exc:
            if isinstance(exc, BrokenPipeError):
                raise  # of `minibatch ... | head`; click ends quietly
            if ctx.params['debug']:
                click.echo(masked_text(traceback.format_exc()), err=True, nl=False)
            kind = '' if isinstance(exc, MinibatchError) else f'{type(exc).__name__}: '
            said = reason_of(exc) if isinstance(exc, PyMongoError) else exc
            lines = masked_text(f'error: {kind}{said}').splitlines()
            click.echo('\n'.join(map(plain, lines)), err=True)
            ctx.exit(1)
        except UnicodeEncodeError:
            click.echo('error: an argument is no text in the encoding of this locale, see LANG and LC_ALL', err=True)
            ctx.exit(1)
        except click.UsageError as exc:
            said = exc.format_message()
            if (masked := masked_text(said)) != said:
                raise click.UsageError(masked, exc.ctx) from None
            raise


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
      minibatch streams          the streams: how many messages, how far behind their consumers are
      minibatch groups list      the consumer groups: how far behind, and who leads them
      minibatch append NAME      messages from a file or standard input into a stream
      minibatch run FILE.py      the decorated functions of a module, as a service
      minibatch dead list        the windows that have failed for good
      minibatch server status    the embedded MongoDB: does it run, and where
      minibatch demo --help      every command has its own help

    \b
    Exit codes:
      0    done
      1    an error, said in one line on stderr; the demo has lost messages; a question was answered with no;
           the reader of a pipe has gone
      2    a wrong command, option or argument
      3    `server status`: the embedded MongoDB is not running
      130  interrupted by Ctrl-C; what only ends so (tail, lag --watch, run, app), and the demo, end with 0

    \b
    Environment:
      MINIBATCH_MONGO_URL, MONGO_URL    where MongoDB is; without them, and without --url, the embedded one
      MINIBATCH_HOME                    the folder of the embedded MongoDB
      MINIBATCH_MONGOD                  the mongod program of the embedded MongoDB
    """


COMMANDS = (
    run.demo, server.server, streams.streams, streams.lag, groups.groups_, groups.reset_group, messages.append,
    messages.tail, dead.dead, run.run, run.app, completion.completion,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
