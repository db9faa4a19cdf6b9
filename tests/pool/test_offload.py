"""Offloading: synchronous tools run in a limited number of threads and processes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Generator
from contextvars import ContextVar

import pytest

from openagents_worker import tool
from openagents_worker.errors import PluginConfigError, ToolUnavailableError
from openagents_worker.tools.offload import DaemonThreads, Offload
from tests.pool.tools import compute, crash
from tests.support.waiting import PATIENCE_S, wait_for

whose: ContextVar[str] = ContextVar("whose", default="none")


@pytest.fixture
def offload() -> Generator[Offload]:
    offload = Offload(threads=2, processes=1)
    yield offload
    offload.close()


async def test_no_more_tools_run_at_once_than_there_are_threads(offload: Offload) -> None:
    """The others wait for a thread; no unneeded thread is started."""
    free, inside = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        inside.release()
        free.wait(60)

    holding = [asyncio.create_task(offload.in_thread(hold)) for _ in range(5)]
    for _ in range(2):
        await asyncio.to_thread(inside.acquire, timeout=PATIENCE_S)
    full = offload.stats()["threads"]
    free.set()
    await asyncio.gather(*holding)

    assert full == {"limit": 2, "threads": 2, "busy": 2, "waiting": 3}


async def test_a_tool_in_a_thread_has_its_runs_context_variables(offload: Offload) -> None:
    """A model client or a tracer reads from them which call it belongs to."""
    whose.set("this run's")

    assert await offload.in_thread(whose.get) == "this run's"


async def test_an_exception_of_a_tool_comes_back(offload: Offload) -> None:
    """From a thread and from a process."""
    with pytest.raises(ZeroDivisionError):
        await offload.in_thread(lambda: 1 // 0)
    with pytest.raises(TypeError):
        await offload.in_process(compute.function, upto="many")


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    """Its threads are daemons; calls that have not started are cancelled."""
    threads = DaemonThreads(1, name="test-threads")
    free = threading.Event()
    hanging = threads.submit(free.wait, 10)
    wait_for(hanging.running, "the call hangs")
    waiting = threads.submit(os.getpid)

    threads.shutdown()

    assert [t.daemon for t in threading.enumerate() if t.name.startswith("test-threads")] == [True]
    free.set()
    wait_for(waiting.cancelled, "the waiting call is cancelled")
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(os.getpid)


async def test_a_cpu_bound_tool_runs_in_another_process(offload: Offload) -> None:
    """The process imports it by its name; the process starts at the first call."""
    assert not offload.stats()["processes"]["started"]

    found = await offload.in_process(compute.function, upto=10)

    assert found["sum"] == 45
    assert found["pid"] != os.getpid()


async def test_a_process_that_dies_is_replaced(offload: Offload) -> None:
    """The failed call may be repeated; the next call gets a new process."""
    with pytest.raises(ToolUnavailableError, match="crash"):
        await offload.in_process(crash.function)

    assert (await offload.in_process(compute.function, upto=3))["sum"] == 3


def test_a_function_that_cannot_be_imported_cannot_be_cpu_bound() -> None:
    """The error is raised by the decorator, not when a model calls the tool."""

    def here(number: int) -> int:
        """A local function."""
        return number

    with pytest.raises(PluginConfigError, match="cannot be CPU-bound"):
        tool(cpu_bound=True)(here)
