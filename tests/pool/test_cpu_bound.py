"""CPU-bound tools compute in a separate process under every pool that executes runs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, open_shop
from tests.support.waiting import wait_for

TOOLS = "tests.pool.tools"
COMPUTE = {"tool_calls": [{"name": "compute", "arguments": {"upto": 10}}]}
CRASH = {"tool_calls": [{"name": "crash", "arguments": {}}]}
CALCULATOR = agent("calculator", COMPUTE, {"text": "computed"}, tools={"compute": f"{TOOLS}.compute"})
CRASHER = agent("crasher", CRASH, {"text": "went on"}, tools={"crash": f"{TOOLS}.crash"})

_sessions = (f"session-{n}" for n in count())


LONG = partial(pytest.param, marks=pytest.mark.long)


@pytest.fixture(scope="module", params=["ours", LONG("threads"), LONG("solo"), LONG("processes")])
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
    """The child processes of a process, and their children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = {int(child) for task in tasks for child in (task / "children").read_text().split()}
    return children.union(*map(started_by, children))


def pid_in(events: dict[str, Any]) -> int:
    """The process id in the tool's result."""
    found = re.search(r"'pid': (\d+)|\"pid\": ?(\d+)", str(events["tool.succeeded"]))
    assert found, events["tool.succeeded"]
    return int(found[1] or found[2])


def test_it_computes_in_a_child_process_of_the_worker(shop: Shop) -> None:
    """Also under prefork, whose processes are daemons and may not start children with multiprocessing."""
    output, events = run(shop, "calculator")

    assert output == "computed"
    assert pid_in(events) in started_by(shop.process.pid)


def test_a_process_is_reused_for_the_next_call(shop: Shop) -> None:
    """The start of a process takes half a second."""
    assert pid_in(run(shop, "calculator")[1]) == pid_in(run(shop, "calculator")[1])


def test_a_crash_fails_the_call_and_not_the_worker(shop: Shop) -> None:
    """The model gets the error, and the next call gets a new process."""
    output, events = run(shop, "crasher")

    assert (output, events["tool.failed"]["error_details"]["code"]) == ("went on", "tool.unavailable")
    assert run(shop, "calculator")[0] == "computed"


def test_a_killed_worker_leaves_no_process(shop: Shop) -> None:
    """Each process watches its parent. The last test: it ends the worker."""
    pid = pid_in(run(shop, "calculator")[1])

    for process in (shop.process.pid, *started_by(shop.process.pid) - {pid}):
        os.kill(process, signal.SIGKILL)

    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the tool's process has ended", PATIENCE_S)
