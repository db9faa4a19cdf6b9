"""The agent of a run: the only place that leaves a run to workers that have its agent."""

from __future__ import annotations

from dataclasses import dataclass

from openagents_worker.errors import AgentNotFoundError, OpenAgentsError, OtherFormat, PatternError
from openagents_worker.models import RunBudget
from openagents_worker.runtime.assembly import AgentParts, Assembly
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.kept_definitions import KeptAgent
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.user_code import user_code
from openagents_worker.store.scripts import Claimed

__all__ = ["AgentOfRun"]


@dataclass(frozen=True, slots=True)
class AgentOfRun:
    """The agent of a run, in the definition that its attempt uses.

    `kept` is set if this is not the definition of this process. `request_error` is set if the request cannot
    be read: then the run fails or is left to others.
    """

    agent_id: str
    assembly: Assembly
    kept: KeptAgent | None = None
    request_error: OpenAgentsError | None = None

    @property
    def limits(self) -> RunBudget | None:
        """The upper limits for the budget of the run; None if there are none or the agent is unknown."""
        definition = self.kept.definition if self.kept else self.assembly.definition(self.agent_id)
        return definition.limits if definition is not None else None

    async def parts(self, claimed: Claimed, store: FencedStore, latch: Latch) -> AgentParts:
        """The parts of the agent. Raises the error that ends the run; `RunLatched` to leave it to others.

        If the run begins now, its definition is stored.
        """
        if self.request_error is not None:
            if isinstance(self.request_error, OtherFormat):  # another version can read the request
                _leave_to_others(latch, self.request_error)
            raise self.request_error
        own_hash = self.assembly.hashes.get(self.agent_id)
        if own_hash is not None and claimed.durable and not claimed.journal_length:
            await self.assembly.keeper.store(self.agent_id, own_hash, run_id=store.run_id, reader=store)
        try:
            with user_code(PatternError):
                return self.assembly.parts(self.agent_id, self.kept)
        except OpenAgentsError as error:
            if await self._is_for_others(error, store):
                _leave_to_others(latch, error)
            raise

    async def _is_for_others(self, error: OpenAgentsError, store: FencedStore) -> bool:
        """Whether another worker may be able to serve the agent."""
        if self.agent_id in self.assembly.unavailable:
            return True
        is_unknown = self.agent_id not in self.assembly.hashes and isinstance(error, AgentNotFoundError)
        return is_unknown and await _is_served_by_others(self.agent_id, store)


async def _is_served_by_others(agent_id: str, store: FencedStore) -> bool:
    """Whether a worker has announced the agent."""
    key = store.keys("agents")
    return bool(await store.ask(lambda r: r.hexists(key, agent_id)))


def _leave_to_others(latch: Latch, error: OpenAgentsError) -> None:
    latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
    raise RunLatched(LatchReason.LEFT_TO_OTHERS) from error
