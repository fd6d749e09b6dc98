"""``minibatch groups``: how far each consumer group is, and how to move or delete it."""

from __future__ import annotations

from datetime import datetime

import click

from ..text import plain
from .common import (
    as_json,
    ask,
    fields_of,
    find_stream,
    find_target,
    group_names,
    stream_names,
    title,
    url_option,
    yes_option,
)
from .output import count_text, print_json, print_table, time_text


def _place(ctx: click.Context, param: click.Parameter, value: str) -> str | datetime:
    """Where to go on in a log."""
    if value in ('earliest', 'latest'):
        return value
    from ..fields import BadMessage, iso_time

    try:
        return iso_time(value)
    except BadMessage:
        raise click.BadParameter(
            f'must be earliest, latest, or a time as in 2026-01-31T12:00:00, not {value!r}'
        ) from None


@click.group('groups', invoke_without_command=True)
@url_option
@as_json
@click.pass_context
def groups_(ctx: click.Context, url: str | None, as_json: bool) -> None:
    """The consumer groups of streams: how far each is behind, and who leads it. Without a command it lists all.

    \b
    Examples:
      minibatch groups
      minibatch groups list temperature
      minibatch groups reset temperature default --to earliest
      minibatch groups delete temperature alerts
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_groups, stream=None, url=url, as_json=as_json)
    elif url is not None or as_json:
        raise click.UsageError('options go behind the command, as in `minibatch groups list --json`')


@groups_.command('list')
@click.argument('stream', required=False, shell_complete=stream_names)
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
    from ..groups import dead_count, groups_of

    found = groups_of(find_target(url)) if stream is None else find_stream(stream, url).groups()
    rows = [(group, group.lag(), dead_count(group)) for group in found]
    if as_json:
        print_json({'groups': [
            {**fields_of(group), 'lag': lag._asdict(), 'dead': dead} for group, lag, dead in rows
        ]})  # fmt: skip
    elif rows:
        print_table(
            ('stream', 'group', '>lag', '>seconds', 'led by', '>windows', '>messages', '>late', '>dead', '>expired',
             'stalled'),
            (
                (
                    group.stream, group.name, f'{lag.messages:,}', f'{lag.seconds:,.1f}', group.owner or '-',
                    f'{group.windows:,}', f'{group.messages:,}', f'{group.late:,}', f'{dead:,}',
                    f'{group.expired:,}', time_text(group.stalled) or '-',
                )
                for group, lag, dead in rows
            ),
        )  # fmt: skip
        for group, _, _ in rows:
            if group.owner and group.source_error:
                said = f'the source of {group.stream}, group {group.name}, has failed: {group.source_error}'
                click.echo(plain(said), err=True)
    else:
        click.echo('no consumer groups')


@groups_.command('reset')
@click.argument('stream', shell_complete=stream_names)
@click.argument('group', shell_complete=group_names)
@click.option('--to', callback=_place, required=True, metavar='earliest|latest|TIME',
              help='The oldest message stored; behind the last one; or the first message created at TIME (ISO 8601, '
              'UTC unless it says another zone) or later.')  # fmt: skip
@yes_option
@url_option
@as_json
def reset_group(stream: str, group: str, to: str | datetime, yes: bool, url: str | None, as_json: bool) -> None:
    """Let GROUP of STREAM go on from elsewhere in the log. Its consumers must be stopped.

    What it was doing is given up; its dead letters stay. Messages between are processed again, or left out.

    `minibatch reset` and `minibatch groups reset` are the same.

    \b
    Examples:
      minibatch groups reset temperature default --to earliest
      minibatch reset temperature default --to 2026-01-31T12:00:00 --yes
    """
    from ..groups import messages_from

    found = find_stream(stream, url).group(group)
    before, after = found.lag().messages, messages_from(found, to)
    place = to if isinstance(to, str) else f'{to:%Y-%m-%d %H:%M:%S}'
    ask(f'Reset {title(found)} to {place}, from a lag of {before:,} messages to {after:,}?', yes)
    found.reset(to)
    lag = found.lag().messages
    if as_json:
        print_json({'stream': stream, 'group': group, 'before': before, 'lag': lag})
    else:
        click.echo(f'{title(found)} goes on with a lag of {count_text(lag, "message")}')


@groups_.command('delete')
@click.argument('stream', shell_complete=stream_names)
@click.argument('group', shell_complete=group_names)
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
    from ..groups import dead_count

    found = find_stream(stream, url).group(group)
    lag, dead = found.lag().messages, dead_count(found)
    with_dead = f' with its {count_text(dead, "dead letter")}' if dead else ''
    ask(f'Delete {title(found)}{with_dead}, at a lag of {count_text(lag, "message")}?', yes)
    found.delete()
    if as_json:
        print_json({'stream': stream, 'group': group, 'lag': lag, 'dead': dead})
    else:
        click.echo(f'deleted {title(found)}{with_dead}')
