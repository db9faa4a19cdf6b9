"""Scripts that fork runs and sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.payloads import Digested, Payload
from openagents_worker.store.scripts.wakes import Wake

__all__ = ["ForkAnswer", "ForkSessionAnswer", "Forked", "fork", "fork_session"]


class ForkAnswer(StrEnum):
    """SAME: the fork exists. CONFLICT: its id belongs to another request. UNKNOWN: there is no source run.

    NO_CHECKPOINT: the source has no records. OTHER_CHECKPOINT: it has no record with this number.
    SESSION_EXISTS: the session of the fork exists, and it is not that of the source. HELD_EXPIRED: turns of
    `above` are not stored any more.
    """

    NEW = "NEW"
    SAME = "SAME"
    CONFLICT = "CONFLICT"
    UNKNOWN = "UNKNOWN"
    NO_CHECKPOINT = "NO_CHECKPOINT"
    OTHER_CHECKPOINT = "OTHER_CHECKPOINT"
    SESSION_EXISTS = "SESSION_EXISTS"
    HELD_EXPIRED = "HELD_EXPIRED"


@dataclass(frozen=True, slots=True)
class Forked:
    """The answer of `fork`. `detail` is the last checkpoint of the source (OTHER_CHECKPOINT), or the run
    whose held turns are gone (HELD_EXPIRED).

    `sent_us` is set if the first message must be sent now. `also` are other runs that must be woken.
    """

    answer: ForkAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: tuple[Wake, ...] = ()
    detail: str = ""


@script_function
def fork(
    *,
    run_id: str,
    from_run_id: str,
    steps: int,
    session_id: str,
    digest: str,
    uid: str,
    request: Payload,
    messages: int,
    artifacts: int,
    lists: Sequence[str] = (),
    tell: bool = False,
    input_text: Digested = "",
    above: Sequence[str] = (),
    held_to: int = 0,
    held_call: str = "",
) -> Forked:
    """Create a run with the records 0 to `steps` of another run.

    `messages` and `artifacts` are the numbers of items in the session when the source began. `lists`,
    `digest`, `tell` and `input_text` are as those of `submit`. `above` are the held turns that the source saw
    when it began: run id, begin, end, run id, … (`store.held_turns`). The fork gets the first `held_to` items
    that the source holds, up to those of the call `held_call`.
    """


class ForkSessionAnswer(StrEnum):
    """EXISTS: the new session exists. UNKNOWN: there is no session to copy."""

    OK = "OK"
    EXISTS = "EXISTS"
    UNKNOWN = "UNKNOWN"


@script_function
def fork_session(*, session_id: str, new_session_id: str) -> ForkSessionAnswer:
    """Copy the transcript, the artifacts and the state of a session to a new one."""
