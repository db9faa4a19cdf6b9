"""`deps`: the dependencies of tools, created for each attempt and closed after it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from openagents_worker import register_deps
from openagents_worker.models import RunBudget, RunRecord, RunState, StopReason
from openagents_worker.runtime.deps import LIMIT_S
from openagents_worker.runtime.registry import DEPS
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.clocks import LoopClock
from tests.support.runner import crash, due, process

SHOPPER = patterned("Shopper", tool("DepsLook"))


@pytest.fixture(autouse=True)
def _registered_by_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEPS, "_by_name", {})
    open_gates("deps")


def made(name: str) -> dict[str, str]:
    plugins.LOG.append(("made", name, threading.current_thread() is threading.main_thread()))
    return {"name": name}


def plain() -> dict[str, str]:
    return made("shop")


async def awaited() -> dict[str, str]:
    return made("shop")


@contextmanager
def managed() -> Generator[dict[str, str]]:
    with closing_log():
        yield made("shop")


@asynccontextmanager
async def managed_async() -> AsyncGenerator[dict[str, str]]:
    with closing_log():
        yield made("shop")


@contextmanager
def closing_log() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        plugins.LOG.append(("closed", type(error).__name__))
        raise
    else:
        plugins.LOG.append(("closed", None))


@contextmanager
def forgiving() -> Generator[dict[str, str]]:
    try:
        yield made("shop")
    except ValueError:
        plugins.LOG.append(("forgiven",))


def error_of(record: RunRecord) -> Any:
    assert record.result is not None
    return record.result.error_details


@pytest.mark.parametrize(
    ("factory", "on_the_loop"),
    [(plain, False), (awaited, True), (managed, False), (managed_async, True)],
)
async def test_tools_and_the_pattern_get_the_dependencies(
    redis_url: str, factory: Callable[[], Any], on_the_loop: bool
) -> None:
    """They are created once, in a thread unless the factory is async, and closed at the end."""
    register_deps("shop", factory)
    async with process(redis_url, SHOPPER) as p:
        record = await p.run(deps="shop")

    assert record.result is not None
    assert record.result.final_output == ["shop", "shop"]
    assert [entry for entry in plugins.LOG if entry[0] == "made"] == [("made", "shop", on_the_loop)]
    closed = [("closed", None)] if factory in (managed, managed_async) else []
    assert [entry for entry in plugins.LOG if entry[0] == "closed"] == closed


@pytest.mark.parametrize("factory", [managed, managed_async])
async def test_a_context_manager_gets_the_error_of_the_run(
    redis_url: str, factory: Callable[[], Any]
) -> None:
    """It can roll back."""
    register_deps("shop", factory)
    async with process(redis_url, patterned("Shopper", tool("DepsLook"), fails=True)) as p:
        record = await p.run(deps="shop")

    assert error_of(record).code == "pattern.error"
    assert plugins.LOG[-1] == ("closed", "ValueError")


async def test_a_context_manager_cannot_make_a_failed_run_a_completed_one(redis_url: str) -> None:
    """It can suppress the error for itself, but the run fails."""
    register_deps("shop", forgiving)
    async with process(redis_url, patterned("Shopper", tool("DepsLook"), fails=True)) as p:
        record = await p.run(deps="shop")

    assert plugins.LOG[-1] == ("forgiven",)
    assert (record.state, error_of(record).code) == (RunState.FAILED, "pattern.error")


async def test_the_next_attempt_gets_new_dependencies(redis_url: str) -> None:
    """The connection of a worker that died is lost."""
    register_deps("shop", managed_async)
    plugins.GATES["deps"].clear()
    async with process(redis_url, SHOPPER, name="one") as one, process(redis_url, SHOPPER, name="two") as two:
        await one.submit(deps="shop")
        dying = await executed_until(one, lambda: ("look", "shop") in plugins.LOG, "the tool is called")
        await crash(one, "r1", dying)
        open_gates("deps")
        await two.execute()

        assert (await two.record()).state is RunState.COMPLETED
    assert [entry[0] for entry in plugins.LOG if entry[0] == "made"] == ["made", "made"]


async def test_an_unregistered_name_fails_the_run_with_a_suggestion(redis_url: str) -> None:
    """The run fails before the model is called."""
    register_deps("shop", plain)
    async with process(redis_url, SHOPPER) as p:
        record = await p.run(deps="shopp")
        journal = await p.journal()

    assert (record.state, error_of(record).code) == (RunState.FAILED, "plugin.load")
    assert "no deps are registered as 'shopp'; did you mean 'shop'?" in error_of(record).message
    assert journal == []


async def test_a_factory_that_fails_is_retried(redis_url: str) -> None:
    """If a database is unavailable, the run is suspended as after a failed call.

    Its first events are emitted once.
    """
    answers: list[Any] = [ConnectionError("away"), {"name": "shop"}]

    def factory() -> Any:
        if isinstance(answers[0], Exception):
            raise answers.pop(0)
        return answers[0]

    register_deps("shop", factory)
    async with process(redis_url, SHOPPER) as p:
        await p.submit(deps="shop")
        attempt_result = await p.execute()
        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "deps.unavailable")
        await due(p)
        await p.execute()

        assert (await p.record()).state is RunState.COMPLETED
        assert (await p.event_names()).count("run.requested") == 1


async def test_a_factory_that_always_fails_fails_the_run(redis_url: str) -> None:
    """After `max_resume_attempts` retries, with the error of the factory as cause."""

    def factory() -> Any:
        raise ConnectionError("away for good")

    register_deps("shop", factory)
    async with process(redis_url, SHOPPER) as p:
        await p.submit(deps="shop", budget=RunBudget(max_resume_attempts=1))
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)
        await p.execute()
        record = await p.record()

    assert (record.state, error_of(record).code) == (RunState.FAILED, "deps.unavailable")
    assert error_of(record).cause.message == "ConnectionError: away for good"


async def test_a_factory_that_takes_too_long_is_retried(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the run could not be cancelled, nor its worker stopped."""
    monkeypatch.setattr("openagents_worker.runtime.deps.LIMIT_S", 0.05)

    async def hangs() -> None:
        await asyncio.Event().wait()

    register_deps("shop", hangs)
    async with process(redis_url, SHOPPER) as p:
        await p.submit(deps="shop")

        assert (await p.execute()).reason == "deps.unavailable"


async def test_dependencies_that_take_too_long_to_close_fail_the_run(redis_url: str) -> None:
    """They may have been about to undo or to store the work of the run."""

    @asynccontextmanager
    async def sticky() -> AsyncGenerator[dict[str, str]]:
        yield made("shop")
        closing.set()
        await asyncio.Event().wait()

    closing = asyncio.Event()
    register_deps("shop", sticky)
    clock = LoopClock()
    async with process(redis_url, SHOPPER) as p:
        running = asyncio.create_task(p.run(deps="shop"))
        await closing.wait()
        clock.forward(LIMIT_S + 1)
        record = await running

    assert (record.state, error_of(record).code) == (RunState.FAILED, "pattern.error")
    assert record.result is not None
    assert record.result.stop_reason is StopReason.TIMEOUT
