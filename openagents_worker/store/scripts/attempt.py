"""Scripts of an attempt: a worker claims a run, writes its records and events, and gives it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.quick_init import quick_init
from openagents_worker.store.formats import NEWEST_READ, OLDEST_READ, SUMMARIES, WRITTEN
from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.payloads import Events, Payload, PayloadPairs
from openagents_worker.store.scripts.wakes import Wake

__all__ = [
    "Begun",
    "ClaimAnswer",
    "Claimed",
    "LEFT_TO_OTHERS_MAX_MS",
    "MAX_RECOVERIES",
    "PAGE_BYTES",
    "ReleaseKind",
    "SuspendKind",
    "WriteAnswer",
    "WriteResult",
    "ask",
    "claim",
    "commit",
    "emit",
    "finish",
    "intent",
    "page",
    "release",
    "suspend",
]

PAGE_BYTES = 240 * 1024
"""The size of a page of journal records in one answer. A larger answer would delay the commands of others."""
MAX_RECOVERIES = 5
LEFT_TO_OTHERS_MAX_MS = 24 * 3_600_000
"""The defaults of the settings with these names, for callers without settings."""


class ClaimAnswer(StrEnum):
    """The answer to a claim. Only CLAIMED means that the worker executes the run.

    DONE: the run has ended. WAITING: another run holds its session. BUSY: another attempt owns it. NOT_DUE:
    it waits for a time. NOT_ALIVE: the lease of the worker is over. UNKNOWN: no such run. CANCELLED: the
    claim has ended it as cancelled. SUSPECT_BUSY: the worker already has a suspect of another group,
    or the run or a suspect must be executed alone.
    OTHER_FORMAT: this worker cannot read its format. PARKED: it is in a state in which it must not be
    executed.
    """

    CLAIMED = "CLAIMED"
    DONE = "DONE"
    WAITING = "WAITING"
    BUSY = "BUSY"
    NOT_DUE = "NOT_DUE"
    NOT_ALIVE = "NOT_ALIVE"
    UNKNOWN = "UNKNOWN"
    CANCELLED = "CANCELLED"
    SUSPECT_BUSY = "SUSPECT_BUSY"
    OTHER_FORMAT = "OTHER_FORMAT"
    PARKED = "PARKED"


@quick_init
@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer of `claim`. The fields from `fence` on are only set for CLAIMED; `life` also for DONE.

    `unnotified_result` is the result (JSON) of a run that is DONE if Celery was not notified of its end yet,
    else ''. `journal` is the first page of records (JSON), `journal_length` the number of all records.
    `active_ms` is the time that earlier attempts worked on the run. `messages` and `artifacts` are the
    numbers of items in the session. `facts_no` is the number of the newest fact from outside. `now_ms` is the
    time of Redis. `is_interrupted`: the run must end as interrupted, and no new call of it may begin.
    `facts` and `session_state` are None if they are too large for this answer. `compaction` is the summary
    (JSON) that stands for the first `compacted` messages of the session, `epoch` its number; 0: none.
    `held` is what the run and the runs above it hold for shared children (`store.held_turns`): run id, first
    position, end, run id … `seeds` has a line for each run from which records of a fork are copied, the
    oldest first: the last position, the uid of the run, its id.
    """

    answer: ClaimAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""
    unnotified_result: Payload = ""
    fence: str = ""
    request: Payload = ""
    attempt: int = 0
    life: int = 1
    retries: int = 0
    recoveries: int = 0
    uid: str = ""
    usage: str = ""
    queue: str = ""
    canvas: str = ""
    last_error: str = ""
    active_ms: int = 0
    durable: bool = True
    facts: dict[str, Payload] | None = None
    facts_no: int = 0
    now_ms: int = 0
    journal_length: int = 0
    journal: tuple[Payload, ...] = ()
    messages: int = 0
    artifacts: int = 0
    is_interrupted: bool = False
    session_state: dict[str, Payload] | None = None
    epoch: int = 0
    compacted: int = 0
    compaction: Payload = ""
    held: tuple[str, ...] = ()
    seeds: str = ""


@script_function
def claim(
    *,
    run_id: str,
    incarnation: str,
    nonce: str,
    page_bytes: int,
    oldest: int = OLDEST_READ,
    newest: int = NEWEST_READ,
    message_format: int = WRITTEN,
    left_max_ms: int = LEFT_TO_OTHERS_MAX_MS,
) -> Claimed:
    """Claim a run. A repeated claim with the same nonce gets the same answer, in case a reply was lost.

    `page_bytes` limits the journal records in the answer. `oldest` to `newest` are the formats that the
    worker reads, `message_format` is that of its message. A run in another format is left to other workers,
    and fails after `left_max_ms`.
    """


@script_function
def page(*, run_id: str, position: int, page_bytes: int) -> tuple[Payload, ...]:
    """Read journal records (JSON) from `position` on: as many as fit into `page_bytes`, at least one."""


class WriteAnswer(StrEnum):
    """The answer to a write of the owner of a run. FENCED: the caller is not the owner; nothing was written.

    SAME: this batch was stored before. CANCEL: a cancel was requested, stop the run (a commit was stored).
    MISPLACED: the journal has another record at this position. OVERDUE: the run was left to other workers for
    too long, so this worker must end it.
    """

    OK = "OK"
    SAME = "SAME"
    CANCEL = "CANCEL"
    FENCED = "FENCED"
    MISPLACED = "MISPLACED"
    OVERDUE = "OVERDUE"


