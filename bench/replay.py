"""The time that another process needs to replay a run of ten thousand steps, and the replies of Redis.

The first attempt records the run: its pattern calls one tool ten thousand times, each call returns a thousand
bytes and is committed, and then it waits in a tool named gate. Further attempts, each in a new process, claim
the run and replay its journal with the same pattern. The replay ends when the first call starts that is not
in the journal. One more attempt uses a proxy that measures the replies of Redis: a long reply would delay
other clients.

The run is measured once as one loop, and once as a thousand concurrent branches with equal calls. In the
second case each record could belong to a thousand calls, and the replay has to find the right one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._worker import megabytes, print_machine
from bench.steps import FixedLease
from openagents_worker.agents import load_agents
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import Runner
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.scripts import Wake
from openagents_worker.submission.submit import asubmit
from openagents_worker.tools.base import ToolContext, ToolPlugin
from tests.support.command_proxy import Proxy, value_of
from tests.support.proxy import Line

FIRST = "bench:0"
STEP_BYTES = 1_000
BRANCHES = 1_000
MAX_S = 2.0
MAX_REPLY = 256 * 1024


class Text(ToolPlugin):
    """Returns a different text in each call."""

    name = "text"
    description = "Returns a text."

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> str:
        return os.urandom(STEP_BYTES // 2).hex()


class Gate(ToolPlugin):
    """Sets `reached` when it is called, and then waits forever."""

    name = "gate"
    description = "Waits."
    reached: asyncio.Event

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> None:
        Gate.reached.set()
        await asyncio.Event().wait()


class Steps:
    """Calls the tool `text` `steps` times, divided among equal branches, and then the tool `gate`."""

    context: Any

    def __init__(self, config: dict[str, Any]) -> None:
        self._branches = int(config["branches"])
        self._calls = int(config["steps"]) // self._branches

    async def execute(self) -> Any:
        if self._branches == 1:
            await self._branch()
        else:
            await asyncio.gather(*(self._branch() for _ in range(self._branches)))
        return await self.context.tools["gate"].invoke({})

    async def _branch(self) -> None:
        for n in range(self._calls):
            await self.context.tools["text"].invoke({"n": n})


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if the replay is fast enough and no reply of Redis is too long."""
    parser = argparse.ArgumentParser(prog="python -m bench replay", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{options.steps:,} steps of {STEP_BYTES:,} bytes, median of {options.rounds} attempts\n")
    rows = [_measure(options.steps, branches, options.rounds) for branches in (1, BRANCHES)]
    columns = ("branches", "recorded in, s", "replayed in, s", "µs per record", "MB after the replay")
    print(f"\n| {' | '.join(columns)} | largest reply, bytes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(row)
    return 0 if all(row.took_s <= MAX_S and row.largest <= MAX_REPLY for row in rows) else 1


@dataclass(frozen=True, slots=True)
class Row:
    """The figures for a run of `steps` steps."""

    steps: int
    branches: int
    recording_s: float
    took_s: float
    mb: float
    largest: int

    def __str__(self) -> str:
        each_us = self.took_s / self.steps * 1e6
        times = f"{self.recording_s:.1f} | {self.took_s:.2f} | {each_us:.0f}"
        return f"| {self.branches:,} | {times} | {self.mb:.0f} | {self.largest:,} |"


def _measure(steps: int, branches: int, rounds: int) -> Row:
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder)) as server,
    ):
        if branches == 1:
            print_machine(server.url)
        url = server.url
        recording_s, _ = _attempt_in_process(url, steps, branches, FIRST)
        found = [
            _attempt_in_process(url, steps, branches, f"bench:{number}") for number in range(1, rounds + 1)
        ]
        with _MeasuringProxy(url) as line:  # a separate attempt, because the proxy is slower than Redis
            _attempt_in_process(line.url_of("watched"), steps, branches, "bench:watched")
            largest = line.largest
    took_s, mb = (statistics.median(one) for one in zip(*found, strict=True))
    return Row(steps, branches, recording_s, took_s, mb, largest)


def _attempt_in_process(url: str, steps: int, branches: int, incarnation: str) -> tuple[float, float]:
    """Execute an attempt in a new process.

    Return the seconds from its claim to the gate, and its megabytes.
    """
    script = "import sys; from bench import replay; replay.attempt(*sys.argv[1:])"
    command = [sys.executable, "-c", script, url, str(steps), str(branches), incarnation]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    took_s, mb = json.loads(output)
    return took_s, mb


def attempt(url: str, steps: str, branches: str, incarnation: str) -> None:
    """The main function of the process of an attempt. Prints its measurements as JSON."""
    print(json.dumps(asyncio.run(_attempt(url, int(steps), int(branches), incarnation))))


async def _attempt(url: str, steps: int, branches: int, incarnation: str) -> tuple[float, float]:
    """Execute the run up to its gate, then hand it over. The first incarnation also submits it."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": url, "OPENAGENTS_LOG_LEVEL": "ERROR"})
    agent = {
        "id": "steps",
        "name": "Steps",
        "llm": {"provider": "scripted", "script": [{"text": "done"}]},
        "memory": {"type": "buffer"},
        "pattern": {"impl": "bench.replay.Steps", "config": {"steps": steps, "branches": branches}},
        "tools": [{"id": name, "impl": f"bench.replay.{name.title()}"} for name in ("text", "gate")],
    }
    assembly = Assembly(load_agents(json.dumps({"agents": [agent]}), env={}), env={})
    store, lease, Gate.reached = AsyncStore(Cell(url)), FixedLease(incarnation), asyncio.Event()

    async def send(wakes: Sequence[Wake]) -> None:
        """Not needed: the next attempt claims the run directly."""

    runner = Runner(store=store, lease=lambda: lease, assembly=assembly, settings=settings, send_wakes=send)
    announced = assembly.announcements()
    await store.run(scripts.register(incarnation=incarnation, lease_ms=3_600_000, agents=announced))
    if incarnation == FIRST:
        request = RunRequest(agent_id="steps", session_id="s", run_id="long", input_text="go")
        await asubmit(store, request, settings=settings)
    began = time.perf_counter()
    executing = asyncio.create_task(runner.execute("long"))
    await Gate.reached.wait()
    took_s, mb = time.perf_counter() - began, megabytes()
    handing = asyncio.create_task(runner.latch_all(LatchReason.HANDOVER))
    await asyncio.sleep(0)
    await runner.hurry_all()
    await handing
    assert (await executing).reason == "handover"
    await store.run(scripts.retire(incarnation=incarnation))
    await assembly.aclose()
    await store.close()
    return took_s, mb


class _MeasuringProxy(Proxy):
    """A proxy that records the length of the longest reply of Redis."""

    largest = 0

    async def _answers(self, line: Line) -> None:
        while True:
            raw = await value_of(line.from_redis)
            self.largest = max(self.largest, len(raw))
            line.to_client.write(raw)
            await line.to_client.drain()
