"""The drain. The only place that says how a worker that is told to stop gives its runs away.

Order matters: no new runs, then each run up to its next commit and on to somebody else, and only then the end
of the lease. Whatever is killed in between is a dead worker like any other: its runs are reclaimed.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.telemetry import get_logger
from openagents_worker.worker.heartbeat import Carrier

__all__ = ["drain", "let_go"]

log = get_logger(__name__)

LET_GO_S = 2.0  # calls are being cancelled; a tool in a thread that cannot be stopped is not waited for


class Draining(Carrier, Protocol):
    accepting: bool


async def drain(carrier: Draining, timeout_s: float) -> bool:
    """Hand over every run at its next commit, for at most `timeout_s`; False: some are still at work."""
    carrier.accepting = False
    runs = len(carrier.known())
    handed_over = await _latched(carrier, LatchReason.HANDOVER, timeout_s)
    log.info("worker.drained", runs=runs, left=len(carrier.known()))
    return handed_over


async def let_go(carrier: Carrier) -> None:
    """The lease is over: whatever still works stops, and can write nothing any more."""
    if not await _latched(carrier, LatchReason.FENCED, LET_GO_S):
        log.warning("worker.left_running", runs=len(carrier.known()))


async def _latched(carrier: Carrier, reason: LatchReason, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await carrier.latch_all(reason)
    except TimeoutError:
        return False
    return True
