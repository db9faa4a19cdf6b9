"""Accepted runs: the only place that turns the answer of a script into an accepted run and its messages."""

from __future__ import annotations

from dataclasses import dataclass

from openagents_worker.errors import OpenAgentsError
from openagents_worker.models import RunRequest, RunState
from openagents_worker.store.scripts import Forked, Resumed, Submitted, Wake

__all__ = ["Accepted", "accepted_as", "error_of"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted run. The caller sends `first`, its first message, and `also`, wake-ups of other runs.

    `state` is a `RunState`, or a state of a newer version.
    """

    run_id: str
    agent_id: str
    session_id: str
    state: str
    queue: str
    is_new: bool
    first: Wake | None = None
    also: tuple[Wake, ...] = ()


def accepted_as(
    request: RunRequest, answer: Submitted | Resumed | Forked, canvas: str, *, is_new: bool
) -> Accepted:
    """The accepted run of a request, from the answer of its script. `canvas` has its task options."""
    first = None
    if answer.sent_us is not None and answer.state == RunState.QUEUED:
        first = Wake(
            run_id=request.run_id,
            queue=answer.queue,
            sent_us=answer.sent_us,
            agent_id=request.agent_id,
            session_id=request.session_id,
            attempt=0,
            step=0,
            canvas=canvas,
        )
    return Accepted(
        run_id=request.run_id,
        agent_id=request.agent_id,
        session_id=request.session_id,
        state=answer.state,
        queue=answer.queue,
        is_new=is_new,
        first=first,
        also=answer.also,
    )


def error_of(
    request: RunRequest, kind: type[OpenAgentsError], message: str, hint: str | None
) -> OpenAgentsError:
    """An error with the ids of the request."""
    return kind(
        message,
        hint=hint,
        run_id=request.run_id,
        agent_id=request.agent_id,
        session_id=request.session_id,
    )
