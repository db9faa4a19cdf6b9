"""Parts. The only place that says what every part of the agents file has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core import PydanticCustomError, to_jsonable_python

from openagents_worker.agents.positions import Path
from openagents_worker.agents.problems import did_you_mean
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER

__all__ = ["LONGEST_MS", "Part", "not_supported", "problem"]

LONGEST_MS = 7 * 24 * 60 * 60 * 1000
"""A week. A longer duration is a mistake in the unit."""


def problem(kind: str, text: str, *, key: Path = (), hint: str | None = None) -> PydanticCustomError:
    """A validation error whose text may contain anything; `key` is appended to its path."""
    return PydanticCustomError(kind, "{text}", {"text": text, "key": key, "hint": hint})


def not_supported(what: str, *, key: Path = ()) -> PydanticCustomError:
    return problem("not_supported", f"{what} is not supported by this version", key=key)


def _write_all_defaults(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """pydantic leaves the defaults of its factories out of a JSON Schema."""
    for name, field in model.model_fields.items():
        if field.default_factory is not None and name in schema.get("properties", {}):
            made = field.get_default(call_default_factory=True, validated_data={})
            schema["properties"][name]["default"] = to_jsonable_python(made)


class Part(BaseModel):
    """A part of the file: frozen, finite numbers, unknown keys rejected with a suggestion."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_write_all_defaults
    )

    @classmethod
    def problems_of_whole(cls, data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
        """What is wrong with the part as a whole, each with the key that it is about. Known also where a
        single field is wrong, which keeps validators of the whole from being called."""
        yield from ()

    @field_validator("*", mode="after")
    @classmethod
    def _numbers_have_64_bits(cls, value: Any) -> Any:
        """Also one that a variable has given as text."""
        if isinstance(value, int) and not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
            raise problem("number", "an integer beyond 64 bits")
        return value

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, data: Any) -> Any:
        """For a part that is made by itself; in a file `loading` finds all unknown keys at once."""
        if not isinstance(data, Mapping) or cls.model_config.get("extra") == "allow":
            return data
        for name in data:
            if name not in cls.model_fields:
                hint = did_you_mean(str(name), cls.model_fields, "known keys")
                raise problem("unknown_key", "unknown key", key=(str(name),), hint=hint)
        return data
