"""Scripts with which people and producers control accepted runs and sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.payloads import Digested, Payload
from openagents_worker.store.scripts.wakes import Wake

__all__ = [
    "CancelAnswer",
    "Cancelled",
    "DecideAnswer",
    "DecideResult",
    "DecisionKind",
    "DeleteAnswer",
    "Deleted",
    "FactAnswer",
    "FactResult",
    "ResumeAnswer",
    "Resumed",
    "cancel",
    "decide",
    "delete_session",
    "fact",
    "resume",
]


class CancelAnswer(StrEnum):
    """REQUESTED: the worker of the run will cancel it. ALREADY: it has ended before, or is not overdue."""

    REQUESTED = "REQUESTED"
    CANCELLED = "CANCELLED"
    ALREADY = "ALREADY"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The answer of `cancel`. `state` is set for ALREADY."""

    answer: CancelAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""


@script_function
def cancel(
    *,
    run_id: str,
    reason: str,
    force: bool,
    overdue: bool = False,
    transcript: Sequence[Payload] = (),
    given_up_in: int = 0,
) -> Cancelled:
    """Cancel a run: immediately if no worker executes it or with `force`, else by a request to its worker.

    `overdue`: only a run that was interrupted and has not ended in time. `transcript` are the messages (JSON)
    that an interrupted run leaves in its session if it ends by force. `given_up_in`: the life in which the
    run that has delegated to this one has given it up.
    """


class ResumeAnswer(StrEnum):
    """LIVE: the run has not ended. OTHER_…: the arguments do not match the run.

    NO_CHECKPOINT: the run has no record to continue from, and starting again might repeat an effect.
    """

    OK = "OK"
    LIVE = "LIVE"
    COMPLETED = "COMPLETED"
    UNKNOWN = "UNKNOWN"
    OTHER_AGENT = "OTHER_AGENT"
    OTHER_SESSION = "OTHER_SESSION"
    OTHER_INPUT = "OTHER_INPUT"
    OTHER_CHECKPOINT = "OTHER_CHECKPOINT"
    NO_CHECKPOINT = "NO_CHECKPOINT"


@dataclass(frozen=True, slots=True)
class Resumed:
    """The answer of `resume`. `detail` is the real value of the run if the answer is OTHER_….

    `sent_us` is set if a message must be sent now. `also` are other runs that must be woken.
    """

    answer: ResumeAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: tuple[Wake, ...] = ()
    detail: str = ""
    canvas: str = ""


@script_function
def resume(
    *,
    run_id: str,
    agent_id: str,
    session_id: str,
    input_text: Digested,
    checkpoint_id: str,
    canvas: str = "",
    by: str = "",
) -> Resumed:
    """Start another life of a run that failed or was cancelled. `checkpoint_id` '' means the latest one.

    `canvas` are new task options (JSON), '' keeps the old ones. `by` is who resumes the run, for the event.
    """


class DecisionKind(StrEnum):
    """What a decision is about: the approval of a call, or a call whose outcome is unknown."""

    APPROVAL = "approval"
    RESOLUTION = "resolution"


class DecideAnswer(StrEnum):
    """ALREADY: somebody has decided before. GONE: the run has ended. NOT_PENDING: no call with this id waits
    for a decision."""

    OK = "OK"
    ALREADY = "ALREADY"
    GONE = "GONE"
    NOT_PENDING = "NOT_PENDING"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class DecideResult:
    """The answer of `decide`. `decision` (JSON) is the first decision about the call, if it is known."""

    answer: DecideAnswer
    wakes: tuple[Wake, ...] = ()
    decision: Payload = ""


@script_function
def decide(
    *, run_id: str, kind: str, call: str, value: Payload, event: str, payload: Payload, fence: str = ""
) -> DecideResult:
    """Decide about a call (`DecisionKind`).

    `value` is the decision (JSON), `payload` that of the event. `fence` is that of the attempt that made an
    interrupted call and now knows its outcome; '' for everybody else.
    """


class DeleteAnswer(StrEnum):
    """BUSY: a run of the session is live. NOT_NOTIFIED: Celery was not notified yet of the end of a run, or
    a worker must still cancel a job or a response that a run has left behind.

    MORE: runs were deleted, but the session still has runs: call it again.
    """

    BUSY = "BUSY"
    NOT_NOTIFIED = "UNTOLD"
    MORE = "MORE"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Deleted:
    """The answer of `delete_session`. `run_id` is the run for which nothing was deleted (BUSY, NOT_NOTIFIED).

    `runs` is the number of deleted runs.
    """

    answer: DeleteAnswer
    run_id: str = ""
    runs: int = 0


@script_function
def delete_session(*, session_id: str, limit: int, even_if_not_notified: bool) -> Deleted:
    """Delete up to `limit` ended runs of a session, and the session itself with the last of them.

    `even_if_not_notified`: do not wait until Celery was notified of the end of the runs, and until what
    they have left behind was cancelled.
    """


class FactAnswer(StrEnum):
    """SAME: a message with this id was stored before. ALREADY: this was decided before. ENDED: the run is
    over. FULL: the run has too many facts that it did not take yet."""

    OK = "OK"
    SAME = "SAME"
    ALREADY = "ALREADY"
    ENDED = "ENDED"
    FULL = "FULL"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class FactResult:
    """The answer of `fact`. `state` is the state of the run before. `value` is the first decision (JSON) for
    ALREADY."""

    answer: FactAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""
    value: Payload = ""


@script_function
def fact(
    *, run_id: str, name: str, value: Payload, message_id: str, max_facts: int, max_bytes: int
) -> FactResult:
    """Store a fact about a run, and wake the run if it is parked and waits for this fact.

    `name` is `kind:id` for a fact that is decided once, or `kind:id:` for one that gets a number. The limits
    hold for the numbered facts of one kind that the run did not take yet.
    """
