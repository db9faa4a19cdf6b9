"""Models and tools as a pattern gets them: the same contracts, with the recorder in between."""

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
    count,
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

REST_OF_RECORD_BYTES = 2048  # of a reply's record: usage, ids, how it is found again


class RecordedModel(ModelClient):
    """The run's model: counts usage, watches the cost budget, streams to watchers, records every reply."""

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
        self._streams = _takes_deltas(type(inner))
        self._told_unpriced = False
        self.provider_name = getattr(inner, "provider_name", "unknown")
        self.model_id = getattr(inner, "model_id", "unknown")

    async def respond(self, request: ModelRequest) -> LLMResponse:
        """As the provider's own client; a reply that is in the journal costs nothing."""
        name = text_of(request.model or self.model_id)

        async def make(info: CallInfo) -> Outcome:
            return await self._ask(name, request, info)

        digest, core = self._recorder.rules.prompt({**request.content(), "model": name})
        reply = await self._recorder.call("model", name, digest, make, core=core)
        return LLMResponse.from_wire(reply)

    async def _ask(self, name: str, request: ModelRequest, info: CallInfo) -> Outcome:
        if (over := self._over_budget()) is not None:
            return Outcome(error=over)
        self._writer.emit("llm.called", {"model": name, "call": info.call_id})
        started = self._clock()
        try:
            with user_code(LLMResponseError, prefix="the model's client failed: "):
                reply = await self._respond(replace(request, on_delta=self._shown(request, info)))
                reply = _bounded(reply, self._recorder.max_record_bytes)
                usage = _usage_of(reply)
                wire = stored_part("the reply", reply.to_wire(), levels=MAX_NESTING + ENVELOPE_LEVELS)
        except OpenAgentsError as error:
            self._log_failure(error, name)
            failed = {"model": name, "call": info.call_id, "error": str(error)}
            details = ErrorDetails.from_exception(error).model_dump(exclude_none=True)
            return Outcome(error=error, events=[("llm.failed", {**failed, "error_details": details})])
        took_ms = round((self._clock() - started) * 1000, 1)
        metrics = {"latency_ms": took_ms, **usage.model_dump(exclude_defaults=True, exclude={"llm_calls"})}
        told = {
            "model": name,
            "call": info.call_id,
            "_metrics": metrics,
            "output_text": self._writer.preview(reply.output_text),
            "tool_calls": [call.name for call in reply.tool_calls],
        }
        return Outcome(value=wire, usage=usage, events=[("llm.succeeded", told)])

    def _shown(self, request: ModelRequest, info: CallInfo) -> OnDelta | None:
        """Gives the pieces of a reply to whoever watches the run; None where the client cannot stream."""
        if not self._streams:
            return None

        async def pass_on(text: str) -> None:
            self._writer.delta(info.call_id, text)
            if request.on_delta is not None:
                await request.on_delta(text)

        return pass_on

    async def _respond(self, request: ModelRequest) -> LLMResponse:
        if isinstance(self._inner, ModelClient):
            return await self._inner.respond(request)
        return await self._inner.generate(**request.arguments())

    def _log_failure(self, error: OpenAgentsError, name: str) -> None:
        """A client of somebody's own that fails in its own way; of ours, the run or its retry says enough."""
        if (raised := user_error_of(error)) is not None:
            log.warning(
                "llm.failed",
                run_id=self._recorder.run_id,
                model=name,
                **described_in_log(error),
                user_error=raised,
            )

    def _over_budget(self) -> BudgetExhausted | None:
        """The error when the money is spent. Asked only for calls that are made: a recorded one is paid."""
        limit, spent = self._budget.max_cost_usd, self._recorder.usage.cost_usd
        if limit is None:
            return None
        if spent is None:
            if self._recorder.usage.llm_calls and not self._told_unpriced:
                self._told_unpriced = True
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
        """The client belongs to the process, not to the run: nothing to close."""


@lru_cache  # there are few classes of clients, and to read a signature takes longer than to prepare a call
def _takes_deltas(client: type[LLMClient]) -> bool:
    return "on_delta" in inspect.signature(client.generate).parameters


