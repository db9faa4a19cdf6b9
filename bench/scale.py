"""How costs grow with the number of processes, the length of a run or session, stored sessions, waiting runs.

All processes share this machine, so only the ratios are meaningful. CPU times are those of the named process;
other load on the machine affects them less than wall-clock times. Redis writes its append-only file, as in
production.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis

from bench import _transcripts as transcripts
from bench import steps as steps_bench
from bench._worker import Worker, print_machine, wait, waiting_agent
from openagents_worker import Client, RunRequest
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.local.stack import Stack
from openagents_worker.runtime.runner import Runner
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import confirm_completion
from openagents_worker.submission.submit import asubmit

LENGTHS = (10, 100, 1_000, 10_000)
SESSIONS = (1, 1_000, 100_000)
BACKLOG = (0, 1_000, 10_000, 100_000)
STEP_BYTES = 1_000
RUNS = 200  # per measurement
MAX_STEP_RATIO = 1.15  # the cost of a step of the longest run, divided by that of a short run
MAX_RUN_RATIO = 1.25  # the cost of a run with the most stored data, divided by that with the least
MAX_IDLE_CPU_GROWTH = 0.5  # percent of a core, from an empty queue to the longest
HOUR_MS = 3_600_000


def main(arguments: Sequence[str] = ()) -> int:
    """Print the tables. Return 0 if constant costs are constant, and more processes have more throughput."""
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    parser.add_argument("--only", choices=list(SECTIONS))
    parser.add_argument("--most", type=int, default=100_000, help="steps, sessions or queued runs")
    parser.add_argument(
        "--short",
        action="store_true",
        help="at most 1,000 of anything, two processes; no ratio of transcripts is judged",
    )
    options = parser.parse_args(arguments)
    most = min(options.most, 1_000) if options.short else options.most
    sections = [options.only] if options.only else list(SECTIONS)
    met = {name: SECTIONS[name](most) for name in sections}
    return 0 if all(met.values()) else 1


# --- processes -------------------------------------------------------------------------------------------


WAITING_MS = 400
SLOTS = 8
ROUNDS = 3


def processes(most: int) -> bool:
    """Measure the runs per second with 1, 2 and 4 workers, for waiting and for computing runs."""
    counts = (1, 2) if most <= 1_000 else (1, 2, 4)
    with tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder:
        agents = Path(folder) / "agents.json"
        agents.write_text(json.dumps({"agents": [_agent("waits", WAITING_MS), _agent("works", 0)]}))
        env = {**os.environ, "OPENAGENTS_CONFIG": str(agents), "OPENAGENTS_LOG_LEVEL": "ERROR"}
        with (
            EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
            Stack(redis_url=server.url, env=env) as stack,
        ):
            print_machine(stack.redis_url)
            print("\n| workers | waiting runs/s | ratio to one | computing runs/s | ratio to one |")
            print("|---|---|---|---|---|")
            waiting: list[float] = []
            working: list[float] = []
            for count in counts:
                while len(stack.workers) < count:
                    stack.start_worker(f"w{len(stack.workers) + 1}", concurrency=SLOTS)
                waiting.append(_rate_of(stack, "waits", 4 * SLOTS * count))
                working.append(_rate_of(stack, "works", 300))
                print(
                    f"| {count} | {waiting[-1]:.1f} | {waiting[-1] / waiting[0]:.2f} "
                    f"| {working[-1]:.1f} | {working[-1] / working[0]:.2f} |",
                    flush=True,
                )
    return waiting[1] > 1.5 * waiting[0]


def _agent(name: str, latency_ms: int) -> dict[str, object]:
    """An agent whose model calls the tool `calc` once and then answers."""
    script = [{"tool_calls": [{"name": "calc", "arguments": {"expression": "6*7"}}]}, {"text": "42"}]
    return {
        "id": name,
        "name": name,
        "llm": {"provider": "scripted", "script": script, "latency_ms": latency_ms},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
        "tools": [{"id": "calc", "type": "calc"}],
    }


def _rate_of(stack: Stack, agent_id: str, runs: int) -> float:
    return statistics.median(_rate(stack, agent_id, runs) for _ in range(ROUNDS))


def _rate(stack: Stack, agent_id: str, runs: int) -> float:
    """Runs per second from the first submission to the last end. Every run has a new session."""
    round_id = uuid.uuid4().hex[:8]
    with Client(stack.redis_url) as client:
        started = time.perf_counter()
        handles = [
            client.submit(RunRequest(agent_id=agent_id, session_id=f"{round_id}-{n}", input_text="go"))
            for n in range(runs)
        ]
        for handle in handles:
            result = handle.wait(timeout=120)
            if not result.ok:
                sys.exit(f"a run failed: {result.error_details}")
        return runs / (time.perf_counter() - started)


# --- a run's length --------------------------------------------------------------------------------------


def length(most: int) -> bool:
    """Measure the cost of a step in runs of different length."""
    return asyncio.run(_with_redis(_length, most))


async def _length(store: AsyncStore, runner: Runner, settings: Settings, most: int) -> bool:
    print(f"\nA recorded call of {STEP_BYTES:,} bytes, of the model or a tool, by the length of its run. The")
    print("costs of the start and the end of a run are divided among its calls.\n")
    print("| steps | ms | own CPU, ms | Redis CPU, ms | bytes stored | sent to Redis | sent by Redis |")
    print("|---|---|---|---|---|---|---|")
    rows: dict[int, float] = {}
    for steps in [steps for steps in LENGTHS if steps <= most]:
        repeats = max(1, 400 // steps)
        before, began = await _spent(store), steps_bench.Moment.now()
        ids = [uuid.uuid4().hex for _ in range(repeats)]
        for run_id in ids:
            await steps_bench.run_once(store, runner, settings, f"steps-{steps}", run_id)
        took, after = steps_bench.Moment.now().since(began), await _spent(store)
        journals = [store.keys("journal", run_id) for run_id in ids]
        count = sum([int(await store.redis.llen(key)) for key in journals])
        kept = await steps_bench.memory_of(
            store, [store.keys(key, run_id) for run_id in ids for key in steps_bench.RUN_KEYS]
        )
        redis_ms = (after.cpu_ms - before.cpu_ms) / count
        rows[steps] = took.own_ms / count + redis_ms
        print(
            f"| {steps:,} | {took.wall_ms / count:.2f} | {took.own_ms / count:.2f} | {redis_ms:.2f} "
            f"| {kept / count:,.0f} | {(after.received - before.received) / count:,.0f} "
            f"| {(after.sent - before.sent) / count:,.0f} |",
            flush=True,
        )
    return rows[max(rows)] <= MAX_STEP_RATIO * rows.get(100, rows[min(rows)])


# --- stored sessions -------------------------------------------------------------------------------------


def sessions(most: int) -> bool:
    """Measure the cost of a run with many stored sessions, each with one finished run."""
    return asyncio.run(_with_redis(_sessions, most))


async def _sessions(store: AsyncStore, runner: Runner, settings: Settings, most: int) -> bool:
    print(f"\nA run without tools with stored sessions, {RUNS} runs, each in a new session\n")
    print("| sessions | ms | own CPU, ms | Redis CPU, ms | Redis, MB |\n|---|---|---|---|---|")
    await _execute(store, runner, settings, 1)
    rows, kept = [], 1
    for count in [count for count in SESSIONS if count <= most]:
        await _copy_sessions(store, kept, count)
        kept = count
        rows.append(await _measure_runs(store, runner, settings, f"{count:,}"))
    return rows[-1] <= MAX_RUN_RATIO * rows[0]


async def _copy_sessions(store: AsyncStore, have: int, want: int) -> None:
    """Copy the stored session of a finished run, byte for byte, until there are `want` sessions.

    The indexes of runs and sessions do not grow: `bench lists` measures those.
    """
    names = ("session", "transcript", "run", "journal", "events")
    made: Any = store.redis
    dumps = {}
    for name in names:
        key = store.keys(name, "kept-0")
        dumps[name] = (await _raw(store, key), max(0, await made.pttl(key)))
    at = have
    while at < want:
        async with made.pipeline(transaction=False) as pipe:
            for number in range(at, min(at + 2_000, want)):
                for name, (dump, ttl_ms) in dumps.items():
                    pipe.restore(store.keys(name, f"kept-{number}"), ttl_ms, dump)
            await pipe.execute()
        at += 2_000


async def _raw(store: AsyncStore, key: str) -> bytes:
    with redis.Redis.from_url(store.cell.url) as client:  # a dump is binary
        dump: bytes = client.dump(key)
    return dump


# --- the messages of a session ----------------------------------------------------------------------------


def transcript(most: int) -> bool:
    """Measure the cost of a run whose session has many messages, by context assembler."""
    return asyncio.run(_with_redis(transcripts.measure, most))


# --- runs that wait --------------------------------------------------------------------------------------


def backlog(most: int) -> bool:
    """Measure the cost of a run, and of a fully used worker, with queues of different length."""
    print("\nA queue of runs, consumed by a worker whose only slot is occupied\n")
    print("| queued | worker CPU, % | Redis CPU, % | commands/s | a run, ms | own CPU, ms | Redis CPU, ms |")
    print("|---|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        Client(server.url) as client,
        Worker(Path(folder), server.url, waiting_agent(HOUR_MS), "-c", "1", app="tasks") as worker,
    ):
        print_machine(server.url)
        held = client.submit(RunRequest(agent_id="waits", session_id="held", input_text="go"))
        wait(lambda: client.record(held.id).started_ms, "the slot of the worker is occupied")
        rows, queued = [], 0
        for count in [count for count in BACKLOG if count <= most]:
            _queue(server.url, count - queued)
            queued = count
            rows.append(asyncio.run(_measure_with_queue(worker, server.url, queued)))
        client.cancel(held.id)
    first, last = rows[0], rows[-1]
    return (
        last.idle_cpu - first.idle_cpu <= MAX_IDLE_CPU_GROWTH and last.run_ms <= MAX_RUN_RATIO * first.run_ms
    )


class _QueueCost(NamedTuple):
    """The CPU of a fully used worker and its Redis in percent of a core, and the CPU of a run in ms."""

    idle_cpu: float
    run_ms: float


def _queue(url: str, runs: int) -> None:
    """Submit `runs` runs from two processes."""
    if runs <= 0:
        return
    context = multiprocessing.get_context("spawn")
    producers = [context.Process(target=_produce, args=(url, half)) for half in (runs // 2, runs - runs // 2)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
        if producer.exitcode:
            sys.exit("a producer has failed")


def _produce(url: str, runs: int) -> None:
    with Client(url) as client:
        for _ in range(runs):
            client.submit(RunRequest(agent_id="waits", session_id=uuid.uuid4().hex, input_text="go"))


async def _measure_with_queue(worker: Worker, url: str, queued: int, seconds: float = 12.0) -> _QueueCost:
    """Measure the worker for some seconds, then runs that this process claims directly."""
    agents = [steps_bench.agent_of("runs", 0, 10)]
    async with steps_bench.process(url, agents) as (store, runner, settings):
        waiting = int(await store.redis.zcard(store.keys("sent", settings.queue)))
        if waiting != queued or await store.redis.llen(settings.queue) != queued:
            sys.exit(f"{waiting} runs are waiting instead of {queued}")
        await asyncio.sleep(1.0)
        before, cpu_s, began = await _spent(store), worker.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        took, after = time.monotonic() - began, await _spent(store)
        own, of_redis = 100 * (worker.cpu_s() - cpu_s) / took, (after.cpu_ms - before.cpu_ms) / took / 10
        asked = (after.commands - before.commands) / took
        await _execute(store, runner, settings, RUNS // 4)
        before, moment = await _spent(store), steps_bench.Moment.now()
        await _execute(store, runner, settings, RUNS)
        run, after = steps_bench.Moment.now().since(moment), await _spent(store)
    redis_ms = (after.cpu_ms - before.cpu_ms) / RUNS
    print(
        f"| {queued:,} | {own:.2f} | {of_redis:.2f} | {asked:.1f} "
        f"| {run.wall_ms / RUNS:.2f} | {run.own_ms / RUNS:.2f} | {redis_ms:.2f} |",
        flush=True,
    )
    return _QueueCost(own + of_redis, run.own_ms / RUNS + redis_ms)


# --- shared by the sections ------------------------------------------------------------------------------


class _Spent(NamedTuple):
    """What Redis has used so far. `cpu_ms` is its CPU time; `commands` includes those inside of scripts."""

    cpu_ms: float
    received: int
    sent: int
    commands: int


async def _spent(store: AsyncStore) -> _Spent:
    cpu, stats = await store.redis.info("cpu"), await store.redis.info("stats")
    used_s = cpu["used_cpu_sys_main_thread"] + cpu["used_cpu_user_main_thread"]
    return _Spent(
        1000 * used_s,
        stats["total_net_input_bytes"],
        stats["total_net_output_bytes"],
        stats["total_commands_processed"],
    )


async def _with_redis(section: Callable[..., Any], most: int) -> bool:
    agents = [steps_bench.agent_of("runs", 0, 10), *transcripts.agents()]
    for steps in LENGTHS:
        agents.append(steps_bench.agent_of(f"steps-{steps}", steps // 2, STEP_BYTES))
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder)) as server,
    ):
        print_machine(server.url)
        async with steps_bench.process(server.url, agents) as (store, runner, settings):
            for _ in range(3):
                await steps_bench.run_once(store, runner, settings, "steps-100", uuid.uuid4().hex)
            met: bool = await section(store, runner, settings, most)
            return met


async def _execute(store: AsyncStore, runner: Runner, settings: Settings, runs: int) -> None:
    """Submit and execute `runs` runs, one after the other.

    A single run becomes the session that is copied.
    """
    for number in range(runs):
        run_id = "kept-0" if runs == 1 and number == 0 else uuid.uuid4().hex
        request = RunRequest(agent_id="runs", session_id=run_id, run_id=run_id, input_text="go")
        await asubmit(store, request, settings=settings)
        await runner.execute(run_id)
        await store.run(confirm_completion(runs=[run_id, "1"]))  # as if Celery had been notified


async def _measure_runs(store: AsyncStore, runner: Runner, settings: Settings, what: str) -> float:
    await _execute(store, runner, settings, RUNS // 4)
    before, began = await _spent(store), steps_bench.Moment.now()
    await _execute(store, runner, settings, RUNS)
    took, after = steps_bench.Moment.now().since(began), await _spent(store)
    megabytes = (await store.redis.info("memory"))["used_memory"] / 1e6
    redis_ms = (after.cpu_ms - before.cpu_ms) / RUNS
    own_ms = took.own_ms / RUNS
    print(
        f"| {what} | {took.wall_ms / RUNS:.2f} | {own_ms:.2f} | {redis_ms:.2f} | {megabytes:,.0f} |",
        flush=True,
    )
    return own_ms + redis_ms


SECTIONS: dict[str, Callable[[int], bool]] = {
    "processes": processes,
    "length": length,
    "sessions": sessions,
    "backlog": backlog,
    "transcript": transcript,
}
