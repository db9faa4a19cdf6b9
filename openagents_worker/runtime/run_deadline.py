"""The deadline of a run: the only place that says how long an attempt may go on before its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from openagents_worker.errors import BudgetExhausted, RecordUnreadable, RedisUnreachable
from openagents_worker.runtime.clock import RunClock
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.supervision import Supervision
from openagents_worker.runtime.working_budget import TIME, limits_in
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import BY_PLACE
from openagents_worker.store.scripts import Claimed

__all__ = ["RunDeadline"]

ANSWER_S = 1.0
"""How long a run whose time is over goes on while Redis does not say whether it was extended."""


class RunDeadline:
    """`max_duration_ms` of one attempt, with the extensions of the budget.

    If a used-up budget pauses the run, the attempt has no deadline: its next call waits for an extension
    (`more_time`), and calls in progress end before.
    """

    def __init__(self, clock: RunClock, facts: RunFacts, claimed: Claimed) -> None:
        self._clock = clock
        self._facts = facts
        self._pauses = False
        self.known: asyncio.Future[None] | None = None
        """Done when the deadline is known; None: it is known."""
        if clock.limit_ms is not None and claimed.journal_length:  # it may hold extensions
            self.known = asyncio.get_running_loop().create_future()

    def apply_to(self, recorder: Recorder, extended: Mapping[str, float]) -> None:
        """Let the calls of the recorder wait for more time. `extended`: the extensions of the journal."""
        if self._clock.limit_ms is None:
            return
        recorder.budget.clock = self._clock
        self._pauses = recorder.budget.pauses and recorder.rules.format != BY_PLACE
        self._clock.extend(extended.get(TIME))
        if self.known is not None:
            self.known.set_result(None)

    async def wait(self, execution: asyncio.Task[Any], supervision: Supervision, latch: Latch) -> None:
        """Wait until the code of the run has ended or the latch is set. It is set when the time is over."""
        if self.known is not None:
            await supervision.wait(execution, None, self.known)
        while not execution.done() and latch.reason is None:
            if self._clock.limit_ms is None:
                await supervision.wait(execution, None)
            elif (exceeded := await self._exceeded(supervision)) is not None:
                latch.set(LatchReason.TIME_LIMIT, error=exceeded)
            else:
                await supervision.wait(execution, self.left_s())

    def left_s(self) -> float | None:
        """Seconds until the time is over; None: there is no limit, or the calls wait for more time."""
        return None if self._pauses else self._clock.left_s()

    async def _exceeded(self, supervision: Supervision) -> BudgetExhausted | None:
        """The error of a run whose time is over, None if it is not. An extension that the run has not taken
        yet counts."""
        if self.left_s() == 0:
            await supervision.uninterrupted(self._read_extensions, name="extensions")
        return self._clock.exhausted() if self.left_s() == 0 else None

    async def _read_extensions(self) -> None:
        """Read the extensions that are stored, also those that were not announced yet."""
        with suppress(RunLatched, RedisUnreachable, TimeoutError):  # then those that are known count
            async with asyncio.timeout(ANSWER_S):
                await self._facts.refresh()
        with suppress(RecordUnreadable):  # the call that takes it reports it
            for fact in self._facts.of(FactKind.EXTEND):
                value = fact.value()
                limits = limits_in(value.get("budget") if isinstance(value, Mapping) else None)
                self._clock.extend(limits.get(TIME))