def _bounded(reply: LLMResponse, max_bytes: int) -> LLMResponse:
    """The reply as it can be recorded: arguments that are too large for that are an error for the model."""
    allowed = max(max_bytes - REST_OF_RECORD_BYTES, max_bytes // 2)
    calls = list(reply.tool_calls)
    sizes = [len(dumps([dict(call.arguments), call.raw_arguments or ""]).encode()) for call in calls]
    while calls and sum(sizes) + len(reply.output_text.encode()) > allowed and max(sizes):
        largest = sizes.index(max(sizes))
        problem = f"the arguments have {sizes[largest]:,} bytes, a reply may have {allowed:,} in all"
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
        input_tokens_cached=count(more.get("cached_tokens") or more.get("cache_read_input_tokens")),
        input_tokens_cache_creation=count(more.get("cache_creation_input_tokens")),
        cost_usd=_amount(more.get("cost_usd")),
        cost_breakdown=_amounts(more.get("cost_breakdown")),
        ttft_ms=_amount(more.get("ttft_ms")),
        llm_retry_count=count(more.get("retries")),
    )


def _amount(said: Any) -> float | None:
    """Money or time as a client says it; None for what is not such a number, negative ones included."""
    is_number = isinstance(said, int | float) and not isinstance(said, bool)
    return float(said) if is_number and 0 <= said <= LARGEST_COUNT else None


def _amounts(said: Any) -> dict[str, float]:
    if not isinstance(said, Mapping):
        return {}
    amounts = {text_of(name): _amount(value) for name, value in said.items()}
    return {name: amount for name, amount in amounts.items() if amount is not None}


