"""The recorded model client: the only place that makes the model calls of a run and counts their usage."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from openagents_worker.errors import BudgetExhausted, LLMResponseError, OpenAgentsError, text_of
from openagents_worker.jsontext import ENVELOPE_LEVELS, LARGEST_COUNT, MAX_NESTING, dumps
from openagents_worker.llm.base import (
    CallInfo,
    Delta,
    LLMClient,
    LLMResponse,
    LLMUsage,
    ModelClient,
    ModelRequest,
    token_count,
)
from openagents_worker.llm.limits import REPLY_TOKENS, LimitWait, estimated_tokens
from openagents_worker.models import ErrorDetails, RunUsage, WaitKind
from openagents_worker.models.usage import NO_USAGE, usage_of
from openagents_worker.runtime.calls.extending import more_of, more_time
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.span_content import report_reply
from openagents_worker.runtime.spending import BudgetReservation
from openagents_worker.runtime.storable import stored_part
from openagents_worker.runtime.user_code import described_in_log, user_code, user_error_of
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import annotate, is_enabled

__all__ = ["RecordedModel"]

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
        reply_tokens: int = REPLY_TOKENS,
        clock: Clock = time.monotonic,
        output_format: Mapping[str, Any] | None = None,
    ) -> None:
        """`reply_tokens` are estimated for a reply that its request does not limit. `output_format` is the
        `response_format` of the run's output. It follows from the request of the run, so it does not change
        the identity of a call, and earlier versions did not send it."""
        self._output_format = output_format
        self._inner = inner
        self._recorder = recorder
        self._writer = writer
        self._reply_tokens = reply_tokens
        self._clock = clock
        self._streams = _takes(type(inner), "on_delta")
        self._reported_unpriced = False
        self._unpriced: set[str] = set()
        self._is_billed = getattr(inner, "is_billed", True)
        self.provider_name = getattr(inner, "provider_name", "unknown")
        self.model_id = getattr(inner, "model_id", "unknown")

    async def respond(self, request: ModelRequest) -> LLMResponse:
        """The reply to a request, from the journal or from the provider. Raises the errors of the client."""
        name = text_of(request.model or self.model_id)

        reserved: list[BudgetReservation] = []

        async def make(info: CallInfo) -> Outcome:
            return await self._call_model(name, request, info, reserved)

        content = {**request.content(), "model": name}
        if content["response_format"] == self._output_format:
            content["response_format"] = None
        digest, core = self._recorder.rules.prompt(content)
        try:
            wire = await self._recorder.call("model", name, digest, make, core=core)
        finally:
            for reservation in reserved:
                reservation.settle()
        reply = LLMResponse.from_wire(wire)
        if reply.usage is None or reply.usage.metadata.get("cost_usd") is None:
            self._unpriced.add(name)
        return reply

    async def _call_model(
        self, name: str, request: ModelRequest, info: CallInfo, reserved: list[BudgetReservation]
    ) -> Outcome:
        """Make a model call and return its outcome. Emits `llm.called` before it. Appends what it reserves to
        `reserved`."""
        if self._recorder.budget.clock is not None:
            await more_time(self._recorder)
        try:
            await self._stay_within_budget(request, info, reserved)
        except BudgetExhausted as error:
            return Outcome(error=error)
        self._writer.emit("llm.called", {"model": name, "call": info.call_id})
        annotate("gen_ai.provider.name", text_of(self.provider_name))
        started, usage = self._clock(), NO_USAGE
        try:
            with user_code(LLMResponseError, prefix="the model's client failed: "):
                try:
                    reply = await self._send_request(self._watched(request, info))
                except LimitWait as wait:
                    return Outcome(waits_for=wait)
                usage = _usage_of(reply)
                reply = _limit_arguments(reply, self._recorder.max_record_bytes)
                wire = stored_part("the reply", reply.to_wire(), levels=MAX_NESTING + ENVELOPE_LEVELS)
        except OpenAgentsError as error:
            self._log_failure(error, name)
            failed = {"model": name, "call": info.call_id, "error": str(error)} | _request_id(error)
            details = ErrorDetails.from_exception(error).model_dump(exclude_none=True)
            if isinstance(used := getattr(error, "usage", None), LLMUsage):
                usage = _usage_of(LLMResponse(usage=used))
            return Outcome(
                error=error,
                usage=usage,
                events=[("llm.failed", {**failed, "error_details": details})],
                may_retry=not getattr(error, "is_final", False),
            )
        if is_enabled():
            report_reply(request, reply, self._writer.preview)
        took_ms = round((self._clock() - started) * 1000, 1)
        metrics = {"latency_ms": took_ms, **usage.known(), **_speed_fields(reply)}
        del metrics["llm_calls"]  # always 1
        payload = {
            "model": name,
            "call": info.call_id,
            "_metrics": metrics,
            "output_text": self._writer.preview(reply.output_text),
            "tool_calls": [call.name for call in reply.tool_calls],
            **_end_of_reply_fields(reply, name),
        }
        events: list[tuple[str, Mapping[str, Any]]] = [("llm.succeeded", payload)]
        if usage.cost_usd is None and self._is_billed and name not in self._unpriced:
            unknown = {"model": name, "call": info.call_id, **_unpriced_parts(reply)}
            events.append(("llm.price_unknown", unknown))
        return Outcome(value=wire, usage=usage, events=events, is_stored_form=True)

    def _watched(self, request: ModelRequest, info: CallInfo) -> ModelRequest:
        """The request with a listener that publishes the pieces of the reply, if the client can stream."""
        if not self._streams:
            if request.on_delta is None and request.on_piece is None:
                return request
            return request.with_listeners(None, None)

        async def publish(text: str) -> None:
            self._writer.delta(info.call_id, text)
            if request.on_delta is not None:
                await request.on_delta(text)

        async def publish_piece(piece: Delta) -> None:
            self._writer.delta_of(info.call_id, piece)
            if request.on_piece is not None:
                await request.on_piece(piece)

        return request.with_listeners(publish, publish_piece)

    async def _send_request(self, request: ModelRequest) -> LLMResponse:
        if isinstance(self._inner, ModelClient):
            return await self._inner.respond(request)
        if not _takes(type(self._inner), "response_format"):  # written for the original SDK
            request = replace(request, response_format=None)
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

    async def _stay_within_budget(
        self, request: ModelRequest, info: CallInfo, reserved: list[BudgetReservation]
    ) -> None:
        """Reserve what the call may use, of the limits that the run has. If a budget is used up, take an
        extension or wait for one; if it is reserved, wait until that is settled. Raises `BudgetExhausted`.

        Not used for replayed calls: they cost nothing more.
        """
        inner, recorder = self._inner, self._recorder
        recorder.waits.begin_again(info, WaitKind.CHILD)
        usd, tokens = 0.0, 0
        if recorder.budget.limit("max_cost_usd") is not None:
            usd = (inner.largest_cost_usd(request) if isinstance(inner, ModelClient) else None) or 0.0
        if recorder.budget.limit("max_total_tokens") is not None:
            tokens = estimated_tokens(request, self._reply_tokens)
        # After each wait, all limits are checked again: other calls have used something meanwhile.
        while await self._has_waited_for_tokens(tokens, info) or await self._has_waited_for_cost(usd, info):
            pass
        if usd or tokens:
            reserved.append(recorder.spending.reserve(usd, tokens))

    async def _has_waited_for_tokens(self, tokens: int, info: CallInfo) -> bool:
        """Wait once if not enough tokens are left. They are only estimated: a call beside which nothing is
        reserved may begin as long as the limit is not reached."""
        name, recorder, spending = "max_total_tokens", self._recorder, self._recorder.spending
        limit = recorder.budget.limit(name)
        if limit is None:
            return False
        used, in_use = self._spent.total_tokens, spending.reserved_tokens + spending.of_children(name)
        if (exhausted := self._out_of_tokens(limit)) is not None:
            if used < limit and spending.will_settle(name):
                await spending.child_settled(recorder.waits, info)
            else:
                await more_of(recorder, name, exhausted.current or 0, limit, exhausted)
        elif used + in_use + tokens <= limit:
            return False
        elif spending.reserved_tokens:
            await spending.one_settled(recorder.in_progress)  # it may use less than was reserved for it
        elif spending.will_settle(name):
            await spending.child_settled(recorder.waits, info)
        else:
            return False
        return True

    async def _has_waited_for_cost(self, most: float, info: CallInfo) -> bool:
        """Wait once if the call may exceed the limit of cost."""
        recorder, spending = self._recorder, self._recorder.spending
        if recorder.budget.limit("max_cost_usd") is None or (limit := self._cost_limit()) is None:
            return False
        in_use = spending.reserved_usd + spending.of_children("max_cost_usd")
        if (exhausted := self._out_of_money(limit, most)) is not None:
            await more_of(recorder, "max_cost_usd", exhausted.current or 0, limit, exhausted)
        elif not (most and in_use) or self._spent_usd + in_use + most <= limit:
            return False
        elif spending.reserved_usd:
            await spending.one_settled(recorder.in_progress)  # it may cost less than was reserved for it
        else:
            await spending.child_settled(recorder.waits, info)
        return True

    def _out_of_tokens(self, limit: int) -> BudgetExhausted | None:
        kept = int(self._recorder.spending.of_children("max_total_tokens"))
        used = self._spent.total_tokens + kept
        if used < limit:
            return None
        message = f"token budget exhausted: {used:,} of {limit:,} tokens"
        if kept:
            message += f", of which {kept:,} are reserved for children"
        return BudgetExhausted(message, kind="tokens", current=used, limit=limit)

    @property
    def _spent(self) -> RunUsage:
        """The usage of the whole run: also of calls that an earlier attempt has made, and the program of this
        one has not asked for."""
        return self._recorder.checkpoints.total_usage

    @property
    def _spent_usd(self) -> float:
        return self._spent.cost_usd or 0.0

    def _cost_limit(self) -> float | None:
        """The limit of cost; None if it cannot be checked, because the cost of earlier calls is not known."""
        limit: float | None = self._recorder.budget.limit("max_cost_usd")
        usage = self._spent
        if usage.cost_usd is not None or not usage.llm_calls:
            return limit
        if not self._reported_unpriced:
            self._reported_unpriced = True
            self._writer.emit(
                "budget.cost_skipped", {"limit": limit, "reason": "the model's price is not known"}
            )
        return None

    def _out_of_money(self, limit: float, most: float) -> BudgetExhausted | None:
        """The error if the cost is used up, or if this call alone may exceed the limit."""
        spent, hint = self._spent_usd, None
        kept = self._recorder.spending.of_children("max_cost_usd", for_good=True) if most else 0.0
        message = f"cost budget exhausted: {spent:.4f} of {limit:.4f} USD"
        if not (self._spent.llm_calls and spent >= limit):
            if spent + kept + most <= limit:
                return None
            reserved = f", {kept:.4f} are reserved for children in the background" if kept else ""
            message += f" are spent{reserved}, and the next model call may cost {most:.4f}"
            hint = "a lower llm.max_tokens lets a call reserve less; max_cost_usd limits the whole run"
        return BudgetExhausted(message, hint=hint, kind="cost", current=spent, limit=limit)

    def without_stream(self) -> RecordedModel:
        """The same client, for calls whose reply is not for the watchers of the run."""
        quiet = copy.copy(self)
        quiet._streams = False
        return quiet

    def count_tokens(self, text: str) -> int:
        return self._inner.count_tokens(text)

    async def aclose(self) -> None:
        """Does nothing: the client belongs to the process, not to the run."""


@lru_cache  # reading a signature takes longer than preparing a call
def _takes(client: type[LLMClient], parameter: str) -> bool:
    """Whether `generate` of this client class has a parameter of this name."""
    return parameter in inspect.signature(client.generate).parameters


def _limit_arguments(reply: LLMResponse, max_bytes: int) -> LLMResponse:
    """The reply without tool arguments that are too large to record. The model gets an error for these."""
    allowed = max(max_bytes - RECORD_OVERHEAD_BYTES, max_bytes // 2)
    calls = list(reply.tool_calls)
    if not calls:
        return reply
    sizes = [len(dumps([dict(call.arguments), call.raw_arguments or ""]).encode()) for call in calls]
    while calls and sum(sizes) + len(reply.output_text.encode()) > allowed and max(sizes):
        largest = sizes.index(max(sizes))
        problem = f"the arguments have {sizes[largest]:,} bytes, {allowed:,} are allowed for the whole reply"
        calls[largest] = replace(calls[largest], arguments={}, raw_arguments=None, parse_error=problem)
        sizes[largest] = 0
    return replace(reply, tool_calls=tuple(calls)) if 0 in sizes else reply


def _request_id(source: Any) -> dict[str, Any]:
    """The provider's id of a request, for the events of a call."""
    request_id = getattr(source, "request_id", None)
    return {"request_id": text_of(request_id)} if request_id else {}


