"""Execution policies: the only place that decides by its arguments whether a call of a tool is allowed.

A policy goes by what a tool can do, as its schema and its `ToolExecutionSpec` say, not by its name.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from openagents_worker.agents.executors import FilesystemOptions, NetworkOptions
from openagents_worker.errors import PermanentToolError, text_of
from openagents_worker.tools.base import ToolExecutionSpec
from openagents_worker.tools.builtin.networks import is_public

__all__ = [
    "CommandPolicy",
    "CompositePolicy",
    "ExecutionPolicy",
    "FilesystemPolicy",
    "NetworkPolicy",
    "PolicyRequest",
    "check_policies",
    "check_redirect",
    "policies_of_call",
]

PATH_PARAMETERS = ("path", "file_path", "directory", "dir_path", "cwd", "root")
"""The parameters that name a file or a folder."""
URL_PARAMETERS = ("url", "urls", "uri", "base_url", "endpoint", "host", "hostname")
"""The parameters that name a host, alone or in a URL."""


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
    """Allows some programs, for tools with the parameter `command`: a command line, or a list of words.

    A tool may give a line to a shell, so the line must be one command with its words.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)

    def problem(self, request: PolicyRequest) -> str | None:
        if "command" not in request.parameters and "command" not in request.arguments:
            return None
        command = request.arguments.get("command")
        if isinstance(command, str) and _is_more_than_words(command):
            return "a shell would find more than one program with its words in the command"
        try:
            words = shlex.split(command) if isinstance(command, str) else list(command or ())
        except (ValueError, TypeError):
            return "the command cannot be read"
        if words and words[0] in self._allowed:
            return None
        return "the program is not in command_allowlist"


def _is_more_than_words(line: str) -> bool:
    """Whether a POSIX shell would find in a line more than a program and its words: another command, a
    redirection, an expansion that contains commands, or a comment, which may contain quotes.

    >>> _is_more_than_words("git log --format='%h; %s'"), _is_more_than_words("git log; rm a")
    (False, True)
    """
    quote, is_escaped, before = "", False, " "
    for char, after in pairwise(f"{line} "):
        if is_escaped:
            is_escaped = False
        elif quote == "'":
            quote = "" if char == "'" else quote
        elif char == "\\":
            is_escaped = True
        elif char == "`" or (char == "$" and after in "({"):  # also in double quotes
            return True
        elif quote:
            quote = "" if char == '"' else quote
        elif char in "'\"":
            quote = char
        elif (
            char in ";&|<>()\r\n"
            or (char == "$" and after in "'\"")  # some shells quote in another way then
            or (char == "#" and before.isspace())
        ):
            return True
        before = char
    return False


class NetworkPolicy:
    """Allows some hosts, for tools that may reach the network: by what they declare, and by their parameters.

    A tool without side effects may not reach it. One that declares `network` and whose arguments name no host
    is denied, because nobody can say what it reaches.
    """

    def __init__(self, options: NetworkOptions) -> None:
        self._options = options
        self._hosts = [host.lower() for host in options.allow_hosts]
        self._schemes = {scheme.lower() for scheme in options.allow_schemes}

    def problem(self, request: PolicyRequest) -> str | None:
        if request.spec.side_effects == "none" or request.tool_id in self._options.allow_tools:
            return None
        named = [(name, request.arguments[name]) for name in URL_PARAMETERS if name in request.arguments]
        if not named:
            is_known = request.spec.side_effects != "network"
            return None if is_known else "the arguments name no host, and the tool reaches the network"
        for name, value in named:
            for text in value if isinstance(value, list) else [value]:
                if (reason := self._problem_of(name, text)) is not None:
                    return reason
        return None

    def _problem_of(self, name: str, text: Any) -> str | None:
        """Why a host or URL is not allowed; None if it is."""
        if not isinstance(text, str) or not text or any(char <= " " or char == "\\" for char in text):
            return f"{name} is not a URL"  # or one that another program reads in another way
        has_scheme = "://" in text
        try:
            parts = urlsplit(text if has_scheme else f"//{text}")
            host = (parts.hostname or "").lower().rstrip(".")
        except ValueError:
            return f"{name} is not a URL"
        if not host:
            return f"{name} names no host"
        if (has_scheme or "url" in name) and parts.scheme.lower() not in self._schemes:
            return f"the scheme of {name} is not in allow_schemes"
        if not any(fnmatchcase(host, allowed) for allowed in self._hosts):
            return f"{host} is not in allow_hosts"
        if self._options.deny_private_networks and not all(map(is_public, _addresses(host))):
            return f"{host} is in a private network"
        return None


class CompositePolicy:
    """Allows what all of its children allow, or what any of them allows.

    Each child is a list of policies that must all allow a call. Without children, everything is allowed. A
    child that fails denies.
    """

    def __init__(
        self, children: Sequence[Sequence[ExecutionPolicy]], mode: Literal["all", "any"] = "all"
    ) -> None:
        self._children = children
        self._mode = mode

    def problem(self, request: PolicyRequest) -> str | None:
        reason: str | None = None
        for child in self._children:
            reason = _first_problem(child, request)
            if (reason is None) == (self._mode == "any"):
                return reason
        return reason


def _first_problem(policies: Sequence[ExecutionPolicy], request: PolicyRequest) -> str | None:
    for policy in policies:
        try:
            reason = policy.problem(request)
        except Exception as error:  # noqa: BLE001 - `resolve` of a tool may raise anything
            reason = f"a policy has failed: {text_of(error)}"
        if reason is not None:
            return reason
    return None


def _addresses(host: str) -> list[str]:
    """The addresses of a host; none if it cannot be resolved: then the tool cannot reach it either."""
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


# --- the policies of a call ---------------------------------------------------------------------------------

policies_of_call: ContextVar[tuple[Sequence[ExecutionPolicy], PolicyRequest] | None] = ContextVar(
    "openagents_policies", default=None
)
"""The policies of the call that is being made, and what they have allowed."""


async def check_policies(policies: Sequence[ExecutionPolicy], request: PolicyRequest) -> None:
    """Raises `PermanentToolError` for a call that a policy denies. They work in a thread: some ask the file
    system, or resolve a host."""
    for policy in policies:
        if (reason := await asyncio.to_thread(policy.problem, request)) is not None:
            raise PermanentToolError(
                f"policy denied: {reason}",
                request.tool_id,
                hint="the tool_executor in the agents file decides what the tools of an agent may do",
            )


async def check_redirect(url: str) -> None:
    """Raises `PermanentToolError` if this call is sent to another URL, and its policies do not allow that."""
    if (current := policies_of_call.get()) is not None:
        policies, request = current
        await check_policies(policies, replace(request, arguments={**request.arguments, "url": url}))


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
