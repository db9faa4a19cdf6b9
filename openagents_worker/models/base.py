"""Base models. The only place that decides whether unknown fields of a model are rejected or ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from openagents_worker.suggest import nearest

__all__ = ["RequestModel", "StoredModel"]


class RequestModel(BaseModel):
    """Base class of models in requests: frozen, without unknown fields, with finite numbers only."""

    # pydantic's messages would show the wrong value and the fields around it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

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


class StoredModel(BaseModel):
    """Base class of models that are read from Redis: fields that a newer version has added are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
