"""Waits: the only place where a recorded call waits for a fact or a time, and that decides when a run parks.

A run parks when nothing of it can go on: every call in progress waits, and so does its program. Then it holds
no slot, and the next attempt makes the waiting calls again. A wait that ends within `IN_PLACE_MS` does not
park the run, because parking and continuing costs more than it saves.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.errors import PatternError
from openagents_worker.llm.base import CallInfo
from openagents_worker.llm.limits import LimitWait
from openagents_worker.models import WaitKind
from openagents_worker.runtime.awaited import is_waiting_for
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.calls_in_progress import CallsInProgress
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.replay_waits import QUIET_S
from openagents_worker.runtime.rules import OpenCall, Rules
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import Fact, FactKind, Facts
from openagents_worker.store.parking import Park, Wait

__all__ = ["IN_PLACE_MS", "Waits", "open_waits"]

IN_PLACE_MS = 1_000
LIMIT_SERVED_MS = 10_000  # a run is called so long after its turn at the latest, if a worker serves its limit
MAX_WAITS = 1_000  # the record of the run lists them, and each claim reads their facts
PARK_AFTER_S = 0.05  # the program makes its next call within milliseconds
PARK_BUSY_AFTER_S = 2 * QUIET_S  # for a program that may do something else than wait for its calls


@dataclass(slots=True, eq=False)
class _OpenWait:
    call_id: str
    wait: Wait
    fact: Fact
    """What is stored of the wait, so that the next attempt continues it."""
    ended: asyncio.Future[Fact | None]
    must_park: bool = False
    is_stored: bool = False
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)


class Waits:
    """The open waits of one attempt."""

    def __init__(
        self,
        facts: RunFacts,
        *,
        writer: RunWriter,
        latch: Latch,
        calls: CallsInProgress,
        rules: Rules,
        durable: bool,
    ) -> None:
        """A run that is not durable never parks: its attempt waits in place."""
        self.facts = facts
        self.clock = facts.clock
        self._writer = writer
        self._latch = latch
        self._calls = calls
        self._rules = rules
        self._durable = durable
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, _OpenWait] = {}
        self._taken: dict[str, list[str]] = {}
        self._checked_again: defaultdict[WaitKind, int] = defaultdict(int)
        self._timer: asyncio.TimerHandle | None = None
        self._writing: set[asyncio.Task[None]] = set()
        facts.when_changed.append(self._look_for_facts)
        facts.when_closed = self._close
        calls.when_none_can_end = self._plan_to_park
        latch.when_set = self._keep_intents

    async def until(
        self,
        info: CallInfo,
        kind: WaitKind,
        *,
        name: str = "",
        fact: str = "",
        timeout_ms: int | None = None,
        needs_all: bool = False,
        limit: float = 0,
        begins_again: bool = False,
        must_park: bool = False,
        shown_as: str = "",
    ) -> Fact | None:
        """Wait inside the recorded call `info` until this fact is there, and take it. None: it timed out.

        The arguments are those of `store.parking.Wait`; the time-out is counted from the first attempt that
        waits, or from now if it `begins_again`. Without a fact, this waits for the time only. The record of
        the call replaces the fact. `must_park`: the fact comes only while the run is parked. `shown_as`: the
        id by which a person names the call, if it differs.
        """
        wait = self._wait_of(
            info,
            kind,
            begins_again,
            call_id=shown_as or info.call_id,
            name=name,
            fact=fact,
            timeout_ms=timeout_ms,
            needs_all=needs_all,
            limit=limit,
        )
        checks = self._checked_again[kind]
        found = self.facts.take(fact) or await self._look_again(wait)
        if found is None and not self._is_over(wait) and self._checked_again[kind] == checks:
            found = await self._wait(info.call_id, wait, must_park) or await self._look_again(wait)
        if found is not None:
            self._taken.setdefault(info.call_id, []).append(found.name)
        return found

    def begin_again(self, info: CallInfo, kind: WaitKind) -> None:
        """Forget that an earlier attempt of this call has waited for this: the call looks itself whether it
        has to wait."""
        if (self.facts.stored_wait(info.call_id) or {}).get("kind") == kind.value:
            name = _fact_name(info.call_id)
            self._taken.setdefault(info.call_id, []).append(name)
            self.facts.forget([name])

    def park_for_limit(self, call_id: str, limit: LimitWait) -> None:
        """Park the run until a limit of the fleet has room. Calls in progress end before. If nobody serves
        the limit, the run asks again itself."""
        until_ms = self.clock.now_ms() + 2 * limit.delay_ms + LIMIT_SERVED_MS
        wait = Wait(WaitKind.LIMIT, limit.name, call_id, until_ms)
        with self._calls.waiting():  # this call, and those around it
            self._latch.set_parked(Park([wait], self.facts.seen, limit=limit.name, tenant=limit.tenant))

    def check_again(self, kind: WaitKind) -> None:
        """End the waits of a kind, also those that just begin, as if they had timed out: their calls look
        again what they wait for."""
        self._checked_again[kind] += 1
        for opened in list(self._open.values()):
            if opened.wait.kind is kind:
                _end(opened.ended, None)

    def taken_by(self, call_id: str) -> Sequence[str]:
        """The names of the facts that the record of this call replaces."""
        if call_id not in self._taken:
            return ()
        names = self._taken.pop(call_id)
        self.facts.forget(names)
        return names

    def _close(self) -> None:
        """The attempt has ended."""
        if self._timer is not None:
            self._timer.cancel()
        self._calls.when_none_can_end = lambda: None
        self._latch.when_set = lambda: None
        self._open.clear()

    # --- one wait ----------------------------------------------------------------------------------------

    def _wait_of(
        self, info: CallInfo, kind: WaitKind, begins_again: bool, *, timeout_ms: int | None, **fields: Any
    ) -> Wait:
        """The wait of a call. If an earlier attempt has begun this wait, its time-out stays as it was.

        A call may have waited for something else before, such as an approval.
        """
        stored = self.facts.stored_wait(info.call_id)
        if stored is not None:
            self._taken.setdefault(info.call_id, []).append(_fact_name(info.call_id))
        if stored is not None and not begins_again and stored.get("kind") == kind.value:
            until_ms = stored.get("until_ms", 0)
            until_ms = until_ms if isinstance(until_ms, int) else 0
        else:
            until_ms = 0 if timeout_ms is None else self.clock.now_ms() + max(0, timeout_ms)
        return Wait(kind, until_ms=until_ms, **fields)

    async def _look_again(self, wait: Wait) -> Fact | None:
        """The fact that ends the wait, if it is stored and was not announced yet."""
        return await self.facts.look_for(wait.fact) if wait.fact else None

    def _is_over(self, wait: Wait) -> bool:
        return bool(wait.until_ms) and wait.until_ms <= self.clock.now_ms()

    async def _wait(self, call_id: str, wait: Wait, must_park: bool) -> Fact | None:
        if len(self._open) >= MAX_WAITS:
            raise PatternError(
                f"a run cannot wait for more than {MAX_WAITS:,} signals and times at once",
                hint="use runs of their own, or let tasks wait one after another",
            )
        opened = _OpenWait(call_id, wait, self._fact_of(call_id, wait), self._loop.create_future(), must_park)
        self._open[call_id] = opened
        self._writer.facts_at_suspend[opened.fact.name] = opened.fact
        timer = None
        if wait.until_ms:
            left_s = (wait.until_ms - self.clock.now_ms()) / 1000
            timer = self._loop.call_later(max(0.0, left_s), _end, opened.ended, None)
        self._plan_to_park()
        is_cut = False
        try:
            with self._calls.waiting():
                return await opened.ended
        except asyncio.CancelledError:
            is_cut = self._latch.reason is not None  # the suspension stores the wait
            if opened.ended.done() and not opened.ended.cancelled() and (fact := opened.ended.result()):
                self.facts.give_back(fact)  # it came in the moment in which the program gave up
                self._look_for_facts()  # another call may wait for it
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del self._open[call_id]
            if not is_cut:
                del self._writer.facts_at_suspend[opened.fact.name]
                if opened.is_stored:
                    self._taken.setdefault(call_id, []).append(opened.fact.name)

    def _fact_of(self, call_id: str, wait: Wait) -> Fact:
        place = self._rules.place_of(call_id)
        value = {**wait.to_json(), "call_kind": place.kind, "node": place.node, "scope": place.scope}
        return Fact.of(FactKind.WAIT, call_id, value)

    def _look_for_facts(self) -> None:
        """New facts were read: end the waits for them, in the order in which they began."""
        for opened in list(self._open.values()):
            if not opened.ended.done() and (fact := self.facts.take(opened.wait.fact)) is not None:
                _end(opened.ended, fact)

    # --- parking -----------------------------------------------------------------------------------------

    def _plan_to_park(self) -> None:
        """Park soon, unless something of the run goes on then."""
        if self._open and self._latch.reason is None and self._durable:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(PARK_AFTER_S, self._park_if_quiet, self._calls.begun, False)

    def _park_if_quiet(self, begun: int, has_been_busy: bool) -> None:
        self._timer = None
        if not self._open or self._latch.reason is not None or not self._calls.none_can_end:
            self._write_ahead()
            return
        if begun != self._calls.begun:
            self._plan_to_park()
            return
        if not has_been_busy and not self._program_waits():
            self._write_ahead()
            later_s = PARK_BUSY_AFTER_S - PARK_AFTER_S
            self._timer = self._loop.call_later(later_s, self._park_if_quiet, begun, True)
            return
        if any(opened.ended.done() for opened in self._open.values()):
            return
        waits = [opened.wait for opened in self._open.values()]
        park = Park(waits, self.facts.seen)
        is_long = not park.due_ms or park.due_ms - self.clock.now_ms() > IN_PLACE_MS
        if is_long or any(opened.must_park for opened in self._open.values()):
            self._latch.set_parked(park)

    def _keep_intents(self) -> None:
        """The attempt stops. A call with effects that only waits begins again, as when the run parks. Any
        other one goes on; if it is stopped before it ends, nobody knows whether it had its effect."""
        is_parked = self._latch.reason is LatchReason.PARKED
        waiting = {opened.task for opened in self._open.values()}
        for call in self._calls.with_effects():
            if not (call.blocked if is_parked else is_waiting_for(call.task, waiting)):
                call.goes_on = True
                self._writer.keep_intent(call.call_id)

    def _program_waits(self) -> bool:
        """Whether every task of the program waits for a call that waits."""
        waiting = {opened.task for opened in self._open.values()}
        return all(is_waiting_for(task, waiting) for task in self._rules.tasks())

    def _write_ahead(self) -> None:
        """Store the waits now, because the run goes on: if its worker dies, their time-outs stay."""
        facts = [opened for opened in self._open.values() if not opened.is_stored and opened.wait.until_ms]
        if not facts or self._latch.reason is not None or not self._durable:
            return
        task = outside_runs(self._write(facts), name=f"waits {self._writer.run_id}")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, waits: Iterable[_OpenWait]) -> None:
        for opened in waits:
            if self._open.get(opened.call_id) is not opened:
                continue  # it has ended meanwhile, and its record does not replace what is stored after it
            opened.is_stored = True
            try:
                await self._writer.write_fact(opened.fact)
            except RunLatched:
                return


def _end(future: asyncio.Future[Fact | None], fact: Fact | None) -> None:
    if not future.done():
        future.set_result(fact)


def _fact_name(call_id: str) -> str:
    return f"{FactKind.WAIT}:{call_id}"


def open_waits(facts: Facts) -> Collection[OpenCall]:
    """The calls that were waiting when the run was suspended, and those that have created a child run."""
    found: dict[str, OpenCall] = {}
    for fact in (*facts.of(FactKind.WAIT), *facts.of(FactKind.DELEGATED)):
        value = fact.value()
        if isinstance(value, dict):
            kind, node, scope = (str(value.get(name, "")) for name in ("call_kind", "node", "scope"))
            found[fact.id] = OpenCall(fact.id, kind, node, scope, is_begun=False)
    return found.values()
