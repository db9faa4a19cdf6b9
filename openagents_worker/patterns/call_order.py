"""Call order: the only place that lets the calls of a turn be asked about together, and executed in order.

A call that waits for an approval must not keep the calls after it from being asked about. So all calls of the
turn begin at once, and each waits for the calls before it after its approval.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["begin_together", "earlier_calls", "wait_for_earlier_calls"]

T = TypeVar("T")

earlier_calls: ContextVar[Sequence[asyncio.Task[Any]]] = ContextVar("openagents_earlier_calls", default=())
"""The calls of the turn that must end before the current call is executed."""


def begin_together(
    calls: Sequence[tuple[Coroutine[Any, Any, T], bool]],
) -> list[Coroutine[Any, Any, T]]:
    """Coroutines to run concurrently, started in order: each executes its call after the earlier ones.

    The second value of a pair says whether the call may be executed beside its neighbours that also may.
    """
    tasks: list[asyncio.Task[Any]] = []
    groups: list[int] = []
    for at, (_, is_safe) in enumerate(calls):
        continues = at > 0 and is_safe and calls[at - 1][1]
        groups.append(groups[-1] if continues else at)
    return [_after(tasks, group, call) for group, (call, _) in zip(groups, calls, strict=True)]


async def _after(tasks: list[asyncio.Task[Any]], first: int, call: Awaitable[T]) -> T:
    """Make a call of a turn. `tasks` gets the tasks of the turn in order; those before `first` go first."""
    task = asyncio.current_task()
    assert task is not None
    tasks.append(task)
    earlier_calls.set(tuple(tasks[:first]))
    return await call


async def wait_for_earlier_calls() -> None:
    """Return when the calls have ended that must end before the current one."""
    earlier = earlier_calls.get()
    if not all(task.done() for task in earlier):
        await asyncio.wait(earlier)
    if any(task.cancelled() or task.exception() is not None for task in earlier):
        await asyncio.Event().wait()  # the turn ends with that error, and cancels this call
