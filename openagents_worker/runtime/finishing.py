"""Finishing: the only place that writes the end of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.ending import Ending
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import LatchReason, RunLatched
from openagents_worker.runtime.parting import AttemptOutcome, AttemptResult
from openagents_worker.runtime.user_code import described, described_in_log, user_error_of
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.scripts import WriteAnswer, WriteResult
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.sentry import report_unless_logged

__all__ = ["NO_STATE", "SessionState", "finish_run"]

log = get_logger(__name__)


@quick_init
@dataclass(frozen=True, slots=True)
class SessionState:
    """The state of the session before the run, as JSON by key, and the state that the run leaves."""

    before: Mapping[str, str]
    after: Mapping[str, Any]


NO_STATE = SessionState({}, {})


async def finish_run(
    identity: RunIdentity,
    ending: Ending,
    state: SessionState,
    *,
    writer: RunWriter,
    send_wakes: Callable[[WriteResult], Awaitable[None]],
) -> AttemptResult:
    """Write the end of the run. If it cannot be stored, write a bare failure instead."""
    stored = ending.stored(state.before, state.after)
    try:
        reply = await writer.finish(**stored.arguments)
    except Exception as error:
        # For example, it contains a lone surrogate that passed the checks.
        log.exception("run.end_not_stored", run_id=identity.run_id)
        stored = ending.bare(f"the run's end cannot be stored: {described(error)}")
        reply = await writer.finish(**stored.arguments)
    if reply.answer is WriteAnswer.CANCEL:  # nothing was written: a cancelled run must not complete
        raise RunLatched(LatchReason.CANCELLED)
    await send_wakes(reply)
    _log_end(identity, stored.ending)
    return AttemptResult(
        AttemptOutcome.FINISHED,
        stop_reason=stored.ending.stop_reason,
        error=stored.ending.details,
        life=identity.life,
    )


def _log_end(identity: RunIdentity, ending: Ending) -> None:
    """Log the end of the run in one line. A failure has the traceback of the user code that raised it."""
    fields: dict[str, Any] = {
        **identity.ids,
        "stop_reason": str(ending.stop_reason),
        "attempts": identity.attempt,
    }
    if ending.error is None or ending.state == "cancelled":
        log.info("run.ended", **fields)
    else:
        raised = user_error_of(ending.error)
        log.error("run.failed", **fields, **described_in_log(ending.error), user_error=raised)
        report_unless_logged(raised)
    if ending.not_stored:
        log.warning("run.not_all_stored", run_id=identity.run_id, not_stored=ending.not_stored)
