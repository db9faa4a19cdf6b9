"""Waiting. The only place where a test lets time pass: until a condition holds, never for a duration."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01
PATIENCE_S = 60.0  # a machine that is busy with something else takes its time; who waits in vain pays it once


def wait_for(
    condition: Callable[[], T], what: str, timeout: float = PATIENCE_S, *, poll_s: float = POLL_S
) -> T:
    """The first true value of `condition()`; fails with `what` when none comes within `timeout` seconds."""
    assert not _on_a_loop(), "wait_for blocks the event loop; an async test awaits await_for"
    deadline, late = time.monotonic() + timeout, False
    while not (value := condition()):
        assert not late, _failure(what, value, timeout)
        late = time.monotonic() >= deadline  # asked once more after it: this process may have stood still
        time.sleep(poll_s)
    return value


async def await_for(condition: Callable[[], T | Awaitable[T]], what: str, timeout: float = PATIENCE_S) -> T:
    """As `wait_for`, for async tests; `condition` may be async itself."""
    deadline, late = time.monotonic() + timeout, False
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert not late, _failure(what, value, timeout)
        late = time.monotonic() >= deadline  # as above
        await asyncio.sleep(POLL_S)


def _failure(what: str, value: object, timeout: float) -> str:
    return f"not within {timeout:g} s: {what} (last seen: {value!r})"


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
