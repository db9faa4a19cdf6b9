"""Storable parts. The only place that makes what a call or a run leaves into what is stored of it.

Text and numbers that JSON has no place for are replaced (`jsontext`); what cannot be stored is an error that
names the part.
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
    """The value as it is stored. Raises `StepTooDeep` or `StepTooLarge`, which name it as `what`."""
    try:
        return replaced(value.model_dump(mode="json") if isinstance(value, BaseModel) else value, levels)
    except NestedTooDeeply as error:
        raise too_deep(what, error) from error
    except Exception as error:  # the value's own class may raise anything
        raise StepTooLarge(f"{what} is not JSON: {described(error)}", hint="use plain JSON values") from error


def sized_part(what: str, value: Any, max_bytes: int) -> tuple[Any, int]:
    """The value as it is stored, and its bytes. Raises as `stored_part`, and for more than `max_bytes`."""
    stored = stored_part(what, value)
    size = size_of(stored)
    if size > max_bytes:
        raise StepTooLarge(f"{what} has {size:,} bytes, {max_bytes:,} are allowed")
    return stored, size


def too_deep(what: str, error: NestedTooDeeply) -> StepTooDeep:
    return StepTooDeep(
        f"{what} cannot be stored: {error}", hint="leave a flatter value, or its JSON as one text"
    )


def stored_artifact(artifact: Any, of: str = "") -> dict[str, Any]:
    """The artifact's fields as they are stored. Raises as `stored_part`; `of` is who has left it."""
    what = f"artifact {artifact_name(artifact)!r}{of and f' of {of}'}"
    # Its fields one by one: pydantic gives up on a payload that is nested deeply, and does not say so.
    value = dict(artifact) if type(artifact) is RunArtifact else artifact
    stored: dict[str, Any] = stored_part(what, value, levels=MAX_NESTING + 1)
    return stored


def artifact_of(name: Any, kind: Any, payload: Any, metadata: Any) -> RunArtifact:
    """An artifact of what a plugin gives. Raises `StepTooDeep`, and pydantic's error for what is not JSON."""
    fields = {"name": name, "kind": kind, "payload": payload, "metadata": dict(metadata or {})}
    try:
        fields = replaced(fields, MAX_NESTING + 1)
    except NestedTooDeeply as error:
        raise too_deep(f"artifact {text_of(name)!r}", error) from error
    except (TypeError, ValueError):  # it is not JSON: pydantic says where
        fields["name"] = whole_text(name) if isinstance(name, str) else name
    return RunArtifact(**fields)


def artifact_name(artifact: Any) -> str:
    """The artifact's name; a plugin may have put anything into the list of artifacts."""
    return text_of(getattr(artifact, "name", type(artifact).__name__))
