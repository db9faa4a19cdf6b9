"""Submitting. The only place that turns a request into an accepted run, or raises why it is not accepted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_never

from openagents_worker.arguments import TEN_YEARS_MS, number_of, optional_text, text_of_caller
from openagents_worker.errors import (
    AgentNotFoundError,
    ConfigError,
    OpenAgentsError,
    RedisUnreachable,
    RunConflict,
    SessionBusy,
    SubmitUnknown,
)
from openagents_worker.models import RunRecord, RunRequest, RunState, parse_request
from openagents_worker.producer.queue_checks import checked_queue
from openagents_worker.redaction import shown_reason
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AnswerLost, AsyncStore, Store
from openagents_worker.store.listing import extra_indexes
from openagents_worker.store.records import run_not_found
from openagents_worker.store.scripts import ResumeAnswer, Resumed, ScriptCall, SubmitAnswer, Submitted, Wake
from openagents_worker.suggest import agent_hint

T = TypeVar("T")

__all__ = ["Accepted", "aresume", "asubmit", "resume", "submit"]

# One more try takes at most two seconds, so that a caller waits less than five seconds in total.
REPEAT_FOR_S = 2.5
REPEAT_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted run. The caller sends `first`, its first message, and `also`, a wake-up of another run.

    `state` is a `RunState`, or a state of a newer version.
    """

    run_id: str
    agent_id: str
    session_id: str
    state: str
    queue: str
    is_new: bool
    first: Wake | None = None
    also: Wake | None = None


