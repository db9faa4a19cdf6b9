"""What a task awaits: the only place that looks into tasks of asyncio."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Collection
from types import FrameType
from typing import Any

__all__ = ["is_waiting_for"]

MAX_DEPTH = 50  # tasks that wait for each other in a chain
STEPPING = {
    ("openagents_worker.runtime.marks", "run_marked"),
    ("openagents_worker.runtime.user_code", "__await__"),
}
"""Functions that step a coroutine themselves, so that it is not seen what they await: it is in their variable
`work`. Every task of a run on a worker is stepped by the first one, every tool and step by the second one."""


def is_waiting_for(task: asyncio.Task[Any], tasks: Collection[Any]) -> bool:
    """Whether a task is one of these, or only waits for some of them.

    It recognizes what asyncio itself offers to wait for tasks: await, gather, wait, wait_for, as_completed,
    shield, TaskGroup.
    False also if it cannot be seen what the task waits for.
    """
    return _waits(task, tasks, 0)


def _waits(future: Any, tasks: Collection[Any], depth: int) -> bool:
    if future in tasks:
        return True
    if depth > MAX_DEPTH or not isinstance(future, asyncio.Future):
        return False
    if future.done():
        return True
    awaited = _awaited_by(future, tasks) if isinstance(future, asyncio.Task) else _combined_in(future)
    return bool(awaited) and all(_waits(each, tasks, depth + 1) for each in awaited)


def _awaited_by(task: asyncio.Task[Any], tasks: Collection[Any]) -> Collection[Any]:
    """The futures that a task awaits; empty if they cannot be seen. `tasks`: what it may wait for."""
    waiter = getattr(task, "_fut_waiter", None)
    if isinstance(waiter, asyncio.Task) or _combined_in(waiter):
        return [waiter]
    step: Any = task.get_coro()
    while inspect.iscoroutine(step) or inspect.isgenerator(step):
        frame = step.cr_frame if inspect.iscoroutine(step) else step.gi_frame
        if found := _awaited_in(frame, tasks):
            return found
        if frame is not None and _name_of(frame) in STEPPING:
            step = frame.f_locals.get("work")
        else:
            step = step.cr_await if inspect.iscoroutine(step) else step.gi_yieldfrom
    return []


def _combined_in(future: Any) -> Collection[Any]:
    """The futures of which `asyncio.gather` or `asyncio.shield` has made this one; empty for any other."""
    if children := getattr(future, "_children", None):
        return list(children)
    for callback, _ in getattr(future, "_callbacks", None) or ():
        if getattr(callback, "__qualname__", "") == "shield.<locals>._outer_done_callback":
            return [inspect.getclosurevars(callback).nonlocals.get("inner")]
    return []


def _name_of(frame: FrameType | None) -> tuple[str, str]:
    """Module and name of the function of a frame."""
    return ("", "") if frame is None else (str(frame.f_globals.get("__name__")), frame.f_code.co_name)


def _awaited_in(frame: FrameType | None, tasks: Collection[Any]) -> Collection[Any]:
    """The futures that a function of asyncio awaits, from its variables."""
    module, name = _name_of(frame)
    if frame is None or module not in ("asyncio.tasks", "asyncio.taskgroups"):
        return []
    variables = frame.f_locals
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
