"""Submitting. The only place that decides when a submission is repeated, and whether it was accepted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, TypedDict

from typing_extensions import Unpack

from openagents_worker.errors import RedisUnreachable, SubmitUnknown
from openagents_worker.models import RunRecord, RunRequest, parse_request
from openagents_worker.settings import Settings
from openagents_worker.store.client import AnswerLost, AsyncStore, Store
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import OnDisk, Plan
from openagents_worker.store.scripts import ScriptCall
from openagents_worker.submission.accepted import Accepted, error_of
from openagents_worker.submission.fork import fork_of
from openagents_worker.submission.new_run import NewRun, SubmitOptions
from openagents_worker.submission.resumption import Resumption, requested_resumption

__all__ = [
    "Accepted",
    "ForkOptions",
    "Request",
    "SubmitOptions",
    "asubmit",
    "forking",
    "resumption",
    "submission",
    "submit",
]

# One more try takes at most two seconds, so that a caller waits less than five seconds in total.
REPEAT_FOR_S = 2.5
REPEAT_PAUSE_S = 0.1


class ForkOptions(TypedDict, total=False):
    """How a fork differs from its source. `session_id`: by default a new session, a copy of that of the
    source."""

    input_text: str | None
    session_id: str | None
    run_id: str | None


Request = RunRequest | Mapping[str, Any]
"""A request, or a dict of its fields."""


def submit(
    store: Store, request: Request, *, settings: Settings, **options: Unpack[SubmitOptions]
) -> Accepted:
    """Accept a run within five seconds. It sends no message. The same request again is the same run.

    If nothing was accepted, it raises the errors of `parse_request`, `AgentNotFoundError`, `RunConflict`,
    `SessionBusy`, `RedisUnsafe` or `RedisUnreachable`. It raises `SubmitUnknown` if the run may be accepted,
    and with `OPENAGENTS_DURABILITY=strict` also if the run may not be on disk yet.
    """
    return store.execute(submission(request, settings, **options), time.sleep)


def asubmit(
    store: AsyncStore, request: Request, *, settings: Settings, **options: Unpack[SubmitOptions]
) -> Awaitable[Accepted]:
    """The same as `submit`, for asyncio."""
    return store.execute(submission(request, settings, **options), asyncio.sleep)


def submission(request: Request, settings: Settings, **options: Unpack[SubmitOptions]) -> Plan[Accepted]:
    """The plan that submits a run: its steps are scripts, and seconds to wait. Raises as `submit` does."""
    parsed = parse_request(request, max_bytes=settings.max_payload_bytes)
    new_run = NewRun(parsed, settings, **options)
    if parsed.resume_from_checkpoint is None:
        return (yield from _repeated(new_run, settings))
    resumed = yield from requested_resumption(new_run)
    return (yield from _repeated(resumed, settings))


def resumption(run: RunRecord, settings: Settings, *, by: str = "") -> Plan[Accepted]:
    """The plan that starts another life of a failed or cancelled run, from its last checkpoint.

    `by` names the user for the event. Raises as `submit` does, and `ConfigError` for a run without a
    checkpoint that may have had effects.
    """
    return _repeated(Resumption.of(run, settings, by), settings)


def forking(
    keys: Keys, settings: Settings, checkpoint_id: str, **options: Unpack[ForkOptions]
) -> Plan[Accepted]:
    """The plan that creates a run from a checkpoint of another one. Raises as `fork_of` and `submit` do."""
    fork = yield from fork_of(keys, settings, checkpoint_id, **options)
    return (yield from _repeated(fork, settings))


class _Submission(Protocol):
    """One script, and the meaning of its answer."""

    @property
    def request(self) -> RunRequest: ...
    def call(self) -> ScriptCall[Any]: ...
    def accepted(self, answer: Any) -> Accepted: ...


def _repeated(submission: _Submission, settings: Settings) -> Plan[Accepted]:
    """Run the script. If its answer was lost, run it again, because it may have accepted the run."""
    request, began_s = submission.request, time.monotonic()
    call: Any = submission.call()
    step = OnDisk(call) if settings.durability == "strict" else call
    is_possibly_accepted = False
    while True:
        try:
            answer = yield step
        except RedisUnreachable as error:
            is_possibly_accepted = is_possibly_accepted or isinstance(error, AnswerLost)
            if not is_possibly_accepted:
                raise
            if time.monotonic() - began_s >= REPEAT_FOR_S:
                raise error_of(
                    request,
                    SubmitUnknown,
                    f"it is not known whether the run {request.run_id!r} is accepted: {error.message}",
                    "submit the same request with this run_id again: it is safe and creates no second run",
                ) from error
        else:
            return submission.accepted(answer)
        yield REPEAT_PAUSE_S