def submit(
    store: Store,
    request: RunRequest | Mapping[str, Any],
    *,
    settings: Settings,
    queue: str | None = None,
    delay_ms: int = 0,
    expires_ms: int = 0,
    canvas: str = "",
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Accepted:
    """Accept a run within five seconds. It sends no message. The same request again is the same run.

    `queue` overrides the queue of the request. `canvas` is JSON with the task options for the messages of the
    run. With `expires_ms`, the run is cancelled if it has not started by then.

    If nothing was accepted, it raises the errors of `parse_request`, `AgentNotFoundError`, `RunConflict`,
    `SessionBusy`, `RedisUnsafe` or `RedisUnreachable`. It raises `SubmitUnknown` if the run may be accepted,
    and with `OPENAGENTS_DURABILITY=strict` also if the run may not be on disk yet.
    """
    return _execute(
        store, _submission(request, settings, queue, delay_ms, expires_ms, canvas, clock), settings, pause
    )


def resume(store: Store, run: RunRecord, *, settings: Settings, by: str = "") -> Accepted:
    """Start another life of a failed or cancelled run, from its last checkpoint.

    `by` names the user for the event. Raises as `submit` does, and `ConfigError` for a run without a
    checkpoint that may have had effects.
    """
    return _execute(store, _resumption(run, settings, by), settings, time.sleep)


async def aresume(store: AsyncStore, run: RunRecord, *, settings: Settings, by: str = "") -> Accepted:
    """The same as `resume`, for asyncio."""
    return await _aexecute(store, _resumption(run, settings, by), settings, asyncio.sleep)


def _resumption(run: RunRecord, settings: Settings, by: str) -> _Resumption:
    text_of_caller("by", by)
    fields = {
        "agent_id": run.agent_id,
        "session_id": run.session_id,
        "input_text": "",
        "resume_from_checkpoint": f"{run.run_id}:step:{run.steps}",
    }
    request = parse_request(fields, max_bytes=settings.max_payload_bytes)
    return _Resumption(request, "", time.monotonic, by=by)


def _execute(
    store: Store, submission: _SubmitTry[Any], settings: Settings, pause: Callable[[float], None]
) -> Accepted:
    run = store.run_on_disk if settings.durability == "strict" else store.run
    while True:
        try:
            return submission.accepted(run(submission.call))
        except RedisUnreachable as error:
            submission.raise_unless_repeatable(error)
            pause(REPEAT_PAUSE_S)


async def asubmit(
    store: AsyncStore,
    request: RunRequest | Mapping[str, Any],
    *,
    settings: Settings,
    queue: str | None = None,
    delay_ms: int = 0,
    expires_ms: int = 0,
    canvas: str = "",
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Accepted:
    """The same as `submit`, for asyncio."""
    return await _aexecute(
        store, _submission(request, settings, queue, delay_ms, expires_ms, canvas, clock), settings, pause
    )


async def _aexecute(
    store: AsyncStore,
    submission: _SubmitTry[Any],
    settings: Settings,
    pause: Callable[[float], Awaitable[None]],
) -> Accepted:
    run = store.run_on_disk if settings.durability == "strict" else store.run
    while True:
        try:
            return submission.accepted(await run(submission.call))
        except RedisUnreachable as error:
            submission.raise_unless_repeatable(error)
            await pause(REPEAT_PAUSE_S)


def _submission(
    request: RunRequest | Mapping[str, Any],
    settings: Settings,
    queue: str | None,
    delay_ms: int,
    expires_ms: int,
    canvas: str,
    clock: Callable[[], float],
) -> _SubmitTry[Any]:
    parsed = parse_request(request, max_bytes=settings.max_payload_bytes)
    optional_text("queue", queue)
    number_of("delay_ms", delay_ms, most=TEN_YEARS_MS)
    number_of("expires_ms", expires_ms, most=TEN_YEARS_MS)
    if parsed.resume_from_checkpoint is not None:
        return _Resumption(parsed, canvas, clock)
    return _Submission(parsed, settings, queue, delay_ms, expires_ms, canvas, clock)


class _SubmitTry(Generic[T]):
    """The submission of one request: the script, when it is repeated, and the meaning of its answer."""

    call: ScriptCall[T]

    def __init__(self, request: RunRequest, canvas: str, clock: Callable[[], float]) -> None:
        self.request = request
        self._canvas = canvas
        self._clock = clock
        self._began = clock()
        self._is_possibly_accepted = False

    def accepted(self, answer: T) -> Accepted:
        """The accepted run. Raises the error for an answer that does not accept it."""
        raise NotImplementedError

    def raise_unless_repeatable(self, error: RedisUnreachable) -> None:
        """Return if the script should be run again after `error`, else raise the error for the caller."""
        self._is_possibly_accepted = self._is_possibly_accepted or isinstance(error, AnswerLost)
        if not self._is_possibly_accepted:
            raise error
        if self._clock() - self._began >= REPEAT_FOR_S:
            raise self._error_of(
                SubmitUnknown,
                f"it is not known whether the run {self.request.run_id!r} is accepted: {error.message}",
                "submit the same request with this run_id again: it is safe and creates no second run",
            ) from error

    def _accepted_as(
        self, state: str, queue: str, sent_us: int | None, also: Wake | None, *, is_new: bool
    ) -> Accepted:
        request = self.request
        first = None
        if sent_us is not None and state == RunState.QUEUED:
            first = Wake(
                run_id=request.run_id,
                queue=queue,
                sent_us=sent_us,
                agent_id=request.agent_id,
                session_id=request.session_id,
                attempt=0,
                step=0,
                canvas=self._canvas,
            )
        return Accepted(
            run_id=request.run_id,
            agent_id=request.agent_id,
            session_id=request.session_id,
            state=state,
            queue=queue,
            is_new=is_new,
            first=first,
            also=also,
        )

    def _error_of(self, kind: type[OpenAgentsError], message: str, hint: str) -> OpenAgentsError:
        request = self.request
        return kind(
            message,
            hint=hint,
            run_id=request.run_id,
            agent_id=request.agent_id,
            session_id=request.session_id,
        )


class _Submission(_SubmitTry[Submitted]):
    """A new run."""

    def __init__(
        self,
        request: RunRequest,
        settings: Settings,
        queue: str | None,
        delay_ms: int,
        expires_ms: int,
        canvas: str,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(request, canvas, clock)
        self.call = _submit_script(request, settings, queue, delay_ms, expires_ms, canvas)

    def accepted(self, answer: Submitted) -> Accepted:
        match answer.answer:
            case SubmitAnswer.NEW | SubmitAnswer.SAME:
                return self._accepted_as(
                    answer.state,
                    answer.queue,
                    answer.sent_us,
                    answer.also,
                    is_new=answer.answer is SubmitAnswer.NEW,
                )
            case SubmitAnswer.CONFLICT:
                raise self._error_of(
                    RunConflict,
                    f"the run_id {self.request.run_id!r} belongs to another request",
                    "choose another run_id, or submit exactly the same request again",
                )
            case SubmitAnswer.BUSY:
                raise self._error_of(
                    SessionBusy,
                    f"the session {self.request.session_id!r} is busy with the run {answer.holder!r}",
                    "wait for that run, or submit with on_busy='enqueue'",
                )
            case SubmitAnswer.UNKNOWN_AGENT:
                raise self._error_of(AgentNotFoundError, *self._unknown_agent(answer.known_agents))
            case _:
                assert_never(answer.answer)

    def _unknown_agent(self, known: tuple[str, ...]) -> tuple[str, str]:
        """The message and the hint of the error."""
        agent_id = self.request.agent_id
        return f"no worker knows the agent {agent_id!r}", agent_hint(agent_id, known)


class _Resumption(_SubmitTry[Resumed]):
    """The resumption of a failed or cancelled run in another life."""

    def __init__(self, request: RunRequest, canvas: str, clock: Callable[[], float], *, by: str = "") -> None:
        super().__init__(request, canvas, clock)
        self.call = scripts.resume(
            run_id=request.run_id,
            agent_id=request.agent_id,
            session_id=request.session_id,
            input_text=request.input_text,
            checkpoint_id=request.resume_from_checkpoint or "",
            canvas=canvas,
            by=shown_reason(by),
        )

    def accepted(self, answer: Resumed) -> Accepted:
        checkpoint = self.request.resume_from_checkpoint
        match answer.answer:
            case ResumeAnswer.OK | ResumeAnswer.LIVE:
                self._canvas = answer.canvas
                return self._accepted_as(
                    answer.state,
                    answer.queue,
                    answer.sent_us,
                    answer.also,
                    is_new=answer.answer is ResumeAnswer.OK,
                )
            case ResumeAnswer.UNKNOWN:
                raise run_not_found(self.request.run_id)
            case ResumeAnswer.COMPLETED:
                raise self._error_of(
                    RunConflict,
                    f"the run {self.request.run_id!r} has completed, so it cannot be resumed",
                    "to continue from its answer, submit a new run in the same session",
                )
            case ResumeAnswer.NO_CHECKPOINT:
                raise self._error_of(
                    ConfigError,
                    f"the run {self.request.run_id!r} has no checkpoint, so it cannot be resumed",
                    "it is not durable, or its journal is gone; starting it again could repeat its effects: "
                    "submit a new run",
                )
            case ResumeAnswer.OTHER_CHECKPOINT:
                raise self._error_of(
                    ConfigError,
                    f"Unknown resume_from_checkpoint {checkpoint!r}",
                    f"the latest checkpoint is {answer.detail!r}; only the latest can be used",
                )
            case ResumeAnswer.OTHER_AGENT | ResumeAnswer.OTHER_SESSION | ResumeAnswer.OTHER_INPUT:
                field = {"OTHER_AGENT": "agent", "OTHER_SESSION": "session", "OTHER_INPUT": "input_text"}[
                    answer.answer
                ]
                raise self._error_of(
                    ConfigError,
                    f"the run {self.request.run_id!r} has another {field} than the request that resumes it",
                    f"the {field} of the run is {answer.detail!r}"
                    if answer.detail
                    else "leave input_text empty: the run keeps its own",
                )
            case _:
                assert_never(answer.answer)


def _submit_script(
    request: RunRequest, settings: Settings, queue: str | None, delay_ms: int, expires_ms: int, canvas: str
) -> ScriptCall[Submitted]:
    """The call of the script `submit` for a checked request."""
    return scripts.submit(
        run_id=request.run_id,
        agent_id=request.agent_id,
        session_id=request.session_id,
        queue=checked_queue(queue or request.queue, settings.key_prefix, run_id=request.run_id),
        default_queue=settings.queue,
        digest=_digest(request),
        uid=secrets.token_hex(8),
        request=request.model_dump_json(exclude_none=True, exclude=_default_fields(request)),
        canvas=canvas,
        durable=settings.durable_default if request.durable is None else request.durable,
        delay_ms=delay_ms,
        reject_if_busy=request.on_busy == "reject",
        lists=extra_indexes(request.tenant, request.labels),
        parent_run_id=request.parent_run_id or "",
        expires_ms=expires_ms,
        tell=True,
        input_text=request.input_text,
    )


def _default_fields(request: RunRequest) -> set[str]:
    """Fields with their default value, besides the ones that are None. They are not stored or hashed.

    Therefore older workers can read requests of newer producers, and a new field does not change the digest
    of requests that do not use it.
    """
    return set() if request.labels else {"labels"}


def _digest(request: RunRequest) -> str:
    """The digest that decides whether two requests are the same: of all stored fields in sorted order."""
    fields = request.model_dump(mode="json", exclude_none=True, exclude=_default_fields(request))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
