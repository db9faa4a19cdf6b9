"""Recorded extensions: the only place where a run waits for a larger budget, and takes it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from openagents_worker.errors import BudgetExhausted, OpenAgentsError
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import WaitKind
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.rules import EXTEND
from openagents_worker.runtime.working_budget import TIME, limits_in
from openagents_worker.store.facts import FactKind

__all__ = ["more_of", "more_steps", "more_time"]


async def more_of(
    recorder: Recorder, name: str, current: float, limit: float, exhausted: OpenAgentsError
) -> None:
    """The limit `name` is used up: take an extension, or wait for one. The caller checks the limit again.

    Raises `exhausted` if the budget does not pause the run and nobody has extended it before.
    """
    budget, facts = recorder.budget, recorder.waits.facts
    if budget.pauses or recorder.rules.next_kind() == EXTEND:
        await _take_extension(recorder, name, current, limit, exhausted)
        return
    async with _one_at_a_time(recorder):
        if budget.extended.get(name, limit) > limit:
            return  # another call has taken an extension meanwhile
        await facts.refresh()  # an extension may have been stored that was not announced yet
        if not facts.of(FactKind.EXTEND):
            raise exhausted
        await _take_extension(recorder, name, current, limit, exhausted)


@asynccontextmanager
async def _one_at_a_time(recorder: Recorder) -> AsyncGenerator[None]:
    """A block in which no other call takes an extension: a call that finds none ends the run."""
    lock = recorder.budget.extending
    if lock.locked():
        with recorder.in_progress.waiting():
            await lock.acquire()
    else:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


async def _take_extension(
    recorder: Recorder, name: str, current: float, limit: float, exhausted: OpenAgentsError
) -> None:
    budget, waits = recorder.budget, recorder.waits
    timeout_ms = None if budget.pauses else 0

    async def make(info: CallInfo) -> Outcome:
        if info.emit is not None and waits.facts.stored_wait(info.call_id) is None:
            info.emit("run.budget_exceeded", {"kind": name, "limit": limit, "current": current})
        while budget.extended.get(name, limit) <= limit:
            fact = await waits.until(
                info,
                WaitKind.BUDGET,
                name=name,
                fact=f"{FactKind.EXTEND}:",
                timeout_ms=timeout_ms,
                limit=max(limit, budget.extended.get(name, 0)),
            )
            if fact is not None:  # else another call has taken an extension
                value = fact.value(run_id=recorder.run_id)
                limits = limits_in(value.get("budget"))
                extended = {"budget": limits, "by": str(value.get("by") or "")}
                is_larger = any(each != name or limits[each] > limit for each in limits)
                return Outcome(value=limits, events=[("run.budget_extended", extended)] if is_larger else [])
            if not budget.pauses:  # an earlier attempt has taken one of another limit here
                return Outcome(error=exhausted, may_retry=False)
        return Outcome(value={})

    await recorder.call(EXTEND, name, "", make)


async def more_steps(recorder: Recorder, limit: int, exhausted: OpenAgentsError) -> int:
    """The larger number of steps that the run may make now. Raises `exhausted`."""
    while (extended := int(recorder.budget.extended.get("max_steps", 0))) <= limit:
        await more_of(recorder, "max_steps", limit, limit, exhausted)
    return extended


async def more_time(recorder: Recorder) -> None:
    """Before a call is made: if the time of the run is used up, take an extension or wait for one.

    Calls in progress end before a run waits here, so that nothing has to be made twice. A run whose budget
    does not pause it ends, here or in the middle of a call (`RunDeadline`). Whether the time is over differs
    from attempt to attempt, so a call that an earlier attempt has recorded here is replayed first.
    """
    while (exhausted := _out_of_time(recorder)) is not None:
        await more_of(recorder, TIME, exhausted.current or 0, exhausted.limit or 0, exhausted)


def _out_of_time(recorder: Recorder) -> BudgetExhausted | None:
    """The error of a run that has no time for its next call; None if the call may be made."""
    limit, clock = recorder.budget.limit(TIME), recorder.budget.clock
    if limit is None or clock is None:
        return None
    following = recorder.rules.next_kind()
    is_recorded = following == EXTEND and recorder.rules.next_name() == TIME
    is_over = following is None and clock.active_ms >= limit
    return clock.exhausted(limit) if is_recorded or is_over else None
