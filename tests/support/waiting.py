"""Waiting. The only place where a test waits: for a condition, never for a duration."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01
MAX_POLL_S = 0.05
POLL_SHARE = 0.05  # a condition that takes long is checked less often, because each check costs
LOST_S = 10.0
PATIENCE_S = 60.0  # generous, because the machine may be busy; only a failing test waits so long


def wait_for(
    condition: Callable[[], T], what: str, timeout: float = PATIENCE_S, *, poll_s: float | None = None
) -> T:
    """Return the first true value of `condition()`. Fail with `what` after `timeout` seconds without one.

    `poll_s` is for conditions that may be true for a short time only.
    """
    assert not _is_on_event_loop(), "wait_for blocks the event loop; use await_for in async tests"
    began_s, late = time.monotonic(), False
    while not (value := condition()):
        assert not late, _failure(what, value, timeout)
        waited_s = time.monotonic() - began_s
        late = waited_s >= timeout  # call it once more: this process may have been paused
        time.sleep(poll_s or _next_poll_s(waited_s))
    return value


async def await_for(condition: Callable[[], T | Awaitable[T]], what: str, timeout: float = PATIENCE_S) -> T:
    """As `wait_for`, for async tests. `condition` may be async, too."""
    began_s, late = time.monotonic(), False
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert not late, _failure(what, value, timeout)
        waited_s = time.monotonic() - began_s
        late = waited_s >= timeout  # as above
        await asyncio.sleep(_next_poll_s(waited_s))


async def until_cancelled(limit_s: float = LOST_S) -> None:
    """A call that the test expects to be cancelled. If nobody cancels it, it returns after `limit_s` seconds:
    then the test fails soon, and does not hang."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await asyncio.Event().wait()


def _next_poll_s(waited_s: float) -> float:
    return min(max(POLL_S, waited_s * POLL_SHARE), MAX_POLL_S)


def _failure(what: str, value: object, timeout: float) -> str:
    return f"not within {timeout:g} s: {what} (last seen: {value!r})"


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
