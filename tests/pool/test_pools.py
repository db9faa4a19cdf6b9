"""Runs under every pool of Celery that can execute them: four pools do it in the same way."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.pool.shopkeeper import PATIENCE_S, ROOT, Shop, agent, open_shop
from tests.support.waiting import wait_for
from tests.worker.test_stall_monitor import lives

TOOLS = "tests.pool.tools"
CALL = {"tool_calls": [{"name": "sleep_in_a_thread", "arguments": {"seconds": 0.01}}]}
CALLER = agent("caller", CALL, {"text": "called"}, tools={"sleep_in_a_thread": f"{TOOLS}.sleep_in_a_thread"})
FAILING = agent("failing", {"error": "response", "message": "no such model"})

_session = (f"session-{n}" for n in count())


@pytest.fixture(
    scope="module",
    params=[
        "ours",
        "ours without uvloop",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("threads", "solo", "processes")),
    ],
)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    name, _, without = request.param.partition(" without ")
    pool = [] if name == "ours" else ["--pool", name]
    folder = tmp_path_factory.mktemp(name)
    if without:
        (folder / f"{without}.py").write_text('raise ImportError("not installed here")')
    with (
        EmbeddedRedis() as server,
        open_shop(
            folder,
            server.url,
            "-c",
            "2",
            *pool,
            agents=[CALLER, FAILING],
            env={"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        ) as shop,
    ):
        shop.pool = name
        shop.loop = "asyncio" if without else "uvloop"
        yield shop


def test_the_loop_is_uvloops_where_that_is_installed(shop: Shop) -> None:
    """Without configuration; `celery inspect stats` shows the loop."""
    if shop.pool == "ours":
        assert shop.stats()["pool"]["loop"] == shop.loop


def submit(shop: Shop, agent_id: str, session_id: str = "") -> str:
    request = {"agent_id": agent_id, "session_id": session_id or next(_session), "input_text": "hi"}
    return str(shop.client.submit(request).id)


def test_a_run_with_a_tool_is_executed_to_its_end(shop: Shop) -> None:
    """A model call, a tool call in a thread, a model call."""
    run_id = submit(shop, "caller")

    result = shop.client.handle(run_id).wait(PATIENCE_S)

    assert (result.final_output, result.usage.tool_calls) == ("called", 1)


def test_runs_of_one_session_go_in_their_order(shop: Shop) -> None:
    """Later runs wait without a slot."""
    run_ids = [submit(shop, "caller", "shared") for _ in range(4)]

    for run_id in run_ids:
        shop.client.handle(run_id).wait(PATIENCE_S)

    ended = [shop.client.record(run_id).ended_ms for run_id in run_ids]
    assert ended == sorted(ended)


def test_a_run_fails_with_its_own_error(shop: Shop) -> None:
    """The pool does not change the error."""
    result = shop.client.handle(submit(shop, "failing")).wait(PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code == "llm.response"


def test_a_run_is_cancelled_in_the_middle_of_a_call(shop: Shop) -> None:
    """The worker receives the request while the run waits for the model."""
    handle = shop.client.handle(submit(shop, "waiter"))
    wait_for(lambda: handle.record().state == "running", "the run is executed", PATIENCE_S)

    handle.cancel()

    assert handle.wait(PATIENCE_S).stop_reason == "cancelled"


def test_each_process_that_executes_runs_has_a_lease(shop: Shop) -> None:
    """Under prefork each child has one (`--pool processes`: Celery treats `prefork` as its default)."""
    expected = 2 if shop.pool == "processes" else 1
    key = shop.client.store.keys("workers")

    wait_for(
        lambda: shop.client.store.ask(lambda r: r.zcard(key)) == expected, f"{expected} leases", PATIENCE_S
    )


def monitors_of(shop: Shop) -> dict[int, int]:
    """The stall monitors of the worker's processes: process id -> id of the process that has started it."""
    parents, monitors = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has just ended
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(words[1])
            if words[0] != "Z" and b"stall_monitor_process.py" in (entry / "cmdline").read_bytes():
                monitors.add(int(entry.name))
    worker_pids = {shop.process.pid, *(pid for pid, parent in parents.items() if parent == shop.process.pid)}
    return {monitor: parents[monitor] for monitor in monitors if parents[monitor] in worker_pids}


def test_each_process_that_executes_runs_has_a_stall_monitor(shop: Shop) -> None:
    """Under prefork each child has one, but not their parent."""
    expected = 2 if shop.pool == "processes" else 1

    wait_for(lambda: len(monitors_of(shop)) == expected, "each process has a monitor", PATIENCE_S)
    monitors = monitors_of(shop)

    assert len(set(monitors.values())) == expected
    assert (shop.process.pid in monitors.values()) == (shop.pool != "processes")


@pytest.mark.share(of=2)
def test_a_stopping_worker_hands_its_run_over(shop: Shop) -> None:
    """Also under solo, whose main thread executes the run. The last test: it ends the worker."""
    monitors = monitors_of(shop)
    handle = shop.client.handle(submit(shop, "waiter"))
    wait_for(lambda: handle.record().state == "running", "the run is executed", PATIENCE_S)

    code = shop.signal(signal.SIGTERM)

    assert code == 0
    assert handle.record().state == "queued"
    wait_for(lambda: not any(map(lives, monitors)), "no monitor is left", PATIENCE_S)
    handle.cancel()
