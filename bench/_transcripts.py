"""What it costs a run to assemble its context, by the number of messages in its session.

A part of `python -m bench scale`. The messages are stored before the measurement. A run reads what its
context assembler needs of them, and adds two.
"""

from __future__ import annotations

import json
import uuid
from itertools import pairwise
from typing import Any, NamedTuple

from bench import steps as steps_bench
from openagents_worker import RunRequest
from openagents_worker.runtime.runner import Runner
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import confirm_completion
from openagents_worker.submission.submit import asubmit

__all__ = ["ASSEMBLERS", "agents", "measure"]

ASSEMBLERS = ("truncating", "sliding_window", "head_tail", "importance_weighted")
LENGTHS = (100, 1_000, 10_000)
MESSAGE_CHARS = 500
RUNS = 40
MAX_RATIO = 1.25  # the longest session, divided by the one before it


class Cost(NamedTuple):
    """What one run costs: processor time in ms, bytes that Redis sends."""

    cpu_ms: float
    sent: float


def agents() -> list[dict[str, Any]]:
    """An agent for each assembler. It answers at once."""
    config = {kind: {} if kind == "truncating" else {"max_input_tokens": 6_000} for kind in ASSEMBLERS}
    return [
        {
            **steps_bench.agent_of(f"sees-{kind}", 0, 0),
            "context_assembler": {"type": kind, "config": config[kind]},
        }
        for kind in ASSEMBLERS
    ]


async def measure(store: AsyncStore, runner: Runner, settings: Settings, most: int) -> bool:
    """Print the table. Returns whether the costs are flat."""
    print(
        f"\nA run without tools, by the number of messages ({MESSAGE_CHARS} characters each) in its session\n"
    )
    print("| assembler | messages | own CPU, ms | Redis CPU, ms | sent by Redis, KB |\n|---|---|---|---|---|")
    flat = True
    for kind in ASSEMBLERS:
        costs = [await _cost(store, runner, settings, kind, length) for length in LENGTHS if length <= most]
        flat &= all(
            after.cpu_ms <= MAX_RATIO * before.cpu_ms and after.sent <= MAX_RATIO * before.sent
            for before, after in pairwise(costs[1:])
        )
    return flat


async def _cost(store: AsyncStore, runner: Runner, settings: Settings, kind: str, length: int) -> Cost:
    await _fill(store, f"{kind}-{length}", length)
    await _runs(store, runner, settings, kind, length, RUNS // 4)
    before, began = await _used(store), steps_bench.Moment.now()
    await _runs(store, runner, settings, kind, length, RUNS)
    took, after = steps_bench.Moment.now().since(began), await _used(store)
    own_ms = took.own_ms / RUNS
    redis_ms, sent = (after.cpu_ms - before.cpu_ms) / RUNS, (after.sent - before.sent) / RUNS
    print(f"| {kind} | {length:,} | {own_ms:.2f} | {redis_ms:.2f} | {sent / 1000:.1f} |", flush=True)
    return Cost(own_ms + redis_ms, sent)


async def _used(store: AsyncStore) -> Cost:
    cpu, stats = await store.redis.info("cpu"), await store.redis.info("stats")
    used_s = cpu["used_cpu_sys_main_thread"] + cpu["used_cpu_user_main_thread"]
    return Cost(1000 * used_s, stats["total_net_output_bytes"])


async def _fill(store: AsyncStore, session: str, length: int) -> None:
    """Store this many messages, as finished runs do."""
    key = store.keys("transcript", session)
    for turn in range(length // 2):
        ids = {"run_id": f"old-{turn}", "agent_id": "old"}
        text = (f"{turn} word " * MESSAGE_CHARS)[:MESSAGE_CHARS]
        messages = ({"role": "user", "content": text, **ids}, {"role": "assistant", "content": text, **ids})
        await store.redis.rpush(key, *map(json.dumps, messages))


async def _runs(
    store: AsyncStore, runner: Runner, settings: Settings, kind: str, length: int, runs: int
) -> None:
    session = f"{kind}-{length}"
    for _ in range(runs):
        run_id = uuid.uuid4().hex
        request = RunRequest(agent_id=f"sees-{kind}", session_id=session, run_id=run_id, input_text="go")
        await asubmit(store, request, settings=settings)
        result = await runner.execute(run_id)
        assert result.stop_reason == "completed", result
        await store.run(confirm_completion(runs=[run_id, "1"]))  # as if Celery had been notified
        await store.redis.ltrim(store.keys("transcript", session), 0, length - 1)
