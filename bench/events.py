"""The delay from an event of a run to its watchers, and the number of events that one process can store.

An event is a fenced write: one script numbers it, stores it in the stream of the run and publishes it. The
watchers use `aevents` in a separate process, over one shared connection. For comparison, in alternating
turns, a plain PUBLISH is read by as many tasks in such a process, which share one connection, too: a message
is read once and put into the queue of each task.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import redis.asyncio as redis_async

from bench._worker import megabytes, print_machine, waiting_agent
from bench.steps import FixedLease
from openagents_worker.agents import AppConfig
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.scripts import ClaimAnswer, Claimed, Wake
from openagents_worker.store.watch import awatch
from openagents_worker.submission.submit import asubmit

WORKER = "bench:1"
RATE = 200  # events a second while delays are measured
EVENTS = 600  # per turn
WATCHERS = (1, 10, 100)
MAX_P99_MS, MAX_TIMES_BARE = 5.0, 1.5
MIN_A_SECOND = 10_000
CHANNEL = "bench:channel"
Emit = Callable[[float], Awaitable[Any]]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the tables. Return 0 if the delays and the rate are within the limits."""
    parser = argparse.ArgumentParser(prog="python -m bench events", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder)) as server,
    ):
        print_machine(server.url)
        return asyncio.run(_measure(server.url, options.rounds))


async def _measure(url: str, rounds: int) -> int:
    store, settings = AsyncStore(Cell(url)), load_settings({"OPENAGENTS_REDIS_URL": url})
    agents = ["watched", "{}"]
    await store.run(scripts.register(incarnation=WORKER, lease_ms=3_600_000, agents=agents))
    met = [await _delays(store, settings, url, rounds, watchers) for watchers in WATCHERS]
    met.append(await _many(store, settings, rounds))
    await store.close()
    return 0 if all(met) else 1


async def _run(store: AsyncStore, settings: Settings) -> Claimed:
    """A new run that this process has claimed."""
    run_id = uuid.uuid4().hex
    request = RunRequest(agent_id="watched", session_id=run_id, run_id=run_id, input_text="go")
    await asubmit(store, request, settings=settings)
    claimed = await store.run(
        scripts.claim(run_id=run_id, incarnation=WORKER, nonce=run_id, page_bytes=1_000)
    )
    assert claimed.answer is ClaimAnswer.CLAIMED
    return claimed


# --- delays ----------------------------------------------------------------------------------------------


async def _delays(store: AsyncStore, settings: Settings, url: str, rounds: int, watchers: int) -> bool:
    ours: list[list[float]] = []
    bare: list[list[float]] = []
    most_mb = [0.0, 0.0]
    cpu_us: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        turns = [(ours, _ours(store, settings)), (bare, _bare(store))]
        for found, turn in reversed(turns) if number % 2 else turns:
            name, emit = await turn
            delays, mb, cpu_s = await _turn(url, name, watchers, emit)
            found.append(delays)
            most_mb[found is bare] = max(most_mb[found is bare], mb)
            cpu_us[found is bare].append(cpu_s * 1e6 / len(delays))
    cuts = [[statistics.quantiles(turn, n=100) for turn in found] for found in (ours, bare)]
    (ours_p50, ours_p99), (bare_p50, bare_p99) = (
        [statistics.median(cut[at] for cut in found) for at in (49, 98)] for found in cuts
    )
    times = statistics.median(one[98] / other[98] for one, other in zip(*cuts, strict=True))
    print(f"\nms from an event to {watchers} watchers, {RATE} events/s, median of {rounds} pairs\n")
    ours_us, bare_us = map(statistics.median, cpu_us)
    print("| | p50 | p99 | processor time per event and watcher, µs |\n|---|---|---|---|")
    print(f"| stored and published, `aevents` | {ours_p50:.2f} | {ours_p99:.2f} | {ours_us:.1f} |")
    print(f"| plain PUBLISH, one subscription | {bare_p50:.2f} | {bare_p99:.2f} | {bare_us:.1f} |")
    print(f"\np99 {times:.2f} times that of the plain PUBLISH; memory of the watching process: ", end="")
    print(f"{most_mb[0]:.0f} MB, plain {most_mb[1]:.0f} MB", flush=True)
    return times <= MAX_TIMES_BARE if watchers == max(WATCHERS) else ours_p99 <= MAX_P99_MS


async def _ours(store: AsyncStore, settings: Settings) -> tuple[str, Emit]:
    claimed = await _run(store, settings)
    run_id = RunRequest.model_validate_json(claimed.request).run_id
    batches = iter(range(1, 1_000_000))

    async def emit(at: float) -> None:
        event = ["bench.event", json.dumps({"at": at, "text": "x" * 200})]
        batch_no = next(batches)
        await store.run(scripts.emit(run_id=run_id, fence=claimed.fence, batch_no=batch_no, events=event))

    return run_id, emit


