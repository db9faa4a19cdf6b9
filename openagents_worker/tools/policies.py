"""Execution policies: the only place that decides by its arguments whether a call of a tool is allowed.

A policy goes by what a tool can do, as its schema and its `ToolExecutionSpec` say, not by its name.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openagents_worker.agents.executors import FilesystemOptions
from openagents_worker.tools.base import ToolExecutionSpec

__all__ = ["CommandPolicy", "ExecutionPolicy", "FilesystemPolicy", "PolicyRequest"]

PATH_PARAMETERS = ("path", "file_path", "directory", "dir_path", "cwd", "root")
"""The parameters that name a file or a folder."""


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """A call that wants to be made."""

    tool_id: str
    spec: ToolExecutionSpec
    parameters: Mapping[str, Any]
    """The properties of the tool's schema."""
    arguments: Mapping[str, Any]
    resolve: Callable[[str], str | os.PathLike[str]] = os.path.abspath
    """The file that the tool means by a path. May raise the error of the tool."""


class ExecutionPolicy(Protocol):
    def problem(self, request: PolicyRequest) -> str | None:
        """Why the call is not allowed; None if it is. May ask the file system."""
        ...


class FilesystemPolicy:
    """Allows the calls of some tools, and paths below some folders.

    A tool that declares neither `reads_files` nor `writes_files` may do both, unless it has no side effects.
    Links are followed before a path is compared.
    """

    def __init__(self, options: FilesystemOptions) -> None:
        self._options = options

    def problem(self, request: PolicyRequest) -> str | None:
        options, spec = self._options, request.spec
        if request.tool_id in options.deny_tools:
            return "the tool is in deny_tools"
        if options.allow_tools and request.tool_id not in options.allow_tools:
            return "the tool is not in allow_tools"
        is_undeclared = not (spec.reads_files or spec.writes_files) and spec.side_effects != "none"
        for name, path in _paths(request):
            if not isinstance(path, str):
                return f"{name} is not a path"
            try:
                real = os.path.realpath(request.resolve(path))
            except (ValueError, OSError):  # a null character, a loop of links
                return f"{name} is not a usable path"
            writes, reads = spec.writes_files or is_undeclared, spec.reads_files or is_undeclared
            if writes and options.write_roots and not _is_below(real, options.write_roots):
                return f"{name} is not below one of write_roots"
            if reads and options.read_roots and not _is_below(real, options.read_roots):
                return f"{name} is not below one of read_roots"
        return None


class CommandPolicy:
    """Allows some programs, for tools with the parameter `command`: a command line, or a list of words."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)

    def problem(self, request: PolicyRequest) -> str | None:
        if "command" not in request.parameters and "command" not in request.arguments:
            return None
        command = request.arguments.get("command")
        try:
            words = shlex.split(command) if isinstance(command, str) else list(command or ())
        except (ValueError, TypeError):
            return "the command cannot be read"
        if words and words[0] in self._allowed:
            return None
        return "the program is not in command_allowlist"


def _paths(request: PolicyRequest) -> Iterator[tuple[str, Any]]:
    """The paths of a call by their parameters, also those that it leaves to the tool."""
    for name in PATH_PARAMETERS:
        value = request.arguments.get(name)
        if value is None and name in request.parameters:
            schema = request.parameters[name]
            value = (schema.get("default") if isinstance(schema, dict) else None) or "."
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            yield name, path


def _is_below(path: str, roots: Sequence[str]) -> bool:
    real_roots = [os.path.realpath(root) for root in roots]
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in real_roots)
