"""``minibatch dead``: the dead letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ..text import plain
from .common import as_json, ask, fields_of, find_stream, find_target, stream_names, url_option, yes_option
from .output import count_text, print_json, print_table, time_text

if TYPE_CHECKING:
    from ..groups import DeadLetters

MOST_IN_LIST = 200
MAX_LISTED = 10

group_option = click.option('--group', metavar='GROUP', help='Only those of this consumer group.')
all_option = click.option('--all', 'every', metavar='STREAM', shell_complete=stream_names,
                          help='All dead letters of this stream, instead of ids.')  # fmt: skip


@click.group()
def dead() -> None:
    """The dead letters: windows that have failed for good, with their messages.

    \b
    Examples:
      minibatch dead list
      minibatch dead show temperature/default/000000000012
      minibatch dead replay --all temperature
    """


@dead.command('list')
@click.argument('stream', required=False, shell_complete=stream_names)
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
        print_json({'dead': [fields_of(letter) for letter in letters]})
    elif letters:
        print_table(
            ('id', 'failed', '>messages', '>attempts', 'state', 'error'),
            (
                (
                    letter.id, time_text(letter.failed), f'{letter.n:,}', f'{letter.attempts:,}',
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
    from ..groups import dead_letters_by_id

    (letter,) = dead_letters_by_id(find_target(url), [id])
    trace, spans, window = letter.traceback, letter.spans, letter.load()
    if as_json:
        found = {'traceback': trace, 'spans': [span._asdict() for span in spans], 'data': window.data}
        print_json({**fields_of(letter), **found})
        return
    state = 'waits to be run again' if letter.waiting else 'dead letter'
    click.echo(f'{plain(letter.id)}  ({state})')
    click.echo(f'failed    {time_text(letter.failed)}, {count_text(letter.attempts, "attempt")}')
    if letter.start and letter.end:
        click.echo(f'window    {time_text(letter.start)} to {time_text(letter.end)}')
    if letter.key is not None:
        click.echo(f'key       {plain(str(letter.key))}')
    click.echo(f'error     {plain(letter.error)}')
    for line in trace.splitlines():
        click.echo(f'          {plain(line)}')
    for producer, start, end in spans[:MAX_LISTED]:
        click.echo(f'span      {plain(producer)} {start} to {end - 1}')
    if len(spans) > MAX_LISTED:
        click.echo(f'          and {len(spans) - MAX_LISTED:,} more spans')
    click.echo(f'messages  {letter.n:,}' + (f', of which {window.missing:,} were not kept' if window.missing else ''))
    for data in window:
        print_json(data)


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
    from ..groups import groups_of

    letters = _chosen(ids, every, group, url)
    count = letters.replay()
    if as_json:
        print_json({'replayed': count, 'waiting': len(letters) - count})
        return
    if count < len(letters):
        click.echo(f'{count_text(len(letters) - count, "dead letter")} waited for it already')
    leaders = {(found.stream, found.name): found.owner for found in groups_of(find_target(url))}
    for (stream, name), number in sorted(Counter((letter.stream, letter.group) for letter in letters).items()):
        owner = leaders.get((stream, name))
        who = f'the consumer that leads now, {owner}' if owner else 'the next consumer of this group that starts'
        click.echo(plain(f'{stream}/{name}: {count_text(number, "dead letter")} will be run again by {who}'))
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
        ask(f'Delete {count_text(len(letters), "dead letter")} with {count_text(messages, "message")}?', yes)
        count = letters.discard()
    if as_json:
        print_json({'discarded': count, 'left': len(letters) - count})
        return
    click.echo(f'deleted {count_text(count, "dead letter")}' if letters else 'no dead letters')
    if count < len(letters):
        click.echo(f'{count_text(len(letters) - count, "dead letter")} waited to be run again and stayed')


def _dead(stream: str | None, group: str | None, url: str | None) -> DeadLetters:
    from ..groups import dead_letters

    return dead_letters(find_target(url)) if stream is None else find_stream(stream, url).dead_letters(group)


def _chosen(ids: Sequence[str], every: str | None, group: str | None, url: str | None) -> DeadLetters:
    """The dead letters that a command is about."""
    if ids and every:
        raise click.UsageError('give the ids of dead letters or --all STREAM, not both')
    if not (ids or every):
        raise click.UsageError('give the ids of dead letters, or --all STREAM')
    if group is not None and not every:
        raise click.UsageError('--group needs --all STREAM')
    from ..groups import dead_letters_by_id

    return _dead(every, group, url) if every else dead_letters_by_id(find_target(url), ids)
