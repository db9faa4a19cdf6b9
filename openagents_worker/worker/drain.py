"""The drain: the only place that defines how a stopping worker hands its runs over.

The order matters. First the worker accepts no new runs. Then each run is handed over at its next commit. Then
runs inside long calls are interrupted. The lease ends last. A worker that is killed during the drain is a
dead worker like any other: its runs are reclaimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.heartbeat import RunHost

__all__ = ["drain", "stop_runs"]

log = get_logger(__name__)


class DrainableHost(RunHost, Protocol):
    accepting: bool

    async def hurry_all(self) -> None: ...


async def drain(run_host: DrainableHost, limits: TimeLimits) -> bool:
    """Hand over every run at its next commit or, when the drain time is over, out of its current call.

    Returns False if some runs still execute code that cannot be cancelled; the process must then be ended.
    """
    run_host.accepting = False
    runs = len(run_host.known())
    if runs:  # from here on, no run goes on after its next commit
        log.info("worker.draining", runs=runs, at_most_s=limits.drain_s)
    handed_over = await _ends_within(limits.drain_s, run_host.latch_all(LatchReason.HANDOVER))
    if not handed_over:
        log.info("worker.hurries", runs=len(run_host.known()))
        handed_over = await _ends_within(limits.let_go_s, run_host.hurry_all())
    log.info("worker.drained", runs=runs, left=len(run_host.known()))
    return handed_over


async def stop_runs(run_host: RunHost, limits: TimeLimits) -> bool:
    """Stop all remaining runs and fence their writes. Returns False if some cannot be stopped."""
    return await _ends_within(limits.confirm_s, run_host.latch_all(LatchReason.FENCED))


async def _ends_within(timeout_s: float, work: Awaitable[None]) -> bool:
    """Wait for the work. Returns whether it has ended within the time-out; otherwise it is cancelled."""
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        return False
    return True
