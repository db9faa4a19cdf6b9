"""Random concurrent programs: sequences, branches, nested tasks, pools, races, time limits, retries.

`generate(seed)` returns the same program for the same seed. Programs that depend on time may end in several
ways; the others must end with the same result. A recorded clock in workers over a queue is left out: there,
timing decides which worker takes an item, and nothing is guaranteed.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.replay.world import Api, ToolFailed

Statement = tuple[str, int, Any]

ALWAYS = ["tool", "tool", "twin", "model", "clock", "jitter", "retry", "fed", "now", "quick"]
WAITS = ["receive", "receive", "receive_twin", "wait", "wait"]
NESTING = ["gather", "gather", "group", "nested", "sorted_done", "outer", "shield", "best_of", "spawn"]
DEPENDING_ON_TIME = ["fed_done", "race", "pool", "timeout"]


@dataclass
class Generated:
    """A program, with its properties."""

    run: Callable[[Api], Awaitable[Any]]
    depends_on_time: bool
    is_sampled: bool
    has_limits: bool
    """Whether it has time limits of its own."""


def generate(seed: int, depends_on_time: bool, *, waits: bool = False) -> Generated:
    """With `waits`, the program also receives values and sleeps."""
    maker = _Maker(random.Random(seed), depends_on_time, waits)
    tree = maker.block(2, 4)
    has_clock = {number: maker.chance.random() < 0.3 for number in range(200)}
    interpreter = _Interpreter(has_clock)

    async def program(api: Api) -> Any:
        return await interpreter.run(api, tree, "", [])

    return Generated(program, depends_on_time, maker.is_sampled, maker.has_limits)


class _Maker:
    def __init__(self, chance: random.Random, depends_on_time: bool, waits: bool) -> None:
        self.chance = chance
        self._waits = WAITS if waits else []
        self.is_sampled = False
        self.has_limits = False
        self._depends_on_time = depends_on_time
        self._number = 0

    def block(self, depth: int, width: int = 3) -> list[Statement]:
        return [self._statement(depth) for _ in range(self.chance.randint(1, width))]

    def _statement(self, depth: int) -> Statement:
        kinds = ALWAYS + self._waits
        if depth:
            kinds += NESTING + (DEPENDING_ON_TIME if self._depends_on_time else ["pool"])
        kind = self.chance.choice(kinds)
        self._number += 1
        return kind, self._number, self._inside(kind, depth)

    def _inside(self, kind: str, depth: int) -> Any:
        chance = self.chance
        match kind:
            case "gather" | "group" | "nested" | "sorted_done" | "shield" | "spawn":
                return [self.block(depth - 1) for _ in range(chance.randint(2, 3))]
            case "outer":
                return self.block(0)
            case "race" | "fed_done":
                return [self.block(0, 2) for _ in range(3)]
            case "pool":
                return chance.randint(3, 6), chance.randint(2, 3)
            case "timeout":
                self.has_limits = True
            case "best_of":
                self.is_sampled = True
                return chance.randint(2, 3)
        return None


class _Interpreter:
    def __init__(self, has_clock: dict[int, bool]) -> None:
        self._has_clock = has_clock

    async def run(self, api: Api, statements: list[Statement], at: str, done: list[Any]) -> list[Any]:
        for kind, number, inside in statements:
            await getattr(self, f"_{kind}")(api, f"{at}{number}", number, inside, done)
        return done

    async def _branch(self, api: Api, me: str, index: int, block: list[Statement]) -> list[Any]:
        return await self.run(api, block, f"{me}.{index}|", [])

    def _branches(self, api: Api, me: str, inside: list[Any]) -> list[Any]:
        return [self._branch(api, me, index, block) for index, block in enumerate(inside)]

    async def _tool(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await api.tool("do", me, subject=me))

    async def _twin(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await api.tool("twin", "x"))

    async def _model(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await api.model("hello", len(done)))

    async def _clock(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await api.model(me, clock=True))

    async def _jitter(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        await api.sleep()

    async def _receive(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        await api.receive(me)

    async def _receive_twin(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        await api.receive("twin")

    async def _wait(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        await api.wait((0, 0.2, 30, 86_400)[number % 4])

    async def _fed(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await api.tool("fed", me, done[-3:], subject=me))

    async def _now(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(bool(await api.tool("at", me, await api.now(), subject=me)))

    async def _quick(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        try:
            done.append(await asyncio.wait_for(api.tool("quick", me, subject=me), 60))
        except TimeoutError:
            done.append("late")

    async def _retry(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        for attempt in range(3):
            try:
                done.append(await api.tool("flaky", me, fails=attempt < 1))
            except ToolFailed:
                continue
            return

    async def _gather(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await asyncio.gather(*self._branches(api, me, inside)))

    async def _group(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch) for branch in self._branches(api, me, inside)]
        done.append([task.result() for task in tasks])

    async def _nested(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        async def deep(index: int, block: list[Statement]) -> Any:
            await api.sleep()
            return await asyncio.create_task(self._branch(api, me, index, block))

        done.append(await asyncio.gather(*(deep(index, block) for index, block in enumerate(inside))))

    async def _shield(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        done.append(await asyncio.gather(*map(asyncio.shield, self._branches(api, me, inside))))

    async def _spawn(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        """Create tasks one after another, each once the one before has made some calls."""
        tasks = []
        for index, block in enumerate(inside):
            tasks.append(asyncio.create_task(self._branch(api, me, index, block)))
            await api.sleep()
            await api.tool("between", me, index, subject=f"{me}b{index}")
        done.append([await task for task in tasks])

    async def _sorted_done(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        finished = asyncio.as_completed(self._branches(api, me, inside))
        done.append(sorted([json.dumps(await each) for each in finished]))

    async def _outer(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        async def body() -> Any:
            return await self.run(api, inside, f"{me}in|", [])

        done.append(await api.tool("outer", me, body=body, want=me))

    async def _best_of(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        async def vote(index: int) -> bool:
            await api.sleep()
            reply = await api.model("vote", number, sampled=True)
            await api.sleep()
            return bool(await api.tool("save", f"{me}v{index}", reply, subject=f"{me}v{index}"))

        done.append(await asyncio.gather(*(vote(index) for index in range(inside))))

    async def _pool(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        async def work(item: int) -> Any:
            made = await api.tool("item", f"{me}i{item}", subject=f"{me}i{item}")
            return [made, await api.model(f"{me}i{item}", clock=self._has_clock.get(number, False))]

        done.append(await _pooled(api, inside, work))

    async def _fed_done(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        out: list[Any] = []
        for each in asyncio.as_completed(self._branches(api, me, inside)):
            out.append(await each)
            await api.tool("progress", me, out, subject=f"{me}p{len(out)}")
        done.append(out)

    async def _race(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        tasks = [asyncio.create_task(branch) for branch in self._branches(api, me, inside)]
        ended, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(index for index, task in enumerate(tasks) if task in ended)
        for task in rest:
            task.cancel()
        await asyncio.wait(tasks)
        done.append(await api.tool("won", me, first, subject=f"{me}w"))

    async def _timeout(self, api: Api, me: str, number: int, inside: Any, done: list[Any]) -> None:
        try:
            async with asyncio.timeout(0.3):
                done.append(await api.tool("slow", me))
        except TimeoutError:
            done.append(await api.tool("planB", me, subject=f"{me}B"))


async def _pooled(api: Api, size: tuple[int, int], work: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """`items` items, taken by `workers` workers."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    for item in range(size[0]):
        queue.put_nowait(item)
    out: dict[int, Any] = {}

    async def worker() -> None:
        while not queue.empty():
            item = queue.get_nowait()
            await api.sleep()
            out[item] = await work(item)

    await asyncio.gather(*(worker() for _ in range(size[1])))
    return [out[item] for item in sorted(out)]
