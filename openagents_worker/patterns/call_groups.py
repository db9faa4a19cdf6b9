"""Groups of tool calls: the only place that decides which calls of one turn or one batch run concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from openagents_worker.patterns.base import RunTool
from openagents_worker.patterns.call_order import begin_together
from openagents_worker.quick_init import quick_init

__all__ = ["GroupedCall", "make_calls"]

T = TypeVar("T")


@quick_init
@dataclass(frozen=True, slots=True)
class GroupedCall(Generic[T]):
    """A call, and the tool that it calls; None if the run does not have it."""

    make: Callable[[], Coroutine[Any, Any, T]]
    tool: RunTool | None

    @property
    def is_concurrency_safe(self) -> bool:
        return self.tool is not None and self.tool.concurrency_safe

    @property
    def may_need_approval(self) -> bool:
        return bool(getattr(self.tool, "may_need_approval", False))


async def make_calls(calls: Sequence[GroupedCall[T]]) -> list[T]:
    """Make the calls and return their outcomes in the same order.

    Consecutive calls run concurrently if their tools are `concurrency_safe`. If some may need an approval,
    they are asked about together. If one raises, the others are cancelled and awaited first.
    """
    if len(calls) > 1 and any(call.may_need_approval for call in calls):
        together = [(call.make(), call.is_concurrency_safe) for call in calls]
        return await _run_concurrently(begin_together(together))
    outcomes: list[T] = []
    for safe, consecutive in groupby(calls, key=lambda call: call.is_concurrency_safe):
        group = list(consecutive)
        if safe and len(group) > 1:
            outcomes += await _run_concurrently([call.make() for call in group])
        else:
            outcomes += [await call.make() for call in group]
    return outcomes


async def _run_concurrently(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls concurrently, started in order. If one raises, the others are cancelled and awaited first.

    A signal of the runtime (a BaseException that is neither an Exception nor a CancelledError) is raised
    rather than any other error.
    """
    tasks = [asyncio.create_task(call, name=f"tool-call-{n}") for n, call in enumerate(calls, start=1)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, BaseException) and not isinstance(end, Exception | asyncio.CancelledError):
                raise end from None
        raise
