"""What a task awaits: whether it only waits for tasks that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

import pytest

from openagents_worker.runtime.awaited import is_waiting_for
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.user_code import RunCode, cancelling_itself_only
from openagents_worker.worker.loop_thread import _Task


class Scene:
    """Two tasks that wait for a future; `busy` waits for something else."""

    def __init__(self, context: Context | None = None) -> None:
        self.context = context
        self.release = asyncio.get_running_loop().create_future()
        self.event = asyncio.Event()
        self.waiting = [self.start(self.wait()) for _ in range(2)]
        self.busy = self.start(self.event.wait())

    def start(self, work: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(work, context=self.context)

    async def wait(self) -> None:
        await self.release


async def gathers(scene: Scene) -> None:
    await asyncio.gather(*scene.waiting)


async def awaits_one(scene: Scene) -> None:
    await scene.waiting[0]


async def waits_for_the_first(scene: Scene) -> None:
    await asyncio.wait(scene.waiting, return_when=asyncio.FIRST_COMPLETED)


async def takes_them_as_they_complete(scene: Scene) -> None:
    for each in asyncio.as_completed(scene.waiting):
        await each


async def waits_with_a_time_limit(scene: Scene) -> None:
    await asyncio.wait_for(gathers(scene), 60)


async def gathers_with_a_time_limit(scene: Scene) -> None:
    await asyncio.wait_for(asyncio.gather(*scene.waiting), 60)


async def groups(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.wait())
        scene.waiting = [*group._tasks]  # type: ignore[attr-defined]


async def nests(scene: Scene) -> None:
    await asyncio.create_task(gathers(scene))


async def shields(scene: Scene) -> None:
    await asyncio.shield(asyncio.ensure_future(gathers(scene)))


async def gathers_with_a_busy_one(scene: Scene) -> None:
    await asyncio.gather(*scene.waiting, scene.busy)


async def shields_a_busy_one(scene: Scene) -> None:
    await asyncio.shield(scene.busy)


async def waits_for_an_event(scene: Scene) -> None:
    await scene.event.wait()


@pytest.mark.parametrize("in_a_call", [False, True], ids=["in the program", "in a call"])
@pytest.mark.parametrize("on_worker", [False, True], ids=["plain loop", "loop of a worker"])
@pytest.mark.parametrize(
    ("code", "waits"),
    [
        (gathers, True),
        (awaits_one, True),
        (waits_for_the_first, True),
        (takes_them_as_they_complete, True),
        (waits_with_a_time_limit, True),
        (gathers_with_a_time_limit, True),
        (groups, True),
        (nests, True),
        (shields, True),
        (gathers_with_a_busy_one, False),
        (shields_a_busy_one, False),
        (waits_for_an_event, False),
    ],
    ids=lambda code: getattr(code, "__name__", ""),
)
async def test_a_task_that_only_waits_for_waiting_tasks_is_recognized(
    code: Callable[[Scene], Awaitable[None]], waits: bool, on_worker: bool, in_a_call: bool
) -> None:
    """Also in a worker, which steps the coroutine of each task, and in a tool or a recorded function, whose
    steps are counted."""
    context = None
    if on_worker:
        asyncio.get_running_loop().set_task_factory(_Task.make)  # type: ignore[arg-type]
        context = RunCode("r1", "a", Latch()).context()
    scene = Scene(context)
    task = scene.start(called(code(scene)) if in_a_call else code(scene))
    for _ in range(5):
        await asyncio.sleep(0)

    assert is_waiting_for(task, scene.waiting) is waits
    assert all(is_waiting_for(each, scene.waiting) for each in scene.waiting)

    scene.release.set_result(None)
    scene.event.set()
    await asyncio.gather(task, scene.busy, *scene.waiting)


async def called(work: Awaitable[None]) -> None:
    await cancelling_itself_only(work)
