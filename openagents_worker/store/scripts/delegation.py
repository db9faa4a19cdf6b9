"""Scripts by which a run delegates to other agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.formats import DELEGATES
from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.payloads import Digested, Payload
from openagents_worker.store.scripts.wakes import Wake

__all__ = ["MAX_CHILDREN", "DelegateAnswer", "Delegated", "delegate"]


MAX_CHILDREN = 1_000
"""The children of a run that have not ended: the script that ends the run also ends them."""


class DelegateAnswer(StrEnum):
    """NEW: the child was created, or continues in another life. SAME: this call has created it before, and it
    goes on. ENDED: it has ended. STOPPING: it ends because an earlier life of the run has ended, or because
    the run had given it up: ask again. CONFLICT: another run has its id. UNKNOWN_AGENT: no worker has
    announced the agent. FULL: `max_children` of the run have not ended.

    CANCEL, FENCED and MISPLACED are those of `WriteAnswer`; nothing was written.
    """

    NEW = "NEW"
    SAME = "SAME"
    ENDED = "ENDED"
    STOPPING = "STOPPING"
    CONFLICT = "CONFLICT"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"
    FULL = "FULL"
    CANCEL = "CANCEL"
    FENCED = "FENCED"
    MISPLACED = "MISPLACED"


@dataclass(frozen=True, slots=True)
class Delegated:
    """The answer of `delegate`. `result` is the result (JSON) of a child that has ended.

    `known_agents` are the announced agents (UNKNOWN_AGENT).
    """

    answer: DelegateAnswer
    result: Payload = ""
    wakes: tuple[Wake, ...] = ()
    known_agents: tuple[str, ...] = ()


@script_function
def delegate(
    *,
    run_id: str,
    fence: str,
    call: str,
    child_id: str,
    agent_id: str,
    session_id: str,
    queue: str,
    mode: str,
    background: bool,
    digest: str,
    uid: str,
    request: Payload,
    input_text: Digested,
    delegated: str,
    batch_no: int,
    lists: Sequence[str] = (),
    canvas: str = "",
    stored: int = 0,
    max_children: int = MAX_CHILDREN,
    format: int = DELEGATES,
) -> Delegated:
    """Create the child run of a recorded call, or find it.

    `call` is the id of the call, `mode` is `isolated`, `shared` or `forked`. `queue` '' means the queue of
    the agent, or that of the parent. `delegated` is the value (JSON) of a fact of the parent; it holds ids
    and numbers only. `lists`, `digest`, `uid`, `request`, `input_text` and `canvas` are as those of
    `submit`. `stored`: as for `ask`. `batch_no` is the number of this write among those of the attempt.
    """
