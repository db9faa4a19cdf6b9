"""Typed replies: the only place that gets a value of a type from a model, and lets the model correct it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from openagents_worker.errors import OutputValidationError, PatternError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMResponse
from openagents_worker.llm.structured import response_format
from openagents_worker.patterns.answers import checked_answer
from openagents_worker.patterns.base import RunContext
from openagents_worker.patterns.turn import Conversation

__all__ = ["ReplyType", "typed_reply"]

DEFAULT_VALIDATION_RETRIES = 3
MAX_PROBLEMS = 3  # of a reply that does not match its type, in the message for the model


@dataclass(frozen=True, slots=True)
class ReplyType:
    """What a reply is parsed as, and the `response_format` that asks for it."""

    name: str
    adapter: TypeAdapter[Any]
    form: Mapping[str, Any]

    @classmethod
    def of(cls, type_: Any) -> ReplyType:
        """Raises `TypeError` for something that is not a type, `PatternError` for one without a schema."""
        if isinstance(type_, str | Mapping):
            raise TypeError(
                f"output_type must be a type, not a {type(type_).__name__}; "
                "use a pydantic model or a dataclass"
            )
        return _reply_type(type_)

    @property
    def instruction(self) -> str:
        """For models whose provider takes no schema: it is sent to all of them."""
        schema = dumps(self.form["json_schema"]["schema"])
        return f"Your answer is JSON that fits this JSON Schema, and nothing else:\n{schema}"

    def parsed(self, text: str) -> Any:
        """The value in a text. Raises pydantic's ValidationError."""
        return self.adapter.validate_json(_without_fence(text))


@lru_cache(maxsize=256)
def _reply_type(type_: Any) -> ReplyType:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(type_)
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise PatternError(
            f"{type_!r} cannot be the type of a reply: it has no JSON Schema",
            hint="use a pydantic model or a dataclass",
        ) from error
    name = str(schema.get("title", "output"))
    return ReplyType(name, adapter, response_format(name, schema))


async def typed_reply(
    context: RunContext,
    conversation: Conversation,
    reply_type: ReplyType,
    ask: Callable[[], Awaitable[LLMResponse]],
) -> LLMResponse:
    """A reply whose `structured_output` is a value of the type. The model corrects an invalid reply.

    `ask` makes one model call with the conversation. A reply with tool calls is returned as it is. Raises
    `OutputValidationError` after `max_validation_retries` corrections.
    """
    budget = getattr(context.run_request, "budget", None)
    retries = getattr(budget, "max_validation_retries", None)
    attempts = 1 + (DEFAULT_VALIDATION_RETRIES if retries is None else retries)
    problem = ""
    for attempt in range(1, attempts + 1):
        reply = await ask()
        if reply.tool_calls:
            return reply
        text = checked_answer(reply, accept_empty=True)
        try:
            return replace(reply, structured_output=reply_type.parsed(text))
        except ValidationError as error:
            problem = _described(error)
        if attempt < attempts:
            await context.emit("validation.retry", attempt=attempt, error=problem)
            conversation.add_answer(text, reply)
            conversation.add_request(
                f"That answer does not fit: {problem}. Answer again, with JSON that fits the schema."
            )
    raise OutputValidationError(
        f"the reply does not match {reply_type.name} after {attempts} attempts: {problem}",
        output_type=reply_type.name,
        attempts=attempts,
    )


def _without_fence(text: str) -> str:
    """The text inside a Markdown code fence, or the text itself."""
    lines = text.strip().split("\n")
    is_fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if is_fenced else text


def _described(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'answer'}: {each['msg']}" for each in found)
