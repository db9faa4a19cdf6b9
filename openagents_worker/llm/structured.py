"""Structured output: the only place that converts the schema of a run's output to what a provider accepts.

A neutral request has OpenAI's `response_format`: `{"type": "json_schema", "json_schema": {"name", "schema",
"strict"}}`. How it is sent is the option `llm.structured_output`:

| value | the request has |
|---|---|
| `json_schema` | the provider's own structured output |
| `json_object` | OpenAI's JSON mode: an object, without a schema |
| `tool` | a tool whose arguments are the output; the model must call a tool |
| `text` | nothing: the instruction in the prompt is all |
| `auto` | `json_schema` where the provider has it, otherwise `tool` or `text` |

With `auto`, a provider that rejects schemas gets requests without them, and one that rejects a single
schema gets requests without this one. Many servers with OpenAI's API cannot call tools while they follow a
schema, so with `auto` only OpenAI itself gets both. Whatever is sent, the output is validated, and the model
corrects it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from openagents_worker.errors import LLMError, LLMResponseError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FinishReason, LLMResponse, ModelRequest
from openagents_worker.llm.digest_memory import DigestMemory

__all__ = [
    "OUTPUT_TOOL",
    "OutputSchema",
    "RejectedFormats",
    "StructuredOutput",
    "can_be_closed",
    "closed_schema",
    "is_rejected",
    "is_strict",
    "output_schema",
    "output_tool",
    "response_format",
    "without_output_tool",
]

StructuredOutput = Literal["auto", "json_schema", "json_object", "tool", "text"]

OUTPUT_TOOL = "final_answer_as_json"
"""The name of the tool whose arguments are the output."""

MAX_STRICT_DEPTH = 10  # OpenAI's limit for levels of a strict schema
_NAME = re.compile(r"[^a-zA-Z0-9_-]+")
_REJECTED = re.compile(
    r"response_format|json_schema|structured.?output|output_config|text\.format|guided|grammar"
    r"|tool_choice: type",
    re.IGNORECASE,
)


_OF_ONE_SCHEMA = re.compile(
    r"invalid.(json.)?schema|additionalProperties|schema\b.{0,80}(too|must|property|properties|keyword)",
    re.IGNORECASE,
)
_STATUS_OF_REJECTED = frozenset({400, 404, 422})  # OpenRouter: 404 if no provider has the parameter


class OutputSchema(NamedTuple):
    """The schema of the output that a request asks for."""

    name: str
    schema: dict[str, Any]
    strict: bool


def response_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The neutral `response_format` for a schema. It is strict if providers accept it as strict."""
    legal = _NAME.sub("_", name).strip("_")[:64] or "output"
    return {
        "type": "json_schema",
        "json_schema": {"name": legal, "schema": dict(schema), "strict": is_strict(schema)},
    }


def output_schema(form: Mapping[str, Any] | None) -> OutputSchema | None:
    """The schema of a neutral `response_format`; None if it has none."""
    wanted = form.get("json_schema") if form is not None and form.get("type") == "json_schema" else None
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("schema"), Mapping):
        return None
    return OutputSchema(
        str(wanted.get("name") or "output"), dict(wanted["schema"]), wanted.get("strict") is True
    )


def is_strict(schema: Any, depth: int = 0) -> bool:
    """Whether every object of a schema forbids other fields and requires all of its own, as strict modes
    demand.

    >>> is_strict({"type": "object", "properties": {"a": {"type": "string"}}})
    False
    """
    if not isinstance(schema, Mapping) or depth > MAX_STRICT_DEPTH:
        return False
    properties = schema.get("properties") or {}
    if schema.get("type") == "object" or properties:
        if schema.get("additionalProperties") is not False:
            return False
        if set(schema.get("required") or ()) != set(properties):
            return False
    elif depth == 0:
        return False  # the root must be an object
    if any(name in schema for name in ("allOf", "oneOf", "not", "if", "patternProperties", "prefixItems")):
        return False
    parts = [*properties.values(), *(schema.get("$defs") or {}).values(), *(schema.get("anyOf") or ())]
    if "items" in schema:
        parts.append(schema["items"])
    return all(is_strict(part, depth + 1) for part in parts)


