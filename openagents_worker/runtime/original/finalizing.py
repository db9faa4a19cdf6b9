"""`finalize` of patterns of the original SDK: the only place that calls it.

It gets what the pattern has returned, and the type of the output as the pattern expects it. The runtime then
checks its result against the schema of the request, so a type need not be a class that is loaded here.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from openagents_worker.errors import ModelRetryError
from openagents_worker.models import instance_of
from openagents_worker.runtime.original.errors import translated
from openagents_worker.runtime.output import OutputMismatch, OutputType, parse_json_answer

__all__ = ["Finalize", "finalized"]

Finalize = Callable[[Any, OutputType | None], Awaitable[Any]]


async def finalized(finalize: Callable[..., Any], raw: Any, output_type: OutputType | None) -> Any:
    """What `finalize(raw, output_type)` of a pattern returns. Raises `ModelRetryError` if it refuses `raw`.

    Its `output_type` is the registered class of the request, or a `SchemaType`; None without a type.
    """
    try:
        output = finalize(raw, None if output_type is None else _type_for_pattern(output_type))
        return await output if inspect.isawaitable(output) else output
    except Exception as error:
        retry = translated(error)
        if isinstance(retry, ModelRetryError):
            raise retry from error
        raise


def _type_for_pattern(output_type: OutputType) -> Any:
    if output_type.model is not None:
        return _accepting_text(output_type.model)
    return SchemaType(output_type.name, output_type.schema)


class SchemaType:
    """A type of which only the JSON Schema is known. It accepts every value: the runtime checks it later."""

    def __init__(self, name: str, json_schema: dict[str, Any]) -> None:
        self.__name__ = name
        self._json_schema = json_schema

    def model_validate(self, obj: Any, **_: Any) -> Any:
        """The value; of a JSON text, what it contains."""
        return _without_text(obj)

    def model_json_schema(self, **_: Any) -> dict[str, Any]:
        return self._json_schema


@lru_cache(maxsize=256)
def _accepting_text(model: type[BaseModel]) -> type[BaseModel]:
    """The class, which also validates the JSON text of a model."""

    class AcceptingText(model):  # type: ignore[misc,valid-type]
        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> Any:
            value = _without_text(obj)
            return model.model_validate(value, **options) if options else instance_of(model, value)

        @classmethod
        def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
            return model.model_json_schema(*args, **options)

    AcceptingText.__name__, AcceptingText.__qualname__ = model.__name__, model.__qualname__
    return AcceptingText


def _without_text(value: Any) -> Any:
    """The value of a JSON text, also in a Markdown code fence; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json_answer(value)
    except OutputMismatch:
        return value
