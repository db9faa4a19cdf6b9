"""Base models. The only place that decides whether unknown fields of a model are rejected or ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from openagents_worker.suggest import nearest

__all__ = ["CheckedModel", "RequestModel", "StoredModel", "from_known_fields"]

M = TypeVar("M", bound=BaseModel)


class CheckedModel(BaseModel):
    """Base class of models that callers and plugins create: frozen, an unknown field has a suggestion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _unknown_fields_have_a_hint(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = cls.model_fields
        for name in data:
            if name in known:
                continue
            near = nearest(str(name), known)
            hint = f"did you mean {near!r}?" if near else f"known fields: {', '.join(known)}"
            raise PydanticCustomError(
                "unknown_field",
                "{model} has no field {name}; {hint}",
                {"model": cls.__name__, "name": repr(name), "hint": hint},
            )
        return data


class RequestModel(CheckedModel):
    """Base class of models in requests: also with finite numbers only."""

    # pydantic's messages would show the wrong value and the fields around it.
    model_config = ConfigDict(allow_inf_nan=False, hide_input_in_errors=True)


class StoredModel(BaseModel):
    """Base class of models that are read from Redis: fields that a newer version has added are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def from_known_fields(model: type[M], fields: Mapping[str, Any]) -> M:
    """An instance with the fields that this version knows, for values of a newer version or another package.

    Raises pydantic's `ValidationError`.
    """
    return model.model_validate({name: value for name, value in fields.items() if name in model.model_fields})
