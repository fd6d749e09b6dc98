"""Functions that are given to us: whether they can be called so, and calls that are over when they return.

What a function returns may still be to come: a coroutine, or an iterator, of which nothing has run. So users' functions
are called through `call`. Coroutines run in an event loop of the thread that calls. It is kept, and runs in a thread
beside it, so that connections and tasks which they leave live on between two calls.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import islice
from types import CoroutineType
from typing import Any
from weakref import WeakKeyDictionary, finalize

from .errors import ArgumentError, DataError
from .marshaller import name_of

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 3.0
LOOK_AT = 100  # items of a result; a thousand would cost a worker some percent
COLLECTIONS = (list, tuple, set, frozenset)

_loops: WeakKeyDictionary[threading.Thread, Loop] = WeakKeyDictionary()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_loops.clear)  # their threads are not in the child


# --- when it is given


def check(name: str, fn: Any, *given: str, plain: bool = False) -> None:
    """Refuse what cannot be called so.

    Args:
        name: how the user calls it.
        fn: the function.
        given: what it will be called with, in words, one for each argument.
        plain: whether nobody waits for what it returns, so that it can be neither ``async def`` nor a generator.

    Raises:
        ArgumentError: if it is no function, or takes another number of arguments, or nothing of it would ever run.
    """
    if not callable(fn):
        hint = '; give the function itself, and do not call it' if inspect.isawaitable(fn) else ''
        raise ArgumentError(f'{name} must be callable, not {fn!r}{hint}')
    if plain and (kind := _kind_of(fn)):
        raise ArgumentError(f'{name} must be a plain function, and {name_of(fn)} is {kind}: nothing of it would run')
    try:
        signature = inspect.signature(fn, follow_wrapped=False)
    except (ValueError, TypeError):  # it does not say, as some of what is written in C
        return
    try:
        signature.bind(*given)
    except TypeError as exc:
        takes = ', '.join(_shown(parameter) for parameter in signature.parameters.values())
        with_what = ' and '.join(given) if given else 'no arguments'
        raise ArgumentError(f'{name} is called with {with_what}, and {name_of(fn)}({takes}) cannot be: {exc}') from None


def _shown(parameter: inspect.Parameter) -> str:
    """Its name, without its default, which may be a secret."""
    bare = parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)
    return str(bare) + ('=...' if parameter.default is not inspect.Parameter.empty else '')


def _kind_of(fn: Any) -> str:
    """Why a call of the function runs nothing of it, in words; '' if it does."""
    called = (fn, type(fn).__call__)
    return 'async def' if any(map(inspect.iscoroutinefunction, called)) else 'a generator' if yields(fn) else ''


def yields(fn: Any) -> bool:
    """Whether it is a generator function, or an asynchronous one."""
    called = (fn, type(fn).__call__)
    return any(inspect.isasyncgenfunction(each) or inspect.isgeneratorfunction(each) for each in called)


# --- when it is called


def call(fn: Callable[..., Any], *args: Any, keep: bool = True) -> Any:
    """Call a function, and return when all of it has run.

    What it returns is awaited, if it is awaitable, in the event loop of this thread. Of an iterator, also an
    asynchronous one, the items are the result: a list, which is empty unless they are to be kept.

    Raises:
        DataError: if there are coroutines in a list that it returns, which nobody would ever await.
    """
    result = fn(*args)
    while result is not None:
        if inspect.isawaitable(result):
            result = loop_here().run(result)
        elif isinstance(result, AsyncIterator):
            result = loop_here().run(_items_of(result, keep))
        elif isinstance(result, Iterator):
            result = list(deque(result, maxlen=None if keep else 0))
        else:
            break
    items = result.values() if isinstance(result, dict) else result if isinstance(result, COLLECTIONS) else ()
    if CoroutineType in set(map(type, islice(items, LOOK_AT))):
        raise DataError('coroutines are in what the function returned, which nobody awaits; return '
                        'await asyncio.gather(*coroutines)')  # fmt: skip
    return result


async def _items_of(iterator: AsyncIterator[Any], keep: bool) -> list[Any]:
    items: deque[Any] = deque(maxlen=None if keep else 0)
    async for item in iterator:
        items.append(item)
    return list(items)


def cancel(fn: Callable[[], Any], thread: threading.Thread | None) -> None:
    """Call a function that tells the work of another thread to end; coroutines in the loop of that one, unawaited."""
    result = fn()
    if inspect.isawaitable(result):
        loop = _loops.get(thread) if thread is not None else None
        (loop or loop_here()).post(result)


def loop_here() -> Loop:
    """The event loop of this thread, made on first use, and closed when the thread, or the process, ends."""
    thread = threading.current_thread()
    loop = _loops.get(thread)
    if loop is None:
        loop = _loops[thread] = Loop()
        finalize(thread, loop.close)
    return loop


def close_loop() -> None:
    """Close the event loop of this thread, if it has one; who comes next has a new one."""
    loop = _loops.pop(threading.current_thread(), None)
    if loop is not None:
        loop.close()


class Loop:
    """An event loop that goes on in a thread of its own until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._run_on, name='minibatch-loop', daemon=True)
        self._thread.start()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Return what it comes to, or raise what it raises."""
        future = asyncio.run_coroutine_threadsafe(_guarded(awaitable), self._loop)
        try:
            value, error = future.result()
        except BaseException:  # a signal, in this thread
            future.cancel()
            raise
        if error is not None:
            raise error
        return value

    def post(self, awaitable: Awaitable[Any]) -> None:
        """Let it run, and do not wait for it."""
        asyncio.run_coroutine_threadsafe(_logged(awaitable), self._loop)

    def close(self) -> None:
        """Cancel what still runs, and wait some seconds until it has ended."""
        if self._closed or not self._thread.is_alive():
            return
        self._closed = True
        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT)

    def _run_on(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._closed:
            try:
                self._loop.run_forever()
            except BaseException:  # SystemExit of a task that was left running would end the loop
                logger.exception('a task in an event loop raised what would have ended it')
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT / 2)
            await self._loop.shutdown_asyncgens()
        finally:
            self._loop.stop()


async def _guarded(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What it comes to, and what it raised: an event loop ends at some of that."""
    try:
        return await awaitable, None
    except BaseException as exc:
        return None, exc


async def _logged(awaitable: Awaitable[Any]) -> None:
    _, error = await _guarded(awaitable)
    if error is not None:
        logger.warning('a coroutine has failed', exc_info=error)
