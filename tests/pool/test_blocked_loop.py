"""A worker with a blocked loop: the cause is reported, its lease is renewed, and a dead loop ends the
process."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.handle import RunHandle
from openagents_worker.worker.watchdog import EX_LOOP_DEAD
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, new_tag, open_shop
from tests.support.waiting import wait_for

TOOLS = "tests.pool.tools"
LEASE_S = 1.0


def caller(tool_id: str, **arguments: Any) -> dict[str, Any]:
    """An agent whose model calls one tool."""
    calls = {"tool_calls": [{"name": tool_id, "arguments": arguments}]}
    return agent(
        f"{tool_id}-{len(arguments)}", calls, {"text": "done"}, tools={tool_id: f"{TOOLS}.{tool_id}"}
    )


AGENTS = [
    caller("oversleep", seconds=1.5),
    caller("sleep_in_a_thread", seconds=0.5),
    caller("compute", upto=100_000),
    caller("crash"),
    {
        **agent("ponder", {"text": "done"}),
        "pattern": {"impl": f"{TOOLS}.Ponder"},
    },
    {
        **agent("recite", {"text": "done"}),
        "memory": {"impl": f"{TOOLS}.Recite"},
    },
]


def submit(shop: Shop, agent_id: str) -> RunHandle[Any]:
    return shop.client.submit({"agent_id": agent_id, "session_id": new_tag(), "input_text": "go"})


def called(shop: Shop, agent_id: str) -> tuple[list[Any], Any]:
    """The events of a run and the result of its tool, after the run has ended."""
    events = list(submit(shop, agent_id).events())
    return events, next((e.payload["result"] for e in events if e.name == "tool.succeeded"), None)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    env = {"OPENAGENTS_LEASE_MS": str(int(LEASE_S * 1000)), "OPENAGENTS_TOOL_PROCESSES": "1"}
    folder = tmp_path_factory.mktemp("shop")
    with EmbeddedRedis() as server, open_shop(folder, server.url, "-c", "5", env=env, agents=AGENTS) as shop:
        yield shop


def test_a_tool_that_blocks_the_loop_is_named(shop: Shop) -> None:
    """In an event of the run with the source line, in the worker's log, and in `inspect stats`."""
    events, result = called(shop, "oversleep-1")

    blocked = next(event.payload for event in events if event.name == "worker.loop_blocked")
    assert result == "slept"
    assert (blocked["kind"], blocked["name"]) == ("tool", "oversleep")
    assert (blocked["agent_id"], blocked["plugin"]) == ("oversleep-1", "tool oversleep")
    assert blocked["blocked_ms"] >= 1200
    assert "time.sleep(seconds)" in blocked["stack"]
    assert "loop.blocked" in shop.log
    assert "name=oversleep" in shop.log
    loop = shop.stats()["openagents"]["loop"]
    assert loop["blocks"] >= 1
    assert loop["longest_block_ms"] >= 1200


@pytest.mark.parametrize(
    ("agent_id", "plugin"), [("ponder", f"pattern {TOOLS}.Ponder"), ("recite", f"memory {TOOLS}.Recite")]
)
def test_code_outside_a_recorded_call_that_blocks_the_loop_is_named(
    shop: Shop, agent_id: str, plugin: str
) -> None:
    """With run, agent and plugin, in an event of the run and in the worker's log."""
    events, _ = called(shop, agent_id)

    blocked = [event for event in events if event.name == "worker.loop_blocked"]
    mine = next(event.payload for event in blocked if "time.sleep(1.5)" in event.payload["stack"])
    assert (mine["agent_id"], mine["plugin"]) == (agent_id, plugin)
    assert mine["blocked_ms"] >= 1200
    line = next(line for line in shop.log.splitlines() if "loop.blocked" in line and plugin in line)
    assert f"run_id={events[0].run_id}" in line
    assert f"agent_id={agent_id}" in line


def test_a_worker_keeps_its_runs_while_its_loop_is_blocked(shop: Shop) -> None:
    """The block is longer than the lease, and no worker recovers the run: one attempt, one call."""
    names = [event.name for event in called(shop, "oversleep-1")[0]]

    assert names.count("run.attempt_started") == names.count("tool.called") == 1
    assert "run.recovered" not in names


def test_a_sync_tool_blocks_a_separate_thread(shop: Shop) -> None:
    """No block of the loop is reported."""
    events, thread = called(shop, "sleep_in_a_thread-1")

    assert str(thread).startswith("openagents-tool")
    assert "worker.loop_blocked" not in [event.name for event in events]
    assert shop.stats()["openagents"]["tools"]["threads"]["threads"] >= 1


def test_a_cpu_bound_tool_of_a_run_computes_elsewhere(shop: Shop) -> None:
    """In a child process of the worker."""
    _, result = called(shop, "compute-1")

    assert result["sum"] == sum(range(100_000))
    assert result["pid"] != shop.process.pid


def test_a_loop_that_is_dead_ends_the_process(tmp_path: Path) -> None:
    """Otherwise its lease would be renewed for ever although no run makes progress."""
    env = {"OPENAGENTS_LOOP_DEAD_S": "1"}
    agents = [caller("oversleep", seconds=600)]
    with EmbeddedRedis() as server, open_shop(tmp_path, server.url, env=env, agents=agents) as shop:
        submit(shop, "oversleep-1")

        code = wait_for(shop.process.poll, "the worker has ended", PATIENCE_S)

        assert code == EX_LOOP_DEAD
        assert "loop.dead" in shop.log
        assert "time.sleep(seconds)" in shop.log


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["pool", "solo", "threads", "processes"])
def test_a_process_with_a_stalled_interpreter_ends_in_every_pool(tmp_path: Path, pool: str) -> None:
    """A stall monitor beside each process that executes runs kills it; under prefork, beside each child."""
    env = {"OPENAGENTS_LOOP_DEAD_S": "1.5", "OPENAGENTS_LEASE_MS": "30000", "OPENAGENTS_LOG_FORMAT": "json"}
    arguments = ["-c", "2", *([] if pool == "pool" else ["--pool", pool])]
    agents = [caller("hold")]
    with (
        EmbeddedRedis() as server,
        open_shop(tmp_path, server.url, *arguments, env=env, agents=agents) as shop,
    ):
        run_id = submit(shop, "hold-0").id

        wait_for(lambda: '"event": "loop.dead"' in shop.log, "the end is in the log", PATIENCE_S)
        lines = [json.loads(line) for line in shop.log.splitlines() if line.startswith("{")]
        dead = next(line for line in lines if line["event"] == "loop.dead")
        assert (dead["run_id"], dead["plugin"], dead["exit_code"]) == (run_id, "tool hold", 137)
        assert "tests/pool/tools.py" in dead["stack"]
        if pool != "processes":
            assert wait_for(shop.process.poll, "the worker has ended", PATIENCE_S) == -signal.SIGKILL
