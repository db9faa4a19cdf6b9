"""The tool calls of a reply: the only place that runs them, and that makes the messages of their outcomes.

A tool's error is sent to the model, which may try something else. Budget errors, cancellation and the
runtime's own signals are raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from openagents_worker.errors import (
    ExecutionError,
    OpenAgentsError,
    StepTooLarge,
    ToolCancelledError,
    ToolNotFoundError,
    ToolValidationError,
)
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FinishReason, FixedMessage, LLMResponse, LLMToolCall
from openagents_worker.llm.conversation import assistant_message, tool_name
from openagents_worker.llm.messages import result_content
from openagents_worker.models import ErrorDetails
from openagents_worker.patterns.base import RunContext
from openagents_worker.patterns.call_order import begin_together
from openagents_worker.suggest import did_you_mean

__all__ = ["ReplyCalls", "ToolCallOutcome", "last_error", "run_concurrently", "shown_text", "unknown_tool"]

T = TypeVar("T")

MAX_NAME_CHARS = 200  # of an unknown tool name, in the error for the model

INTERRUPTED_CALL = "the run was interrupted before this call had ended; it may have had an effect"
NOT_CALLED = "the run was interrupted before this call began"
"""Results of calls in the turn of an interrupted run, for the model."""


@dataclass(frozen=True, slots=True)
class ToolCallOutcome:
    """The outcome of one tool call: a result, or an error that is sent to the model."""

    call: LLMToolCall
    result: Any = None
    error: OpenAgentsError | None = None

    def message(self) -> FixedMessage:
        message = {"role": "tool", "tool_call_id": self.call.id, "name": tool_name(self.call.name)}
        if self.error is None:
            content = result_content(self.result)  # blocks, if the result has images or files
            return FixedMessage(message, content=shown_text(self.result) if content is None else content)
        problem = {"error": self.error.code, "message": self.error.message}
        if self.error.hint:
            problem["hint"] = self.error.hint
        return FixedMessage(message, content=dumps(problem), is_error=True)


class ReplyCalls:
    """The tool calls of one reply, and their outcomes as far as they are known."""

    def __init__(self, context: RunContext, response: LLMResponse, calls: Sequence[LLMToolCall]) -> None:
        """`calls` are those of the reply, each with an id of its own."""
        self._context = context
        self._calls = calls
        self._is_cut = response.finish_reason == FinishReason.LENGTH
        self.message = assistant_message(response, calls)
        self._outcomes: dict[str | None, ToolCallOutcome | None] = {}
        """The outcomes of the calls, by call id. None: the call has begun."""

    @property
    def messages(self) -> list[FixedMessage]:
        """The reply and a result of each call; without an outcome, it says that the call was interrupted."""
        outcomes = [self._outcomes.get(call.id) or self._interrupted(call) for call in self._calls]
        return [self.message, *(outcome.message() for outcome in outcomes)]

    def _interrupted(self, call: LLMToolCall) -> ToolCallOutcome:
        problem = INTERRUPTED_CALL if call.id in self._outcomes else NOT_CALLED
        return ToolCallOutcome(call, error=ToolCancelledError(problem, call.name))

    async def run(self) -> list[ToolCallOutcome]:
        """Run the calls and return the outcomes in the same order.

        Consecutive calls run concurrently if their tools are `concurrency_safe`. If some may need an
        approval, they are asked about together.
        """
        calls = self._calls
        if len(calls) > 1 and any(map(self._may_need_approval, calls)):
            together = [(self._run_call(call), self._is_concurrency_safe(call)) for call in calls]
            return await run_concurrently(begin_together(together))
        outcomes: list[ToolCallOutcome] = []
        for safe, consecutive in groupby(calls, key=self._is_concurrency_safe):
            group = list(consecutive)
            if safe and len(group) > 1:
                outcomes += await run_concurrently([self._run_call(call) for call in group])
            else:
                outcomes += [await self._run_call(call) for call in group]
        return outcomes

    def _is_concurrency_safe(self, call: LLMToolCall) -> bool:
        tool = self._context.tools.get(call.name)
        return tool is not None and tool.concurrency_safe

    def _may_need_approval(self, call: LLMToolCall) -> bool:
        return bool(getattr(self._context.tools.get(call.name), "may_need_approval", False))

    async def _run_call(self, call: LLMToolCall) -> ToolCallOutcome:
        """Run one call. Errors of the tool become its outcome; errors of the run are raised."""
        self._outcomes[call.id] = None
        outcome = self._outcomes[call.id] = await self._outcome_of(call)
        return outcome

    async def _outcome_of(self, call: LLMToolCall) -> ToolCallOutcome:
        try:
            return ToolCallOutcome(call, result=await self._invoke(call))
        except StepTooLarge as error:
            return ToolCallOutcome(call, error=error)
        except ExecutionError:  # an error of the run, not of the tool: for example a budget
            raise
        except OpenAgentsError as error:
            return ToolCallOutcome(call, error=error)

    async def _invoke(self, call: LLMToolCall) -> Any:
        tool = self._context.tools.get(call.name)
        if tool is None:
            raise await self._emit_failed(call, unknown_tool(call.name, sorted(self._context.tools)))
        if call.parse_error:
            problem = f"the call cannot be read: {call.parse_error}"
            hint = "call it again with a JSON object as its arguments"
            if self._is_cut:
                hint = "your reply was cut at its token limit; call it again with shorter arguments"
            raise await self._emit_failed(call, ToolValidationError(problem, call.name, hint=hint))
        return await tool.invoke(dict(call.arguments), self._context)

    async def _emit_failed(self, call: LLMToolCall, error: OpenAgentsError) -> OpenAgentsError:
        """Emit `tool.failed` for a call that reaches no tool, and return its error."""
        await self._context.emit(
            "tool.failed",
            tool_id=call.name,
            error=str(error),
            code=error.code,
            message=error.message,
            type=type(error).__name__,
            error_details=ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        )
        return error


async def run_concurrently(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls concurrently, started in order. If one raises, the others are cancelled and awaited first.

    A signal of the runtime (a BaseException that is neither an Exception nor a CancelledError) is raised
    rather than any other error.
    """
    tasks = [asyncio.create_task(call, name=f"tool-call-{n}") for n, call in enumerate(calls, start=1)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, BaseException) and not isinstance(end, Exception | asyncio.CancelledError):
                raise end from None
        raise


def unknown_tool(name: str, known: list[str]) -> ToolNotFoundError:
    """The error for a tool that the run does not have, with a suggestion."""
    name = name[:MAX_NAME_CHARS]
    hint = did_you_mean(name, known, "the tools are")
    return ToolNotFoundError(f"there is no tool {name!r}", name, hint=hint)


def last_error(outcomes: Sequence[ToolCallOutcome]) -> OpenAgentsError:
    """The error of the last call that failed."""
    return next(outcome.error for outcome in reversed(outcomes) if outcome.error is not None)


def shown_text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)
