"""The cost of a committed step, of the tenth and of the thousandth, in time and in bytes.

A complete run in one process: the runner, the ReAct pattern, a scripted model that answers at once, and a
tool that only returns its text. Every call of the model or the tool is one step: it is recorded and counted,
and its events are stored. For comparison, in the same rounds and over the same kind of connection, a pipeline
stores the same data: the record, the usage and the events of each step. This is the minimum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench._worker import megabytes
from openagents_worker.agents import AppConfig
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest, RunState
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.runner import Runner
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.records import aread_record
from openagents_worker.store.scripts import Wake
from openagents_worker.submission.submit import asubmit
from openagents_worker.tools.base import ToolContext, ToolPlugin

EARLY, LATE = 10, 1_000
AROUND = (
    10  # the time of a step is the median of this many steps around it, because a single one is too noisy
)
STEP_BYTES, STORED_STEPS = 5_000, 100
ALLOWED_MS, ALLOWED_TIMES_BARE, ALLOWED_GROWTH, ALLOWED_TIMES_CONTENT = 1.0, 3.0, 1.1, 1.3
RUN_KEYS = ("run", "facts", "events", "journal")
PACKAGES = ("openagents-worker", "redis", "hiredis", "pydantic")
NOT_COMPARABLE = """
What is not comparable: the pipeline checks nothing (no fence, no session, no order), publishes nothing to
watchers, and executes no pattern, model or tool. It is a lower bound, not an alternative.
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """Wall-clock time and CPU time of this process, in ms.

    On a busy machine only the CPU time is meaningful.
    """

    wall_ms: float
    own_ms: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter() * 1000, time.process_time() * 1000)

    def since(self, before: Moment) -> Moment:
        return Moment(self.wall_ms - before.wall_ms, self.own_ms - before.own_ms)

    def __truediv__(self, number: int) -> Moment:
        return Moment(self.wall_ms / number, self.own_ms / number)


class Text(ToolPlugin):
    """Returns a text of the requested size and records when it was called."""

    name = "text"
    description = "Returns a text."
    called: list[Moment] = []  # noqa: RUF012 - of the current run; one run at a time

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> str:
        Text.called.append(Moment.now())
        return "x" * int(params["size"])


@dataclass(frozen=True, slots=True)
class Step:
    """The stored data of one step: its record, the usage after it, and its events."""

    record: str
    usage: str
    events: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class FixedLease:
    """A lease that does not end during a measurement."""

    incarnation: str

    def remaining_s(self) -> float:
        return 3600.0


def main(arguments: Sequence[str] = ()) -> int:
    """Print the tables.

    Return 0 if the tenth and the thousandth step are within the limits of time and bytes.
    """
    parser = argparse.ArgumentParser(prog="python -m bench steps", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--appendonly", choices=("no", "everysec", "always"), default="everysec")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(data_dir=Path(folder), appendonly=options.appendonly) as redis,
    ):
        return asyncio.run(_measure(redis.url, options.rounds))


