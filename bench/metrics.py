"""Metrics: what measuring costs a run, in processor time of its worker.

The same run of 100 steps, in alternating rounds with a meter of Prometheus and without one. A step may cost
at most 5 % more with its measurements. A scrape of a worker with 100 models is timed, too.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.steps import agent_of, process, run_once
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.prometheus import PrometheusMeter, metrics_text, new_registry

TURNS = 50  # short runs, so that what disturbs the machine meets both of a pair
STEPS = 2 * TURNS
MOST = 1.05
MODELS = 100


def main(arguments: Sequence[str] = ()) -> int:
    """Print the ratio of the processor times. Return 1 if measuring costs too much."""
    parser = argparse.ArgumentParser(prog="python -m bench metrics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(data_dir=Path(folder)) as redis:
        ratio = asyncio.run(_compare(redis.url, options.rounds))
    _time_scrape()
    return int(ratio > MOST)


async def _compare(redis_url: str, rounds: int) -> float:
    with_ms: list[float] = []
    without_ms: list[float] = []
    meter = PrometheusMeter()
    async with process(redis_url, [agent_of("steady", TURNS, 10)]) as (store, runner, settings):
        for number in range(-1, rounds):  # the first one is the warm-up
            for is_measured in (True, False) if number % 2 else (False, True):
                if is_measured:
                    signals.register_meter(meter)
                began_s = time.process_time()
                await run_once(store, runner, settings, "steady", f"run-{number}-{is_measured}")
                took_ms = (time.process_time() - began_s) * 1000
                signals.unregister_meter(meter)
                if number >= 0:
                    (with_ms if is_measured else without_ms).append(took_ms)
    ratio = median(measured / plain for measured, plain in zip(with_ms, without_ms, strict=True))
    print(f"processor time of a step, without a meter: {median(without_ms) / STEPS * 1000:.0f} µs")
    print(f"processor time of a step, with a meter:    {median(with_ms) / STEPS * 1000:.0f} µs")
    print(f"ratio, the median of {rounds} pairs: {ratio:.3f} (at most {MOST})")
    return ratio


def _time_scrape() -> None:
    meter = PrometheusMeter()
    for number in range(MODELS):
        model = {"gen_ai.request.model": f"m{number}", "gen_ai.agent.id": "a"}
        meter.observe("gen_ai.client.operation.duration", 1.0, model)
        meter.observe("gen_ai.client.operation.time_to_first_chunk", 1.0, model)
        meter.count("openagents.model.calls", 1, model)
    registry = new_registry(meter)
    began_s = time.process_time()
    text, _ = metrics_text(registry)
    took_ms = (time.process_time() - began_s) * 1000
    print(f"a scrape with {MODELS} models: {len(text) / 1024:.0f} KiB, {took_ms:.1f} ms of processor time")
