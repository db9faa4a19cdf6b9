"""Submitting. The only place that turns a request into an accepted run, or says why it is none."""

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

# One more try takes two seconds at most, so that a caller waits less than five in all.
REPEAT_FOR_S = 2.5
REPEAT_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted run. `first` is its first message, to be sent by the caller; `also` another run to wake.

    `state` is one of `RunState`, or one that only a newer version knows.
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
    """Accept a run, within five seconds; nothing is sent. The same request again is the same run.

    `queue` goes before the request's own; `canvas` is JSON kept for the run's messages; with `expires_ms` the
    run is cancelled unless it has been started by then. Raises what
    `parse_request` raises, `AgentNotFoundError`, `RunConflict`, `SessionBusy`, `RedisUnsafe` or
    `RedisUnreachable` when nothing was accepted, and `SubmitUnknown` when that cannot be known, which under
    `OPENAGENTS_DURABILITY=strict` is also said of a run that is not known to be on disk.
    """
    return _executed(
        store, _attempt(request, settings, queue, delay_ms, expires_ms, canvas, clock), settings, pause
    )


def resume(store: Store, run: RunRecord, *, settings: Settings, by: str = "") -> Accepted:
    """Start another life of a run that has failed or was cancelled, from its last checkpoint.

    `by` is who wants it, for the event. Raises as `submit` does, and `ConfigError` for one that has no
    checkpoint and may have had effects.
    """
    return _executed(store, _resumption(run, settings, by), settings, time.sleep)


async def aresume(store: AsyncStore, run: RunRecord, *, settings: Settings, by: str = "") -> Accepted:
    """As `resume`, for asyncio."""
    return await _aexecuted(store, _resumption(run, settings, by), settings, asyncio.sleep)


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


def _executed(
    store: Store, attempt: _SubmitTry[Any], settings: Settings, pause: Callable[[float], None]
) -> Accepted:
    run = store.run_on_disk if settings.durability == "strict" else store.run
    while True:
        try:
            return attempt.accepted(run(attempt.call))
        except RedisUnreachable as error:
            attempt.must_repeat(error)
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
    """As `submit`, for asyncio."""
    return await _aexecuted(
        store, _attempt(request, settings, queue, delay_ms, expires_ms, canvas, clock), settings, pause
    )


async def _aexecuted(
    store: AsyncStore,
    attempt: _SubmitTry[Any],
    settings: Settings,
    pause: Callable[[float], Awaitable[None]],
) -> Accepted:
    run = store.run_on_disk if settings.durability == "strict" else store.run
    while True:
        try:
            return attempt.accepted(await run(attempt.call))
        except RedisUnreachable as error:
            attempt.must_repeat(error)
            await pause(REPEAT_PAUSE_S)


def _attempt(
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
    """One request on its way: the script to run, when to repeat it, and what its answer means."""

    call: ScriptCall[T]

    def __init__(self, request: RunRequest, canvas: str, clock: Callable[[], float]) -> None:
        self.request = request
        self._canvas = canvas
        self._clock = clock
        self._began = clock()
        self._may_be_accepted = False

    def accepted(self, answer: T) -> Accepted:
        """The accepted run, or the error that says why it is none."""
        raise NotImplementedError

    def must_repeat(self, error: RedisUnreachable) -> None:
        """Returns when the script is to be run again, else raises what the caller should know."""
        self._may_be_accepted = self._may_be_accepted or isinstance(error, AnswerLost)
        if not self._may_be_accepted:
            raise error
        if self._clock() - self._began >= REPEAT_FOR_S:
            raise self._error(
                SubmitUnknown,
                f"the run {self.request.run_id!r} may be accepted or not: {error.message}",
                "submit the same request with this run_id again: that is safe, and it is one run",
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

    def _error(self, kind: type[OpenAgentsError], message: str, hint: str) -> OpenAgentsError:
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
        self.call = _script(request, settings, queue, delay_ms, expires_ms, canvas)

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
                raise self._error(
                    RunConflict,
                    f"the run_id {self.request.run_id!r} belongs to another request",
                    "choose another run_id, or send the very same request again",
                )
            case SubmitAnswer.BUSY:
                raise self._error(
                    SessionBusy,
                    f"the session {self.request.session_id!r} is busy with the run {answer.holder!r}",
                    "wait for that run, or submit with on_busy='enqueue'",
                )
            case SubmitAnswer.UNKNOWN_AGENT:
                raise self._error(AgentNotFoundError, *self._no_agent(answer.known_agents))
            case _:
                assert_never(answer.answer)

    def _no_agent(self, known: tuple[str, ...]) -> tuple[str, str]:
        agent_id = self.request.agent_id
        return f"no worker knows an agent {agent_id!r}", agent_hint(agent_id, known)


class _Resumption(_SubmitTry[Resumed]):
    """A run that ended without an answer and goes on in another life."""

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
                raise self._error(
                    RunConflict,
                    f"the run {self.request.run_id!r} has completed; there is nothing to resume",
                    "submit a new run in the same session to go on from its answer",
                )
            case ResumeAnswer.NO_CHECKPOINT:
                raise self._error(
                    ConfigError,
                    f"the run {self.request.run_id!r} has no checkpoint to go on from",
                    "it is not durable, or its records are gone: to begin it again might repeat what it did; "
                    "submit a new run",
                )
            case ResumeAnswer.OTHER_CHECKPOINT:
                raise self._error(
                    ConfigError,
                    f"Unknown resume_from_checkpoint {checkpoint!r}",
                    f"its latest is {answer.detail!r}; a run goes on from its latest",
                )
            case ResumeAnswer.OTHER_AGENT | ResumeAnswer.OTHER_SESSION | ResumeAnswer.OTHER_INPUT:
                what = {"OTHER_AGENT": "agent", "OTHER_SESSION": "session", "OTHER_INPUT": "input_text"}[
                    answer.answer
                ]
                raise self._error(
                    ConfigError,
                    f"the run {self.request.run_id!r} has another {what} than the request that resumes it",
                    f"it is {answer.detail!r}"
                    if answer.detail
                    else "leave input_text empty: the run has its own",
                )
            case _:
                assert_never(answer.answer)


def _script(
    request: RunRequest, settings: Settings, queue: str | None, delay_ms: int, expires_ms: int, canvas: str
) -> ScriptCall[Submitted]:
    return scripts.submit(
        run_id=request.run_id,
        agent_id=request.agent_id,
        session_id=request.session_id,
        queue=checked_queue(queue or request.queue, settings.key_prefix, run_id=request.run_id),
        default_queue=settings.queue,
        digest=_digest(request),
        uid=secrets.token_hex(8),
        request=request.model_dump_json(exclude_none=True, exclude=_unsaid(request)),
        canvas=canvas,
        durable=settings.durable_default if request.durable is None else request.durable,
        delay_ms=delay_ms,
        reject_if_busy=request.on_busy == "reject",
        lists=extra_indexes(request.tenant, request.labels),
        parent_run_id=request.parent_run_id or "",
        expires_ms=expires_ms,
        tell=True,
    )


def _unsaid(request: RunRequest) -> set[str]:
    """Fields beside those that are None which say nothing.

    What is not said is not stored: so it is read also where a newer field is not known, and a field that a
    newer version adds, and that a request leaves out, makes it no other request.
    """
    return set() if request.labels else {"labels"}


def _digest(request: RunRequest) -> str:
    """Decides what the same request is: every field that says something, in one order."""
    fields = request.model_dump(mode="json", exclude_none=True, exclude=_unsaid(request))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
