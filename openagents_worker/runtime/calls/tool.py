"""Recorded tools: the only place that makes the tool calls of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import (
    CheckLimitExceeded,
    MaxStepsExceeded,
    ModelRetryError,
    OpenAgentsError,
    PermanentToolError,
    StepTooLarge,
    ToolError,
    ToolTimeoutError,
    ToolValidationError,
    text_of,
)
from openagents_worker.json_schema.rules import Schema
from openagents_worker.jsontext import MAX_NESTING, NESTING_OF_OLD, canonical_json, dumps, replaced
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import MAX_MESSAGE_CHARS, ErrorDetails, RunBudget, RunUsage
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.context import CallContext, RunContext
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.recorder import Outcome
from openagents_worker.runtime.state import CHANGE_LEVELS
from openagents_worker.runtime.storable import stored_artifact, stored_part
from openagents_worker.runtime.user_code import (
    cancelling_itself_only,
    described_in_log,
    tool_error,
    user_code,
    user_error_of,
)
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import ToolExecutionSpec
from openagents_worker.tools.checks import SchemaChecks, schema_of_tool

__all__ = ["RecordedTool"]

log = get_logger(__name__)


class RecordedTool:
    """A tool of a run. Checks arguments and approval, calls hooks, limits the time, records each call."""

    def __init__(
        self,
        tool_id: str,
        inner: Any,
        *,
        context: RunContext,
        writer: RunWriter,
        budget: RunBudget,
        timeout_ms: int | None,
        default_timeout_ms: int | None,
        checks: SchemaChecks,
    ) -> None:
        self.tool_id = tool_id
        self._inner = inner
        self._context = context
        self._writer = writer
        self._budget = budget
        described = inner.describe() if hasattr(inner, "describe") else {}
        self._described = {**described, "name": tool_id}
        self._schema = described.get("parameters") or {"type": "object"}
        self._checks = checks
        self._checked_schema: Schema | None = None
        spec = inner.execution_spec() if hasattr(inner, "execution_spec") else None
        self.spec = (
            ToolExecutionSpec.model_validate(spec.model_dump()) if spec is not None else ToolExecutionSpec()
        )
        self._timeout_ms = timeout_ms or self.spec.default_timeout_ms or default_timeout_ms
        self._may_repeat = bool(getattr(inner, "durable_idempotent", True))
        self._has_warned = False
        self._retry_requests = 0

    @property
    def concurrency_safe(self) -> bool:
        return self.spec.concurrency_safe

    def describe(self) -> dict[str, Any]:
        return dict(self._described)

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        """The result of the tool as JSON values, from the journal or by executing it. Raises coded errors."""
        try:
            _ = replaced(params, NESTING_OF_OLD)  # checks the nesting of arguments that a pattern made itself
            digest = digest_of(canonical_json(params))
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolValidationError(f"the arguments are not JSON: {error}", self.tool_id) from None

        async def make(info: CallInfo) -> Outcome:
            return await self._execute_call(params, info)

        try:
            return await self._context.recorder.call(
                "tool", self.tool_id, digest, make, may_repeat=self._may_repeat
            )
        except ModelRetryError:
            self._retry_requests += 1
            raise

    async def _execute_call(self, params: dict[str, Any], info: CallInfo) -> Outcome:
        """Execute a tool call and return its outcome. Emits `tool.called` before it."""
        if (exceeded := self._over_budget(info)) is not None:
            return Outcome(error=exceeded)
        call = CallContext(self._context, info.idempotency_key, info.call_id)
        self._writer.emit(
            "tool.called",
            {"tool_id": self.tool_id, "params": self._writer.preview(params), "call_id": info.call_id},
        )
        self._warn_about_side_effects_once()
        try:
            value = await self._invoke_checked(params, call)
            with user_code(tool_error(StepTooLarge, self.tool_id)):
                outcome = self._storable_outcome(value, call)
                value = outcome.value
        except OpenAgentsError as error:
            return self._failed_outcome(error, call)
        payload = {"tool_id": self.tool_id, "result": self._writer.preview(value), "call_id": info.call_id}
        outcome.events = [("tool.succeeded", payload)]
        return outcome

    def _storable_outcome(self, value: Any, call: CallContext) -> Outcome:
        """The outcome of a call as it is stored. Raises `StepTooDeep` or `StepTooLarge`, naming the part."""
        state: dict[str, Any] = {}
        for key, change in call.state.changes().items():
            what = f"state key {text_of(key)!r}, set by {self.tool_id},"
            state |= stored_part(what, {key: change}, levels=MAX_NESTING + CHANGE_LEVELS)
        return Outcome(
            value=stored_part(f"the result of {self.tool_id}", value),
            usage=RunUsage(tool_calls=1),
            state=state,
            artifacts=[stored_artifact(artifact, self.tool_id) for artifact in call.artifacts],
        )

    def _failed_outcome(self, error: OpenAgentsError, call: CallContext) -> Outcome:
        """The outcome of a failed call, with its log line and events."""
        error.tool_id = error.tool_id or self.tool_id
        raised, fields = user_error_of(error), described_in_log(error)
        payload: dict[str, Any] = {
            "tool_id": self.tool_id,
            "error": safe_message(str(error), MAX_MESSAGE_CHARS),
            "call_id": call.call_id,
            **fields,
            "type": type(raised or error).__name__,
            "error_details": ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        }
        log.warning(
            "tool.failed",
            run_id=self._context.run_id,
            agent_id=self._context.agent_id,
            tool_id=self.tool_id,
            call_id=call.call_id,
            **fields,
            user_error=raised,
        )
        events: list[tuple[str, Mapping[str, Any]]] = [("tool.failed", payload)]
        if isinstance(error, ModelRetryError):
            request = {key: payload[key] for key in ("tool_id", "error", "call_id")}
            events.insert(0, ("tool.retry_requested", {**request, "attempt": self._retry_requests + 1}))
        # A retryable error does not repeat a call whose side effects may already have happened.
        return Outcome(
            error=error,
            events=events,
            may_retry=self._may_repeat,
            usage=RunUsage(tool_calls=1),
        )

    async def _invoke_checked(self, params: dict[str, Any], call: CallContext) -> Any:
        """Check arguments and approval, call the hooks and the tool. Raises only coded errors."""
        as_tool_error = tool_error(ToolError, self.tool_id)
        with user_code(as_tool_error):
            await self._check_params(params)
        self._check_approval(params, call)
        result: Any = None
        raised: BaseException | None = None
        try:
            with user_code(as_tool_error):
                try:
                    await _call_hook(self._inner, "before_invoke", params, call)
                    result = await self._invoke_with_timeout(params, call)
                except BaseException as error:
                    raised = error  # the hook gets the original exception, not the coded error
                    raise
            return result
        finally:
            if not isinstance(raised, RunLatched | GeneratorExit):
                await self._after_invoke(params, call, result, raised)

    async def _after_invoke(
        self, params: dict[str, Any], call: CallContext, result: Any, raised: BaseException | None
    ) -> None:
        """Call the `after_invoke` hook. It cannot change the outcome; its errors are only logged."""
        try:
            with user_code(tool_error(ToolError, self.tool_id)):
                await _call_hook(self._inner, "after_invoke", params, call, result, raised)
        except OpenAgentsError as error:
            log.warning(
                "tool.after_invoke_failed",
                run_id=self._context.run_id,
                tool_id=self.tool_id,
                **described_in_log(error),
                user_error=user_error_of(error),
            )

    async def _invoke_with_timeout(self, params: dict[str, Any], call: CallContext) -> Any:
        """Invoke the tool. Raises `ToolTimeoutError` after its time limit."""
        if self._timeout_ms is None:
            return await cancelling_itself_only(self._inner.invoke(params, call))
        deadline = asyncio.timeout(self._timeout_ms / 1000)
        try:
            async with deadline:
                return await cancelling_itself_only(self._inner.invoke(params, call))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise ToolTimeoutError(
                f"Tool {self.tool_id!r} timed out after {self._timeout_ms}ms", self.tool_id
            ) from error

    async def _check_params(self, params: dict[str, Any]) -> None:
        problem = await self._schema_problem(params)
        if problem is None and hasattr(self._inner, "validate_params"):
            is_valid, message = self._inner.validate_params(params)
            problem = None if is_valid else message or "refused by the tool"
        if problem is not None:
            raise ToolValidationError(
                problem, self.tool_id, hint=f"the parameters are {dumps(self._schema)[:500]}"
            )

    async def _schema_problem(self, params: dict[str, Any]) -> str | None:
        if self._checked_schema is None:
            self._checked_schema = schema_of_tool(self._schema)
        try:
            return await self._checks.mistakes(self._checked_schema, params, "argument")
        except CheckLimitExceeded as error:  # the model may try arguments that are cheaper to check
            raise ToolValidationError(error.message, self.tool_id, hint=error.hint) from error

    def _check_approval(self, params: dict[str, Any], call: CallContext) -> None:
        """Raises `PermanentToolError` if the call needs an approval that the request does not give."""
        if not self._needs_approval(params, call):
            return
        hints = self._context.run_request.context_hints.get("approvals")
        known = hints if isinstance(hints, dict) else {}
        decision = known.get(call.call_id, known.get(self.tool_id, known.get("*")))
        if decision != "allow":  # no other value allows the call
            raise PermanentToolError(
                f"Tool {self.tool_id!r} requires approval; "
                + ("no decision was given" if decision is None else f"the decision is {decision!r}"),
                self.tool_id,
                hint=f'context_hints={{"approvals": {{"{self.tool_id}": "allow"}}}}',
            )

    def _needs_approval(self, params: dict[str, Any], call: CallContext) -> bool:
        if not hasattr(self._inner, "requires_approval"):
            return self.spec.approval_mode == "always"
        try:
            with user_code(tool_error(ToolError, self.tool_id)):
                return bool(self._inner.requires_approval(params, call))
        except OpenAgentsError as error:  # if the check fails, approval is required
            log.warning(
                "tool.approval_gate_failed",
                run_id=self._context.run_id,
                tool_id=self.tool_id,
                **described_in_log(error),
                user_error=user_error_of(error),
            )
            return True

    def _over_budget(self, info: CallInfo) -> MaxStepsExceeded | None:
        limit = self._budget.max_tool_calls
        if limit is None or info.number <= limit:
            return None
        return MaxStepsExceeded(f"Tool call limit ({limit}) exceeded", tool_id=self.tool_id)

    def _warn_about_side_effects_once(self) -> None:
        if not self._may_repeat and not self._has_warned:
            self._has_warned = True
            hint = (
                "it is not called again once its outcome is stored; send its idempotency key to the receiver"
            )
            self._writer.emit(
                "run.durable_idempotency_warning",
                {"run_id": self._context.run_id, "tool_id": self.tool_id, "hint": hint},
            )


async def _call_hook(inner: Any, name: str, *args: Any) -> None:
    hook = getattr(inner, name, None)
    if hook is not None:
        await hook(*args)
