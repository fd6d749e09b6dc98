"""Helpers for tests of web apps: programs with an app, requests to them, and who is still alive."""
from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from processes import is_alive, running

TOKEN = 'correct-horse'
AUTH = {'Authorization': f'Bearer {TOKEN}'}
# What a path may not keep on its way to the app, and what it keeps.
CHANGED = [
    '/odom', 'odom/', '//odom', 'x//odom', 'x/../odom', '../odom', './odom', 'x/.', '..', '.', '/', '/tail', '\\odom',
    'odom\n', 'o\rdom', 'o\tdom', '\x7fodom',
]
KEPT = [
    'odom', 'plant/3/left', 'tail', 'a/tail', 'replay', 'ümläut & <b>', 'x?y', '?stream=odom', 'x#y', '50%', '%2Fodom',
    'a+b', 'a;b=c', ' odom ', '...', '.odom', '\N{ZIPPER-MOUTH FACE}', 'cafe\N{COMBINING ACUTE ACCENT}', 'caf\xe9',
    '\N{RIGHT-TO-LEFT OVERRIDE}mado', '$where', 'None', 'constructor', '__proto__', "'; DROP--", 'x' * 200,
]

PROGRAM = """
import os, sys, time
import minibatch as mb
from minibatch.contrib.apps import StreamingApp

app = StreamingApp(uri={url!r}, token={token!r})

def consumer(url):
    @mb.streaming('test', size=2, url=url, workers=2, lease=2)
    def process(window):
        {work}

if __name__ == '__main__':
    app.start_streaming(consumer)
    app.run(port=0)
"""


@contextmanager
def program(tmp_path: Any, url: str, work: str = 'pass') -> Any:
    """A program with an app and a consumer; yields the process and its address."""
    path = tmp_path / 'program.py'
    path.write_text(PROGRAM.format(url=url, token=TOKEN, work=work))
    with running(str(path), stderr=-1) as process:
        yield process, re.search(r'http://\S+', process.stderr.readline()).group()


def get(url: str, **headers: str) -> tuple[int, Any]:
    """GET something that is JSON: status and value."""
    return ask(urllib.request.Request(url, headers=headers))


def post(url: str, value: Any, **headers: str) -> tuple[int, Any]:
    """POST a value as JSON, with the token."""
    request = urllib.request.Request(url, json.dumps(value).encode(), method='POST')
    for name, text in {'Content-Type': 'application/json', **AUTH, **headers}.items():
        request.add_header(name, text)
    return ask(request)


def ask(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def children(pid: int | None = None) -> set[psutil.Process]:
    """All that a process, or this one, has started and that still runs."""
    return {child for child in psutil.Process(pid).children(recursive=True) if is_alive(child)}


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
