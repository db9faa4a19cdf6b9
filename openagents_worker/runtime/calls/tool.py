"""Recorded tools: the only place that makes the tool calls of a run, and records their outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import (
    ModelRetryError,
    OpenAgentsError,
    StepTooLarge,
    ToolError,
    ToolValidationError,
)
from openagents_worker.jsontext import NESTING_OF_OLD, canonical_json, replaced
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import MAX_MESSAGE_CHARS, Decision, ErrorDetails, RunUsage
from openagents_worker.models.usage import ONE_TOOL_CALL
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.call_outcome import Event
from openagents_worker.runtime.calls.executors import execute_by
from openagents_worker.runtime.calls.interrupted import RecordedOutcome
from openagents_worker.runtime.calls.jobs import run_job
from openagents_worker.runtime.calls.tool_call import BoundTool, ToolCall, ToolRun, in_order, is_needed
from openagents_worker.runtime.calls.tool_stream import stream
from openagents_worker.runtime.context import AttemptContext, CallContext, writing_to
from openagents_worker.runtime.journal import Record, digest_of
from openagents_worker.runtime.recorder import Outcome
from openagents_worker.runtime.span_content import report_tool_content
from openagents_worker.runtime.storable import stored_part
from openagents_worker.runtime.user_code import (
    cancelling_itself_only,
    described_in_log,
    tool_error,
    user_code,
    user_error_of,
)
from openagents_worker.telemetry.logs import get_logger

__all__ = ["RecordedTool"]

log = get_logger(__name__)


class RecordedTool:
    """A tool of a run. Each call is answered from the journal, or passes the guards and is recorded."""

    def __init__(self, tool: BoundTool, run: ToolRun) -> None:
        self.tool_id = tool.tool_id
        self._tool = tool
        self._run = run
        self._guarded = in_order([guard for guard in run.guards if is_needed(guard, tool, run)], _execute)
        self._retry_requests = 0
        self._failure_of_tool = tool_error(ToolError, tool.tool_id)
        self._failure_of_result = tool_error(StepTooLarge, tool.tool_id)

    @property
    def concurrency_safe(self) -> bool:
        return self._tool.spec.concurrency_safe

    @property
    def context(self) -> AttemptContext:
        """The run that has the tool."""
        return self._run.context

    @property
    def may_need_approval(self) -> bool:
        return self._tool.may_need_approval

    def describe(self) -> dict[str, Any]:
        return dict(self._tool.description)

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        """The result of the tool as JSON values, from the journal or by executing it. Raises coded errors."""
        try:
            _ = replaced(params, NESTING_OF_OLD)  # checks the nesting of arguments that a pattern made itself
            digest = digest_of(canonical_json(params))
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolValidationError(f"the arguments are not JSON: {error}", self.tool_id) from None

        self._run.context.tool_chain.append((self.tool_id, params))

        async def make(info: CallInfo) -> Outcome:
            return await self._make_call(params, info)

        try:
            return await self._run.context.recorder.call(
                "tool", self.tool_id, digest, make, may_repeat=self._tool.may_repeat
            )
        except ModelRetryError:
            self._retry_requests += 1
            raise

    async def _make_call(self, params: dict[str, Any], info: CallInfo) -> Outcome:
        """Pass a call through the guards to the tool, and return its outcome."""
        context = CallContext(self._run.context, info.idempotency_key, info.call_id)
        call = ToolCall(self._tool, self._run, info, context, params)
        try:
            with writing_to(context), user_code(self._failure_of_tool):  # a guard may raise anything
                value = await self._guarded(call)
            if isinstance(value, RecordedOutcome):
                return self._outcome_of(call, value.record)
            with user_code(self._failure_of_result):
                outcome = self._succeeded(call, value)
            report_tool_content(params, outcome.value, self._run.writer.preview)
            return outcome
        except OpenAgentsError as error:
            outcome = self._failed(call, error) if call.is_announced else Outcome(error=error)
            outcome.decision = _stored(call.decision)
            return outcome

    def _succeeded(self, call: ToolCall, value: Any) -> Outcome:
        """The outcome of a call as it is stored. Raises `StepTooDeep` or `StepTooLarge`, naming the part."""
        state, artifacts = call.context.stored_changes(self.tool_id)
        stored = stored_part(f"the result of {self.tool_id}", value)
        return Outcome(
            value=stored,
            usage=ONE_TOOL_CALL,
            state=state,
            artifacts=artifacts,
            events=[self._success(call, stored)],
            decision=_stored(call.decision),
            is_stored_form=True,
        )

    def _success(self, call: ToolCall, result: Any) -> Event:
        preview = self._run.writer.preview(result)
        payload = {"tool_id": self.tool_id, "result": preview, "call_id": call.info.call_id}
        return "tool.succeeded", payload | _more_fields(call)

    def _outcome_of(self, call: ToolCall, record: Record) -> Outcome:
        """The outcome of a call that another attempt has made."""
        value = record.outcome.get("ok")
        return Outcome(
            value=value,
            usage=RunUsage(**record.usage),
            state=record.state,
            artifacts=record.artifacts,
            events=[self._success(call, value)],
            is_stored_form=True,
        )

    def _failed(self, call: ToolCall, error: OpenAgentsError) -> Outcome:
        """The outcome of a failed call, with its log line and events."""
        error.tool_id = error.tool_id or self.tool_id
        raised, fields = user_error_of(error), described_in_log(error)
        payload: dict[str, Any] = {
            "tool_id": self.tool_id,
            "error": safe_message(str(error), MAX_MESSAGE_CHARS),
            "call_id": call.info.call_id,
            **fields,
            "type": type(raised or error).__name__,
            "error_details": ErrorDetails.from_exception(error).model_dump(exclude_none=True),
            **_more_fields(call),
        }
        log.warning(
            "tool.failed",
            run_id=self._run.context.run_id,
            agent_id=self._run.context.agent_id,
            tool_id=self.tool_id,
            call_id=call.info.call_id,
            **fields,
            user_error=raised,
        )
        events: list[tuple[str, Mapping[str, Any]]] = [("tool.failed", payload)]
        if isinstance(error, ModelRetryError):
            request = {key: payload[key] for key in ("tool_id", "error", "call_id")}
            events.insert(0, ("tool.retry_requested", {**request, "attempt": self._retry_requests + 1}))
        return Outcome(
            error=error,
            events=events,
            # A retryable error does not repeat a call whose side effects may already have happened.
            may_retry=(self._tool.may_repeat or not call.has_begun) and not call.has_job,
            usage=ONE_TOOL_CALL,
        )


def _stored(decision: Decision | None) -> dict[str, Any] | None:
    """A decision as it is stored with the outcome of its call."""
    return None if decision is None else decision.model_dump(mode="json", exclude_none=True)


def _more_fields(call: ToolCall) -> dict[str, Any]:
    """Further fields of the event of the end of a call."""
    fields: dict[str, Any] = {"streamed": True} if call.has_streamed else {}
    if call.executor_metadata:
        fields["executor_metadata"] = call.executor_metadata
    return fields


async def _execute(call: ToolCall) -> Any:
    """Call the tool itself, after all guards."""
    if call.tool.is_background or call.goes_on:
        return await run_job(call)
    if call.tool.is_streaming:
        return await cancelling_itself_only(stream(call))
    if call.tool.executor is not None:
        return await cancelling_itself_only(execute_by(call.tool.executor, call))
    return await cancelling_itself_only(call.tool.toolset.call(call.tool_id, call.params, call.context))
