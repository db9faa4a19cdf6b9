"""Blocking calls. The only place that knows which calls of the standard library make their thread wait.

A call counts by its kind, not by its duration, so that a busy machine makes no test fail.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

__all__ = ["report_blocking_calls"]

ROOT = Path(__file__).parents[2]
OURS = str(ROOT / "openagents_worker")
SOCKET_CALLS = ("accept", "connect", "recv", "recv_into", "send", "sendall")
STARTING = frozenset({threading.Thread.start.__code__})
ENDING = frozenset({asyncio.BaseEventLoop.shutdown_default_executor.__code__})


def report_blocking_calls(
    patch: pytest.MonkeyPatch, on_a_loop: Callable[[], bool], report: Callable[[str], None]
) -> None:
    """Call `report` with the name of each call that makes a thread wait while `on_a_loop()` is true.

    A blocking socket counts only if a coroutine of the library uses it. Coroutines of tests may use blocking
    clients of the local Redis.
    """

    def replace(owner: Any, name: str, waits: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if on_a_loop() and waits(*args, **kwargs):
                report(f"{owner.__name__}.{name}")
            return original(*args, **kwargs)

        patch.setattr(owner, name, watched)

    replace(time, "sleep", lambda seconds: seconds > 0)
    replace(threading.Condition, "wait", _condition_waits)
    replace(threading.Thread, "join", _join_waits)
    replace(subprocess.Popen, "wait", lambda self, timeout=None: self.poll() is None and timeout != 0)
    for name in SOCKET_CALLS:
        replace(socket.socket, name, lambda self, *_: self.gettimeout() != 0 and _in_library_coroutine())


def _condition_waits(self: threading.Condition, timeout: float | None = None) -> bool:
    """Whether it blocks. Starting a thread waits until the thread runs; this is allowed, as in executors."""
    return timeout != 0 and not _is_called_by(STARTING)


def _join_waits(self: threading.Thread, timeout: float | None = None) -> bool:
    """Whether it blocks. A closing loop joins a thread that is about to end; this is allowed."""
    return self.is_alive() and timeout != 0 and not _is_called_by(ENDING)


def _is_called_by(codes: frozenset[CodeType]) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _in_library_coroutine() -> bool:
    """Whether the innermost coroutine on the stack belongs to the library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            return frame.f_code.co_filename.startswith(OURS)
        frame = frame.f_back
    return False