async def _measure(redis_url: str, rounds: int) -> int:
    agents = [agent_of("steady", LATE // 2 + AROUND, 10), agent_of("large", STORED_STEPS // 2, STEP_BYTES)]
    async with process(redis_url, agents) as (store, runner, settings):
        await _print_machine(store, rounds)
        ours, bare = [], []
        for number in range(-1, rounds):  # the first one is the warm-up
            run_id = f"round-{number}"
            times = await run_once(store, runner, settings, "steady", run_id)
            steps = await _stored(store, run_id)
            least = await _pipelined(store, f"bare-{number}", steps)
            if number >= 0:
                ours.append((_at(EARLY, times), _at(LATE, times)))
                bare.append((_at(EARLY, least), _at(LATE, least)))
        is_quick = _print_times(ours, bare)
        large = str(uuid.uuid4())
        await run_once(store, runner, settings, "large", large)
        steps = await _stored(store, large)
        await _pipelined(store, "bare-large", steps)
        is_small = await _print_bytes(store, large, "bare-large")
        print(f"\nthis process uses {megabytes():.0f} MB\n{NOT_COMPARABLE}")
    return 0 if is_quick and is_small else 1


# --- a run -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def process(
    redis_url: str, agents: Sequence[dict[str, Any]]
) -> AsyncGenerator[tuple[AsyncStore, Runner, Settings]]:
    """The parts of a worker process that execute runs, without Celery and without background tasks."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_LOG_LEVEL": "ERROR"})
    config = AppConfig.model_validate({"agents": list(agents)})  # larger than an agents file may be
    assembly = Assembly(config, env={})
    store, lease = AsyncStore(Cell(redis_url)), FixedLease("bench:1")

    async def send(wakes: Sequence[Wake]) -> None:
        """Not needed: each run is executed directly."""

    runner = Runner(store=store, lease=lambda: lease, assembly=assembly, settings=settings, send_wakes=send)
    announced = assembly.announcements()
    await store.run(scripts.register(incarnation=lease.incarnation, lease_ms=3_600_000, agents=announced))
    try:
        yield store, runner, settings
    finally:
        await assembly.aclose()
        await store.close()


def agent_of(agent_id: str, turns: int, size: int) -> dict[str, Any]:
    """An agent of `turns` turns. Each turn is a step of the model and a step of the tool, of `size` bytes."""
    turn = {
        "text": "y" * size,
        "tool_calls": [{"name": "text", "arguments": {"size": size}}],
        "usage": {
            "input_tokens": 1,
            "output_tokens": 1,
        },  # without it, the usage would be estimated from the whole conversation
    }
    return {
        "id": agent_id,
        "name": agent_id,
        "memory": {"type": "buffer", "config": {"max_items": 1}},
        "pattern": {"type": "react", "config": {"max_steps": turns + 1, "step_timeout_ms": 3_600_000}},
        "llm": {"provider": "scripted", "script": [*[turn] * turns, {"text": "done"}]},
        "tools": [{"id": "text", "impl": "bench.steps.Text"}],
    }


async def run_once(
    store: AsyncStore, runner: Runner, settings: Settings, agent_id: str, run_id: str
) -> list[Moment]:
    """Execute one run. Return the time of a step in each turn, measured from call to call of the tool."""
    Text.called.clear()
    request = RunRequest(agent_id=agent_id, session_id=run_id, run_id=run_id, input_text="Go.")
    await asubmit(store, request, settings=settings)
    await runner.execute(run_id)
    assert (await aread_record(store, run_id)).state is RunState.COMPLETED
    return [after.since(before) / 2 for before, after in pairwise(Text.called)]


def _at(step: int, times: Sequence[Moment]) -> Moment:
    """The median time of the steps around this one. A turn has two steps."""
    turn, half = step // 2, AROUND // 4
    return _median(times[max(0, turn - half) : turn + half + 1])


def _median(times: Sequence[Moment]) -> Moment:
    return Moment(median(time.wall_ms for time in times), median(time.own_ms for time in times))


# --- the pipeline that stores the same data --------------------------------------------------------------


async def _stored(store: AsyncStore, run_id: str) -> list[Step]:
    """The stored data of the run, step by step. The event of a checkpoint is the last event of its step."""
    keys = store.keys
    redis: Any = store.redis
    records = await redis.lrange(keys("journal", run_id), 0, -1)
    events: list[tuple[Mapping[str, str], ...]] = [()]
    usage = ["{}"]
    for _, fields in await redis.xrange(keys("events", run_id)):
        events[-1] += (fields,)
        if fields["name"] == "usage.updated":
            usage.append(json.dumps(json.loads(fields["payload"])["usage"]))
        if fields["name"] == "run.checkpoint_saved":
            events.append(())
    assert len(events) == len(records) + 1
    return [Step(*parts) for parts in zip(records, usage, events, strict=False)]


async def _pipelined(store: AsyncStore, name: str, steps: Sequence[Step]) -> list[Moment]:
    """Store the same data with one pipeline per step. Return the time of a step in each turn."""
    moments = [Moment.now()]
    for step in steps:
        async with store.redis.pipeline(transaction=False) as pipe:
            pipe.rpush(f"{name}:journal", step.record)
            pipe.hset(f"{name}:run", mapping={"usage": step.usage})
            for event in step.events:
                pipe.xadd(f"{name}:events", event)
            await pipe.execute()
        moments.append(Moment.now())
    return [after.since(before) / 2 for before, after in pairwise(moments[1::2])]


# --- the tables ------------------------------------------------------------------------------------------


async def _print_machine(store: AsyncStore, rounds: int) -> None:
    server, config = await store.redis.info("server"), await store.redis.config_get("append*")
    name = server.get("server_name", "redis")
    number = server.get(f"{name}_version") or server["redis_version"]
    durability = config["appendfsync"] if config["appendonly"] == "yes" else "in memory only"
    print(
        f"{name} {number}, appendfsync {durability}; Python {platform.python_version()}, {platform.machine()}"
    )
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    print(f"medians of {rounds} rounds, each a run of {LATE + 2 * AROUND} steps and then its bare pipeline\n")


Pair = tuple[Moment, Moment]


def _print_times(ours: Sequence[Pair], bare: Sequence[Pair]) -> bool:
    """Print the table of times. Return whether they are within the limits."""
    print(f"{'ms per step':<34}{f'step {EARLY:,}':>12}{f'step {LATE:,}':>12}{'ratio':>9}")
    found = {}
    for name, rows in (("a run", ours), ("bare pipeline", bare)):
        early, late = found[name] = [_median([row[n] for row in rows]) for n in (0, 1)]
        print(_row(name, early.wall_ms, late.wall_ms))
        print(_row(f"{name}, CPU time here", early.own_ms, late.own_ms))
    times = [one.wall_ms / other.wall_ms for one, other in zip(*found.values(), strict=True)]
    print(f"{'ratio of run to pipeline':<34}{times[0]:>12.1f}{times[1]:>12.1f}\n")
    early, late = found["a run"]
    return (
        late.wall_ms <= ALLOWED_MS
        and max(times) <= ALLOWED_TIMES_BARE
        and late.wall_ms <= ALLOWED_GROWTH * early.wall_ms
    )


def _row(name: str, early: float, late: float) -> str:
    return f"{name:<34}{early:>12.3f}{late:>12.3f}{late / early:>9.2f}"


async def _print_bytes(store: AsyncStore, run_id: str, name: str) -> bool:
    content = STORED_STEPS * STEP_BYTES
    ours = await memory_of(store, [store.keys(key, run_id) for key in RUN_KEYS])
    bare = await memory_of(store, [f"{name}:{key}" for key in ("run", "events", "journal")])
    print(f"bytes in Redis after {STORED_STEPS} steps of {STEP_BYTES:,} bytes each")
    print(f"{'content':<16}{content:>12,}")
    print(f"{'a run':<16}{ours:>12,}{ours / content:>9.2f} times the content")
    print(f"{'bare pipeline':<16}{bare:>12,}{bare / content:>9.2f}")
    return ours <= ALLOWED_TIMES_CONTENT * content


async def memory_of(store: AsyncStore, keys: Sequence[str]) -> int:
    return sum([int(await store.redis.memory_usage(key, samples=0) or 0) for key in keys])
