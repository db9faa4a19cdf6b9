"""Interrupted calls: the only place that decides what becomes of a call whose effect may have happened.

It is the same for the tools of a run and for its recorded functions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from openagents_worker.errors import OpenAgentsError, OutcomeUnknown, error_from_wire
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import WaitKind
from openagents_worker.runtime.effects import Effect, Resolution, ResolutionAction
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.user_code import described_in_log, user_code, user_error_of
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import Reconciled

__all__ = ["RECONCILE_TIMEOUT_MS", "CallWithEffect", "KnownOutcome", "RecordedOutcome"]

log = get_logger(__name__)

RECONCILE_TIMEOUT_MS = 30_000  # for a tool without a timeout of its own


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """The result of a call that another attempt has made: its record, with changes of the state."""

    record: Record


@dataclass(frozen=True, slots=True)
class KnownOutcome:
    """The outcome of an interrupted call: a value that somebody gave, or the record of another attempt."""

    value: Any = None
    record: Record | None = None

    def outcome(self) -> Any:
        """The value, or a `RecordedOutcome`. Raises the error that the other attempt recorded."""
        if self.record is None:
            return self.value
        if "error" in self.record.outcome:
            raise error_from_wire(self.record.outcome["error"])
        return RecordedOutcome(self.record)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWithEffect:
    """A call that must not be repeated without permission."""

    what: str
    """Names the call in error messages."""
    info: CallInfo
    effect: Effect
    recorder: Recorder
    emit: Callable[[str, Mapping[str, Any]], None]
    on_interrupted: Literal["ask", "rerun", "fail"] = "ask"
    reconcile: Callable[[], Awaitable[Any]] | None = None
    """Asks the code of the call whether the effect has happened."""
    reconcile_timeout_ms: int = RECONCILE_TIMEOUT_MS
    error_of: Callable[[str], OpenAgentsError]
    """Makes the coded error of an exception of `reconcile`."""

    async def begin(self, arguments: Mapping[str, Any]) -> KnownOutcome | None:
        """Store the intent of the call; None: it may be made now.

        If an earlier attempt has begun the call: its outcome, if it is known. Raises `OutcomeUnknown`, or
        suspends the run until somebody decides.
        """
        is_allowed = self.effect.interrupted is None
        while True:
            if not is_allowed and (known := await self._known_outcome()) is not None:
                return known
            if await self.effect.write_intent(self.info, arguments):
                return None
            is_allowed = False  # somebody has decided about the call meanwhile

    async def _known_outcome(self) -> KnownOutcome | None:
        """The outcome of an interrupted call; None if it is allowed to make the call again."""
        resolution = self.effect.resolution
        if resolution is None:
            return await self._outcome_without_resolution()
        match resolution.action:
            case ResolutionAction.RERUN:
                return None
            case ResolutionAction.SKIP:
                return KnownOutcome(resolution.result)
            case ResolutionAction.FAIL:
                raise self._unknown(f"{resolution.by} decided that the run fails")
            case ResolutionAction.OUTCOME:
                assert resolution.record is not None
                return KnownOutcome(record=resolution.record)
            case _:
                assert_never(resolution.action)

    async def _outcome_without_resolution(self) -> KnownOutcome | None:
        """Ask the code whether the call had its effect. If it does not know, `on_interrupted` decides."""
        reconciled = await self._reconciled()
        if reconciled.state == "done":
            return KnownOutcome(reconciled.result)
        if reconciled.state == "not_done":
            return None
        match self.on_interrupted:
            case "rerun":
                return None
            case "fail" if self.effect.began_in_life == self.recorder.life:
                raise self._unknown("on_interrupted of the tool is fail")
            case "ask" | "fail":  # somebody has resumed the failed run
                self.effect.resolution = await self._decided()
                return await self._known_outcome()
            case _:
                assert_never(self.on_interrupted)

    async def _decided(self) -> Resolution:
        """Wait until somebody decides about the call. The run holds no slot meanwhile."""
        waits, name = self.recorder.waits, self.info.name
        assert self.effect.interrupted is not None
        begun_as = self.effect.interrupted.call
        stored = waits.facts.stored_wait(self.info.call_id)  # perhaps of its approval
        if stored is None or stored.get("kind") != WaitKind.OUTCOME.value:  # nobody has asked yet
            self.emit("run.outcome_unknown", {"tool_id": name, "call_id": begun_as})
        fact_name = Fact(FactKind.RESOLUTION, begun_as, "").name
        fact = await waits.until(self.info, WaitKind.OUTCOME, name=name, fact=fact_name, shown_as=begun_as)
        assert fact is not None, "the wait has no time-out"
        return Resolution.of(fact.value(run_id=self.recorder.run_id))

    async def _reconciled(self) -> Reconciled:
        """The answer of `reconcile`. An error, a timeout or any other value is unknown."""
        if self.reconcile is None:
            return Reconciled.unknown()
        try:
            with user_code(self.error_of):
                async with asyncio.timeout(self.reconcile_timeout_ms / 1000):
                    answer = await self.reconcile()
        except OpenAgentsError as error:
            log.warning(
                "tool.not_reconciled",
                run_id=self.recorder.run_id,
                tool_id=self.info.name,
                call_id=self.info.call_id,
                **described_in_log(error),
                user_error=user_error_of(error),
            )
            return Reconciled.unknown()
        return answer if isinstance(answer, Reconciled) else Reconciled.unknown()

    def _unknown(self, why: str) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"{self.what} was interrupted before its outcome was stored, so its effect may have "
            f"happened; {why}",
            tool_id=self.info.name,
            call_id=self.info.call_id,
            hint="check the system behind the call; then resume the run and resolve the call",
        )
