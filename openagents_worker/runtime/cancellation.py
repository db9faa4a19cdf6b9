"""Cancellation: the only place that says how a run ends that somebody, or another run, has cancelled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from openagents_worker.errors import RedisUnreachable
from openagents_worker.runtime.ending import Ending
from openagents_worker.runtime.user_code import described
from openagents_worker.store.client import AsyncStore
from openagents_worker.telemetry.logs import get_logger

__all__ = ["Cancellation", "cancellation_of"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Why a run is cancelled. `is_interrupted`: by another run, and its session gets the turn so far."""

    reason: str
    is_interrupted: bool = False

    def applied_to(self, ending: Ending, pattern: Any) -> Ending:
        """The ending of the cancelled run. `pattern` is its pattern, None if it has not begun."""
        if not self.is_interrupted:
            return ending
        return replace(
            ending, is_interrupted=True, turn_messages=_turn_so_far(pattern, ending.request.run_id)
        )


async def cancellation_of(store: AsyncStore, run_id: str) -> Cancellation:
    """The cancellation that was requested, from the run record."""
    key = store.keys("run", run_id)
    try:
        reason, mode = await store.ask(lambda r: r.hmget(key, "cancel_reason", "interrupted"))
    except RedisUnreachable:  # end the run without the reason
        reason = mode = None
    return Cancellation(str(reason or "cancelled"), is_interrupted=mode == "interrupt")


def _turn_so_far(pattern: Any, run_id: str | None) -> Any:
    """The tool calls and results so far of a pattern that was stopped; none if it has no valid ones."""
    try:
        turn_so_far = getattr(pattern, "turn_so_far", None)
        return turn_so_far() if callable(turn_so_far) else getattr(pattern, "turn_messages", ())
    except Exception as error:  # noqa: BLE001 - code of a plugin may raise anything
        log.warning("run.turn_not_stored", run_id=run_id, error=described(error))
        return ()
