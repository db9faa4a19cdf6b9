"""Typed tools: the only place that uses a pydantic model for a tool's schema and arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import islice
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, PydanticSerializationError

from openagents_worker.errors import StepTooDeep, ToolError, ToolValidationError
from openagents_worker.jsontext import MAX_NESTING, NestedTooDeeply, dumps, replaced
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec, ToolPlugin

__all__ = ["JSON_FORMS", "TypedTool", "to_plain_json", "with_own_limit"]

MAX_VALUES = 500_000
"""Largest number of values in a result that contains other types than lists, dicts and plain JSON values."""
MAX_ITERATED = 100_000
"""Largest number of values of an iterator that a tool returns."""
_ANY_VALUE: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))
READS_ONLY = ToolExecutionSpec(concurrency_safe=True, side_effects="none")
JSON_FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"by_alias": True},
    {"round_trip": True},  # without computed fields
    {"round_trip": True, "by_alias": True},
)
"""How pydantic may write a value as JSON (options of `dump_python`). Which form a class reads, and its schema
describes, depends on its aliases and on whether it takes further fields."""


OWN_LIMIT_MARGIN_MS = 15_000  # to end processes and connections after the tool's own limit


def with_own_limit(spec: ToolExecutionSpec, timeout_ms: float) -> ToolExecutionSpec:
    """The spec of a tool that ends its calls itself after this time: no default limit comes before it."""
    return spec.model_copy(update={"default_timeout_ms": int(timeout_ms) + OWN_LIMIT_MARGIN_MS})


class TypedTool(ToolPlugin):
    """A tool whose arguments are a pydantic model: `Params` defines the schema, the checks and the coercion.

    >>> class Greet(TypedTool):
    ...     name, description = "greet", "Greets somebody."
    ...     class Params(TypedTool.Params):
    ...         who: str
    ...     async def run(self, args, context):
    ...         return f"Hello {args.who}"
    >>> Greet().schema()["required"]
    ['who']
    """

    spec: ClassVar[ToolExecutionSpec] = ToolExecutionSpec()

    class Params(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    async def run(self, args: Any, context: ToolContext | None) -> Any:
        """Execute the tool. `args` is a validated instance of `Params`."""
        raise NotImplementedError

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        return plain_json(
            await self.run(parse_arguments(self.Params, params, self.tool_name), context), self.tool_name
        )

    def schema(self) -> dict[str, Any]:
        return schema_of(self.Params)

    def execution_spec(self) -> ToolExecutionSpec:
        return self.spec


class _SchemaWithoutTitles(GenerateJsonSchema):
    """A schema generator that omits titles: they only repeat the names and cost tokens in every request."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(params: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a parameter model, as it is sent to a model."""
    schema = params.model_json_schema(schema_generator=_SchemaWithoutTitles)
    for unwanted in ("title", "description"):
        schema.pop(unwanted, None)
    schema.setdefault("properties", {})
    schema.setdefault("required", [])
    return schema


def parse_arguments(params: type[BaseModel], arguments: Mapping[str, Any], tool_name: str) -> BaseModel:
    """Validate and coerce arguments. Raises `ToolValidationError` with a text for the model."""
    try:
        return params.model_validate(arguments)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
    with suppress(ValueError, TypeError):  # a strict type takes a date as text only from JSON
        return params.model_validate_json(dumps(arguments))
    lines = [_line(problem) for problem in problems[:5]]
    names = [field.alias or name for name, field in params.model_fields.items()]
    raise ToolValidationError(
        "; ".join(lines), tool_name, hint=f"arguments of {tool_name}: {', '.join(names) or 'none'}"
    )


def _line(problem: ErrorDetails) -> str:
    where = ".".join(map(str, problem["loc"])) or "arguments"
    return f"{where}: {'unknown argument' if problem['type'] == 'extra_forbidden' else problem['msg']}"


def plain_json(value: Any, tool_name: str) -> Any:
    """Convert a tool's result to plain JSON. Pydantic serializes models, dates, sets and similar types.

    Raises `ToolError` if it cannot be converted, and `StepTooDeep` if it is nested too deeply.
    """
    try:
        return to_plain_json(value)
    except NestedTooDeeply as error:
        raise StepTooDeep(f"the result of {tool_name} cannot be stored: {error}") from error
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        raise ToolError(
            f"the result of {tool_name} is not JSON: {error}",
            tool_name,
            hint="return str, numbers, bool, None, lists, dicts, dataclasses or pydantic models",
        ) from error


def to_plain_json(value: Any) -> Any:
    """A value as plain JSON. Raises `NestedTooDeeply`, `ValueError`, `TypeError`, `RecursionError` or
    `PydanticSerializationError` if it cannot be converted."""
    try:
        return replaced(value)
    except TypeError:
        return replaced(
            _ANY_VALUE.dump_python(_with_lists_for_iterators(value, MAX_NESTING, [MAX_VALUES]), mode="json")
        )


def _with_lists_for_iterators(value: Any, levels: int, left: list[int]) -> Any:
    """The value with each iterator replaced by a list: pydantic would never return from an endless iterator.

    Raises ValueError for an iterator with too many values, and for one inside a model or dataclass, where its
    length cannot be limited.
    """
    if isinstance(value, Iterator):
        value = list(islice(value, MAX_ITERATED + 1))
        if len(value) > MAX_ITERATED:
            raise ValueError(f"an iterator of more than {MAX_ITERATED:,} values; return a list")
    if isinstance(value, dict | list | tuple):
        left[0] -= len(value)
        if left[0] < 0:
            raise ValueError(f"it has more than {MAX_VALUES:,} values; return lists and dicts alone")
    if levels == 0:
        return value
    if isinstance(value, dict):
        return {key: _with_lists_for_iterators(item, levels - 1, left) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_lists_for_iterators(item, levels - 1, left) for item in value]
    is_model = isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type))
    if is_model and any(isinstance(item, Iterator) for item in getattr(value, "__dict__", {}).values()):
        raise ValueError(f"{type(value).__name__} holds an iterator; give it a list")
    return value
