"""Calls of a program: the only place that makes the single model and tool calls of `context.call_llm` and
`context.call_tool`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from openagents_worker.errors import (
    MaxStepsExceeded,
    OutputValidationError,
    PatternError,
    ToolNotFoundError,
)
from openagents_worker.llm.base import LLMResponse, Message
from openagents_worker.llm.structured import response_format
from openagents_worker.patterns.base import RunContext
from openagents_worker.patterns.turn import Conversation, checked_answer, tool_schemas, unknown_tool
from openagents_worker.suggest import did_you_mean

__all__ = ["DEFAULT_VALIDATION_RETRIES", "call_llm", "call_tool"]

DEFAULT_VALIDATION_RETRIES = 3
MAX_PROBLEMS = 3  # of a reply that does not match its type, in the message for the model
OPTIONS = ("temperature", "max_tokens", "tool_choice", "response_format")


class ProgramContext(RunContext, Protocol):
    """The run of a program that calls the model by itself."""

    system_prompt: str | None
    max_llm_calls: int | None
    llm_calls: int


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
    if model is not None:
        options["model"] = model
    conversation = _conversation(context, prompt)
    offered = None if tools is None else tool_schemas({id_: _tool(context, id_) for id_ in tools}) or None
    if output_type is None:
        return await _ask(context, conversation, offered, options)
    if options.get("response_format") is not None:
        raise TypeError("call_llm() takes either output_type or response_format")
    adapter, form = _output(output_type)
    return await _ask_for(context, conversation, adapter, offered, {**options, "response_format": form})


def _conversation(context: RunContext, prompt: str | list[Message]) -> Conversation:
    if isinstance(prompt, str):
        return Conversation(context, system_prompt=getattr(context, "system_prompt", None), question=prompt)
    return Conversation(context, messages=[dict(message) for message in prompt])


async def _ask(
    context: ProgramContext, conversation: Conversation, tools: Any, options: Mapping[str, Any]
) -> LLMResponse:
    """One model call. Raises `MaxStepsExceeded` above the limit of the agent or of the request."""
    limit = context.max_llm_calls
    if limit is not None and context.llm_calls >= limit:
        raise MaxStepsExceeded(
            f"Pattern exceeded max_steps ({limit})",
            hint="each call_llm is a step; raise max_steps in the agent's runtime or in the budget",
        )
    context.llm_calls += 1
    return await conversation.ask(step=context.llm_calls, tools=tools, **options)


async def _ask_for(
    context: ProgramContext,
    conversation: Conversation,
    adapter: TypeAdapter[Any],
    tools: Any,
    options: Mapping[str, Any],
) -> LLMResponse:
    """A reply whose text matches a type. The model corrects one that does not match.

    A reply with tool calls is returned as it is. Raises `OutputValidationError` after the last correction.
    """
    budget = getattr(context.run_request, "budget", None)
    retries = getattr(budget, "max_validation_retries", None)
    attempts = 1 + (DEFAULT_VALIDATION_RETRIES if retries is None else retries)
    problem = ""
    for attempt in range(1, attempts + 1):
        reply = await _ask(context, conversation, tools, options)
        if reply.tool_calls:
            return reply
        text = checked_answer(reply, accept_empty=True)
        try:
            value = adapter.validate_json(_without_fence(text))
        except ValidationError as error:
            problem = _described(error)
        else:
            return replace(reply, structured_output=value)
        if attempt < attempts:
            await context.emit("validation.retry", attempt=attempt, error=problem)
            conversation.add_answer(text)
            conversation.add_problem(
                f"That answer does not fit: {problem}. Answer again, with JSON that fits the schema."
            )
    name = options["response_format"]["json_schema"]["name"]
    raise OutputValidationError(
        f"the reply does not match {name} after {attempts} attempts: {problem}",
        output_type=name,
        attempts=attempts,
    )


def _output(output_type: Any) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """What validates a reply, and the `response_format` that asks for it."""
    if isinstance(output_type, str | Mapping):
        raise TypeError(
            f"call_llm() takes a type as output_type, not a {type(output_type).__name__}; "
            "use a pydantic model or a dataclass"
        )
    try:
        adapter: TypeAdapter[Any] = _adapter(output_type)
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise PatternError(
            f"call_llm() cannot use {output_type!r} as output_type: it has no JSON Schema",
            hint="use a pydantic model or a dataclass",
        ) from error
    return adapter, response_format(str(schema.get("title", "output")), schema)


@lru_cache(maxsize=256)
def _adapter(output_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(output_type)


def _without_fence(text: str) -> str:
    """The text inside a Markdown code fence, or the text itself."""
    lines = text.strip().split("\n")
    is_fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if is_fenced else text


def _described(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'answer'}: {each['msg']}" for each in found)


async def call_tool(context: RunContext, tool_id: str, params: Mapping[str, Any] | None) -> Any:
    """The result of a tool; see `RunContext.call_tool`."""
    return await _tool(context, tool_id).invoke({} if params is None else dict(params), context)


def _tool(context: RunContext, tool_id: str) -> Any:
    """A tool of the run. Raises `ToolNotFoundError` with a suggestion."""
    tool = context.tools.get(tool_id)
    if tool is None:
        error: ToolNotFoundError = unknown_tool(str(tool_id), sorted(context.tools))
        raise error
    return tool
