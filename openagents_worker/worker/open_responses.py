"""Open responses: the only place that cancels calls at the provider whose runs ended without a worker.

With `llm.background`, a model call goes on at the provider while its run waits for a retry or for a worker.
If the run is cancelled then, no attempt is there that could cancel the call. So the end of the run is
delivered here by the outbox, on any worker, until the provider has accepted the cancellation.
"""

from __future__ import annotations

from openagents_worker.errors import RunNotFound
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.facts import FactKind
from openagents_worker.store.records import aread_facts, aread_record
from openagents_worker.store.scripts import RunEnd
from openagents_worker.telemetry.logs import get_logger

__all__ = ["OpenResponses"]

log = get_logger(__name__)


class OpenResponses:
    """A recipient of the ends of runs. Most ends have no open response: that is one read."""

    name = "open_responses"

    def __init__(self, store: AsyncStore, assembly: Assembly) -> None:
        self._store, self._assembly = store, assembly

    async def deliver(self, end: RunEnd) -> None:
        """Cancel the responses of the run that have no outcome. Raises an error for a new try."""
        facts = await aread_facts(self._store, end.run_id)
        notes = [fact.value(run_id=end.run_id) for fact in facts.of(FactKind.RESPONSE)]
        if not notes:
            return
        try:
            record = await aread_record(self._store, end.run_id)
        except RunNotFound:
            return
        if record.life != end.life or not record.state.is_terminal:
            return  # it was resumed
        tenant = None if record.request is None else record.request.tenant
        # the calls were made with the definition that the run began with
        async with self._assembly.keeper.of_ended_run(record, own=self._assembly, store=self._store) as kept:
            for note in notes:
                if isinstance(note, dict) and await self._assembly.cancel_response(
                    record.agent_id, note, kept, tenant=tenant
                ):
                    log.info("llm.response_cancelled", run_id=end.run_id, response_id=note.get("response_id"))
