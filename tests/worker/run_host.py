"""A run host that executes no runs: it records the calls of the worker's parts."""

from __future__ import annotations

import asyncio

from openagents_worker.runtime.latch import LatchReason


class RecordingRunHost:
    """`known_runs` is the result of `known()`; `latch_all` returns when `stop_allowed` is set."""

    def __init__(self, *known: str) -> None:
        self.accepting = True
        self.known_runs = set(known)
        self.latched: list[tuple[str, LatchReason]] = []
        self.all_latched: list[LatchReason] = []
        self.hurried = False
        self.stop_allowed = asyncio.Event()
        self.stop_allowed.set()

    def known(self) -> frozenset[str]:
        return frozenset(self.known_runs)

    def owned_runs(self) -> frozenset[str]:
        return self.known()

    def latch(self, run_id: str, reason: LatchReason) -> None:
        self.latched.append((run_id, reason))

    async def hurry_all(self) -> None:
        self.hurried = True
        await self.stop_allowed.wait()
        self.known_runs.clear()

    async def latch_all(self, reason: LatchReason) -> None:
        self.all_latched.append(reason)
        await self.stop_allowed.wait()
        self.known_runs.clear()
