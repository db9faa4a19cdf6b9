"""The tool calls of a reply: the only place that runs them, and that makes the messages of their outcomes.

A tool's error is sent to the model, which may try something else. Budget errors, cancellation and the
runtime's own signals are raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from openagents_worker.patterns.call_groups import GroupedCall, make_calls
from openagents_worker.quick_init import quick_init
from openagents_worker.suggest import did_you_mean

__all__ = ["ReplyCalls", "ToolCallOutcome", "emit_failed", "last_error", "shown_text", "unknown_tool"]

MAX_NAME_CHARS = 200  # of an unknown tool name, in the error for the model

INTERRUPTED_CALL = "the run was interrupted before this call had ended; it may have had an effect"
NOT_CALLED = "the run was interrupted before this call began"
"""Results of calls in the turn of an interrupted run, for the model."""


@quick_init
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
        """Run the calls and return the outcomes in the same order, see `make_calls`."""
        tools = self._context.tools
        return await make_calls(
            [GroupedCall(partial(self._run_call, call), tools.get(call.name)) for call in self._calls]
        )

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
            problem = unknown_tool(call.name, sorted(self._context.tools))
            raise await emit_failed(self._context, call.name, problem)
        if call.parse_error:
            why = f"the call cannot be read: {call.parse_error}"
            hint = "call it again with a JSON object as its arguments"
            if self._is_cut:
                hint = "your reply was cut at its token limit; call it again with shorter arguments"
            unread = ToolValidationError(why, call.name, hint=hint)
            raise await emit_failed(self._context, call.name, unread)
        return await tool.invoke(dict(call.arguments), self._context)


async def emit_failed(context: RunContext, tool_id: str, error: OpenAgentsError) -> OpenAgentsError:
    """Emit `tool.failed` for a call that reaches no tool, and return its error."""
    await context.emit(
        "tool.failed",
        tool_id=tool_id,
        error=str(error),
        code=error.code,
        message=error.message,
        type=type(error).__name__,
        error_details=ErrorDetails.from_exception(error).model_dump(exclude_none=True),
    )
    return error


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
