"""The command line, ``minibatch``: thin, over the modules that do the work and that are imported when needed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from .errors import MinibatchError

if TYPE_CHECKING:
    from .connection import Target
    from .embedded import Status
    from .groups import DeadLetter, DeadLetters, Group
    from .models import Stream

NOT_RUNNING = 3
INTERRUPTED = 130
MOST_IN_LIST = 200
LEAST_CUT = 20
UNLIMITED = 10_000
MAX_LISTED = 10


class _Main(click.Group):
    """A group whose commands end with one line for an error, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from pymongo.errors import PyMongoError

        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
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
      minibatch groups list      the consumer groups: how far behind, and who leads them
      minibatch dead list        the windows that have failed for good
      minibatch server status    the embedded MongoDB: does it run, and where
      minibatch demo --help      every command has its own help

    \b
    Exit codes:
      0    done
      1    an error, said in one line on stderr; the demo has lost messages; a question was answered with no
      2    a wrong command, option or argument
      3    `server status`: the embedded MongoDB is not running
      130  interrupted by Ctrl-C before there was anything to sum up

    \b
    Environment:
      MINIBATCH_MONGO_URL, MONGO_URL    where MongoDB is; without them, and without --url, the embedded one
      MINIBATCH_HOME                    the folder of the embedded MongoDB
      MINIBATCH_MONGOD                  the mongod program of the embedded MongoDB
    """


url_option = click.option(
    '--url', metavar='URL', help='A MongoDB URL. Default: MINIBATCH_MONGO_URL, else MONGO_URL, else the embedded '
    'MongoDB, which is started.',
)  # fmt: skip
as_json = click.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')


@main.command()
@url_option
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


# --- consumer groups and dead letters

yes_option = click.option('--yes', '-y', is_flag=True, help='Do not ask. Needed where nobody can be asked.')
group_option = click.option('--group', metavar='GROUP', help='Only those of this consumer group.')
all_option = click.option('--all', 'every', metavar='STREAM', help='All dead letters of this stream, instead of ids.')


def _place(ctx: click.Context, param: click.Parameter, value: str) -> str | datetime:
    """Where to go on in a log."""
    if value in ('earliest', 'latest'):
        return value
    try:
        return datetime.fromisoformat(re.sub('[zZ]$', '+00:00', value))
    except ValueError:
        raise click.BadParameter(
            f'must be earliest, latest, or a time as in 2026-01-31T12:00:00, not {value!r}'
        ) from None


@main.group('groups')
def groups_() -> None:
    """The consumer groups of streams: how far each is behind, and who leads it.

    \b
    Examples:
      minibatch groups list
      minibatch groups reset temperature default --to earliest
      minibatch groups delete temperature alerts
    """


@groups_.command('list')
@click.argument('stream', required=False)
@url_option
@as_json
def list_groups(stream: str | None, url: str | None, as_json: bool) -> None:
    """List the consumer groups of STREAM, or of all streams.

    \b
    lag       messages the group has not finished
    seconds   the age of the oldest of them
    led by    host:pid of the consumer that leads now
    windows   processed, as are messages
    late      messages that came when all their windows were closed
    dead      dead letters: windows that have failed for good, see `minibatch dead list`
    expired   messages deleted by their age before they were processed
    stalled   since when windows wait and none is finished

    \b
    Examples:
      minibatch groups list
      minibatch groups list temperature --json | jq '.groups[].lag.messages'
    """
    from .groups import dead_count, groups_of

    found = groups_of(_target(url)) if stream is None else _stream(stream, url).groups()
    rows = [(group, group.lag(), dead_count(group)) for group in found]
    if as_json:
        _print_json({'groups': [
            {**_fields(group), 'lag': lag._asdict(), 'dead': dead} for group, lag, dead in rows
        ]})  # fmt: skip
    elif rows:
        _print_table(
            ('stream', 'group', '>lag', '>seconds', 'led by', '>windows', '>messages', '>late', '>dead', '>expired',
             'stalled'),
            (
                (
                    group.stream, group.name, f'{lag.messages:,}', f'{lag.seconds:,.1f}', group.owner or '-',
                    f'{group.windows:,}', f'{group.messages:,}', f'{group.late:,}', f'{dead:,}',
                    f'{group.expired:,}', _time(group.stalled) or '-',
                )
                for group, lag, dead in rows
            ),
        )  # fmt: skip
    else:
        click.echo('no consumer groups')


@groups_.command('reset')
@click.argument('stream')
@click.argument('group')
@click.option('--to', callback=_place, required=True, metavar='earliest|latest|TIME',
              help='The oldest message stored; behind the last one; or the first message created at TIME (ISO 8601, '
              'UTC unless it says another zone) or later.')  # fmt: skip
@yes_option
@url_option
@as_json
def reset_group(stream: str, group: str, to: str | datetime, yes: bool, url: str | None, as_json: bool) -> None:
    """Let GROUP of STREAM go on from elsewhere in the log. Its consumers must be stopped.

    What it was doing is given up; its dead letters stay. Messages between are processed again, or left out.

    \b
    Examples:
      minibatch groups reset temperature default --to earliest
      minibatch groups reset temperature default --to 2026-01-31T12:00:00 --yes
    """
    from .groups import messages_from

    found = _stream(stream, url).group(group)
    before, after = found.lag().messages, messages_from(found, to)
    place = to if isinstance(to, str) else f'{to:%Y-%m-%d %H:%M:%S}'
    _ask(f'Reset {_title(found)} to {place}, from a lag of {before:,} messages to {after:,}?', yes)
    found.reset(to)
    lag = found.lag().messages
    if as_json:
        _print_json({'stream': stream, 'group': group, 'before': before, 'lag': lag})
    else:
        click.echo(f'{_title(found)} goes on with a lag of {_count(lag, "message")}')


@groups_.command('delete')
@click.argument('stream')
@click.argument('group')
@yes_option
@url_option
@as_json
def delete_group(stream: str, group: str, yes: bool, url: str | None, as_json: bool) -> None:
    """Delete GROUP of STREAM, with its positions and dead letters. Its consumers must be stopped.

    Messages wait for it no more. A consumer of this name that starts later makes the group anew.

    \b
    Examples:
      minibatch groups delete temperature alerts
      minibatch groups delete temperature alerts --yes
    """
    from .groups import dead_count

    found = _stream(stream, url).group(group)
    lag, dead = found.lag().messages, dead_count(found)
    with_dead = f' with its {_count(dead, "dead letter")}' if dead else ''
    _ask(f'Delete {_title(found)}{with_dead}, at a lag of {_count(lag, "message")}?', yes)
    found.delete()
    if as_json:
        _print_json({'stream': stream, 'group': group, 'lag': lag, 'dead': dead})
    else:
        click.echo(f'deleted {_title(found)}{with_dead}')


@main.group()
def dead() -> None:
    """The dead letters: windows that have failed for good, with their messages.

    \b
    Examples:
      minibatch dead list
      minibatch dead show temperature/default/000000000012
      minibatch dead replay --all temperature
    """


@dead.command('list')
@click.argument('stream', required=False)
@group_option
@url_option
@as_json
def list_dead(stream: str | None, group: str | None, url: str | None, as_json: bool) -> None:
    """List the dead letters of STREAM, or of all streams; the oldest failure first.

    Those in the state `replay` wait to be run again. What is long is cut here, and complete in `minibatch dead show`.

    \b
    Examples:
      minibatch dead list
      minibatch dead list temperature --group alerts
      minibatch dead list temperature --json | jq -r '.dead[].id'
    """
    if stream is None and group is not None:
        raise click.UsageError('--group needs a STREAM')
    letters = _dead(stream, group, url)
    if as_json:
        _print_json({'dead': [_fields(letter) for letter in letters]})
    elif letters:
        _print_table(
            ('id', 'failed', '>messages', '>attempts', 'state', 'error'),
            (
                (
                    letter.id, _time(letter.failed), f'{letter.n:,}', f'{letter.attempts:,}',
                    'replay' if letter.waiting else 'dead', letter.error[:MOST_IN_LIST],
                )
                for letter in letters
            ),
        )  # fmt: skip
    else:
        click.echo('no dead letters')


@dead.command('show')
@click.argument('id')
@url_option
@as_json
def show_dead(id: str, url: str | None, as_json: bool) -> None:
    """Show the dead letter ID: what failed and where, then the data of its messages, one JSON object a line.

    The data is MongoDB Extended JSON: times and the like are objects such as {"$date": "2026-01-31T12:00:00Z"}.

    \b
    Examples:
      minibatch dead show temperature/default/000000000012
      minibatch dead show temperature/default/000000000012 --json | jq '.data[].celsius'
    """
    from .groups import dead_letters_by_id

    (letter,) = dead_letters_by_id(_target(url), [id])
    trace, spans, window = letter.traceback, letter.spans, letter.load()
    if as_json:
        found = {'traceback': trace, 'spans': [span._asdict() for span in spans], 'data': window.data}
        _print_json({**_fields(letter), **found})
        return
    state = 'waits to be run again' if letter.waiting else 'dead letter'
    click.echo(f'{_plain(letter.id)}  ({state})')
    click.echo(f'failed    {_time(letter.failed)}, {_count(letter.attempts, "attempt")}')
    if letter.start and letter.end:
        click.echo(f'window    {_time(letter.start)} to {_time(letter.end)}')
    if letter.key is not None:
        click.echo(f'key       {_plain(str(letter.key))}')
    click.echo(f'error     {_plain(letter.error)}')
    for line in trace.splitlines():
        click.echo(f'          {_plain(line)}')
    for producer, start, end in spans[:MAX_LISTED]:
        click.echo(f'span      {_plain(producer)} {start} to {end - 1}')
    if len(spans) > MAX_LISTED:
        click.echo(f'          and {len(spans) - MAX_LISTED:,} more spans')
    click.echo(f'messages  {letter.n:,}' + (f', of which {window.missing:,} were not kept' if window.missing else ''))
    for data in window:
        _print_json(data)


@dead.command('replay')
@click.argument('ids', nargs=-1, metavar='ID...')
@all_option
@group_option
@url_option
@as_json
def replay_dead(ids: Sequence[str], every: str | None, group: str | None, url: str | None, as_json: bool) -> None:
    """Have dead letters run again, under the same ids, by the consumer of their group.

    One that runs does it at once; else they wait for the next. One that fails again is a dead letter again.

    \b
    Examples:
      minibatch dead replay temperature/default/000000000012
      minibatch dead replay --all temperature --group alerts
    """
    from .groups import groups_of

    letters = _chosen(ids, every, group, url)
    count = letters.replay()
    if as_json:
        _print_json({'replayed': count, 'waiting': len(letters) - count})
        return
    if count < len(letters):
        click.echo(f'{_count(len(letters) - count, "dead letter")} waited for it already')
    leaders = {(found.stream, found.name): found.owner for found in groups_of(_target(url))}
    for (stream, name), number in sorted(Counter((letter.stream, letter.group) for letter in letters).items()):
        owner = leaders.get((stream, name))
        who = f'the consumer that leads now, {owner}' if owner else 'the next consumer of this group that starts'
        click.echo(_plain(f'{stream}/{name}: {_count(number, "dead letter")} will be run again by {who}'))
    if not letters:
        click.echo('no dead letters')


@dead.command('discard')
@click.argument('ids', nargs=-1, metavar='ID...')
@all_option
@group_option
@yes_option
@url_option
@as_json
def discard_dead(
    ids: Sequence[str], every: str | None, group: str | None, yes: bool, url: str | None, as_json: bool
) -> None:
    """Delete dead letters and their messages for good. Those that wait to be run again stay.

    \b
    Examples:
      minibatch dead discard temperature/default/000000000012
      minibatch dead discard --all temperature --yes
    """
    letters = _chosen(ids, every, group, url)
    count = 0
    if letters:
        messages = sum(letter.n for letter in letters)
        _ask(f'Delete {_count(len(letters), "dead letter")} with {_count(messages, "message")}?', yes)
        count = letters.discard()
    if as_json:
        _print_json({'discarded': count, 'left': len(letters) - count})
        return
    click.echo(f'deleted {_count(count, "dead letter")}' if letters else 'no dead letters')
    if count < len(letters):
        click.echo(f'{_count(len(letters) - count, "dead letter")} waited to be run again and stayed')


def _stream(name: str, url: str | None) -> Stream:
    from .models import Stream

    return Stream.find(name, url)


def _target(url: str | None) -> Target:
    from . import connection

    where = connection.target(url)
    where.check()
    return where


def _dead(stream: str | None, group: str | None, url: str | None) -> DeadLetters:
    from .groups import dead_letters

    return dead_letters(_target(url)) if stream is None else _stream(stream, url).dead_letters(group)


def _chosen(ids: Sequence[str], every: str | None, group: str | None, url: str | None) -> DeadLetters:
    """The dead letters that a command is about."""
    if bool(ids) == bool(every):
        raise click.UsageError('give the ids of dead letters, or --all STREAM')
    if group is not None and not every:
        raise click.UsageError('--group needs --all STREAM')
    from .groups import dead_letters_by_id

    return _dead(every, group, url) if every else dead_letters_by_id(_target(url), ids)


def _title(group: Group) -> str:
    return f'consumer group {group.name!r} of stream {group.stream!r}'


def _fields(item: Group | DeadLetter) -> dict[str, Any]:
    """What is known about it, for JSON."""
    values = {field.name: getattr(item, field.name) for field in fields(item) if field.repr}
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}


def _ask(question: str, yes: bool) -> None:
    """Return if the user wants it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError('nobody can be asked here; say --yes to do it')
    if not click.confirm(_plain(question), err=True):
        click.echo('nothing was changed', err=True)
        raise click.exceptions.Exit(1)


# --- what is printed


def _plain(text: str) -> str:
    """Text for a terminal: what a message says must not steer it, so what is not printable is escaped."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def _print_json(value: dict[str, Any]) -> None:
    """Print one JSON object, in one line, all that is not printable escaped."""
    from bson import json_util

    text = json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS, ensure_ascii=False)
    click.echo(''.join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose last column is cut to the terminal, or blocks if it is wider; > is for columns to the right.

    What is not a terminal gets the table, uncut.
    """
    names = [head.lstrip('>') for head in heads]
    cells = [[_plain(cell) for cell in row] for row in rows]
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


def _time(time: datetime | None) -> str:
    return f'{time:%Y-%m-%d %H:%M:%S}' if time else ''


def _count(number: int, what: str) -> str:
    return f'{number:,} {what}' + ('' if number == 1 else 's')
