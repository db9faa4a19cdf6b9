"""Execution specs: the only place that reads how a tool is executed, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from openagents_worker.errors import PluginConfigError
from openagents_worker.models.base import from_known_fields
from openagents_worker.suggest import did_you_mean
from openagents_worker.tools.base import ToolExecutionSpec
from openagents_worker.tools.function import FunctionTool
from openagents_worker.tools.jobs import check_job_methods

__all__ = ["check_dependencies", "declared_spec", "dependencies_of", "spec_of"]


def declared_spec(plugin: Any, tool_id: str) -> ToolExecutionSpec:
    """What a tool says in `execution_spec()`. Raises `PluginConfigError` for a spec that is not valid.

    The class of the spec may be that of the original SDK or another one: further fields of it are ignored.
    """
    try:
        given = plugin.execution_spec() if hasattr(plugin, "execution_spec") else ToolExecutionSpec()
        return from_known_fields(ToolExecutionSpec, given.model_dump())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise _refused(tool_id, f"{path}: {first['msg']}" if path else first["msg"]) from error


def spec_of(plugin: Any, tool_id: str) -> ToolExecutionSpec:
    """The spec of a tool, also of one that was written for the original SDK.

    Raises `PluginConfigError` for a spec that is not valid, or that the tool does not implement.
    """
    spec = declared_spec(plugin, tool_id)
    if spec.default_timeout_ms is not None and spec.default_timeout_ms < 1:
        raise _refused(tool_id, "default_timeout_ms is not a positive number of milliseconds")
    if spec.cpu_bound and not isinstance(plugin, FunctionTool):
        raise _refused(tool_id, "only a function with @tool can be cpu_bound, not a class")
    if spec.supports_streaming and not hasattr(plugin, "invoke_stream"):
        raise _refused(tool_id, "supports_streaming is true, but there is no invoke_stream")
    if spec.background:
        check_job_methods(plugin, tool_id)
    return spec


def dependencies_of(plugin: Any) -> list[str]:
    """The ids of the tools that a tool calls (`get_dependencies`)."""
    ask = getattr(plugin, "get_dependencies", None)
    return [str(id_) for id_ in ask() or ()] if callable(ask) else []


def check_dependencies(plugin: Any, tool_id: str, known: Iterable[str]) -> None:
    """Raises `PluginConfigError` if the agent does not have a tool that this one calls."""
    needed = dependencies_of(plugin)
    if not needed:
        return
    known = list(known)
    for id_ in needed:
        if id_ not in known:
            raise PluginConfigError(
                f"the tool {tool_id!r} needs the tool {id_!r}, which the agent does not have",
                hint=did_you_mean(id_, sorted(known), "its tools are"),
            )


def _refused(tool_id: str, problem: str) -> PluginConfigError:
    return PluginConfigError(
        f"execution_spec() of the tool {tool_id!r} cannot be used: {problem}",
        hint="docs/tools.md says what each field means",
    )
