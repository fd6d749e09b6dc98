"""``minibatch append`` and ``minibatch tail``: messages into a stream, and out of it."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from .. import signals
from ..errors import DataError, MinibatchError, ServerError
from ..text import plain
from .common import InputFile, as_json, find_stream, find_target, stream_names, url_option
from .output import count_text, print_json
from .reading import BadInput, Input

if TYPE_CHECKING:
    from ..models import Stream


@click.command()
@click.argument('name', shell_complete=stream_names)
@click.argument('file', type=InputFile('rb'), default='-')
@click.option('--batch', type=click.IntRange(1, 100_000), default=10_000, show_default=True,
              help='Messages per append, at most. What has arrived is not held back to fill one.')  # fmt: skip
@click.option('--from', 'start', type=click.IntRange(1), default=1, metavar='N',
              help='Begin with line N, or item N of a JSON array, counted from 1.')  # fmt: skip
@click.option('--timeout', type=click.FloatRange(0.1, 86400), default=60, show_default=True,
              help='Seconds to wait for room, if the stream has a max_backlog, and for MongoDB to confirm; and once '
              'more, at the end, for what is not confirmed.')  # fmt: skip
@url_option
@as_json
def append(
    name: str, file: BinaryIO, batch: int, start: int, timeout: float, url: str | None, as_json: bool
) -> None:
    """Append the JSON objects in FILE, or on standard input, to the stream NAME, which is made if need be.

    NDJSON, one object a line, is appended as it arrives, in little memory. One JSON array of objects, or one object
    over several lines, is read as a whole before any of it is appended. Extended JSON, as `minibatch tail` prints it,
    is understood.

    At a line that is no message it stops. Those before it are appended, and it says from which line on to go on; so
    it does after Ctrl-C or SIGTERM, and when MongoDB refuses.

    Exit code: 0 if all was appended, 1 if not, 130 after Ctrl-C, 143 after SIGTERM.

    \b
    Examples:
      minibatch append temperature readings.ndjson
      echo '{"room": "attic", "celsius": 17.2}' | minibatch append temperature
      mosquitto_sub -t sensors | minibatch append temperature
      minibatch append temperature readings.ndjson --from 500001
    """
    from ..models import check_name

    check_name('the name of a stream', name)
    find_target(url, timeout)
    source = Input(file)
    work = Appending(name, url, source, batch, timeout)
    began = time.monotonic()
    with _progress(file, source, work) as show:
        work.run(start, show)
    seconds = time.monotonic() - began
    if start > 1 and not work.appended and not work.problem:
        raise MinibatchError(f'there is no {source.what} {start}, so nothing was appended')
    if work.problem:
        path = getattr(file, 'name', '-')
        where = 'standard input' if path in ('-', '<stdin>') else path
        _say_how_far(work, f'{where}: {work.problem}', as_json)
    elif as_json:
        print_json({'stream': name, 'appended': work.appended})
    else:
        rate = f', {work.appended / seconds:,.0f} a second' if seconds > 1 else ''
        click.echo(f'appended {count_text(work.appended, "message")} to {plain(name)} in {seconds:.1f} s{rate}')


def _say_how_far(work: Appending, problem: str, as_json: bool) -> None:
    what, following = work.source.what, work.done + 1
    if as_json:
        print_json({
            'stream': work.name, 'appended': work.appended, 'error': problem, 'go_on_from': following,
            'unconfirmed': work.unconfirmed,
        })  # fmt: skip
    said = f'{count_text(work.appended, "message")} appended'
    if work.unconfirmed:
        last = work.done + work.unconfirmed
        said += f'; {what}s {following} to {last} may be stored or not. Go on with --from {following} or {last + 1}'
    elif work.bad == 'all':
        said += '. Correct it'
    elif work.bad:
        said += f'. Correct it and go on with --from {following}, or leave it out with --from {following + 1}'
    else:
        said += f'. Go on with --from {following}'
    click.echo(plain(f'{"interrupted" if work.interrupted else "error"}: {problem}; {said}'), err=True)
    raise click.exceptions.Exit(128 + work.interrupted if work.interrupted else 1)


class Appending:
    """Appends all that a source has.

    Attributes:
        appended: how many messages MongoDB has acknowledged.
        done: the number of the last line that is dealt with.
        unconfirmed: how many messages after those may be stored or not.
        problem: why it ended before the end, or ''.
        bad: 'one' if that was a line that is no message, 'all' if it is all of the input, else ''.
        interrupted: the number of the signal that asked it to end, or 0.
    """

    def __init__(self, name: str, url: str | None, source: Input, batch: int, timeout: float) -> None:
        self.name, self.source, self._url, self._batch, self._timeout = name, source, url, batch, timeout
        self.appended = self.done = self.unconfirmed = 0
        self.problem, self.bad, self.interrupted = '', '', 0
        self._stream: Stream | None = None
        self._writing = False

    def run(self, start: int, show: Callable[[], None]) -> None:
        """Append from line `start` on, until the end or a problem; call `show` now and then."""
        self.done = start - 1
        with signals.caught(self._interrupt):
            try:
                for batch in self.source.batches(start):
                    self._append(*batch, show)
            except BadInput as exc:
                self.bad = 'one' if exc.number else 'all'
                self.done = max(exc.number - 1, self.done)
                self.problem = f'{self.source.what} {exc.number:,}: {exc}' if exc.number else str(exc)
            except ServerError as exc:
                self.problem = str(exc).rstrip('.')
            except KeyboardInterrupt:
                self.problem = f'after {self.source.what} {self.done:,}'

    def _append(self, messages: list[dict[str, Any]], numbers: list[int], show: Callable[[], None]) -> None:
        for begin in range(0, len(messages), self._batch):
            end = begin + self._batch
            self._writing = True
            try:
                self._write(messages[begin:end], numbers[begin:end])
            finally:
                self._writing = False
            show()
            if self.interrupted:
                raise KeyboardInterrupt

    def _write(self, messages: list[dict[str, Any]], numbers: list[int]) -> None:
        from ..api import stream

        if self._stream is None:
            self._stream = stream(self.name, url=self._url, timeout=self._timeout)
        try:
            self._stream.append_many(messages)
        except DataError as exc:
            good, reason = _storable(messages)
            if good == len(messages):
                raise MinibatchError(str(exc)) from exc
            if good > exc.written:
                self._note(exc.written, numbers)
                self._write(messages[exc.written : good], numbers[exc.written : good])
            raise BadInput(numbers[good], reason) from None
        except (ServerError, KeyboardInterrupt) as exc:
            self._note(getattr(exc, 'written', 0), numbers)
            self.unconfirmed = getattr(exc, 'queued', 0)
            raise
        self._note(len(messages), numbers)

    def _note(self, written: int, numbers: list[int]) -> None:
        self.appended += written
        self.done = numbers[written - 1] if written else self.done

    def _interrupt(self, number: int, frame: object) -> None:
        """Let what is being written come to its end, to say how far it is; a second signal does not."""
        again, self.interrupted = self.interrupted, number
        if again or not self._writing:
            raise KeyboardInterrupt


def _storable(messages: list[dict[str, Any]]) -> tuple[int, str]:
    """How many messages there are before one that MongoDB cannot store, and why it cannot."""
    from ..encoding import encode

    for number, message in enumerate(messages):
        try:
            encode(message)
        except DataError as exc:
            return number, str(exc)
    return len(messages), ''


@contextmanager
def _progress(file: BinaryIO, source: Input, work: Appending) -> Iterator[Callable[[], None]]:
    """A function that shows how far it is, on stderr if that is a terminal and the input is none."""
    if not sys.stderr.isatty() or file.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    size = None
    with suppress(OSError):
        size = os.fstat(file.fileno()).st_size or None
    count, began = TextColumn('{task.fields[count]:>11,} messages  {task.fields[rate]:>9,.0f}/s'), time.monotonic()
    columns = (BarColumn(), DownloadColumn(), count, TimeRemainingColumn()) if size else (count,)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task('', total=size, count=0, rate=0.0)

        def show() -> None:
            rate = work.appended / max(time.monotonic() - began, 0.001)
            progress.update(task, completed=source.bytes, count=work.appended, rate=rate)

        yield show


@click.command()
@click.argument('name', shell_complete=stream_names)
@click.option('--last', type=click.IntRange(0, 10_000), default=10, show_default=True,
              help='Begin with so many messages that are stored.')  # fmt: skip
@click.option('--follow/--no-follow', default=True, show_default=True, help='Go on with new ones until Ctrl-C, or '
              'until nobody reads the output.')  # fmt: skip
@url_option
@as_json
def tail(name: str, last: int, follow: bool, url: str | None, as_json: bool) -> None:
    """Print the messages of the stream NAME as they arrive, the data of each as one JSON object a line.

    Messages that were processed and deleted are not among them. With --json each object has the time and place of
    the message beside its data. Data is MongoDB Extended JSON: times are objects such as
    {"$date": "2026-01-31T12:00:00Z"}.

    Exit code: 0, also when it is ended by Ctrl-C.

    \b
    Examples:
      minibatch tail temperature
      minibatch tail temperature --last 1000 --no-follow > readings.ndjson
      minibatch tail temperature --json | jq -c '[.created, .data.celsius]'
    """
    try:
        for message in find_stream(name, url).tail(last=last, follow=follow):
            if message is None:
                if _nobody_reads():
                    return
            elif as_json:
                place = {'created': message.created.isoformat(), 'producer': message.producer, 'offset': message.offset}
                print_json({**place, 'data': message.data, 'meta': message.meta})
            else:
                print_json(message.data)
    except KeyboardInterrupt:
        return


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, which else shows with the next message only."""
    if not hasattr(select, 'poll'):
        return False
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
