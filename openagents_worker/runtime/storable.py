"""Storable values: the only place that converts what a call or a run produces into what is stored.

Text and numbers that JSON cannot represent are replaced (see `jsontext`). A value that cannot be stored is an
error that names it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from openagents_worker.errors import StepTooDeep, StepTooLarge, text_of
from openagents_worker.jsontext import MAX_NESTING, NestedTooDeeply, replaced, size_of, whole_text
from openagents_worker.models import RunArtifact
from openagents_worker.runtime.user_code import described

__all__ = ["artifact_name", "artifact_of", "sized_part", "stored_artifact", "stored_part", "too_deep"]


def stored_part(what: str, value: Any, *, levels: int = MAX_NESTING) -> Any:
    """A value as it is stored. Raises `StepTooDeep` or `StepTooLarge`, which call it `what`."""
    try:
        return replaced(value.model_dump(mode="json") if isinstance(value, BaseModel) else value, levels)
    except NestedTooDeeply as error:
        raise too_deep(what, error) from error
    except Exception as error:  # the value's own class may raise anything
        raise StepTooLarge(f"{what} is not JSON: {described(error)}", hint="use plain JSON values") from error


def sized_part(what: str, value: Any, max_bytes: int) -> tuple[Any, int]:
    """A value as it is stored, and its size in bytes. Raises like `stored_part`, and above `max_bytes`."""
    stored = stored_part(what, value)
    size = size_of(stored)
    if size > max_bytes:
        raise StepTooLarge(f"{what} has {size:,} bytes, {max_bytes:,} are allowed")
    return stored, size


def too_deep(what: str, error: NestedTooDeeply) -> StepTooDeep:
    return StepTooDeep(f"{what} cannot be stored: {error}", hint="store a flatter value, or its JSON as text")


def stored_artifact(artifact: Any, source: str = "") -> dict[str, Any]:
    """The fields of an artifact as they are stored. `source` is its tool. Raises like `stored_part`."""
    what = f"artifact {artifact_name(artifact)!r}{source and f' of {source}'}"
    # Not `model_dump`: pydantic silently stops at a deeply nested payload.
    value = dict(artifact) if type(artifact) is RunArtifact else artifact
    stored: dict[str, Any] = stored_part(what, value, levels=MAX_NESTING + 1)
    return stored


def artifact_of(name: Any, kind: Any, payload: Any, metadata: Any) -> RunArtifact:
    """An artifact from the values of a plugin. Raises `StepTooDeep`, or ValidationError if it is not JSON."""
    fields = {"name": name, "kind": kind, "payload": payload, "metadata": dict(metadata or {})}
    try:
        fields = replaced(fields, MAX_NESTING + 1)
    except NestedTooDeeply as error:
        raise too_deep(f"artifact {text_of(name)!r}", error) from error
    except (TypeError, ValueError):  # not JSON: the error of pydantic says where
        fields["name"] = whole_text(name) if isinstance(name, str) else name
    return RunArtifact(**fields)


def artifact_name(artifact: Any) -> str:
    """The name of an artifact. A plugin may have put any object into the list of artifacts."""
    return text_of(getattr(artifact, "name", type(artifact).__name__))
