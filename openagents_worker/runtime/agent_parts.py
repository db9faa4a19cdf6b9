"""The parts of an agent for one attempt: the only place that leaves a run to workers that have its agent."""

from __future__ import annotations

from openagents_worker.errors import AgentNotFoundError, OpenAgentsError, OtherFormat, PatternError
from openagents_worker.runtime.assembly import AgentParts, Assembly
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.user_code import user_code

__all__ = ["parts_of_agent"]


async def parts_of_agent(
    agent_id: str,
    assembly: Assembly,
    *,
    store: FencedStore,
    latch: Latch,
    request_error: OpenAgentsError | None,
) -> AgentParts:
    """The parts of the agent. Raises the error that ends the run; `RunLatched` to leave it to others."""
    if request_error is not None:
        if isinstance(request_error, OtherFormat):  # another version can read the request
            _leave_to_others(latch, request_error)
        raise request_error
    try:
        with user_code(PatternError):
            return assembly.parts(agent_id)
    except OpenAgentsError as error:
        is_unknown = agent_id not in assembly.hashes and isinstance(error, AgentNotFoundError)
        if agent_id in assembly.unavailable or (is_unknown and await _is_served_by_others(agent_id, store)):
            _leave_to_others(latch, error)
        raise


async def _is_served_by_others(agent_id: str, store: FencedStore) -> bool:
    """Whether a worker has announced the agent."""
    key = store.keys("agents")
    return bool(await store.ask(lambda r: r.hexists(key, agent_id)))


def _leave_to_others(latch: Latch, error: OpenAgentsError) -> None:
    latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
    raise RunLatched(LatchReason.LEFT_TO_OTHERS) from error
