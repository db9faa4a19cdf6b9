"""Marks: all code of a run is marked while it executes, and not longer."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from openagents_worker import register_deps, register_output, tool
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.marks import (
    MARK_BYTES,
    NO_RUN,
    THREADS,
    Executing,
    Marks,
    MarksSnapshot,
    marked,
)
from openagents_worker.runtime.registry import DEPS, OUTPUTS
from openagents_worker.runtime.user_code import RunCode, current_run, executing
from openagents_worker.tools.base import ToolPlugin
from openagents_worker.tools.offload import work_off_loop
from openagents_worker.worker.loop_thread import LoopThread
from tests.support.runner import agent, process

HERE = "tests.runtime.test_marks"
NASTY = ["", "\0", "\0\0\0\0\0\0", "a" * 5_000, "é" * 3_000, "\ud800", "\x1b[2J", "\u202e", "☃\n"]

seen: list[Executing | None] = []
"""What the marks said where code of the run executed, in that order."""


def look() -> None:
    run = current_run.get()
    assert run is not None
    seen.append(run.marks.executing_on_loop())


def look_in_thread() -> None:
    run = current_run.get()
    assert run is not None
    marks = MarksSnapshot.of(bytes(run.marks._memory))
    seen.extend(each.executing for each in marks.threads if each.ident == threading.get_ident())


@pytest.fixture
def loop() -> Generator[LoopThread]:
    seen.clear()
    thread = LoopThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def marks() -> Marks:
    return Marks()


# --- a mark ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["agent_id", "incarnation", "kind", "name", "call_id"])
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_mark_names_the_run_whatever_the_rest_is(part: str, text: str) -> None:
    """Ids and names can be any text."""
    run_id = "é" * 256

    mark = Executing(run_id, **{part: text}).to_mark()
    read = Executing.of(mark)

    assert read is not None
    assert read.run_id == run_id
    assert len(mark) <= MARK_BYTES


def test_a_shorter_mark_replaces_a_longer_one(marks: Marks) -> None:
    """Nothing of the longer one is read. The mark of no run is the shortest."""
    for executing_now in (Executing("r" * 256, name="n" * 3000), Executing("r2", name="t"), None):
        marks.mark_loop(NO_RUN if executing_now is None else executing_now.to_mark())
        read = MarksSnapshot.of(bytes(marks._memory)).loop.executing
        assert (read and read.run_id) == (executing_now and executing_now.run_id)
    marks.mark_loop(Executing("r" * 256, name="n" * 3000).to_mark())
    marks.mark_loop(Executing("r2", kind="tool", name="t").to_mark())
    assert MarksSnapshot.of(bytes(marks._memory)).loop.executing == Executing("r2", kind="tool", name="t")


def test_the_mark_of_no_run_has_no_name() -> None:
    assert Executing.of(NO_RUN) is None


# --- steps -----------------------------------------------------------------------------------------------


def code(marks: Marks, run_id: str) -> RunCode:
    return RunCode(run_id, "shop", Latch(), marks, "w:1")


def in_tasks(loop: LoopThread, marks: Marks, **works: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of functions that execute in parallel, each in a task of a run with its name."""

    async def task(run_id: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        run = code(marks, run_id)
        current_run.set(run)
        work_off_loop.set(run.off_loop)
        marked.set(run.mark())
        return await asyncio.create_task(work())

    async def all_of_them() -> list[Any]:
        tasks = [asyncio.create_task(task(run_id, work)) for run_id, work in works.items()]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return loop.run(all_of_them())


def test_each_step_of_a_task_has_the_mark_of_its_run(loop: LoopThread, marks: Marks) -> None:
    """Also if tasks of two runs alternate. Between them the loop has no mark."""

    async def work() -> list[str]:
        found = []
        for _ in range(5):
            await asyncio.sleep(0)
            found.append(getattr(marks.executing_on_loop(), "run_id", ""))
        return found

    assert in_tasks(loop, marks, r1=work, r2=work) == [["r1"] * 5, ["r2"] * 5]
    assert loop.run(_on_loop(marks)) is None


async def _on_loop(marks: Marks) -> Executing | None:
    return marks.executing_on_loop()


def test_executing_marks_its_block(loop: LoopThread, marks: Marks) -> None:
    """Also in the tasks that the block starts, and not after it."""

    async def work() -> list[str]:
        async def inner() -> str:
            await asyncio.sleep(0)
            return _plugin(marks)

        with executing("pattern", "P"):
            with executing("tool", "t", "t:1"):
                found = [_plugin(marks), *await asyncio.gather(inner(), inner())]
            found.append(_plugin(marks))
            await asyncio.sleep(0)
            found.append(_plugin(marks))
        return [*found, _plugin(marks)]

    [found] = in_tasks(loop, marks, r1=work)

    assert found == ["tool t"] * 3 + ["pattern P"] * 2 + ["runtime"]


def _plugin(marks: Marks) -> str:
    here = marks.executing_on_loop()
    assert here is not None
    return here.plugin


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_whatever_ends_a_step_its_mark_is_taken_back(
    loop: LoopThread, marks: Marks, error: type[BaseException]
) -> None:
    async def work() -> None:
        with executing("tool", "t"):
            await asyncio.sleep(0)
            raise error

    [raised] = in_tasks(loop, marks, r1=work)

    assert isinstance(raised, Exception)
    assert loop.run(_on_loop(marks)) is None


def test_a_task_that_is_cancelled_leaves_no_mark(loop: LoopThread, marks: Marks) -> None:
    async def work() -> str:
        with executing("tool", "t"):
            waiting = asyncio.create_task(asyncio.Event().wait())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        return _plugin(marks)

    assert in_tasks(loop, marks, r1=work) == ["runtime"]
    assert loop.run(_on_loop(marks)) is None


def test_more_threads_than_marks_execute(loop: LoopThread, marks: Marks) -> None:
    """Further threads have no mark. Each mark is free again after its thread's function."""
    taken = [marks._free.pop() for _ in range(THREADS)]

    async def work() -> str:
        return await asyncio.to_thread(lambda: "executed")

    assert in_tasks(loop, marks, r1=work) == ["executed"]
    marks._free.extend(taken)
    assert in_tasks(loop, marks, r1=work) == ["executed"]
    assert len(marks._free) == THREADS


# --- a run -----------------------------------------------------------------------------------------------


class Plugin:
    def __init__(self, config: Any = None) -> None:
        """Any configuration will do."""


class Pattern(Plugin):
    context: Any

    async def setup(self, **_: Any) -> None:
        look()

    async def execute(self) -> Any:
        look()
        await self.context.tools["asks"].invoke({})
        await self.context.tools["in_thread"].invoke({})
        await asyncio.sleep(0)
        look()
        return {"n": 1}


class Memory(Plugin):
    external = False

    async def inject(self, context: Any) -> None:
        look()

    async def writeback(self, context: Any) -> None:
        look()


class StoringMemory(Memory):
    external = True


class Assembler(Plugin):
    async def assemble(self, **given: Any) -> Any:
        from openagents_worker.context.base import ContextAssemblyResult

        look()
        return ContextAssemblyResult()


class Asks(ToolPlugin):
    async def preflight(self, context: Any) -> None:
        look()

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        look()
        return 1


@tool
def in_thread() -> int:
    """Reads its mark in a thread."""
    look_in_thread()
    return 1


class Answer(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def _looks(cls, value: int) -> int:
        look_in_thread()
        return value


async def make_deps() -> Any:
    look()
    return {}


@pytest.mark.parametrize("memory", ["Memory", "StoringMemory"])
def test_all_code_of_a_run_is_marked(
    loop: LoopThread, redis_url: str, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """With run, agent, incarnation, kind and name, from creating the parts to the end."""
    monkeypatch.setattr(DEPS, "_by_name", {})
    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    register_deps("shop", make_deps)
    register_output("Answer", Answer)
    clerk = agent(
        "clerk",
        pattern={"impl": f"{HERE}.Pattern"},
        memory={"impl": f"{HERE}.{memory}"},
        context_assembler={"impl": f"{HERE}.Assembler"},
        tools=[
            {"id": "asks", "impl": f"{HERE}.Asks"},
            {"id": "in_thread", "impl": f"{HERE}.in_thread"},
        ],
    )

    async def run() -> tuple[Any, str]:
        async with process(redis_url, clerk) as p:
            record = await p.run("r1", agent_id="clerk", deps="shop", output_type="Answer")
            return record, p.lease.incarnation

    record, incarnation = loop.run(run())

    assert record.state == "completed", record
    assert {(each.run_id, each.agent_id, each.incarnation) for each in seen if each is not None} == {
        ("r1", "clerk", incarnation)
    }
    assert [each.plugin if each is not None else None for each in seen] == [
        "deps shop",
        f"context {HERE}.Assembler",
        "tool asks",
        f"memory {HERE}.{memory}",
        f"pattern {HERE}.Pattern",
        f"pattern {HERE}.Pattern",
        "tool asks",
        "tool in_thread",
        f"pattern {HERE}.Pattern",
        "output_type Answer",
        f"memory {HERE}.{memory}",
    ]


@pytest.mark.parametrize("error", [OSError("not allowed"), None])
def test_a_system_without_memory_files_has_marks(
    monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """The watchdog uses them in the process itself. No other process can read them."""

    def memfd_create(name: str) -> int:
        assert error is not None
        raise error

    if error is None:
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", memfd_create)
    marks = Marks(is_shared=True)

    marks.mark_loop(Executing("r1").to_mark())

    assert marks.fd == -1
    assert marks.executing_on_loop() == Executing("r1")
    marks.close()
