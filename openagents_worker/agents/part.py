"""The base class of all parts of the agents file, with the checks that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core import PydanticCustomError, to_jsonable_python

from openagents_worker.agents.positions import Path
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER
from openagents_worker.suggest import did_you_mean

__all__ = ["LONGEST_MS", "Part", "not_supported", "problem"]

LONGEST_MS = 7 * 24 * 60 * 60 * 1000
"""A week, in milliseconds. A longer duration is probably a mistake in the unit."""


def problem(kind: str, text: str, *, key: Path = (), hint: str | None = None) -> PydanticCustomError:
    """A validation error with this text. `key` is appended to its path; `kind` is pydantic's error type."""
    return PydanticCustomError(kind, "{text}", {"text": text, "key": key, "hint": hint})


def not_supported(what: str, *, key: Path = ()) -> PydanticCustomError:
    return problem("not_supported", f"{what} is not supported by this version", key=key)


def _write_all_defaults(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the defaults that factories create: pydantic leaves them out of a JSON Schema."""
    for name, field in model.model_fields.items():
        if field.default_factory is not None and name in schema.get("properties", {}):
            made = field.get_default(call_default_factory=True, validated_data={})
            schema["properties"][name]["default"] = to_jsonable_python(made)


class Part(BaseModel):
    """A part of the agents file: frozen, only finite numbers, unknown keys rejected with a suggestion."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_write_all_defaults
    )

    @classmethod
    def problems_of_whole(cls, data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
        """Problems of the part as a whole: the key and a text. They are found even if a field is invalid;
        pydantic does not call validators of the whole model then."""
        yield from ()

    @field_validator("*", mode="after")
    @classmethod
    def _integers_have_64_bits(cls, value: Any) -> Any:
        """Reject integers of more than 64 bits, also those from variables."""
        if isinstance(value, int) and not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
            raise problem("number", "the integer has more than 64 bits")
        return value

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, data: Any) -> Any:
        """Reject the first unknown key, for a part that is created directly. In a file, `loading` finds all
        unknown keys."""
        if not isinstance(data, Mapping) or cls.model_config.get("extra") == "allow":
            return data
        for name in data:
            if name not in cls.model_fields:
                hint = did_you_mean(str(name), cls.model_fields, "known keys")
                raise problem("unknown_key", "unknown key", key=(str(name),), hint=hint)
        return data
