"""Calls of a program: the only place that makes the single model and tool calls of `context.call_llm` and
`context.call_tool`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from openagents_worker.llm.base import LLMResponse, Message, current_call
from openagents_worker.patterns.base import RunContext
from openagents_worker.patterns.step_limits import more_steps, step_deadline
from openagents_worker.patterns.tool_calls import unknown_tool
from openagents_worker.patterns.turn import Conversation, tool_schemas
from openagents_worker.patterns.typed_reply import ReplyType, typed_reply
from openagents_worker.suggest import did_you_mean

__all__ = ["call_llm", "call_tool"]

OPTIONS = ("temperature", "max_tokens", "tool_choice", "response_format")


class ProgramContext(RunContext, Protocol):
    """The run of a program that calls the model by itself."""

    system_prompt: str | None
    max_llm_calls: int | None
    step_timeout_ms: int | None

    @property
    def steps(self) -> int: ...
    def count_step(self) -> int: ...


async def call_llm(
    context: ProgramContext,
    prompt: str | list[Message],
    *,
    tools: Sequence[str] | None,
    output_type: Any,
    model: str | None,
    **options: Any,
) -> LLMResponse:
    """The reply of the model; see `RunContext.call_llm`."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        hint = did_you_mean(unknown[0], OPTIONS, "the options are")
        raise TypeError(f"call_llm() has no option {unknown[0]!r}; {hint}")
    if output_type is not None and options.get("response_format") is not None:
        raise TypeError("call_llm() takes either output_type or response_format")
    reply_type = None if output_type is None else ReplyType.of(output_type)
    if model is not None:
        options["model"] = model
    if reply_type is not None:
        options["response_format"] = reply_type.form
    options["tools"] = None if tools is None else tool_schemas({id_: _tool(context, id_) for id_ in tools})
    conversation = _conversation(context, prompt)
    is_of_program = current_call.get() is None  # a tool that asks its model takes nothing from the program
    if reply_type is not None:
        conversation.add_to_question(reply_type.instruction)

    async def ask() -> LLMResponse:
        step = await _counted(context)
        async with step_deadline(context, step, context.step_timeout_ms):
            return await conversation.ask(step=step, takes_steering=is_of_program, **options)

    return await (ask() if reply_type is None else typed_reply(context, conversation, reply_type, ask))


def _conversation(context: ProgramContext, prompt: str | list[Message]) -> Conversation:
    if isinstance(prompt, str):
        return Conversation(context, system_prompt=context.system_prompt, question=prompt)
    return Conversation(context, messages=[dict(message) for message in prompt])


async def _counted(context: ProgramContext) -> int:
    """The number of the next call: each is a step.

    Raises `MaxStepsExceeded` above the limit of the agent or the request; with `on_breach: pause`, the run
    waits here for a larger one.
    """
    limit = context.max_llm_calls
    if limit is not None and context.steps >= limit:
        context.max_llm_calls = await more_steps(context, limit)
    return context.count_step()


async def call_tool(context: RunContext, tool_id: str, params: Mapping[str, Any] | None) -> Any:
    """The result of a tool; see `RunContext.call_tool`."""
    return await _tool(context, tool_id).invoke({} if params is None else dict(params), context)


def _tool(context: RunContext, tool_id: str) -> Any:
    """A tool of the run. Raises `ToolNotFoundError` with a suggestion."""
    tool = context.tools.get(tool_id)
    if tool is None:
        raise unknown_tool(str(tool_id), sorted(context.tools))
    return tool
