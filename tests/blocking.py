"""Calls that block. The only place that knows which calls of the standard library make their thread wait.

Found by what is called and not by how long it took: a busy machine makes every call slow, and blames nobody.
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

ROOT = Path(__file__).parents[1]
OURS = str(ROOT / "openagents_worker")
SOCKET_CALLS = ("accept", "connect", "recv", "recv_into", "send", "sendall")
STARTING = frozenset({threading.Thread.start.__code__})
ENDING = frozenset({asyncio.BaseEventLoop.shutdown_default_executor.__code__})


def report_blocking_calls(
    patch: pytest.MonkeyPatch, on_a_loop: Callable[[], bool], report: Callable[[str], None]
) -> None:
    """From now on `report` hears of each call that makes a thread wait while `on_a_loop()`.

    A socket that blocks counts where a coroutine of the library uses it: tests may ask the Redis on this
    machine from a coroutine of theirs, which is what they are not about.
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
        replace(socket.socket, name, lambda self, *_: self.gettimeout() != 0 and _by_a_coroutine_of_ours())


def _condition_waits(self: threading.Condition, timeout: float | None = None) -> bool:
    """Whoever starts a thread waits until it runs, also in the standard library's own executors."""
    return timeout != 0 and not _is_called_by(STARTING)


def _join_waits(self: threading.Thread, timeout: float | None = None) -> bool:
    """A loop that ends joins a thread which has only its last line to run."""
    return self.is_alive() and timeout != 0 and not _is_called_by(ENDING)


def _is_called_by(codes: frozenset[CodeType]) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _by_a_coroutine_of_ours() -> bool:
    """Whether the innermost coroutine on the stack is one of the library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            return frame.f_code.co_filename.startswith(OURS)
        frame = frame.f_back
    return False
