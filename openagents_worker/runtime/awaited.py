"""What a task awaits: the only place that looks into tasks of asyncio."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Collection
from types import FrameType
from typing import Any

__all__ = ["is_waiting_for"]

MAX_DEPTH = 50  # tasks that wait for each other in a chain


def is_waiting_for(task: asyncio.Task[Any], tasks: Collection[Any], depth: int = 0) -> bool:
    """Whether a task is one of these, or only waits for some of them.

    It recognizes what asyncio itself offers to wait for tasks: await, gather, wait, wait_for, as_completed,
    TaskGroup.
    False also if it cannot be seen what the task waits for.
    """
    if task in tasks or task.done():
        return True
    awaited = _awaited_by(task, tasks)
    return (
        depth < MAX_DEPTH
        and bool(awaited)
        and all(
            isinstance(each, asyncio.Future)
            and (each.done() or (isinstance(each, asyncio.Task) and is_waiting_for(each, tasks, depth + 1)))
            for each in awaited
        )
    )


def _awaited_by(task: asyncio.Task[Any], tasks: Collection[Any]) -> Collection[Any]:
    """The futures that a task awaits; empty if they cannot be seen. `tasks`: what it may wait for."""
    waiter = getattr(task, "_fut_waiter", None)
    if isinstance(waiter, asyncio.Task):
        return [waiter]
    children = getattr(waiter, "_children", None)  # of asyncio.gather
    if children:
        return list(children)
    coroutine: Any = task.get_coro()
    while inspect.iscoroutine(coroutine):
        if found := _awaited_in(coroutine.cr_frame, tasks):
            return found
        coroutine = coroutine.cr_await
    return []


def _awaited_in(frame: FrameType | None, tasks: Collection[Any]) -> Collection[Any]:
    """The futures that a function of asyncio awaits, from its variables."""
    module = "" if frame is None else frame.f_globals.get("__name__")
    if frame is None or module not in ("asyncio.tasks", "asyncio.taskgroups"):
        return []
    name, variables = frame.f_code.co_name, frame.f_locals
    if module == "asyncio.taskgroups":
        return list(getattr(variables.get("self"), "_tasks", ()))
    if name == "_wait":
        return list(variables.get("fs", ()))
    if name == "wait_for":  # before Python 3.12
        return [each] if isinstance(each := variables.get("fut"), asyncio.Future) else []
    if name == "_wait_for_one":  # of asyncio.as_completed
        if "done" in variables:  # before Python 3.13
            return _of_as_completed(variables["done"], tasks)
        return list(getattr(variables.get("self"), "_todo", ()))
    return []


def _of_as_completed(done: Any, tasks: Collection[Any]) -> Collection[Any]:
    """The futures of the `asyncio.as_completed` that has this queue; one of `tasks` must be one of them."""
    for task in tasks:
        for callback, _ in getattr(task, "_callbacks", None) or ():
            closure = inspect.getclosurevars(callback).nonlocals if inspect.isfunction(callback) else {}
            if closure.get("done") is done:
                return list(closure.get("todo", ()))
    return []