class RecordedTool:
    """A tool bound to a run: checked arguments, approval, hooks, a deadline, events, usage, a record."""

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
        self._warned = False
        self._asked_again = 0

    @property
    def concurrency_safe(self) -> bool:
        return self.spec.concurrency_safe

    def describe(self) -> dict[str, Any]:
        return dict(self._described)

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        """The tool's result as plain JSON, or a coded error; made once however often the run is resumed."""
        try:
            _ = replaced(params, NESTING_OF_OLD)  # a model's arguments have been looked at where they came in
            digest = digest_of(canonical_json(params))
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolValidationError(f"the arguments are not JSON: {error}", self.tool_id) from None

        async def make(info: CallInfo) -> Outcome:
            return await self._make(params, info)

        try:
            return await self._context.recorder.call(
                "tool", self.tool_id, digest, make, may_repeat=self._may_repeat
            )
        except ModelRetryError:
            self._asked_again += 1
            raise

    async def _make(self, params: dict[str, Any], info: CallInfo) -> Outcome:
        if (over := self._over_budget(info)) is not None:
            return Outcome(error=over)
        call = CallContext(self._context, info.idempotency_key, info.call_id)
        self._writer.emit(
            "tool.called",
            {"tool_id": self.tool_id, "params": self._writer.preview(params), "call_id": info.call_id},
        )
        self._warn_once()
        try:
            value = await self._execute(params, call)
            with user_code(tool_error(StepTooLarge, self.tool_id)):
                outcome = self._checked(value, call)
                value = outcome.value
        except OpenAgentsError as error:
            return self._failed(error, call)
        told = {"tool_id": self.tool_id, "result": self._writer.preview(value), "call_id": info.call_id}
        outcome.events = [("tool.succeeded", told)]
        return outcome

    def _checked(self, value: Any, call: CallContext) -> Outcome:
        """What the call gave, as it is stored. Raises `StepTooDeep` or `StepTooLarge` that names the part."""
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

    def _failed(self, error: OpenAgentsError, call: CallContext) -> Outcome:
        error.tool_id = error.tool_id or self.tool_id
        raised, said = user_error_of(error), described_in_log(error)
        told = {
            "tool_id": self.tool_id,
            "error": safe_message(str(error), MAX_MESSAGE_CHARS),
            "call_id": call.call_id,
            **said,
            "type": type(raised or error).__name__,
            "error_details": ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        }
        log.warning(
            "tool.failed",
            run_id=self._context.run_id,
            agent_id=self._context.agent_id,
            tool_id=self.tool_id,
            call_id=call.call_id,
            **said,
            user_error=raised,
        )
        events: list[tuple[str, Mapping[str, Any]]] = [("tool.failed", told)]
        if isinstance(error, ModelRetryError):
            asked = {key: told[key] for key in ("tool_id", "error", "call_id")}
            events.insert(0, ("tool.retry_requested", {**asked, "attempt": self._asked_again + 1}))
        # A call with effects that may have happened is not made again because its error could be retried.
        return Outcome(
            error=error,
            events=events,
            may_retry=self._may_repeat,
            usage=RunUsage(tool_calls=1),
        )

    async def _execute(self, params: dict[str, Any], call: CallContext) -> Any:
        """Checks, approval, hooks and the call itself. Raises coded errors only."""
        as_tool_error = tool_error(ToolError, self.tool_id)
        with user_code(as_tool_error):
            await self._check_params(params)
        self._check_approval(params, call)
        result: Any = None
        raised: BaseException | None = None
        try:
            with user_code(as_tool_error):
                try:
                    await _hook(self._inner, "before_invoke", params, call)
                    result = await self._with_deadline(params, call)
                except BaseException as error:
                    raised = error  # the hook gets what the tool raised, not what we make of it
                    raise
            return result
        finally:
            if not isinstance(raised, RunLatched | GeneratorExit):
                await self._after_invoke(params, call, result, raised)

    async def _after_invoke(
        self, params: dict[str, Any], call: CallContext, result: Any, raised: BaseException | None
    ) -> None:
        """The hook runs after the fact and cannot change it: what it raises is a line in the log."""
        try:
            with user_code(tool_error(ToolError, self.tool_id)):
                await _hook(self._inner, "after_invoke", params, call, result, raised)
        except OpenAgentsError as error:
            log.warning(
                "tool.after_invoke_failed",
                run_id=self._context.run_id,
                tool_id=self.tool_id,
                **described_in_log(error),
                user_error=user_error_of(error),
            )

    async def _with_deadline(self, params: dict[str, Any], call: CallContext) -> Any:
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
        problem = await self._mistakes(params)
        if problem is None and hasattr(self._inner, "validate_params"):
            fine, said = self._inner.validate_params(params)
            problem = None if fine else said or "refused by the tool"
        if problem is not None:
            raise ToolValidationError(
                problem, self.tool_id, hint=f"the parameters are {dumps(self._schema)[:500]}"
            )

    async def _mistakes(self, params: dict[str, Any]) -> str | None:
        if self._checked_schema is None:
            self._checked_schema = schema_of_tool(self._schema)
        try:
            return await self._checks.mistakes(self._checked_schema, params, "argument")
        except CheckLimitExceeded as error:  # other arguments may be checked in less
            raise ToolValidationError(error.message, self.tool_id, hint=error.hint) from error

    def _check_approval(self, params: dict[str, Any], call: CallContext) -> None:
        if not self._needs_approval(params, call):
            return
        hints = self._context.run_request.context_hints.get("approvals")
        known = hints if isinstance(hints, dict) else {}
        decision = known.get(call.call_id, known.get(self.tool_id, known.get("*")))
        if decision != "allow":  # only the exact word allows
            raise PermanentToolError(
                f"Tool {self.tool_id!r} requires approval; "
                + ("it was not given" if decision is None else f"the decision is {decision!r}"),
                self.tool_id,
                hint=f'context_hints={{"approvals": {{"{self.tool_id}": "allow"}}}}',
            )

    def _needs_approval(self, params: dict[str, Any], call: CallContext) -> bool:
        if not hasattr(self._inner, "requires_approval"):
            return self.spec.approval_mode == "always"
        try:
            with user_code(tool_error(ToolError, self.tool_id)):
                return bool(self._inner.requires_approval(params, call))
        except OpenAgentsError as error:  # a gate that fails is closed
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

    def _warn_once(self) -> None:
        if not self._may_repeat and not self._warned:
            self._warned = True
            hint = "not called again once its outcome is stored; let its receiver know the idempotency key"
            self._writer.emit(
                "run.durable_idempotency_warning",
                {"run_id": self._context.run_id, "tool_id": self.tool_id, "hint": hint},
            )


async def _hook(inner: Any, name: str, *args: Any) -> None:
    hook = getattr(inner, name, None)
    if hook is not None:
        await hook(*args)
