"""Recorded extensions: the only place where a run waits for a larger budget, and takes it."""

from __future__ import annotations

from openagents_worker.errors import OpenAgentsError
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import WaitKind
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.rules import EXTEND
from openagents_worker.runtime.working_budget import limits_in
from openagents_worker.store.facts import FactKind

__all__ = ["more_of", "more_steps"]


async def more_of(
    recorder: Recorder, name: str, current: float, limit: float, exhausted: OpenAgentsError
) -> None:
    """The limit `name` is used up: take an extension, or wait for one. The caller checks the limit again.

    Raises `exhausted` if the budget does not pause the run and nobody has extended it before.
    """
    budget, waits = recorder.budget, recorder.waits
    is_extended = recorder.rules.next_kind() == EXTEND or bool(waits.facts.of(FactKind.EXTEND))
    if not budget.pauses and not is_extended:
        raise exhausted

    async def make(info: CallInfo) -> Outcome:
        if info.emit is not None and waits.facts.stored_wait(info.call_id) is None:
            info.emit("run.budget_exceeded", {"kind": name, "limit": limit, "current": current})
        while budget.extended.get(name, limit) <= limit:
            fact = await waits.until(info, WaitKind.BUDGET, name=name, fact=f"{FactKind.EXTEND}:")
            if fact is not None:  # else another call has taken an extension
                value = fact.value(run_id=recorder.run_id)
                extended = {"budget": limits_in(value.get("budget")), "by": str(value.get("by") or "")}
                return Outcome(value=extended["budget"], events=[("run.budget_extended", extended)])
        return Outcome(value={})

    await recorder.call(EXTEND, name, "", make)


async def more_steps(recorder: Recorder, limit: int, exhausted: OpenAgentsError) -> int:
    """The larger number of steps that the run may make now. Raises `exhausted`."""
    while (extended := int(recorder.budget.extended.get("max_steps", 0))) <= limit:
        await more_of(recorder, "max_steps", limit, limit, exhausted)
    return extended
