"""Runs that ask for requests of one limit of the fleet, script by script, on a real Redis."""

from __future__ import annotations

from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.store.scripts import Admission
from tests.store.test_scripts import Bench

__all__ = ["HOUR_MS", "Fleet"]

HOUR_MS = 3_600_000
FAR_MS = 253_370_764_800_000  # the year 9999


class Fleet:
    """Runs, each in a session of its own, that ask for requests of one limit."""

    def __init__(self, bench: Bench, **limit: int) -> None:
        self.bench = bench
        self.limit = limit
        self.fences: dict[str, str] = {}

    def start(self, run_id: str, **submitted: Any) -> None:
        self.fences[run_id] = self.bench.claimed(run_id, session_id=run_id, **submitted)

    def again(self, run_id: str, incarnation: str = "w1") -> None:
        """The run was woken, and a worker claims it again."""
        self.fences[run_id] = self.bench.claim(run_id, incarnation)

    def take(self, run_id: str, **changed: Any) -> Admission:
        if run_id not in self.fences:
            self.start(run_id)
        taken: Admission = self.bench.do(
            "limit_take", run_id=run_id, fence=self.fences[run_id], **self.limit, **changed
        )
        return taken

    def settle(self, run_id: str, **changed: Any) -> list[str]:
        wakes = self.bench.do("limit_settle", run_id=run_id, fence=self.fences[run_id], **changed)
        return [wake.run_id for wake in wakes]

    def park(self, run_id: str, tenant: str = "") -> list[str]:
        """The run is parked. Returns the runs that are called."""
        if run_id not in self.fences:
            self.start(run_id)
        parked = self.bench.do(
            "suspend",
            run_id=run_id,
            fence=self.fences[run_id],
            kind="park",
            delay_ms=0,
            call="",
            error_code="",
            park_state="waiting",
            waits=dumps([{"kind": "limit", "name": "k", "until_ms": FAR_MS}]),
            waiting_payload="{}",
            due_ms=FAR_MS,
            limit="k",
            tenant=tenant,
        )
        assert parked.answer == "OK"
        return [wake.run_id for wake in parked.wakes]

    def serve(self) -> list[str]:
        """A second has passed in which nobody has served the limit."""
        self.bench.redis.zadd(self.bench.store.keys("limits"), {"k": 1}, xx=True)
        return [wake.run_id for wake in self.bench.do("limit_serve").wakes]

    def schedule(self, ms: int) -> None:
        """As if so much time had passed."""
        key = self.bench.store.keys("limit", "k")
        for field, factor in (("next_us", 1000), ("next_tokens_us", 1000), ("blocked_until_ms", 1)):
            if (at := self.bench.redis.hget(key, field)) is not None:
                self.bench.redis.hset(key, field, str(int(at) - ms * factor))

    def time_out(self, run_id: str) -> None:
        """The run continues because its wait is over, not because it is called."""
        self.bench.redis.zadd(self.bench.store.keys("timeouts"), {run_id: 1}, xx=True)
        assert [wake.run_id for wake in self.bench.do("wake").wakes] == [run_id]

    @property
    def queue(self) -> list[str]:
        return list(self.bench.redis.zrange(self.bench.store.keys("limit_queue", "k"), 0, -1))
