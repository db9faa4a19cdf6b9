"""Recorded models and tools: the only place that wraps them so that each call of a pattern is recorded."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from openagents_worker.errors import (
    BudgetExhausted,
    CheckLimitExceeded,
    LLMResponseError,
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
from openagents_worker.jsontext import (
    ENVELOPE_LEVELS,
    LARGEST_COUNT,
    MAX_NESTING,
    NESTING_OF_OLD,
    canonical_json,
    dumps,
    replaced,
)
from openagents_worker.llm.base import (
    CallInfo,
    LLMClient,
    LLMResponse,
    ModelClient,
    ModelRequest,
    OnDelta,
    token_count,
)
from openagents_worker.models import MAX_MESSAGE_CHARS, ErrorDetails, RunBudget, RunUsage
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.context import CallContext, RunContext
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.recorder import Outcome, Recorder
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

__all__ = ["RecordedModel", "RecordedTool"]

log = get_logger(__name__)

Clock = Callable[[], float]

RECORD_OVERHEAD_BYTES = 2048  # of the record of a reply: usage, ids, lookup fields


class RecordedModel(ModelClient):
    """The model client of a run. Records replies, counts usage, checks the budget, streams."""

    def __init__(
        self,
        inner: LLMClient,
        *,
        recorder: Recorder,
        writer: RunWriter,
        budget: RunBudget,
        clock: Clock = time.monotonic,
    ) -> None:
        self._inner = inner
        self._recorder = recorder
        self._writer = writer
        self._budget = budget
        self._clock = clock
        self._streams = _supports_streaming(type(inner))
        self._reported_unpriced = False
        self.provider_name = getattr(inner, "provider_name", "unknown")
        self.model_id = getattr(inner, "model_id", "unknown")

    async def respond(self, request: ModelRequest) -> LLMResponse:
        """The reply to a request, from the journal or from the provider. Raises like the client it wraps."""
        name = text_of(request.model or self.model_id)

        async def make(info: CallInfo) -> Outcome:
            return await self._call_model(name, request, info)

        digest, core = self._recorder.rules.prompt({**request.content(), "model": name})
        reply = await self._recorder.call("model", name, digest, make, core=core)
        return LLMResponse.from_wire(reply)

    async def _call_model(self, name: str, request: ModelRequest, info: CallInfo) -> Outcome:
        """Make a model call and return its outcome. Emits `llm.called` before it."""
        if (exhausted := self._over_budget()) is not None:
            return Outcome(error=exhausted)
        self._writer.emit("llm.called", {"model": name, "call": info.call_id})
        started = self._clock()
        try:
            with user_code(LLMResponseError, prefix="the model's client failed: "):
                reply = await self._send_request(
                    replace(request, on_delta=self._delta_callback(request, info))
                )
                reply = _limit_arguments(reply, self._recorder.max_record_bytes)
                usage = _usage_of(reply)
                wire = stored_part("the reply", reply.to_wire(), levels=MAX_NESTING + ENVELOPE_LEVELS)
        except OpenAgentsError as error:
            self._log_failure(error, name)
            failed = {"model": name, "call": info.call_id, "error": str(error)}
            details = ErrorDetails.from_exception(error).model_dump(exclude_none=True)
            return Outcome(error=error, events=[("llm.failed", {**failed, "error_details": details})])
        took_ms = round((self._clock() - started) * 1000, 1)
        metrics = {"latency_ms": took_ms, **usage.model_dump(exclude_defaults=True, exclude={"llm_calls"})}
        payload = {
            "model": name,
            "call": info.call_id,
            "_metrics": metrics,
            "output_text": self._writer.preview(reply.output_text),
            "tool_calls": [call.name for call in reply.tool_calls],
        }
        return Outcome(value=wire, usage=usage, events=[("llm.succeeded", payload)], is_stored_form=True)

    def _delta_callback(self, request: ModelRequest, info: CallInfo) -> OnDelta | None:
        """A callback that publishes the pieces of a reply to watchers; None if the client cannot stream."""
        if not self._streams:
            return None

        async def publish(text: str) -> None:
            self._writer.delta(info.call_id, text)
            if request.on_delta is not None:
                await request.on_delta(text)

        return publish

    async def _send_request(self, request: ModelRequest) -> LLMResponse:
        if isinstance(self._inner, ModelClient):
            return await self._inner.respond(request)
        return await self._inner.generate(**request.arguments())

    def _log_failure(self, error: OpenAgentsError, name: str) -> None:
        """Log an exception of a custom client. Failures of the built-in clients are logged with the run."""
        if (raised := user_error_of(error)) is not None:
            log.warning(
                "llm.failed",
                run_id=self._recorder.run_id,
                model=name,
                **described_in_log(error),
                user_error=raised,
            )

    def _over_budget(self) -> BudgetExhausted | None:
        """The error if the cost budget is exhausted. Not used for replayed calls: they cost nothing more."""
        limit, spent = self._budget.max_cost_usd, self._recorder.usage.cost_usd
        if limit is None:
            return None
        if spent is None:
            if self._recorder.usage.llm_calls and not self._reported_unpriced:
                self._reported_unpriced = True
                self._writer.emit(
                    "budget.cost_skipped", {"limit": limit, "reason": "the model's price is not known"}
                )
            return None
        if spent < limit:
            return None
        return BudgetExhausted(
            f"cost budget exhausted: {spent:.4f} of {limit:.4f} USD", kind="cost", current=spent, limit=limit
        )

    def count_tokens(self, text: str) -> int:
        return self._inner.count_tokens(text)

    async def aclose(self) -> None:
        """Does nothing: the client belongs to the process, not to the run."""


@lru_cache  # reading a signature takes longer than preparing a call
def _supports_streaming(client: type[LLMClient]) -> bool:
    """Whether `generate` of this client class has the parameter `on_delta`."""
    return "on_delta" in inspect.signature(client.generate).parameters


def _limit_arguments(reply: LLMResponse, max_bytes: int) -> LLMResponse:
    """The reply without tool arguments that are too large to record. The model gets an error for these."""
    allowed = max(max_bytes - RECORD_OVERHEAD_BYTES, max_bytes // 2)
    calls = list(reply.tool_calls)
    sizes = [len(dumps([dict(call.arguments), call.raw_arguments or ""]).encode()) for call in calls]
    while calls and sum(sizes) + len(reply.output_text.encode()) > allowed and max(sizes):
        largest = sizes.index(max(sizes))
        problem = f"the arguments have {sizes[largest]:,} bytes, {allowed:,} are allowed for the whole reply"
        calls[largest] = replace(calls[largest], arguments={}, raw_arguments=None, parse_error=problem)
        sizes[largest] = 0
    return replace(reply, tool_calls=tuple(calls)) if 0 in sizes else reply


def _usage_of(reply: LLMResponse) -> RunUsage:
    used = reply.usage
    if used is None:
        return RunUsage(llm_calls=1)
    more = used.metadata
    return RunUsage(
        llm_calls=1,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        total_tokens=used.total_tokens or used.input_tokens + used.output_tokens,
        input_tokens_cached=token_count(more.get("cached_tokens") or more.get("cache_read_input_tokens")),
        input_tokens_cache_creation=token_count(more.get("cache_creation_input_tokens")),
        cost_usd=_amount(more.get("cost_usd")),
        cost_breakdown=_amounts(more.get("cost_breakdown")),
        ttft_ms=_amount(more.get("ttft_ms")),
        llm_retry_count=token_count(more.get("retries")),
    )


def _amount(value: Any) -> float | None:
    """An amount of money or time from a client; None if it is not a number or is negative."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= LARGEST_COUNT else None


def _amounts(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    amounts = {text_of(name): _amount(value) for name, value in values.items()}
    return {name: amount for name, amount in amounts.items() if amount is not None}


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
            is_stored_form=True,
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