def without_output_tool(reply: LLMResponse) -> LLMResponse:
    """The reply with the arguments of the output tool as its text, if the model called this tool alone.

    Beside other calls the answer is not final: the model gives it again when it has their results.
    """
    own = [call for call in reply.tool_calls if call.name == OUTPUT_TOOL]
    if not own:
        return reply
    others = [call for call in reply.tool_calls if call.name != OUTPUT_TOOL]
    if others:
        return replace(reply, tool_calls=tuple(others))
    call = own[0]
    if call.parse_error is not None:  # the text is validated, and the model corrects it
        text, value = call.raw_arguments or "", None
    else:
        text, value = dumps(dict(call.arguments)), dict(call.arguments)
    reason = FinishReason.STOP if reply.finish_reason == FinishReason.TOOL_CALLS else reply.finish_reason
    return replace(reply, output_text=text, structured_output=value, tool_calls=(), finish_reason=reason)


def output_tool(schema: OutputSchema) -> dict[str, Any]:
    """The tool whose arguments are the output, in OpenAI's format."""
    function = {
        "name": OUTPUT_TOOL,
        "description": "Give the final answer. Its arguments are the answer. Call it alone, and last.",
        "parameters": {"type": "object", **schema.schema},
    }
    return {"type": "function", "function": function}


def is_rejected(error: LLMError) -> bool:
    """Whether a provider's error says that it does not know the structured output of the request."""
    is_of_request = type(error) is LLMResponseError and error.status in _STATUS_OF_REJECTED
    return is_of_request and _REJECTED.search(error.message) is not None


class RejectedFormats:
    """The formats of the output that one provider has rejected."""

    def __init__(self) -> None:
        self._always: set[bool] = set()
        """Whether no schema is accepted, in requests with tools and in others."""
        self._schemas = DigestMemory[bool]()

    def has(self, request: ModelRequest) -> bool:
        """Whether the format of the request has been rejected before."""
        if bool(request.tools) in self._always:
            return True
        return bool(self._schemas) and self._schemas.get(_format_of(request)) is True

    def add(self, request: ModelRequest, error: LLMError) -> None:
        """Remember what the error rejects: this schema, which other runs need not have, or every schema."""
        if _OF_ONE_SCHEMA.search(error.message) is None:
            self._always.add(bool(request.tools))
            return
        self._schemas.put(_format_of(request), True)


def _format_of(request: ModelRequest) -> list[Any]:
    return [bool(request.tools), dict(request.response_format or {})]


# --- closed schemas --------------------------------------------------------------------------------------

_KEPT = ("type", "title", "description", "enum", "const", "$ref", "required", "default")
"""The keywords of a closed schema besides those that contain schemas. Limits are checked by us."""
_OF_MANY = ("properties", "$defs", "definitions")
_OF_LISTS = {"anyOf": "anyOf", "oneOf": "anyOf", "allOf": "allOf"}


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as Anthropic's structured outputs accept it: every object forbids other fields, without
    limits of numbers, lengths and patterns. What the schema says beyond that is checked by us.

    >>> closed_schema({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}})
    {'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'additionalProperties': False}
    """
    closed: dict[str, Any] = {name: schema[name] for name in _KEPT if name in schema}
    for name in _OF_MANY:
        if isinstance(schema.get(name), Mapping):
            closed[name] = {key: _closed_part(part) for key, part in schema[name].items()}
    for name, as_name in _OF_LISTS.items():
        if isinstance(schema.get(name), list):
            closed[as_name] = [_closed_part(part) for part in schema[name]]
    if "items" in schema:
        closed["items"] = _closed_part(schema["items"])
    if closed.get("type") == "object" or "properties" in closed:
        closed["additionalProperties"] = False
    return closed


def _closed_part(part: Any) -> Any:
    return closed_schema(part) if isinstance(part, Mapping) else part


def can_be_closed(schema: Any) -> bool:
    """Whether no value that fits the schema is lost if its objects forbid other fields."""
    if isinstance(schema, list):
        return all(map(can_be_closed, schema))
    if not isinstance(schema, Mapping):
        return True
    is_object = schema.get("type") == "object" or "properties" in schema
    if is_object and (
        not schema.get("properties") or schema.get("additionalProperties") not in (None, False)
    ):
        return False  # a map: the model chooses its keys
    known = {"properties", "$defs", "definitions"}
    inside = [value for name in known for value in (schema.get(name) or {}).values()]
    return all(map(can_be_closed, [*inside, *(schema.get(name) for name in (*_OF_LISTS, "items"))]))
