"""New runs. The only place that decides the stored fields, the digest and the queue of a new run."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import TypedDict, assert_never

from openagents_worker.arguments import TEN_YEARS_MS, number_of, optional_text
from openagents_worker.errors import AgentNotFoundError, RunConflict, SessionBusy
from openagents_worker.models import RunRequest
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.listing import extra_indexes
from openagents_worker.store.scripts import ScriptCall, SubmitAnswer, Submitted
from openagents_worker.submission.accepted import Accepted, accepted_as, error_of
from openagents_worker.submission.queue_choice import checked_queue
from openagents_worker.suggest import agent_hint

__all__ = ["INTERRUPTING", "NewRun", "SubmitOptions", "digest_of", "stored_text"]


INTERRUPTING = ("interrupt", "rollback")
"""The values of `on_busy` with which a run ends the run that works in its session."""


class SubmitOptions(TypedDict, total=False):
    """How a run is submitted, besides its request."""

    queue: str | None
    """Overrides the queue of the request."""
    delay_ms: int
    expires_ms: int
    """The run is cancelled if it has not started by then. 0: it never expires."""
    canvas: str
    """The task options for the messages of the run, as JSON."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """The submission of a new run. Creating it checks the options; raises `RequestInvalid`."""

    request: RunRequest
    settings: Settings
    queue: str | None = None
    delay_ms: int = 0
    expires_ms: int = 0
    canvas: str = ""

    def __post_init__(self) -> None:
        optional_text("queue", self.queue)
        number_of("delay_ms", self.delay_ms, most=TEN_YEARS_MS)
        number_of("expires_ms", self.expires_ms, most=TEN_YEARS_MS)

    def call(self) -> ScriptCall[Submitted]:
        """The script that accepts the run. Raises `RequestInvalid` for the queue."""
        request, settings = self.request, self.settings
        queue = checked_queue(self.queue or request.queue, settings.key_prefix, run_id=request.run_id)
        return scripts.submit(
            run_id=request.run_id,
            agent_id=request.agent_id,
            session_id=request.session_id,
            queue=queue,
            default_queue=settings.queue,
            digest=digest_of(request),
            uid=secrets.token_hex(8),
            request=stored_text(request),
            canvas=self.canvas,
            durable=settings.durable_default if request.durable is None else request.durable,
            delay_ms=self.delay_ms,
            reject_if_busy=request.on_busy == "reject",
            lists=extra_indexes(request.tenant, request.labels, request.parent_run_id),
            parent_run_id=request.parent_run_id or "",
            expires_ms=self.expires_ms,
            tell=True,
            input_text=request.input_text,
            interrupts=request.on_busy if request.on_busy in INTERRUPTING else "",
        )

    def accepted(self, answer: Submitted) -> Accepted:
        """The accepted run. Raises the error for an answer that does not accept it."""
        request = self.request
        match answer.answer:
            case SubmitAnswer.NEW | SubmitAnswer.SAME:
                is_new = answer.answer is SubmitAnswer.NEW
                return accepted_as(request, answer, self.canvas, is_new=is_new)
            case SubmitAnswer.CONFLICT:
                raise error_of(
                    request,
                    RunConflict,
                    f"the run_id {request.run_id!r} belongs to another request",
                    "choose another run_id, or submit exactly the same request again",
                )
            case SubmitAnswer.BUSY:
                raise error_of(
                    request,
                    SessionBusy,
                    f"the session {request.session_id!r} is busy with the run {answer.holder!r}",
                    "wait for that run, or submit with on_busy='enqueue'",
                )
            case SubmitAnswer.UNKNOWN_AGENT:
                raise error_of(
                    request,
                    AgentNotFoundError,
                    f"no worker knows the agent {request.agent_id!r}",
                    agent_hint(request.agent_id, answer.known_agents),
                )
            case _:
                assert_never(answer.answer)


def _default_fields(request: RunRequest) -> set[str]:
    """Fields with their default value, besides the ones that are None. They are not stored or hashed.

    Therefore older workers can read requests of newer producers, and a new field does not change the digest
    of requests that do not use it.
    """
    return set() if request.labels else {"labels"}


def stored_text(request: RunRequest) -> str:
    """The request as JSON, as the record of its run has it.

    Some values of `on_busy` are not in it, because older workers could not read them. The record has them in
    a field of its own.
    """
    left_out = {"on_busy"} if request.on_busy in INTERRUPTING else set()
    return request.model_dump_json(exclude_none=True, exclude=_default_fields(request) | left_out)


def digest_of(request: RunRequest) -> str:
    """The digest that decides whether two requests are the same: of all stored fields in sorted order."""
    fields = request.model_dump(mode="json", exclude_none=True, exclude=_default_fields(request))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
