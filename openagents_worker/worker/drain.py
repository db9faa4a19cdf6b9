"""The drain. The only place that says how a worker that is told to stop gives its runs away.

Order matters: no new runs, then each run up to its next commit and on to somebody else, then those whose
calls take too long, and only then the end of the lease. Whatever is killed in between is a dead worker like
any other: its runs are reclaimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.heartbeat import RunHost

__all__ = ["drain", "let_go"]

log = get_logger(__name__)


class Draining(RunHost, Protocol):
    accepting: bool

    async def hurry_all(self) -> None: ...


async def drain(run_host: Draining, limits: TimeLimits) -> bool:
    """Hand over every run, at its next commit or, when the drain is over, out of the call that it is in.

    False: some are still at work, in what cannot be cancelled. Their worker dies with them.
    """
    run_host.accepting = False
    runs = len(run_host.known())
    handed_over = await _within(limits.drain_s, run_host.latch_all(LatchReason.HANDOVER))
    if not handed_over:
        log.info("worker.hurries", runs=len(run_host.known()))
        handed_over = await _within(limits.let_go_s, run_host.hurry_all())
    log.info("worker.drained", runs=runs, left=len(run_host.known()))
    return handed_over


async def let_go(run_host: RunHost, limits: TimeLimits) -> bool:
    """Whatever still works stops, and can write nothing any more. False: some of it cannot be stopped."""
    return await _within(limits.confirm_s, run_host.latch_all(LatchReason.FENCED))


async def _within(timeout_s: float, work: Awaitable[None]) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        return False
    return True
