"""Background parts: a worker that has lost one of its own looks healthy, so it does not go on."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.background import EX_PART_FAILED, background_task, background_thread
from openagents_worker.worker.completion_acks import CompletionAcks
from openagents_worker.worker.control_channel import ControlChannel
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import LoopWatchdog
from tests.waiting import await_for, wait_for
from tests.worker.run_host import NotingCarrier


class Parts:
    """What the process would have been ended with, and the one line that says why."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.left: list[int] = []
        self._caplog = caplog

    def has_left_for(self, part: str, why: str) -> bool:
        lines = [r.getMessage() for r in self._caplog.records if "part_failed" in r.getMessage()]
        if not self.left:
            return False
        assert self.left == [EX_PART_FAILED]
        assert len(lines) == 1
        assert f"part={part}" in lines[0]
        assert why in lines[0]
        return True


@pytest.fixture
def parts(caplog: pytest.LogCaptureFixture) -> Parts:
    return Parts(caplog)


def broken(*_: Any, **__: Any) -> NoReturn:
    raise ZeroDivisionError("a bug of ours")


def test_a_thread_that_fails_ends_the_process(parts: Parts) -> None:
    """With an exit code, and a line that says which thread it was and why."""
    background_thread(broken, name="mine", leave=parts.left.append).start()

    wait_for(lambda: parts.has_left_for("mine", "ZeroDivisionError: a bug of ours"), "the process would end")


async def test_a_task_that_fails_ends_the_process(parts: Parts) -> None:
    """As a thread does."""

    async def work() -> None:
        broken()

    background_task(work(), name="mine", leave=parts.left.append)

    await await_for(lambda: parts.has_left_for("mine", "ZeroDivisionError"), "the process would end")


async def test_a_task_that_is_stopped_has_not_failed(parts: Parts) -> None:
    """Nor has one that is done."""

    async def work() -> None:
        await asyncio.Event().wait()

    async def done() -> None: ...

    task = background_task(work(), name="mine", leave=parts.left.append)
    await background_task(done(), name="mine", leave=parts.left.append)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)

    assert parts.left == []


def test_a_heartbeat_that_fails_ends_the_process(parts: Parts, cell: Cell, bridge: LoopThread) -> None:
    """Its lease would end without anybody knowing why."""

    async def send(_: Any) -> None: ...

    heartbeat = Heartbeat(
        cell=cell,
        node="w",
        limits=TimeLimits.of(lease_ms=1_000, heartbeat_ms=100),
        announcements=[],
        run_host=NotingCarrier(),
        loop=bridge.loop,
        send_wakes=send,
        on_registered=lambda _: None,
        leave=parts.left.append,
        clock=broken,
    )
    heartbeat.start()

    wait_for(lambda: parts.has_left_for("openagents-heartbeat", "ZeroDivisionError"), "the process would end")
    heartbeat.retire()


def test_a_watch_that_fails_ends_the_process(parts: Parts, bridge: LoopThread) -> None:
    """Nobody would see that the loop is dead."""
    watch = LoopWatchdog(
        loop=bridge.loop,
        loop_thread_id=lambda: bridge.thread_id,
        lease=broken,
        run_host=NotingCarrier(),
        leave=parts.left.append,
    )
    watch.start()

    wait_for(lambda: parts.has_left_for("openagents-watch", "ZeroDivisionError"), "the process would end")
    watch.stop()


async def test_an_ear_that_fails_ends_the_process(parts: Parts, cell: Cell) -> None:
    """Cancellations would be heard with the next beat only, for ever."""
    notices, store = ControlChannel(cell, on_cancel=broken, leave=parts.left.append), AsyncStore(cell)
    notices.follow("w:1")

    async def failed() -> bool:
        await store.ask(lambda r: r.publish(store.keys.notices("w:1"), "r1"))
        return parts.has_left_for("notices", "ZeroDivisionError")

    await await_for(failed, "the process would end")
    await store.close()
    await notices.aclose()


async def test_a_bookkeeper_that_fails_ends_the_process(parts: Parts, cell: Cell) -> None:
    """Celery would be told of ends again and again."""
    store = AsyncStore(cell)
    tellings = CompletionAcks(store, leave=parts.left.append)
    tellings.add("r1", None)  # type: ignore[arg-type]  # what Redis cannot be sent
    tellings._waiting.append(object())  # type: ignore[arg-type]

    await await_for(lambda: parts.has_left_for("tellings", "Error"), "the process would end")
    await store.close()
