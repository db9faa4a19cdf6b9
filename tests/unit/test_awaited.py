"""What a task awaits: whether it only waits for tasks that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from openagents_worker.runtime.awaited import is_waiting_for


class Scene:
    """Two tasks that wait for a future; `busy` waits for something else."""

    def __init__(self) -> None:
        self.release = asyncio.get_running_loop().create_future()
        self.event = asyncio.Event()
        self.waiting = [asyncio.create_task(self.wait()) for _ in range(2)]
        self.busy = asyncio.create_task(self.event.wait())

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


async def groups(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.wait())
        scene.waiting = [*group._tasks]  # type: ignore[attr-defined]


async def nests(scene: Scene) -> None:
    await asyncio.create_task(gathers(scene))


async def gathers_with_a_busy_one(scene: Scene) -> None:
    await asyncio.gather(*scene.waiting, scene.busy)


async def waits_for_an_event(scene: Scene) -> None:
    await scene.event.wait()


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        (gathers, True),
        (awaits_one, True),
        (waits_for_the_first, True),
        (takes_them_as_they_complete, True),
        (waits_with_a_time_limit, True),
        (groups, True),
        (nests, True),
        (gathers_with_a_busy_one, False),
        (waits_for_an_event, False),
    ],
    ids=lambda code: getattr(code, "__name__", ""),
)
async def test_a_task_that_only_waits_for_waiting_tasks_is_recognized(
    code: Callable[[Scene], Awaitable[None]], waits: bool
) -> None:
    scene = Scene()
    task: asyncio.Task[Any] = asyncio.ensure_future(code(scene))  # type: ignore[arg-type]
    for _ in range(5):
        await asyncio.sleep(0)

    assert is_waiting_for(task, scene.waiting) is waits
    assert all(is_waiting_for(each, scene.waiting) for each in scene.waiting)

    tasks = [task, scene.busy, *scene.waiting]
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
