"""Field types. The only place that checks ids, queue names, labels and checkpoint ids in models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from openagents_worker.queue_names import problem_with_queue

__all__ = ["MAX_ID_CHARS", "CheckpointId", "Id", "LabelName", "QueueName", "problem_with_id"]

MAX_ID_CHARS = 256


def _wrong_in_id(value: str) -> str | None:
    """What is wrong with an id; None if nothing is."""
    # The space is the only printable character that is whitespace.
    is_clean = value.isprintable() and " " not in value
    bad = None if is_clean else next(c for c in value if c.isspace() or not c.isprintable())
    if not value or len(value) > MAX_ID_CHARS or bad is not None:
        return f"it contains {bad!r}" if bad is not None else f"it has {len(value)} characters"
    return None


def problem_with_id(value: Any) -> str | None:
    """Why the value cannot be an id, as the rest of a sentence about it; None if it can."""
    found = _wrong_in_id(value) if isinstance(value, str) else f"it is a {type(value).__name__}"
    if found is None:
        return None
    return f"must have 1 to {MAX_ID_CHARS} printable characters and no whitespace; {found}"


def _checked_id(value: str) -> str:
    if found := _wrong_in_id(value):
        raise PydanticCustomError(
            "id",
            "an id must have 1 to {limit} printable characters and no whitespace; {found}",
            {"limit": MAX_ID_CHARS, "found": found},
        )
    return value


Id = Annotated[str, AfterValidator(_checked_id)]


def _checked_queue(name: str) -> str:
    if problem := problem_with_queue(name):
        raise PydanticCustomError("queue", "{problem}", {"problem": problem})
    return name


QueueName = Annotated[str, AfterValidator(_checked_queue)]
"""A valid queue name. `submit` also checks that it does not begin with the key prefix."""


def _checked_label(name: str) -> str:
    if "=" in _checked_id(name):
        raise PydanticCustomError(
            "label", "the name of a label must not contain '='; found {found}", {"found": repr(name)}
        )
    return name


LabelName = Annotated[str, AfterValidator(_checked_label)]


def _checked_checkpoint(value: str) -> str:
    run_id, _, step = value.rpartition(":step:")
    if not run_id or not step.isdecimal():
        raise PydanticCustomError(
            "checkpoint",
            "a checkpoint must have the form '{{run_id}}:step:{{n}}'; found {found}",
            {"found": repr(value)},
        )
    return value


CheckpointId = Annotated[str, AfterValidator(_checked_checkpoint)]
