"""Recorded functions: the only place that calls a function of a program as a recorded call of its run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from openagents_worker.errors import OpenAgentsError, StepTimeoutError
from openagents_worker.jsontext import canonical_json
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import MAX_MESSAGE_CHARS, ErrorDetails
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.calls.extending import more_time
from openagents_worker.runtime.calls.interrupted import CallWithEffect, KnownOutcome, RecordedOutcome
from openagents_worker.runtime.calls.recorded_values import Step, unwrapped
from openagents_worker.runtime.context import AttemptContext, CallContext, writing_to
from openagents_worker.runtime.effects import Effect
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.recorder import Outcome
from openagents_worker.runtime.user_code import (
    cancelling_itself_only,
    described_in_log,
    user_code,
    user_error_of,
)
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import Offload

__all__ = ["RecordedFunctions"]

log = get_logger(__name__)

ONCE_HINT = "it is not called again once its outcome is stored; send its idempotency key to the receiver"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a function. `arguments` are those of `args` and `kwargs` by their names, as JSON."""

    step: Step
    info: CallInfo
    arguments: Mapping[str, Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class RecordedFunctions:
    """The recorded functions of one attempt."""

    def __init__(self, context: AttemptContext, writer: RunWriter, offload: Offload) -> None:
        self._context = context
        self._writer = writer
        self._offload = offload
        self._warned: set[str] = set()

    step = staticmethod(Step.of)

    def wrapped(self, step: Step) -> Callable[..., Awaitable[Any]]:
        """A function with the signature and the docstring of the step, whose calls are recorded."""

        @wraps(step.function)
        async def recorded(*args: Any, **kwargs: Any) -> Any:
            return await self.call(step, args, kwargs)

        return recorded

    async def call(self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of the function, from the journal or by calling it. Raises coded errors."""
        arguments = step.arguments(args, kwargs)
        digest = digest_of(canonical_json(arguments))
        recorder = self._context.recorder

        async def make(info: CallInfo) -> Outcome:
            if recorder.budget.clock is not None:
                await more_time(recorder)
            call = FunctionCall(step, info, arguments, args, kwargs)
            if not recorder.announced.is_known(info):
                self._emit_started(call)
            with recorder.announced.in_progress(info):
                return await self._make_call(call)

        return step.decoded(await recorder.call("step", step.name, digest, make, may_repeat=step.idempotent))

    async def _make_call(self, call: FunctionCall) -> Outcome:
        """The outcome of a call: known from an earlier attempt, or by calling the function."""
        try:
            with user_code(call.step.error):
                known = await self._begin(call)
                if known is not None:
                    return self._outcome_of(call, known)
                return await self._outcome_of_calling(call)
        except OpenAgentsError as error:
            return self._failed(call.step, call.info, error)

    async def _begin(self, call: FunctionCall) -> KnownOutcome | None:
        """Store the intent of a call that must not be repeated. Returns the outcome of an interrupted one, if
        it is known; else the call may be made."""
        effect: Effect | None = call.info.effect
        if effect is None:
            return None
        known = await CallWithEffect(
            what=f"step {call.step.name!r}",
            info=call.info,
            effect=effect,
            recorder=self._context.recorder,
            emit=self._writer.emit,
            error_of=call.step.error,
        ).begin(call.arguments)
        if known is None and self._context.recorder.announced.was_interrupted(call.info):
            self._emit_started(call)
        try:
            self._writer.store.check_lease()
        except RunLatched:
            effect.report_not_begun(call.info)
            raise
        return known

    async def _outcome_of_calling(self, call: FunctionCall) -> Outcome:
        """Call the function. Changes of the state apply once the outcome is recorded."""
        context = CallContext(self._context, call.info.idempotency_key, call.info.call_id)
        stored = call.step.encoded(await self._execute(call.step, context, call.args, call.kwargs))
        state, artifacts = context.stored_changes(f"step {call.step.name!r}")
        return self._succeeded(call, stored, state=state, artifacts=artifacts)

    def _outcome_of(self, call: FunctionCall, known: KnownOutcome) -> Outcome:
        """The outcome of an interrupted call. Raises its recorded error, and `StepFailed` for a result that
        does not have the type of the function."""
        value = known.outcome()
        if isinstance(value, RecordedOutcome):
            record = value.record
            return self._succeeded(
                call, record.outcome.get("ok"), state=record.state, artifacts=record.artifacts
            )
        call.step.decoded(value)
        return self._succeeded(call, value)

    def _succeeded(self, call: FunctionCall, stored: Any, **changes: Any) -> Outcome:
        preview = self._writer.preview(stored)
        payload = {"name": call.step.name, "call_id": call.info.call_id, "result": preview}
        return Outcome(value=stored, events=[("step.succeeded", payload)], is_stored_form=True, **changes)

    def _emit_started(self, call: FunctionCall) -> None:
        """Emit `step.started` and, for a function that must not be repeated, a warning once per attempt."""
        step, params = call.step, self._writer.preview(call.arguments)
        self._writer.emit("step.started", {"name": step.name, "params": params, "call_id": call.info.call_id})
        if not step.idempotent and step.name not in self._warned:
            self._warned.add(step.name)
            warning = {"run_id": self._context.run_id, "tool_id": step.name, "hint": ONCE_HINT}
            self._writer.emit("run.durable_idempotency_warning", warning)

    async def _execute(
        self, step: Step, context: CallContext, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        def own(value: Any) -> Any:
            return context if isinstance(value, AttemptContext | CallContext) else value

        call = partial(step.function, *map(own, args), **{name: own(value) for name, value in kwargs.items()})
        timer = asyncio.timeout(step.timeout_s)
        try:
            async with timer:
                with writing_to(context):
                    return await cancelling_itself_only(self._call(step, call))
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise StepTimeoutError(f"step {step.name!r} took longer than {step.timeout_s} s") from error

    async def _call(self, step: Step, call: partial[Any]) -> Any:
        """Call an async function on the event loop, and any other one in a thread."""
        if is_async(step.function):
            return await call()
        value = await self._offload.in_thread(call)
        return await value if inspect.isawaitable(value) else value

    def _failed(self, step: Step, info: CallInfo, error: OpenAgentsError) -> Outcome:
        """The outcome of a failed call, with its log line and event."""
        raised, fields_ = user_error_of(error), described_in_log(error)
        payload = {
            "name": step.name,
            "call_id": info.call_id,
            "error": safe_message(str(error), MAX_MESSAGE_CHARS),
            **fields_,
            "type": type(raised or error).__name__,
            "error_details": ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        }
        log.warning(
            "step.failed",
            run_id=self._context.run_id,
            agent_id=self._context.agent_id,
            name=step.name,
            call_id=info.call_id,
            **fields_,
            user_error=raised,
        )
        # A retryable error does not repeat a call whose side effects may already have happened.
        return Outcome(error=error, events=[("step.failed", payload)], may_retry=step.idempotent)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, or an object with `__call__`, is async."""
    function = unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(type(function), "__call__", None)  # noqa: B004  # the method itself is asked for
    )
