"""Scripts that accept runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.payloads import Digested, Payload
from openagents_worker.store.scripts.wakes import Wake

__all__ = ["SubmitAnswer", "Submitted", "reject", "submit"]


class SubmitAnswer(StrEnum):
    """SAME: the run exists with an equal request. CONFLICT: it exists with another request.

    BUSY: the session has other runs, and the caller does not want to wait.
    """

    NEW = "NEW"
    SAME = "SAME"
    CONFLICT = "CONFLICT"
    BUSY = "BUSY"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer of `submit`.

    `sent_us` is set if the first message must be sent now. `also` are other runs that must be woken. `holder`
    is the run that occupies the session (BUSY). `known_agents` are the announced agents (UNKNOWN_AGENT).
    """

    answer: SubmitAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: tuple[Wake, ...] = ()
    holder: str = ""
    known_agents: tuple[str, ...] = ()


@script_function
def submit(
    *,
    run_id: str,
    agent_id: str,
    session_id: str,
    queue: str,
    default_queue: str,
    digest: str,
    uid: str,
    request: Payload,
    canvas: str,
    durable: bool,
    delay_ms: int,
    reject_if_busy: bool,
    parent_run_id: str,
    lists: Sequence[str] = (),
    expires_ms: int = 0,
    tell: bool = False,
    input_text: Digested = "",
    interrupts: str = "",
    format: int = WRITTEN,
) -> Submitted:
    """Accept a run.

    `queue` '' means the queue of the agent, or `default_queue`. Submissions with an equal `digest` are the
    same request. `lists` are the additional indexes of the run (`listing.extra_indexes`). `expires_ms`: the
    run is cancelled if it has not started by then (0: never). `tell`: Celery must be notified of its end.
    `input_text` is that of the request: `resume` compares it. `interrupts`: `interrupt` or `rollback` if the
    run does not wait for its session, but ends the run that works in it; '' if it waits.
    """


@script_function
def reject(*, run_id: str, queue: str, code: str, message: str, hint: str) -> bool:
    """Create a failed run for an invalid message. False if a run with this id exists."""
