"""The consumers of a module, run together in one process until they are stopped or one of them fails."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from .. import signals
from ..api import collecting
from ..connection import same_database
from ..errors import ArgumentError, MinibatchError
from ..marshaller import name_of
from ..window import WindowEmitter

logger = logging.getLogger('minibatch.run')

PAUSE = 0.5
END_TIMEOUT = 70.0  # each of them ends within 60


def consumers_of(name: str) -> list[WindowEmitter]:
    """Import a module, by its name or as FILE.py, and return the consumers that it would have run.

    Raises:
        MinibatchError: if there is no such module, it fails, or it has no consumer; one line that says where.
    """
    spec = _find(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # Workers get the functions of a script without running it again; this module is treated as one.
    cloudpickle.register_pickle_by_value(module)
    with collecting() as emitters:
        _run(module, spec, name)
    if not emitters:
        raise MinibatchError(
            f'{name} has no function decorated with @streaming(...) at its top level; what stands below '
            f"if __name__ == '__main__' does not run here, and blocking=False has had its round"
        )
    _check_groups(emitters)
    return emitters


def describe(emitter: WindowEmitter) -> str:
    """Which consumer it is: stream/group and the function."""
    return emitter.name if emitter.emitfn is None else f'{emitter.name} ({name_of(emitter.emitfn)})'


def _find(name: str) -> ModuleSpec:
    """Where the module is. What is beside it can be imported, as if it were run by Python."""
    path = Path(name)
    if path.suffix == '.py':
        if not path.is_file():
            raise ArgumentError(f'there is no file {name}')
        if path.stem in sys.modules:
            raise ArgumentError(f'{name} has the name of a module that is in use, {path.stem}; rename the file')
        sys.path.insert(0, str(path.parent.absolute()))
        spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    else:
        sys.path.insert(0, os.getcwd())
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError as exc:
            if exc.name is None or not name.startswith(exc.name):
                raise MinibatchError(f'{name} cannot be imported: {exc}') from exc
            spec = None
        except (ImportError, ValueError) as exc:
            raise ArgumentError(f'{name!r} is not the name of a module: {exc}') from exc
    if spec is None or spec.loader is None:
        raise ArgumentError(f'there is no module {name!r} here or on the path of Python; name a file as FILE.py')
    return spec


def _run(module: ModuleType, spec: ModuleSpec, name: str) -> None:
    assert spec.loader is not None  # noqa: S101 # _find has looked
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:  # one that exits has no consumers either
        if signals.is_signal(exc):
            raise
        place = name
        if isinstance(exc, SyntaxError):
            place = f'{exc.filename}, line {exc.lineno}'
        for frame in traceback.extract_tb(exc.__traceback__):
            if spec.origin is not None and frame.filename == spec.origin:
                place = f'{name}, line {frame.lineno}'
        kind = '' if isinstance(exc, MinibatchError) else f'{type(exc).__name__}: '
        raise MinibatchError(f'{place}: {kind}{exc}') from exc


def _check_groups(emitters: Sequence[WindowEmitter]) -> None:
    known: dict[tuple[Any, ...], WindowEmitter] = {}
    for emitter in emitters:
        other = known.setdefault((emitter.stream.target, emitter.stream_name, emitter.group), emitter)
        if other is not emitter:
            raise ArgumentError(
                f'{describe(other)} and {describe(emitter)} are one consumer group; give one of them another group='
            )


def _feeds(one: WindowEmitter, other: WindowEmitter) -> bool:
    """Whether one consumer appends to the stream of another one, as far as its options say."""
    ours = (out for out in (*one.appends_to, one.late) if out is not None and out.name == other.stream_name)
    return any(same_database(out.target, other.stream.target) for out in ours)


class Service:
    """Consumers, each in a thread with worker processes of its own; `run` runs them on the main thread's behalf."""

    def __init__(self, emitters: Sequence[WindowEmitter], until_done: bool = False) -> None:
        self._emitters, self._until_done = emitters, until_done
        self._ended = {emitter: threading.Event() for emitter in emitters}
        for emitter in emitters:
            emitter.fed_by = [self._ended[other] for other in emitters if _feeds(other, emitter)]
        self._errors: list[tuple[WindowEmitter, Exception]] = []
        self._ending = threading.Event()

    def run(self) -> None:
        """Run until SIGTERM or Ctrl-C, which let the windows in flight finish; a second one does not. Or until done.

        Raises:
            MinibatchError: if a consumer failed, naming it; the others were stopped.
        """
        threads = [
            threading.Thread(target=self._consume, args=(emitter,), name=f'minibatch-{emitter.name}', daemon=True)
            for emitter in self._emitters
        ]
        with signals.handled(self._stop_soon, self._end_at_once, within=END_TIMEOUT):
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self._ending.wait(PAUSE):
                pass
            for emitter in self._emitters:
                emitter.stop()
            for thread in threads:
                while thread.is_alive():
                    thread.join(PAUSE)
        for emitter, error in self._errors:
            kind = '' if isinstance(error, MinibatchError) else f'{type(error).__name__}: '
            raise MinibatchError(f'the consumer {describe(emitter)} has ended: {kind}{error}') from error

    def _consume(self, emitter: WindowEmitter) -> None:
        try:
            emitter.run(until_done=self._until_done)
        except Exception as exc:
            self._errors.append((emitter, exc))
            self._ending.set()
        else:
            logger.info('%s: stopped', describe(emitter))
        finally:
            self._ended[emitter].set()

    def _stop_soon(self) -> None:
        if not self._ending.is_set():
            logger.info('stopping; what is in flight is finished first')
        self._ending.set()

    def _end_at_once(self, number: int) -> None:
        """As if killed, which loses nothing: the workers notice, and the next consumer does these windows again."""
        logger.warning('ended at once; what was in flight will be done again')
        sys.stdout.flush()
        os._exit(128 + number)
