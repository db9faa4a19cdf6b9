"""A runner that runs nothing: it notes what the worker's parts tell it."""

from __future__ import annotations

import asyncio

from openagents_worker.runtime.latch import LatchReason


class NotingCarrier:
    """`known_runs` is what it says it runs; `letting_go` decides when `latch_all` returns."""

    def __init__(self, *known: str) -> None:
        self.accepting = True
        self.known_runs = set(known)
        self.latched: list[tuple[str, LatchReason]] = []
        self.all_latched: list[LatchReason] = []
        self.hurried = False
        self.letting_go = asyncio.Event()
        self.letting_go.set()

    def known(self) -> frozenset[str]:
        return frozenset(self.known_runs)

    def owned_runs(self) -> frozenset[str]:
        return self.known()

    def latch(self, run_id: str, reason: LatchReason) -> None:
        self.latched.append((run_id, reason))

    async def hurry_all(self) -> None:
        self.hurried = True
        await self.letting_go.wait()
        self.known_runs.clear()

    async def latch_all(self, reason: LatchReason) -> None:
        self.all_latched.append(reason)
        await self.letting_go.wait()
        self.known_runs.clear()
