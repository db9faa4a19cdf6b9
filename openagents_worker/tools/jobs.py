"""Background jobs: the only place that defines what a tool says about a job of its service, and its limits.

A tool with a job starts it with `invoke_background`, asks for it with `poll_job` and ends it with
`cancel_job`. These are the methods of the original SDK. They may also return dicts or objects with the same
fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from openagents_worker.errors import PluginConfigError, ToolError
from openagents_worker.jsontext import dumps, loads
from openagents_worker.models.base import CheckedModel, from_known_fields

__all__ = [
    "DEFAULT_JOB_LIMIT",
    "MAX_HANDLE_CHARS",
    "JobHandle",
    "JobState",
    "JobStatus",
    "check_job_methods",
    "handle_of",
    "has_jobs",
    "is_of_job",
    "status_of",
]

DEFAULT_JOB_LIMIT = timedelta(days=1)
"""The longest time from the start of a job to its end, for a tool without `timeout_ms`."""
MAX_HANDLE_CHARS = 8_192  # it is stored beside the run, and read by each claim
METHODS = ("invoke_background", "poll_job", "cancel_job")

JobState = Literal["pending", "running", "succeeded", "failed", "cancelled"]


class JobHandle(BaseModel):
    """What a tool needs to find its job again, on any worker. It is stored as JSON at once.

    Further fields are kept. Do not put secrets into it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    job_id: str = Field(min_length=1, max_length=512)
    tool_id: str = ""
    status: JobState = "pending"
    created_at: float = 0.0
    """Seconds since 1970."""


class JobStatus(CheckedModel):
    """What a tool says about its job. `result` is the result of the call, `error` why it has failed.

    An unknown field raises pydantic's `ValidationError`. Unknown fields of a dict or of another class are
    ignored.
    """

    job_id: str = ""
    status: JobState
    progress: float | None = None
    """From 0 to 1, for watchers."""
    result: JsonValue = None
    error: str | None = None
    poll_after_ms: int | None = Field(default=None, ge=0)
    """When to ask again, in milliseconds. None: after a quarter of the time since the start."""


def has_jobs(plugin_or_class: Any) -> bool:
    """Whether a tool, or its class, implements jobs. Those of the base classes only raise an error."""
    kind = plugin_or_class if isinstance(plugin_or_class, type) else type(plugin_or_class)
    for base in kind.__mro__:
        if "invoke_background" in base.__dict__:
            return base.__name__ != "ToolPlugin"
    return False


def is_of_job(note: Mapping[str, Any] | None) -> bool:
    """Whether a note about a call (`CallInfo.note`) is that of a job."""
    return note is not None and isinstance(note.get("handle"), Mapping)


def check_job_methods(plugin: Any, tool_id: str) -> None:
    """Raises `PluginConfigError` if a tool that shall work in the background has no jobs."""
    missing = [name for name in METHODS if not callable(getattr(plugin, name, None))]
    if missing or not has_jobs(plugin):
        toolset_id = getattr(plugin, "toolset_id", None)
        owner = "its class" if toolset_id is None else f"the class of its toolset {toolset_id!r}"
        raise PluginConfigError(
            f"the tool {tool_id!r} cannot work in the background: {owner} does not implement "
            f"{' and '.join(missing or METHODS)}",
            hint="docs/tools.md, section 'Jobs in the background', shows such a tool",
        )


def handle_of(value: Any, tool_id: str) -> JobHandle:
    """What `invoke_background` has returned. Raises `ToolError` if it is not a handle that can be stored."""
    try:
        fields = {"tool_id": tool_id, **_fields(value, JobHandle)}
        if "status" in fields and fields["status"] is None:
            del fields["status"]
        handle = JobHandle.model_validate(fields)
        text = dumps(handle.model_dump(mode="json"))
        if len(text) > MAX_HANDLE_CHARS:
            raise ValueError(f"it has {len(text):,} characters, {MAX_HANDLE_CHARS:,} are allowed")
        return JobHandle.model_validate(loads(text))
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise ToolError(
            f"invoke_background of {tool_id!r} did not return a usable handle: {_problem(error)}",
            tool_id,
            hint='return JobHandle(job_id="…"), or a dict with job_id; its values must be JSON',
        ) from error


def status_of(value: Any, tool_id: str) -> JobStatus:
    """What `poll_job` has returned. Raises `ToolError` if it is not a status."""
    try:
        return from_known_fields(JobStatus, _fields(value, JobStatus))
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise ToolError(
            f"poll_job of {tool_id!r} did not return a usable status: {_problem(error)}",
            tool_id,
            hint='return JobStatus(status="running"), or a dict with status: pending, running, succeeded, '
            "failed or cancelled",
        ) from error


def _fields(value: Any, model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a value, which may be a model of another package."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    found = {name: getattr(value, name) for name in model.model_fields if hasattr(value, name)}
    if not found:
        raise TypeError(f"it is a {type(value).__name__}")
    return found


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'value'}: {first['msg']}"