async def _bare(store: AsyncStore) -> tuple[str, Emit]:
    async def emit(at: float) -> None:
        await store.redis.publish(CHANNEL, json.dumps({"at": at, "text": "x" * 200}))

    return CHANNEL, emit


async def _turn(url: str, name: str, watchers: int, emit: Emit) -> tuple[list[float], float, float]:
    """All delays in a process of watchers, in ms, the memory of the process in MB, and its processor time."""
    reader = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "bench.events", "watch", url, name, str(watchers)], stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert await reader.stdout.readline() == b"ready\n"
    next_s = time.monotonic()
    for _ in range(EVENTS):
        await emit(time.time())
        next_s += 1 / RATE
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
    output = await reader.stdout.read()
    await reader.wait()
    found, mb, cpu_s = json.loads(output)
    assert len(found) == EVENTS * watchers, f"the watchers got {len(found)} events of {EVENTS * watchers}"
    return found, mb, cpu_s


async def _watch(url: str, name: str, watchers: int) -> None:
    """The main function of the process of watchers. Prints `ready`, then all delays as JSON."""
    ready, delays = asyncio.Semaphore(0), []
    store = AsyncStore(Cell(url))

    async def ours() -> None:
        seen = 0
        async with aclosing(awatch(store, name)) as events:
            async for event in events:
                if event.name == "run.attempt_started":
                    ready.release()
                if event.name == "bench.event":
                    delays.append((time.time() - event.payload["at"]) * 1000)  # type: ignore[operator]
                    seen += 1
                    if seen == EVENTS:
                        return

    queues: list[asyncio.Queue[str]] = [asyncio.Queue() for _ in range(watchers)]

    async def bare(queue: asyncio.Queue[str]) -> None:
        ready.release()
        for _ in range(EVENTS):
            message = json.loads(await queue.get())
            delays.append((time.time() - message["at"]) * 1000)

    async def read_for_all() -> None:
        client = redis_async.Redis.from_url(url, decode_responses=True)
        async with client.pubsub() as pubsub:
            await pubsub.subscribe(CHANNEL)
            for _ in range(EVENTS):
                while (message := await pubsub.get_message(True, timeout=30)) is None:
                    pass
                for queue in queues:
                    queue.put_nowait(message["data"])
        await client.aclose()

    tasks = [asyncio.create_task(bare(queue) if name == CHANNEL else ours()) for queue in queues]
    for _ in range(watchers):
        await ready.acquire()
    if name == CHANNEL:
        tasks.append(asyncio.create_task(read_for_all()))
    await asyncio.sleep(0.3)  # until all watchers have read the stored events and are subscribed
    print("ready", flush=True)
    began_s = time.process_time()
    await asyncio.gather(*tasks)
    cpu_s = time.process_time() - began_s
    await store.close()
    print(json.dumps([[round(delay, 3) for delay in delays], megabytes(), cpu_s]), flush=True)


# --- many ------------------------------------------------------------------------------------------------


async def _many(
    store: AsyncStore, settings: Settings, rounds: int, runs: int = 20, each: int = 1_000
) -> bool:
    """Measure the events per second that one process stores and publishes, from `runs` concurrent runs."""
    rates = []
    for _ in range(rounds):
        writers = [_writer(store, await _run(store, settings), settings) for _ in range(runs)]
        began = time.perf_counter()
        await asyncio.gather(*(_emit_all(writer, each) for writer in writers))
        rates.append(runs * each / (time.perf_counter() - began))
        for writer in writers:
            numbers = [
                int(id_.partition("-")[0])
                for id_, _ in await store.redis.xrange(store.keys("events", writer.run_id))
            ]
            assert numbers == list(range(1, len(numbers) + 1)), "an event is missing"
            assert len(numbers) > each, "an event is missing"
    rate = statistics.median(rates)
    print(f"\n{rate:,.0f} events/s stored and published by one process, median of {rounds}; ", end="")
    print(f"it uses {megabytes():.0f} MB")
    return rate >= MIN_A_SECOND


def _writer(store: AsyncStore, claimed: Claimed, settings: Settings) -> RunWriter:
    request = RunRequest.model_validate_json(claimed.request)
    identity = RunIdentity.of(claimed, request, WORKER)
    config = AppConfig.model_validate({"agents": [waiting_agent(0)]})
    services = Services(store, Assembly(config, env={}), settings, _send_no_wakes)
    latch = Latch()
    fenced = FencedStore(identity, store, lease=FixedLease(WORKER), latch=latch)
    return RunWriter(identity, services, store=fenced, latch=latch)


async def _send_no_wakes(_: Sequence[Wake]) -> None:
    """No run of this measurement waits for another one."""


async def _emit_all(writer: RunWriter, events: int) -> None:
    for number in range(events):
        writer.emit("bench.event", {"number": number, "text": "x" * 200})
        if number % 50 == 49:
            await writer.flush()
    await writer.flush()
    await writer.close()


if __name__ == "__main__":
    asyncio.run(_watch(sys.argv[2], sys.argv[3], int(sys.argv[4])))
