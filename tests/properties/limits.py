"""Limits of the fleet under all faults: the machine and its model, with workers that ask for requests.

One limit is for concurrent requests, the other one for requests per minute. A tick is longer than a minute,
so the second one allows one request per tick.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from hypothesis.stateful import invariant

from openagents_worker.store import scripts
from tests.properties.lab import TICK_MS
from tests.properties.machine import (
    ACTS,
    ANY,
    LOST,
    WAYS,
    Act,
    Attempt,
    Protocol,
    Way,
    Worker,
    Write,
    act,
    pick,
)
from tests.properties.truth import PARKED, PARKS, Parking, Run, Truth, Wakes

__all__ = ["LimitedProtocol"]

AT_ONCE = {"c": 1, "r": 0}
PER_MINUTE = {"c": 0, "r": 1}
NAMES = tuple(AT_ONCE)
TENANTS = {"s": "a", "t": "b"}
MOST_CALLED = 100


@dataclass
class Limit:
    """What must be true of one limit."""

    at_once: int = 0  # 0: no such limit
    per_tick: int = 0
    reserved_at: float = -1.0  # tick of the last reservation
    blocked_until: float = -1.0
    calls: dict[str, str] = field(default_factory=dict)  # reservation -> run
    queue: dict[str, int] = field(default_factory=dict)  # run -> place
    tenants: dict[str, int] = field(default_factory=dict)  # tenant -> its last place
    called: dict[str, float] = field(default_factory=dict)  # run -> tick
    look_at: float | None = None


class LimitedTruth(Truth):
    """The model, with limits."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = {name: Limit() for name in NAMES}
        self.parked: dict[str, str] = {}  # run -> limit, until its next claim

    def claim(self, run_id: str, incarnation: str, nonce: str, newest: int) -> tuple[str, Wakes]:
        was_running = run_id in self.runs and self.runs[run_id].state == "running"
        answer, wakes = super().claim(run_id, incarnation, nonce, newest)
        if answer == "CLAIMED" and not was_running:
            self.parked.pop(run_id, None)
        return answer, wakes

    def submit(self, asked: Run, delay: float, expires: float, reject: bool) -> str:
        answer = super().submit(asked, delay, expires, reject)
        if answer == "NEW":
            self.parked.pop(asked.id, None)
        return answer

    def take(self, name: str, run_id: str, fence: str, id_: str, may_park: bool) -> tuple[str, Wakes]:
        if not self.writer(run_id, fence):
            return "FENCED", set()
        limit = self.limits[name]
        limit.at_once, limit.per_tick = AT_ONCE[name], PER_MINUTE[name]
        if id_ in limit.calls:
            return "OK", set()
        waits_for_others = may_park and run_id not in limit.called
        others = len(limit.queue.keys() - {run_id}) if waits_for_others else 0
        called = self._expected(limit) if waits_for_others else 0
        is_soon = self._has_slot(limit)
        others = 0 if limit.per_tick and is_soon else others  # the runs that were called are late
        is_full = bool(limit.at_once) and self._in_use(limit) + called >= limit.at_once
        if is_full or others or not is_soon:
            is_busy = is_full and not others and is_soon
            return "BUSY" if is_busy else "LATER", self._serve(limit, name)
        if not limit.at_once:
            limit.calls = {each: run for each, run in limit.calls.items() if self.holds(each, run)}
        limit.reserved_at = self.now
        limit.calls[id_] = run_id
        limit.called.pop(run_id, None)
        limit.queue.pop(run_id, None)
        return "OK", self._serve(limit, name)

    def settle(self, name: str, id_: str, blocked: float) -> Wakes:
        limit = self.limits[name]
        limit.calls.pop(id_, None)
        if blocked:
            limit.blocked_until = max(limit.blocked_until, self.now + blocked)
        return self._serve(limit, name)

    def park_for_limit(
        self, run_id: str, fence: str, name: str, tenant: str, delay: float, facts_seen: int
    ) -> tuple[str, Wakes]:
        answer, wakes = super().park(run_id, fence, Parking("waiting", (), delay), facts_seen, 0, lends=False)
        run = self.runs.get(run_id)
        if answer != "OK" or not run or run.state != "waiting":
            return answer, wakes
        self.parked[run_id] = name
        limit = self.limits[name]
        first = min(limit.queue.values(), default=0)
        if limit.called.pop(run_id, None) is not None:
            limit.queue[run_id] = first
        elif run_id not in limit.queue:
            last = limit.tenants.get(tenant)
            place = max(first, 0 if last is None else last + 1)
            limit.tenants[tenant] = limit.queue[run_id] = place
        return "OK", self._serve(limit, name)

    def serve(self) -> Wakes:
        wakes: Wakes = set()
        for name, limit in self.limits.items():
            if limit.look_at is not None and limit.look_at < self.now:
                limit.look_at = None
                wakes |= self._serve(limit, name)
        return wakes

    def holds(self, id_: str, run_id: str) -> bool:
        """Whether the attempt of this reservation owns its run."""
        return self.writer(run_id, id_.partition(" ")[0]) is not None

    def _has_slot(self, limit: Limit) -> bool:
        return limit.blocked_until <= self.now and not (limit.per_tick and limit.reserved_at == self.now)

    def _expected(self, limit: Limit) -> int:
        return sum(at == self.now for at in limit.called.values())

    def _in_use(self, limit: Limit) -> int:
        if len(limit.calls) >= limit.at_once:
            limit.calls = {id_: run for id_, run in limit.calls.items() if self.holds(id_, run)}
        return len(limit.calls)

    def _room(self, limit: Limit) -> int:
        if not self._has_slot(limit):
            return 0
        room = 1 if limit.per_tick else MOST_CALLED
        if limit.at_once:
            room = min(room, limit.at_once - self._in_use(limit))
        return room - self._expected(limit)

    def _serve(self, limit: Limit, name: str) -> Wakes:
        wakes: Wakes = set()
        if not limit.queue:
            return wakes
        room = self._room(limit)
        for run_id in sorted(limit.queue, key=lambda run_id: (limit.queue[run_id], run_id)):
            if len(wakes) >= room:
                break
            del limit.queue[run_id]
            run = self.runs.get(run_id)
            if run and run.state in PARKED and self.parked.get(run_id) == name:
                limit.called[run_id] = self.now
                wakes |= self._unpark(run)
        limit.look_at = self.now if limit.queue else None
        if not limit.queue:
            limit.tenants.clear()
        return wakes


