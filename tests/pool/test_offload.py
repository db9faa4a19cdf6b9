"""Offloading: synchronous tools run in threads and processes of their own, so many and no more."""

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
from tests.waiting import PATIENCE_S, wait_for

whose: ContextVar[str] = ContextVar("whose", default="nobody's")


@pytest.fixture
def offload() -> Generator[Offload]:
    offload = Offload(threads=2, processes=1)
    yield offload
    offload.close()


async def test_no_more_tools_run_at_once_than_there_are_threads(offload: Offload) -> None:
    """The others wait for a thread; nothing is started that is not needed."""
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
    """They are how a model client or a tracer knows whose call it is."""
    whose.set("this run's")

    assert await offload.in_thread(whose.get) == "this run's"


async def test_an_exception_of_a_tool_comes_back(offload: Offload) -> None:
    """From a thread as from a process."""
    with pytest.raises(ZeroDivisionError):
        await offload.in_thread(lambda: 1 // 0)
    with pytest.raises(TypeError):
        await offload.in_process(compute.function, upto="many")


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    """They are daemons; what has not begun is cancelled."""
    threads = DaemonThreads(1, name="test-threads")
    free = threading.Event()
    hanging = threads.submit(free.wait, 10)
    wait_for(hanging.running, "it hangs")
    waiting = threads.submit(os.getpid)

    threads.shutdown()

    assert [t.daemon for t in threading.enumerate() if t.name.startswith("test-threads")] == [True]
    free.set()
    wait_for(waiting.cancelled, "what waited is cancelled")
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(os.getpid)


async def test_a_cpu_bound_tool_runs_in_another_process(offload: Offload) -> None:
    """Found there by its name, behind its decorator; started when the first one needs it."""
    assert not offload.stats()["processes"]["started"]

    found = await offload.in_process(compute.function, upto=10)

    assert found["sum"] == 45
    assert found["pid"] != os.getpid()


async def test_a_process_that_dies_is_replaced(offload: Offload) -> None:
    """The call may be made again; the next one has a process again."""
    with pytest.raises(ToolUnavailableError, match="crash"):
        await offload.in_process(crash.function)

    assert (await offload.in_process(compute.function, upto=3))["sum"] == 3


def test_what_another_process_cannot_find_cannot_be_cpu_bound() -> None:
    """Said when it is decorated, not when a model calls it."""

    def here(number: int) -> int:
        """Only this test knows it."""
        return number

    with pytest.raises(PluginConfigError, match="cannot be CPU-bound"):
        tool(cpu_bound=True)(here)
