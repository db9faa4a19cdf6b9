"""CPU-bound tools compute in a process of their own under every pool that executes runs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, open_shop
from tests.waiting import wait_for

TOOLS = "tests.pool.tools"
COMPUTE = {"tool_calls": [{"name": "compute", "arguments": {"upto": 10}}]}
CRASH = {"tool_calls": [{"name": "crash", "arguments": {}}]}
CALCULATOR = agent("calculator", COMPUTE, {"text": "computed"}, tools={"compute": f"{TOOLS}.compute"})
CRASHER = agent("crasher", CRASH, {"text": "went on"}, tools={"crash": f"{TOOLS}.crash"})

_sessions = (f"session-{n}" for n in count())


@pytest.fixture(scope="module", params=["ours", "threads", "solo", "processes"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    """A worker with this pool; `processes` is Celery's prefork."""
    pool = [] if request.param == "ours" else ["--pool", request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with (
        EmbeddedRedis() as server,
        open_shop(folder, server.url, "-c", "1", *pool, agents=[CALCULATOR, CRASHER]) as shop,
    ):
        yield shop


def run(shop: Shop, agent_id: str) -> tuple[Any, dict[str, Any]]:
    """The output of a new run, and the payloads of its events by name."""
    request = {"agent_id": agent_id, "session_id": next(_sessions), "input_text": "hi"}
    handle = shop.client.submit(request)
    result = handle.wait(PATIENCE_S)
    return result.final_output, {event.name: event.payload for event in handle.events()}


def started_by(pid: int) -> set[int]:
    """The processes that this one has started, and those that they have."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = {int(child) for task in tasks for child in (task / "children").read_text().split()}
    return children.union(*map(started_by, children))


def pid_in(events: dict[str, Any]) -> int:
    """The process that has answered, as the tool says."""
    found = re.search(r"'pid': (\d+)|\"pid\": ?(\d+)", str(events["tool.succeeded"]))
    assert found, events["tool.succeeded"]
    return int(found[1] or found[2])


def test_it_computes_in_a_process_that_the_worker_has_started(shop: Shop) -> None:
    """Also under prefork, whose processes are daemons: multiprocessing lets those start none."""
    output, events = run(shop, "calculator")

    assert output == "computed"
    assert pid_in(events) in started_by(shop.process.pid)


def test_a_process_is_kept_for_the_next_call(shop: Shop) -> None:
    """Starting one takes half a second."""
    assert pid_in(run(shop, "calculator")[1]) == pid_in(run(shop, "calculator")[1])


def test_a_crash_fails_the_call_and_not_the_worker(shop: Shop) -> None:
    """The model hears of it, and the next call has a process again."""
    output, events = run(shop, "crasher")

    assert (output, events["tool.failed"]["error_details"]["code"]) == ("went on", "tool.unavailable")
    assert run(shop, "calculator")[0] == "computed"


def test_a_worker_that_is_killed_leaves_none_behind(shop: Shop) -> None:
    """Nobody can tell them; each watches its parent. Runs last: it ends the worker."""
    pid = pid_in(run(shop, "calculator")[1])

    for process in (shop.process.pid, *started_by(shop.process.pid) - {pid}):
        os.kill(process, signal.SIGKILL)

    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the tool's process has ended", PATIENCE_S)
