"""User code that tries to end its process, or continues after the end of its run, under every pool."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunResult, RunState
from openagents_worker.producer.handle import RunHandle
from openagents_worker.runtime.attempt import EX_DOES_NOT_STOP
from tests.pool.exits import EXITS
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, new_tag, open_shop
from tests.support.waiting import wait_for

HERE = "tests.pool.exits"
TOOLS = ("leave_in_coroutine", "leave_in_thread", "leave_in_task", "leave_in_callback")
AGENTS = [
    {
        **agent("leaver", tools={name: f"{HERE}.{name}" for name in TOOLS}),
        "pattern": {"impl": f"{HERE}.Leaving"},
    },
    {**agent("ticking"), "pattern": {"impl": f"{HERE}.Ticking"}},
    agent(
        "blocked",
        {"tool_calls": [{"name": "block", "arguments": {"seconds": 600}}]},
        tools={"block": f"{HERE}.block"},
    ),
]

IMPLEMENTATIONS = {
    "ours": "openagents_worker.celery.pool.task_pool:TaskPool",
    "threads": "celery.concurrency.thread:TaskPool",
    "solo": "celery.concurrency.solo:TaskPool",
    "processes": "celery.concurrency.prefork:TaskPool",
}
"""Celery's name of each pool."""


@pytest.fixture(
    scope="module",
    params=[
        "ours",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("threads", "solo", "processes")),
    ],
)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    pool = [] if request.param == "ours" else ["--pool", request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with EmbeddedRedis() as server, open_shop(folder, server.url, "-c", "4", *pool, agents=AGENTS) as shop:
        shop.pool = request.param
        assert shop.stats()["pool"]["implementation"] == IMPLEMENTATIONS[shop.pool]
        yield shop


def submit(shop: Shop, agent_id: str, text: str = "go", **fields: Any) -> RunHandle[Any]:
    request = {"agent_id": agent_id, "session_id": new_tag(), "input_text": text, **fields}
    return shop.client.submit(request)


def processes_of(shop: Shop) -> set[int]:
    """The processes of the worker that execute runs, and the one that Celery has started."""
    return {shop.process.pid, *shop.stats()["pool"].get("processes", ())}


def ended(handle: RunHandle[Any]) -> RunResult[Any]:
    result = handle.wait(PATIENCE_S)
    assert handle.record().attempt == 1
    return result


@pytest.mark.parametrize("kind", list(EXITS))
def test_no_exception_of_a_tool_ends_the_worker(shop: Shop, kind: str) -> None:
    """From a coroutine, a thread or an asyncio task: it is the outcome of one call, which is made once."""
    processes = processes_of(shop)
    for name in ("leave_in_coroutine", "leave_in_thread", "leave_in_task"):
        result = ended(submit(shop, "leaver", f"{name} {kind}"))
        assert kind in result.final_output["error"], name
    assert processes_of(shop) == processes


@pytest.mark.parametrize("kind", list(EXITS))
def test_no_exception_of_a_pattern_ends_the_worker(shop: Shop, kind: str) -> None:
    """It fails its run only."""
    processes = processes_of(shop)
    result = ended(submit(shop, "leaver", f"pattern {kind}"))

    assert result.error_details is not None
    assert result.error_details.code == "pattern.error"
    assert kind in result.error_details.message
    assert processes_of(shop) == processes


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt"])
def test_the_loop_survives_exceptions_that_stop_asyncio(shop: Shop, kind: str) -> None:
    """All runs of the process use the loop: an exception in a callback is only logged."""
    result = ended(submit(shop, "leaver", f"leave_in_callback {kind}"))

    assert result.final_output == {"got": "still here"}
    assert "loop.exit_refused" in shop.log
    assert ended(submit(shop, "greeter")).ok


def test_a_soft_time_limit_stops_the_pattern_before_its_run_ends(shop: Shop) -> None:
    """None of its code runs beside the next run of the session."""
    if shop.pool in ("threads", "solo"):
        pytest.skip("Celery has no time limits in this pool")
    run_id, session_id = new_tag(), new_tag()
    request = {"agent_id": "ticking", "session_id": session_id, "input_text": "go", "run_id": run_id}
    shop.app.send_task("tasks.run_agent", [request], task_id=run_id, queue="agents", soft_time_limit=1)
    handle = shop.client.handle(run_id)
    wait_for(lambda: shop.notes(run_id), "the pattern is executed", PATIENCE_S)
    wait_for(lambda: handle.record().state.is_terminal, "the run has ended", PATIENCE_S)
    ticks = len(shop.notes(run_id))
    next_run = submit(shop, "greeter", session_id=session_id)

    assert ended(next_run).ok
    assert len(shop.notes(run_id)) == ticks
    result = ended(handle)
    assert result.error_details is not None
    assert "SoftTimeLimitExceeded" in result.error_details.message


def test_a_stopping_worker_ends(shop: Shop) -> None:
    """After all these runs. The last test of the module that uses the shared worker."""
    assert shop.signal(signal.SIGTERM) == 0


def test_a_worker_with_a_thread_that_does_not_stop_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run is cancelled while its tool blocks a thread: the process ends, and the log names the cause."""
    env = {"OPENAGENTS_STOP_GRACE_S": "0.5"}
    folder = tmp_path_factory.mktemp("grace")
    with EmbeddedRedis() as server, open_shop(folder, server.url, env=env, agents=AGENTS) as shop:
        handle = submit(shop, "blocked")
        wait_for(lambda: _has_called_a_tool(shop, handle), "the tool is called", PATIENCE_S)
        handle.cancel()

        assert wait_for(shop.process.poll, "the worker has ended", PATIENCE_S) == EX_DOES_NOT_STOP
        (line,) = [line for line in shop.log.splitlines() if "run.does_not_stop" in line]
        for named in (f"run_id={handle.id}", "agent_id=blocked", "tool block"):
            assert named in line
        assert handle.record().state is RunState.RUNNING


def test_a_worker_that_stops_with_a_blocked_thread_logs_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It ends before its lease does: no worker takes the run while its code still runs."""
    folder = tmp_path_factory.mktemp("drain")
    with EmbeddedRedis() as server, open_shop(folder, server.url, agents=AGENTS) as shop:
        handle = submit(shop, "blocked")
        wait_for(lambda: _has_called_a_tool(shop, handle), "the tool is called", PATIENCE_S)

        assert shop.signal(signal.SIGTERM) == EX_DOES_NOT_STOP
        (line,) = [line for line in shop.log.splitlines() if "run.does_not_stop" in line]
        assert f"run_id={handle.id}" in line
        assert handle.record().state is RunState.RUNNING


def _has_called_a_tool(shop: Shop, handle: RunHandle[Any]) -> bool:
    entries: Any = shop.redis.xrange(shop.client.store.keys("events", handle.id))
    return "tool.called" in [fields["name"] for _, fields in entries]
