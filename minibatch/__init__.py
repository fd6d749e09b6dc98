"""Stream processing for humans, on MongoDB.

::

    import minibatch as mb

    stream = mb.stream('test')
    stream.append({'a': 1})

    @mb.streaming('test', size=2)
    def process(window):
        print(window.data)
"""

from .api import make_emitter, stream, streaming
from .connection import authenticated_url, connectdb
from .errors import MinibatchError
from .groups import DeadLetter, Group
from .messages import Message, MessageWindow
from .models import Buffer, Stream, Window
from .overview import status

__all__ = [
    'Buffer',
    'DeadLetter',
    'Group',
    'Message',
    'MessageWindow',
    'MinibatchError',
    'Stream',
    'Window',
    'authenticated_url',
    'connectdb',
    'make_emitter',
    'status',
    'stream',
    'streaming',
]
