"""Waiting. The only place where a test lets time pass: until a condition holds, never for a duration."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01


def wait_for(condition: Callable[[], T], what: str, timeout: float = 10) -> T:
    """The first true value of `condition()`; fails with `what` when none comes within `timeout` seconds."""
    assert not _on_a_loop(), "wait_for blocks the event loop; an async test awaits await_for"
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, _failure(what, value, timeout)
        time.sleep(POLL_S)
    return value


async def await_for(condition: Callable[[], T | Awaitable[T]], what: str, timeout: float = 10) -> T:
    """As `wait_for`, for async tests; `condition` may be async itself."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, _failure(what, value, timeout)
        await asyncio.sleep(POLL_S)


def _failure(what: str, value: object, timeout: float) -> str:
    return f"not within {timeout:g} s: {what} (last seen: {value!r})"


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