@quick_init
@dataclass(frozen=True, slots=True)
class WriteResult:
    """The answer of a write that ends the ownership of a run, and the wake-ups that must be sent."""

    answer: WriteAnswer
    wakes: tuple[Wake, ...] = ()
    delay_ms: int = 0
    """The time after which a suspended run is due again."""


@script_function
def emit(
    *,
    run_id: str,
    fence: str,
    batch_no: int,
    events: Events,
    facts: PayloadPairs = (),
    taken: Sequence[str] = (),
    format: int = 0,
) -> WriteAnswer:
    """Append a batch of events: name, payload (JSON), name, payload …. A batch number is stored only once.

    `facts` are names and values (JSON) of facts that the attempt writes ahead of a record (`store.facts`).
    `taken` are the names of facts that a run without records has received. `format` becomes that of the run,
    if it is higher.
    """


@script_function
def ask(
    *,
    run_id: str,
    fence: str,
    call: str,
    value: Payload,
    batch_no: int,
    events: Events,
    stored: int = 0,
) -> WriteAnswer:
    """Ask for the approval of a call, together with a batch of events. `value` is what is shown (JSON).

    `stored` is the number of records that the owner knows to be stored. Redis may have lost some of them.
    """


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer of `intent`. With a `decision` (JSON) about an earlier intent, nothing was written."""

    answer: WriteAnswer
    decision: Payload = ""


@script_function
def intent(
    *,
    run_id: str,
    fence: str,
    call: str,
    value: Payload,
    knows_decision: bool,
    batch_no: int,
    events: Events,
    taken: Sequence[str] = (),
    stored: int = 0,
) -> Begun:
    """Write that a call with effects begins now, together with a batch of events.

    `value` is the intent (JSON), `taken` are the names of further facts that it replaces. `knows_decision`:
    whether the caller follows a decision about an earlier intent of this call. `stored`: as for `ask`.
    """


@script_function
def commit(
    *,
    run_id: str,
    fence: str,
    position: int,
    records: list[Payload],
    usage: str,
    batch_no: int,
    events: Events,
    format: int = WRITTEN,
    taken: Sequence[str] = (),
) -> WriteAnswer:
    """Write outcomes to the journal as records from `position` on (0: prepare), together with events.

    `usage` is the total usage of the run so far (JSON). `taken` are the names of facts that the records
    replace (`store.facts`).
    """


class SuspendKind(StrEnum):
    """Why the owner suspends a run: see `suspend`."""

    RETRY = "retry"
    HANDOVER = "handover"
    LEFT_TO_OTHERS = "left_to_others"
    PARK = "park"


@script_function
def suspend(
    *,
    run_id: str,
    fence: str,
    kind: str,
    delay_ms: int,
    call: str,
    error_code: str,
    batch_no: int,
    events: Events,
    left_max_ms: int = LEFT_TO_OTHERS_MAX_MS,
    error_details: Payload = "",
    park_state: str = "",
    waits: str = "",
    waiting_payload: Payload = "",
    due_ms: int = 0,
    facts: PayloadPairs = (),
    closed: Sequence[str] = (),
    facts_seen: int = 0,
    acknowledged: int = 0,
    format: int = WRITTEN,
    limit: str = "",
    tenant: str = "",
) -> WriteResult:
    """Suspend a run, so that another attempt continues it (`SuspendKind`).

    `retry`: in `delay_ms`, because of `error_code` in the recorded call `call`. `handover`: another worker
    continues immediately. `left_to_others`: in increasing intervals, for `left_max_ms` at most.
    `error_details` is the error as JSON, for display. `park`: until a fact ends one of its waits, see
    `store.parking.Park`; the wakes are not empty if a fact arrived meanwhile. `acknowledged` is the number of
    the last batch that Redis has stored for the owner: MISPLACED, and nothing is written, if Redis has lost
    it since. With `limit`, it waits for that
    limit of the fleet, and the wakes are those of the runs that are called.
    """


@script_function
def finish(
    *,
    run_id: str,
    fence: str,
    end_state: str,
    result: Payload,
    event: str,
    payload: Payload,
    completed: Payload,
    transcript: list[Payload],
    artifacts: list[Payload],
    state: PayloadPairs,
    state_removed: list[str],
    usage: str,
    batch_no: int,
    events: Events,
    format: int = WRITTEN,
    stop_reason: str = "completed",
    epoch: int = 0,
    compacted: int = 0,
    compaction: Payload = "",
    compacted_format: int = SUMMARIES,
    code: str = "",
    usage_in_all: str = "",
) -> WriteResult:
    """End a run and write its results into its session, or, of a shared child, let its parent hold them.

    `stop_reason` is that of the result, for the run that has delegated to this one. `code` is that of the
    error in the result, '' without an error.
    `event` and `payload` are the terminal event, `completed` is the payload of `session.run.completed`.
    `state` is key, JSON, key, JSON …; `state_removed` has the keys to delete. `compaction` is a summary
    (JSON) that replaces the first `compacted` messages for later runs, `epoch` its number; 0: none.
    `usage_in_all` is the usage (JSON) in the result, '' if it is `usage`. It has also what children have
    used whose results the run has not recorded.
    """


class ReleaseKind(StrEnum):
    """Why the owner gives a run back: the worker stops (HANDOVER), or no task executes the run (LOST)."""

    HANDOVER = "handover"
    LOST = "lost"


@script_function
def release(
    *,
    run_id: str,
    incarnation: str,
    fence: str,
    kind: str = ReleaseKind.LOST,
    max_recoveries: int = MAX_RECOVERIES,
) -> WriteResult:
    """Give a claimed run back (`ReleaseKind`).

    `lost` counts as a recovery unless the attempt committed a record; after `max_recoveries` of them in a
    row, the run is poisoned.
    """