def _end_of_reply_fields(reply: LLMResponse, name: str) -> dict[str, Any]:
    """Event fields: the request id, the finish reason, and the model that answered if it is a fallback."""
    fields = _request_id(reply)
    if reply.finish_reason:
        fields["finish_reason"] = text_of(reply.finish_reason)
    if reply.usage is not None and (fallback := reply.usage.metadata.get("fallback")):
        fields["answered_by"] = text_of(fallback)
    return fields


def _unpriced_parts(reply: LLMResponse) -> dict[str, Any]:
    """What has no price, such as `web_search`, if the client says so."""
    parts = None if reply.usage is None else reply.usage.metadata.get("unpriced_parts")
    return {"parts": [text_of(part) for part in parts]} if isinstance(parts, list | tuple) and parts else {}


def _speed_fields(reply: LLMResponse) -> dict[str, Any]:
    speed = None if reply.usage is None else _amount(reply.usage.metadata.get("tokens_per_s"))
    return {} if speed is None else {"tokens_per_s": speed}


def _usage_of(reply: LLMResponse) -> RunUsage:
    used = reply.usage
    if used is None:
        return RunUsage(llm_calls=1)
    more = used.metadata
    return usage_of(
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
    if value is None:  # the usual case
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= LARGEST_COUNT else None


def _amounts(values: Any) -> dict[str, float]:
    if not values or not isinstance(values, Mapping):
        return {}
    amounts = {text_of(name): _amount(value) for name, value in values.items()}
    return {name: amount for name, amount in amounts.items() if amount is not None}
