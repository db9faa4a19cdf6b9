"""Interruptions: the only place that ends an interrupted run whose worker does not end it in time."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.errors import OpenAgentsError, RedisUnreachable
from openagents_worker.jsontext import dumps
from openagents_worker.llm.transcript import interrupted_entries
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.records import aread_record
from openagents_worker.store.scripts import CancelAnswer, Wake, cancel
from openagents_worker.telemetry.logs import get_logger

__all__ = ["end_overdue"]

log = get_logger(__name__)


async def end_overdue(store: AsyncStore, run_id: str) -> Sequence[Wake]:
    """End an interrupted run by force, and return the wake-ups to send.

    Its session gets the question of the run, and a note that it was interrupted. The tool calls of the run
    are not in it: only the worker of the run could add them.
    """
    turn = await _turn_of(store, run_id)
    ended = await store.run(
        cancel(run_id=run_id, reason="interrupted", force=True, overdue=True, transcript=turn)
    )
    if ended.answer is CancelAnswer.CANCELLED:  # else it has ended by itself meanwhile
        log.warning("run.interrupted_by_force", run_id=run_id)
    return ended.wakes


async def _turn_of(store: AsyncStore, run_id: str) -> list[str]:
    """The turn of the run as JSON messages; none if its record cannot be read."""
    try:
        record = await aread_record(store, run_id)
    except RedisUnreachable:
        raise
    except OpenAgentsError as error:
        log.warning("run.interrupted_without_turn", run_id=run_id, code=error.code, error=error.message)
        return []
    if record.request is None:
        return []
    ids = {"run_id": run_id, "agent_id": record.agent_id}
    return [dumps(entry) for entry in interrupted_entries(record.request.input_text, ids)]
