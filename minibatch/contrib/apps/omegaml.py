"""`StreamingApp` under the name by which omega|ml knows it."""

from __future__ import annotations

from . import StreamingApp

__all__ = ['StreamingApp']
