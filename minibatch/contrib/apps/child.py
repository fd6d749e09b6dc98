"""The process of a consumer of a `StreamingApp`: it runs one function, and ends when its parent is gone.

It is a clean interpreter, which reads what to run from a pipe of its parent, and nothing else from anywhere::

    python -m minibatch.contrib.apps.child NAME FD

FD is the file descriptor to which it writes the last words of a function that failed.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from minibatch.connection import masked_text

from .supervisor import MAX_WORDS, PROCESS_VARIABLE

PARENT_CHECK = 1.0
GRACE = 10.0


def main() -> None:
    """Run the function that the parent sends."""
    parent = os.getppid()
    words = int(sys.argv[2])
    os.set_inheritable(words, False)
    os.environ[PROCESS_VARIABLE] = str(os.getpid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.path[:] = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our parent
        consumer, url = pickle.load(sys.stdin.buffer)  # noqa: S301
        threading.Thread(target=_follow, args=(parent,), name='minibatch-app-parent', daemon=True).start()
        consumer(url)
    except Exception as exc:
        print(masked_text(traceback.format_exc()), end='', file=sys.stderr, flush=True)
        said = masked_text(f'{type(exc).__name__}: {exc}').encode(errors='replace')
        os.write(words, said[:MAX_WORDS])
        sys.exit(1)


def _leave(number: int, frame: Any) -> NoReturn:
    sys.exit(0)


def _follow(parent: int) -> None:
    """Wait for the end of the parent, then end, after what is in flight, with all that this process has started.

    The parent never writes again, so what comes through the pipe is its end. A process that was forked from the parent
    may keep the pipe open; that the parent is another one then tells.
    """
    while os.getppid() == parent and not select.select([sys.stdin.fileno()], [], [], PARENT_CHECK)[0]:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == '__main__':
    main()
