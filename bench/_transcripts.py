"""What it costs a run to assemble its context, by the number of messages in its session.

A part of `python -m bench scale`. The messages are stored before the measurement. A run reads what its
context assembler needs of them, and adds two.
"""

from __future__ import annotations

import json
import statistics
import uuid
from collections.abc import Mapping, Sequence
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
ROUNDS = 7  # each measures every length once, so that other load on the machine meets all of them
RUNS = 20  # of a length in a round
MAX_RATIO = 1.25  # of a session, divided by the session with a tenth of the messages


class Cost(NamedTuple):
    """What one run costs: processor time of this process and of Redis in ms, bytes that Redis sends."""

    own_ms: float
    redis_ms: float
    sent: float

    @property
    def cpu_ms(self) -> float:
        return self.own_ms + self.redis_ms


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
    """Print the table. Returns whether the costs are flat; true if no session is long enough to tell."""
    print(
        f"\nA run without tools, by the number of messages ({MESSAGE_CHARS} characters each) in its session: "
        f"medians of {ROUNDS} rounds of {RUNS} runs. The ratios are to the row before\n"
    )
    print("| assembler | messages | own CPU, ms | Redis CPU, ms | CPU ratio | sent by Redis, KB | ratio |")
    print("|---|---|---|---|---|---|---|")
    ratios: list[tuple[float, float]] = []
    for kind in ASSEMBLERS:
        costs = await _costs(store, runner, settings, kind, [each for each in LENGTHS if each <= most])
        ratios += _print_rows(kind, costs)
    if not ratios:
        print(f"\nNo ratio is judged: that takes sessions of more than {LENGTHS[1]:,} messages")
        return True
    cpu, sent = max(ratio for ratio, _ in ratios), max(ratio for _, ratio in ratios)
    print(
        f"\nFrom {LENGTHS[1]:,} messages on, ten times as many cost at most {cpu:.2f} times the CPU time "
        f"and {sent:.2f} times the bytes (allowed: {MAX_RATIO})"
    )
    return max(cpu, sent) <= MAX_RATIO


def _print_rows(kind: str, costs: Mapping[int, Cost]) -> list[tuple[float, float]]:
    """Print the rows of an assembler. Returns the ratios of processor time and of bytes that must be flat: a
    session of the first length may be shorter than what a run reads."""
    ratios = []
    before: Cost | None = None
    for length, cost in costs.items():
        shown = ("", "")
        if before is not None:
            ratio = cost.cpu_ms / before.cpu_ms, cost.sent / before.sent
            shown = f"{ratio[0]:.2f}", f"{ratio[1]:.2f}"
            if length > LENGTHS[1]:
                ratios.append(ratio)
        print(
            f"| {kind} | {length:,} | {cost.own_ms:.2f} | {cost.redis_ms:.2f} | {shown[0]} "
            f"| {cost.sent / 1000:.1f} | {shown[1]} |",
            flush=True,
        )
        before = cost
    return ratios


async def _costs(
    store: AsyncStore, runner: Runner, settings: Settings, kind: str, lengths: Sequence[int]
) -> dict[int, Cost]:
    """The cost of a run by the length of its session: the median of all rounds."""
    found: dict[int, list[Cost]] = {length: [] for length in lengths}
    for length in lengths:
        await _fill(store, f"{kind}-{length}", length)
        await _runs(store, runner, settings, kind, length, RUNS // 2)
    for _ in range(ROUNDS):
        for length in lengths:
            found[length].append(await _cost(store, runner, settings, kind, length))
    return {
        length: Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))
        for length, costs in found.items()
    }


async def _cost(store: AsyncStore, runner: Runner, settings: Settings, kind: str, length: int) -> Cost:
    before, began = await _used_by_redis(store), steps_bench.Moment.now()
    await _runs(store, runner, settings, kind, length, RUNS)
    took, after = steps_bench.Moment.now().since(began), await _used_by_redis(store)
    return Cost(took.own_ms / RUNS, *((b - a) / RUNS for a, b in zip(before, after, strict=True)))


async def _used_by_redis(store: AsyncStore) -> tuple[float, float]:
    """Its processor time in ms, and the bytes that it has sent."""
    cpu, stats = await store.redis.info("cpu"), await store.redis.info("stats")
    used_s = cpu["used_cpu_sys_main_thread"] + cpu["used_cpu_user_main_thread"]
    return 1000 * used_s, float(stats["total_net_output_bytes"])


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