LIMIT_ACTS: list[Act] = []
limit_act = partial(act, among=LIMIT_ACTS)


class LimitedProtocol(Protocol):
    """The machine, with workers that ask for requests."""

    acts: ClassVar[Sequence[Act]]
    truth: LimitedTruth

    def __init__(self) -> None:
        self.reserved: dict[tuple[str, str], tuple[str, str, str]] = {}
        super().__init__()

    def new_truth(self) -> Truth:
        return LimitedTruth()

    @limit_act(
        12, when=lambda self: self.at_work, w=ANY, i=ANY, name=NAMES, may_park=(True, True, False), way=WAYS
    )
    def ask(self, w: int, i: int, name: str, may_park: bool, way: Way) -> None:
        worker = pick(self.at_work, w)
        self.take(worker.carries[pick(sorted(worker.carries), i)], name, may_park, way)

    @limit_act(2, when=lambda self: self.zombies, i=ANY, name=NAMES)
    def ask_late(self, i: int, name: str) -> None:
        """A former owner asks."""
        self.take(pick(self.zombies, i), name, True, "answered")

    def take(self, attempt: Attempt, name: str, may_park: bool, way: Way) -> str:
        """The answer. A request whose answer was lost is never sent, nor settled."""
        call = f"c{next(self.numbers)}"
        asked = scripts.limit_take(
            name=name,
            run_id=attempt.run_id,
            fence=attempt.fence,
            call=call,
            tokens=0,
            wait_ms=1_000,
            may_park=may_park,
            requests_per_minute=PER_MINUTE[name],
            max_concurrency=AT_ONCE[name],
        )
        id_ = f"{attempt.fence} {call} {attempt.run_id}"
        for _ in range(2 if way == "repeated" else 1):
            admission = self.lab.run(asked)
            expected, wakes = self.truth.take(name, attempt.run_id, attempt.fence, id_, may_park)
            assert admission.answer == expected, (
                f"{attempt.run_id} asks for {name}: {admission.answer}, but it is {expected}"
            )
            self.send(admission.wakes, wakes, lost=False)
        if expected == "OK" and way != "lost":
            self.reserved[name, id_] = (attempt.run_id, attempt.fence, call)
        return expected

    @limit_act(6, when=lambda self: self.reserved, i=ANY, blocked=(0, 0, 0, 1.5), way=WAYS)
    def settle(self, i: int, blocked: float, way: Way) -> None:
        """A request has ended, perhaps of an attempt that has lost its run. The command may be sent twice."""
        name, id_ = pick(sorted(self.reserved), i)
        run_id, fence, call = self.reserved[name, id_]
        settled = scripts.limit_settle(
            name=name, run_id=run_id, fence=fence, call=call, tokens=0, blocked_ms=int(blocked * TICK_MS)
        )
        for _ in range(2 if way == "repeated" else 1):
            wakes = self.lab.run(settled)
            self.send(wakes, self.truth.settle(name, id_, blocked), lost=False)
        if way != "lost":
            del self.reserved[name, id_]

    @limit_act(10, when=lambda self: self.at_work, w=ANY, i=ANY, name=NAMES, way=WAYS)
    def wait_for_limit(self, w: int, i: int, name: str, way: Way) -> None:
        worker = pick(self.at_work, w)
        self.step(worker, worker.carries[pick(sorted(worker.carries), i)], f"limit {name}", way)

    def write(self, attempt: Attempt, kind: str) -> Write:
        name = kind.removeprefix("limit ")
        if name == kind or attempt.format < PARKS:
            return super().write(attempt, kind if name == kind else "handover")
        attempt.batch_no += 1
        run_id, fence, seen = attempt.run_id, attempt.fence, attempt.facts_seen
        tenant = TENANTS.get(self.requests[run_id].session, "a")  # a child has a session of its own
        until_ms = self.lab.now_ms() + int(1.5 * TICK_MS)
        call = scripts.suspend(
            run_id=run_id,
            fence=fence,
            kind="park",
            delay_ms=0,
            call="",
            error_code="",
            batch_no=attempt.batch_no,
            events=[],
            park_state="waiting",
            waits=json.dumps([{"kind": "limit", "name": name, "until_ms": until_ms}]),
            waiting_payload="{}",
            due_ms=until_ms,
            facts_seen=seen,
            format=PARKS,
            limit=name,
            tenant=tenant,
        )
        return Write("park", call, lambda truth: truth.park_for_limit(run_id, fence, name, tenant, 1.5, seen))

    @limit_act(2, lost=LOST)
    def serve(self, lost: bool) -> None:
        self.send(self.lab.run(scripts.limit_serve(most=10)).wakes, self.truth.serve(), lost)

    def work_fairly(self, worker: Worker, attempt: Attempt) -> None:
        """It asks for a request of each limit before it goes on, and settles them."""
        if attempt.unanswered:
            return super().work_fairly(worker, attempt)
        for name in NAMES:
            if self.take(attempt, name, True, "answered") in ("BUSY", "LATER"):
                self.step(worker, attempt, f"limit {name}")
                return None
        super().work_fairly(worker, attempt)
        for name, id_ in list(self.reserved):
            run_id, fence, call = self.reserved.pop((name, id_))
            wakes = self.lab.run(
                scripts.limit_settle(name=name, run_id=run_id, fence=fence, call=call, tokens=0)
            )
            self.send(wakes, self.truth.settle(name, id_, 0), lost=False)
        return None

    def wake(self, limit: int, lost: bool) -> None:
        super().wake(limit, lost)
        self.serve(lost)

    def check_limits(self) -> None:
        """What is stored about the limits is what the model says, and nobody exceeds them."""
        for name, limit in self.truth.limits.items():
            stored = {
                kind: self.lab.redis.zrange(self.lab.keys(f"limit_{kind}", name), 0, -1, withscores=True)
                for kind in ("calls", "queue", "called")
            }
            assert {id_ for id_, _ in stored["calls"]} == set(limit.calls), f"requests of {name}"
            assert dict(stored["queue"]) == limit.queue, f"queue of {name}"
            assert {run_id for run_id, _ in stored["called"]} == set(limit.called), f"called for {name}"
            held = [id_ for id_, run_id in limit.calls.items() if self.truth.holds(id_, run_id)]
            assert not AT_ONCE[name] or len(held) <= AT_ONCE[name], f"{name} is exceeded: {held}"

    @invariant()
    def holds(self) -> None:
        super().holds()
        self.check_limits()


LimitedProtocol.acts = [*ACTS, *LIMIT_ACTS]
