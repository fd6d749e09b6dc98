"""``minibatch streams`` and ``minibatch lag``: what there is, and how far behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..text import plain
from .common import as_json, find_stream, stream_names, url_option
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..overview import GroupStatus, StreamStatus

HEADS = ('stream', 'group', '>lag', '>seconds', '>in/s', '>out/s', '>windows', '>late', '>dead', 'led by')


@click.command()
@url_option
@as_json
def streams(url: str | None, as_json: bool) -> None:
    """List the streams.

    \b
    appended  messages ever appended
    stored    messages that are stored now
    groups    consumer groups
    lag       messages that the group furthest behind has not finished; - if there is no group
    seconds   the age of the oldest of them
    dead      dead letters of all groups

    \b
    Examples:
      minibatch streams
      minibatch streams --json | jq -r '.streams[].name'
    """
    from ..overview import status

    found = status(url)
    if as_json:
        print_json({'streams': [stream.as_dict() for stream in found]})
    elif found:
        print_table(
            ('stream', '>appended', '>stored', '>groups', '>lag', '>seconds', '>dead'), map(_stream_row, found)
        )
    else:
        click.echo('no streams')


def _stream_row(stream: StreamStatus) -> tuple[str, ...]:
    lags = [group.lag for group in stream.groups]
    return (
        stream.name, f'{stream.appended:,}', f'{stream.stored:,}', f'{len(lags):,}',
        f'{max(lag.messages for lag in lags):,}' if lags else '-',
        f'{max(lag.seconds for lag in lags):,.1f}' if lags else '-',
        f'{sum(group.dead for group in stream.groups):,}',
    )  # fmt: skip


@click.command()
@click.argument('stream', required=False, shell_complete=stream_names)
@click.option('--watch', is_flag=True, help='Go on until Ctrl-C: live in a terminal, else lines, or objects, as '
              'they come.')  # fmt: skip
@click.option('--every', type=click.FloatRange(0.1, 3600), help='Seconds between two looks, with --watch.  '
              '[default: 1]')  # fmt: skip
@url_option
@as_json
def lag(stream: str | None, watch: bool, every: float | None, url: str | None, as_json: bool) -> None:
    """How far the consumer groups of STREAM, or of all streams, are behind.

    \b
    lag       messages the group has not finished
    seconds   the age of the oldest of them
    in/s      messages appended per second, with --watch
    out/s     messages processed per second, with --watch
    windows   in flight: claimed and not finished
    late      messages that came when all their windows were closed
    dead      dead letters
    led by    host:pid of the consumer that leads now

    Exit code: 0, also when --watch is ended by Ctrl-C.

    \b
    Examples:
      minibatch lag
      minibatch lag temperature --watch
      minibatch lag --watch --every 10 --json >> lag.ndjson
    """
    if every is not None and not watch:
        raise click.UsageError('--every goes with --watch')
    if stream is not None:
        find_stream(stream, url)
    if not watch:
        (look,) = _looks(url, stream, None)
        if as_json:
            print_json(look.as_dict())
        elif look.groups:
            print_table(HEADS, look.rows())
        else:
            click.echo('no consumer groups')
        return
    try:
        _watch(_looks(url, stream, every or 1.0), as_json)
    except KeyboardInterrupt:
        return


class Look:
    """What was seen at one moment; with the look before it, how fast it goes."""

    def __init__(self, found: list[StreamStatus], before: Look | None) -> None:
        self.at, self.time, self._found, self._before = time.monotonic(), datetime.now().astimezone(), found, before
        self.groups = [(stream, group) for stream in found for group in stream.groups]
        self._counts = {
            (stream.name, group.name): (stream.appended, group.group.messages) for stream, group in self.groups
        }
        if before is not None:
            before._before = None

    def rates(self, stream: str, group: str) -> tuple[float, float] | None:
        """Messages per second, appended and processed; None if it was not seen before."""
        before = self._before
        if before is None or (stream, group) not in before._counts:
            return None
        pairs = zip(self._counts[stream, group], before._counts[stream, group], strict=True)
        appended, processed = ((now - then) / (self.at - before.at) for now, then in pairs)
        return max(appended, 0.0), max(processed, 0.0)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """For a table with the columns HEADS."""
        for stream, group in self.groups:
            rates = self.rates(stream.name, group.name)
            speeds = ('-', '-') if rates is None else (f'{rates[0]:,.0f}', f'{rates[1]:,.0f}')
            yield (
                stream.name, group.name, f'{group.lag.messages:,}', f'{group.lag.seconds:,.1f}', *speeds,
                f'{group.in_flight:,}', f'{group.group.late:,}', f'{group.dead:,}', group.group.owner or '-',
            )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {'time': self.time.isoformat(), 'groups': [self._group(*pair) for pair in self.groups]}

    def _group(self, stream: StreamStatus, group: GroupStatus) -> dict[str, Any]:
        appended, processed = self.rates(stream.name, group.name) or (None, None)
        return {
            'stream': stream.name, 'group': group.name, 'lag': group.lag._asdict(), 'in_flight': group.in_flight,
            'late': group.group.late, 'dead': group.dead, 'owner': group.group.owner, 'appended_per_second': appended,
            'processed_per_second': processed,
        }  # fmt: skip


def _looks(url: str | None, stream: str | None, every: float | None) -> Iterator[Look]:
    """One look, or one every so many seconds."""
    from ..overview import status

    look = None
    while True:
        due = time.monotonic() + (every or 0)
        look = Look(status(url, stream), look)
        yield look
        if every is None:
            return
        time.sleep(max(due - time.monotonic(), 0))


def _watch(looks: Iterator[Look], as_json: bool) -> None:
    if as_json:
        for look in looks:
            print_json(look.as_dict())
        return
    if not sys.stdout.isatty():
        for look in looks:
            for row in look.rows():
                click.echo(_line(look, row))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text('...'), auto_refresh=False, transient=False) as live:
        for look in looks:
            live.update(_live_table(look), refresh=True)


def _line(look: Look, row: Sequence[str]) -> str:
    stream, group, messages, seconds, appended, processed, _, late, dead, _ = row
    return plain(
        f'{look.time:%Y-%m-%d %H:%M:%S}  {stream}/{group}  lag {messages}  seconds {seconds}  in/s {appended}  '
        f'out/s {processed}  late {late}  dead {dead}'
    )


def _live_table(look: Look) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, padding=(0, 2, 0, 0), caption=f'{look.time:%H:%M:%S}, Ctrl-C ends', caption_justify='left',
        header_style='bold',
    )  # fmt: skip
    for head in HEADS:
        table.add_column(head.lstrip('>'), justify='right' if head[0] == '>' else 'left')
    for row in look.rows():
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table if look.groups else Text('no consumer groups yet; Ctrl-C ends')
