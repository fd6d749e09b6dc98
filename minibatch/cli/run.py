"""``minibatch run``, ``app`` and ``demo``: what goes on until it is stopped."""

from __future__ import annotations

import sys

import click

from .common import url_option


@click.command()
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
    from ..demo import Demo

    sys.exit(Demo(url, seconds, rate, window, workers).run())
