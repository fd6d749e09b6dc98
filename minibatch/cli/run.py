"""``minibatch run``, ``app`` and ``demo``: what goes on until it is stopped."""

from __future__ import annotations

import logging
import sys

import click

from ..errors import MinibatchError
from ..signals import end_by
from .common import url_option

END_TIMEOUT = 10.0  # for threads that a function has left in this process


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


@click.command()
@click.argument('module')
@click.option('--workers', type=click.IntRange(1, 1024),
              help='Worker processes of each consumer, instead of what the module says.')  # fmt: skip
@click.option('--until-done', is_flag=True, help='End when all is processed that is there, and sources are at their '
              'end. Windows that are still open are emitted as they are.')  # fmt: skip
@click.option('--log-level', type=click.Choice(['debug', 'info', 'warning', 'error']), default='info',
              show_default=True, help='What goes to stderr, unless the module sets up logging itself.')  # fmt: skip
def run(module: str, workers: int | None, until_done: bool, log_level: str) -> None:
    """Run the consumers of MODULE, a module name or FILE.py, as a service: all in this process.

    The module is imported. What @streaming decorates at its top level (or streaming(name, fn) names) does not run
    at once, but together with the others, each in a thread with worker processes of its own. What stands below
    if __name__ == '__main__' is not run.

    SIGTERM and Ctrl-C let the windows in flight finish; a second one does not. A consumer that fails stops the
    others, and is named. To scale out, start the same again, here or elsewhere: the others stand by.

    With --until-done it ends by itself, for an input that ends: what was appended, and what sources bring until their
    end, goes through all consumers of the module, also from one to the next. What comes later is not late by that.

    Exit code: 0 when stopped or done, 1 if a consumer has failed, 130 or 143 after a second Ctrl-C or SIGTERM.

    \b
    Examples:
      minibatch run pipeline.py
      minibatch run mypackage.pipeline --workers 2
      minibatch append readings readings.ndjson && minibatch run pipeline.py --until-done
    """
    from .service import Service, consumers_of, describe

    emitters = consumers_of(module)
    for emitter in emitters:
        emitter.max_workers = workers or emitter.max_workers
    logging.basicConfig(level=log_level.upper(), format='%(asctime)s %(levelname)-7s %(name)s: %(message)s')
    for emitter in emitters:
        logging.getLogger('minibatch.run').info('%s: %s', describe(emitter), emitter.describe())
    failed = True
    try:
        Service(emitters, until_done).run()
        failed = False
    finally:
        end_by(int(failed), END_TIMEOUT)


@click.command()
@url_option
@click.option('--host', default='127.0.0.1', show_default=True, help='The address to listen at.')
@click.option('--port', type=click.IntRange(0, 65535), default=5000, show_default=True, help='The port.')
@click.option('--token', envvar='MINIBATCH_APP_TOKEN', help='Who has it may append, replay and discard. Without it '
              'nothing can be changed. Better by MINIBATCH_APP_TOKEN: others see arguments.')  # fmt: skip
@click.option('--private', is_flag=True, help='Ask for the token to read, too.')
@click.option('--allow-host', 'hosts', multiple=True, metavar='NAME', help='A name by which the app may be asked, '
              'besides localhost, the name of this machine, and addresses; may be given several times.')  # fmt: skip
def app(url: str | None, host: str, port: int, token: str | None, private: bool, hosts: tuple[str, ...]) -> None:
    """The dashboard: streams, consumer groups and dead letters in a web page, until Ctrl-C.

    \b
    Examples:
      minibatch app
      MINIBATCH_APP_TOKEN=... minibatch app --port 8080
      MINIBATCH_APP_TOKEN=... minibatch app --host 0.0.0.0 --private --allow-host streams.example.org
    """
    try:
        from ..contrib.apps import StreamingApp
    except ImportError as exc:
        raise MinibatchError(str(exc)) from exc
    logging.basicConfig(level='INFO', format='%(asctime)s %(levelname)-7s %(name)s: %(message)s')
    StreamingApp(uri=url, token=token, private=private, hosts=hosts).run(host=host, port=port)
