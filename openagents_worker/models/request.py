"""Requests. The only place that defines what a caller may ask of an agent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    PydanticUserError,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from openagents_worker.jsontext import dumps
from openagents_worker.models.base import RequestModel
from openagents_worker.models.budget import RunBudget
from openagents_worker.models.fields import CheckpointId, Id, LabelName, QueueName

__all__ = ["MAX_LABELS", "RunRequest", "instance_of", "output_class_of", "schema_of"]

MAX_LABELS = 32

M = TypeVar("M", bound=BaseModel)


class RunRequest(RequestModel):
    """One request to an agent in a session.

    The producer may choose the `run_id`: the same request with the same id is one run, even if it is
    submitted several times. `durable=None` means the default of the deployment
    (`OPENAGENTS_DURABLE_DEFAULT`).

    >>> RunRequest(agent_id="assistant", session_id="s1", input_text="hi", run_id="r1").run_id
    'r1'
    """

    agent_id: Id
    session_id: Id
    input_text: str
    run_id: Id = Field(default_factory=lambda: str(uuid.uuid4()))
    parent_run_id: Id | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    context_hints: dict[str, JsonValue] = Field(default_factory=dict)
    budget: RunBudget | None = None
    durable: bool | None = None
    queue: QueueName | None = None
    tenant: Id | None = None
    """The customer of the run. `Client.runs(tenant=...)` lists the runs of a customer."""
    labels: dict[LabelName, Id] = Field(default_factory=dict, max_length=MAX_LABELS)
    """Names and values, at most 32. `Client.runs(labels=...)` finds runs by them."""
    deps: Id | None = None
    """The registered name (`register_deps`) of the object that tools and patterns get as `context.deps`."""
    output_type: dict[str, JsonValue] | Id | SkipJsonSchema[type[BaseModel]] | None = None
    """The type of the answer: a JSON Schema, a registered name (`register_output`), or a pydantic class.

    A pydantic class is sent as its schema, and `wait()` parses the answer to the class.
    """
    on_busy: Literal["enqueue", "reject", "interrupt", "rollback"] = "enqueue"
    """If the session already has a run: `enqueue` lets this run wait, `reject` raises `session.busy`.

    `interrupt` and `rollback` end the run that works there, and this run is the next one. With `interrupt`,
    the transcript keeps the question, the finished tool calls, and a note. With `rollback`, it keeps nothing.
    """
    resume_from_checkpoint: CheckpointId | None = None
    """The last checkpoint, `{run_id}:step:{n}`, of a failed or cancelled run. That run continues.

    Agent and session must be those of the run, and `input_text` must be the same or empty. The run keeps its
    request: any other field must be left out or have the value of the run.
    """

    @model_validator(mode="before")
    @classmethod
    def _a_resumed_run_keeps_its_id(cls, data: Any) -> Any:
        checkpoint = data.get("resume_from_checkpoint") if isinstance(data, Mapping) else None
        if not isinstance(checkpoint, str):
            return data
        run_id = checkpoint.rpartition(":step:")[0]
        if data.get("run_id", run_id) != run_id:
            raise PydanticCustomError(
                "run_id",
                "run_id {given} is not the run of the checkpoint {checkpoint}; leave run_id out",
                {"given": repr(data["run_id"]), "checkpoint": repr(checkpoint)},
            )
        return {**data, "run_id": run_id}

    @field_validator("output_type")
    @classmethod
    def _check_output_class(cls, value: Any) -> Any:
        """Reject a class from which pydantic cannot make a JSON Schema."""
        if isinstance(value, type):
            try:
                schema_of(value)
            except PydanticUserError as error:
                raise PydanticCustomError(
                    "output_type",
                    "{name} has no JSON Schema: {reason}",
                    {"name": value.__name__, "reason": str(error).splitlines()[0]},
                ) from None
        return value

    @field_serializer("output_type")
    def _output_class_as_schema(self, value: Any) -> dict[str, JsonValue] | str | None:
        return schema_of(value) if isinstance(value, type) else value

    @property
    def output_class(self) -> type[BaseModel] | None:
        """The pydantic class in `output_type`; None if it is a schema, a name, or not set."""
        return self.output_type if isinstance(self.output_type, type) else None


@lru_cache(maxsize=256)  # one submission needs the schema several times
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a pydantic class."""
    return model.model_json_schema()


def instance_of(model: type[M], value: Any) -> M:
    """An instance of a pydantic class from JSON values. Raises ValidationError.

    A strict class takes a date as text only from JSON, so the values are written as JSON first.
    """
    try:
        return model.model_validate_json(dumps(value))
    except ValidationError:
        raise
    except (TypeError, ValueError):  # a value that is not JSON
        return model.model_validate(value)


def output_class_of(request: RunRequest | Mapping[str, Any]) -> type[BaseModel] | None:
    """The pydantic class in the `output_type` of a request, also of an unchecked one; None without a
    class."""
    output_type = request.get("output_type") if isinstance(request, Mapping) else request.output_class
    return output_type if isinstance(output_type, type) and issubclass(output_type, BaseModel) else None
