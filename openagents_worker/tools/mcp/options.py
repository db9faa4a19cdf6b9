"""Options of MCP servers: the only place that defines and checks what the agents file says about them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import PurePath
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from openagents_worker.agents.part import Part, problem
from openagents_worker.agents.plugin import Plugin
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.jsontext import canonical_json
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_names import is_secrets_name

__all__ = [
    "McpOptions",
    "McpToolOptions",
    "ServerOptions",
    "check_installed",
    "config_error",
    "find_command",
]

LONGEST_TIMEOUT_MS = 60 * 60 * 1000
MAX_SERVER_TOOLS = 1_000


class ServerOptions(Part):
    """Where a server is: a `command` to start it, or a `url`."""

    command: str | None = Field(None, min_length=1, description="The program of a server that speaks stdio.")
    args: list[str] = Field(default_factory=list, description="Its arguments.")
    env: dict[str, str] = Field(
        default_factory=dict, description="Its environment variables. It gets no others of the worker."
    )
    cwd: str | None = Field(None, min_length=1, description="The folder in which it starts.")
    env_passthrough: list[str] = Field(
        default_factory=list,
        description="Names and globs of variables of the worker that it gets, such as PATH.",
    )
    init_timeout_ms: int | None = Field(
        30_000,
        ge=1,
        le=LONGEST_TIMEOUT_MS,
        description="Longest time until the server is connected, in milliseconds. null: the default.",
    )
    url: str | None = Field(None, min_length=1, description="The address of a server that speaks HTTP.")
    headers: dict[str, str] = Field(default_factory=dict, description="Further headers of each request.")
    transport: Literal["auto", "streamable_http", "sse"] = Field(
        "auto", description="The protocol of a `url`. auto: streamable HTTP and, if it is refused, SSE."
    )
    bearer_token_env: str | None = Field(
        None,
        min_length=1,
        description="The environment variable of the worker with the bearer token, read for each call.",
    )
    bearer_token_service: str | None = Field(
        None,
        min_length=1,
        description="The name with which the function of `register_api_keys` is asked for the bearer token "
        "of the tenant of a run.",
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                parts = urlsplit(url)
                is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
                _ = parts.port
            except ValueError:
                is_valid = False
            if not is_valid:
                raise problem("url", "must be an address such as https://mcp.example.com/mcp")
        return url

    @field_validator("headers")
    @classmethod
    def _headers_are_valid(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            is_name = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
            if not is_name or not value.isprintable() or not value.isascii():
                raise problem("header", "is not a valid HTTP header", key=(name,))
        return headers

    @field_validator("env")
    @classmethod
    def _names_are_valid(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                raise problem("env", "is not a valid environment variable", key=(name,))
        return env

    @model_validator(mode="after")
    def _one_kind(self) -> ServerOptions:
        if (self.command is None) == (self.url is None):
            found = "both are" if self.command else "none is"
            raise _whole(f"set exactly one of 'command' (stdio) and 'url' (HTTP); {found} set")
        other = ("headers", "bearer_token_env", "bearer_token_service", "transport") if self.command else (
            "args", "env", "cwd", "env_passthrough"
        )  # fmt: skip
        for name in other:
            if name in self.model_fields_set and getattr(self, name) not in ({}, [], None, "auto"):
                kind = "a server with a command" if self.command else "a server with a url"
                raise problem("not_here", f"{kind} does not have this option", key=(name,))
        if self.bearer_token_env and self.bearer_token_service:
            raise _whole("set only one of 'bearer_token_env' and 'bearer_token_service'")
        return self

    @property
    def init_timeout_s(self) -> float:
        return (self.init_timeout_ms or 30_000) / 1000

    @property
    def shown(self) -> str:
        """The server in messages and events: without arguments, variables, headers, logins and queries."""
        if self.command is not None:
            return PurePath(self.command).name
        parts = urlsplit(self.url or "")
        port = f":{parts.port}" if parts.port is not None else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"

    def identity(self) -> str:
        """A digest of all that decides which server this is (M01). It does not show secrets."""
        text = canonical_json(self.model_dump(mode="json", exclude={"init_timeout_ms"}))
        return sha256(text.encode()).hexdigest()

    def remember_secrets(self) -> None:
        """Make the secrets in the URL, headers and variables known, so that they are masked wherever text is
        shown."""
        for name, value in (*self.headers.items(), *self.env.items()):
            remember_secrets_of_url(value)
            if is_secrets_name(name):
                remember_secret(value)
        for name, value in self.headers.items():
            if is_secrets_name(name):
                remember_secret(value.rpartition(" ")[2])  # behind a scheme such as Bearer or Basic
        remember_secrets_of_url(self.url or "")


def _whole(text: str) -> PydanticCustomError:
    return problem("server", text)


class McpToolOptions(Part):
    """What the agents file says about one tool of a server, in place of what the server says."""

    name: str | None = Field(
        None, pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="The name that the model sees."
    )
    description: str | None = Field(None, min_length=1, description="The description that the model sees.")
    read_only: bool | None = Field(
        None, description="Whether a call changes nothing: such calls run concurrently and may be repeated."
    )
    idempotent: bool | None = Field(
        None, description="Whether a call may be repeated without further effect."
    )
    approval: Literal["always", "never"] | None = Field(
        None, description="Whether each call waits until somebody approves it."
    )
    timeout_ms: int | None = Field(
        None, ge=1, le=LONGEST_TIMEOUT_MS, description="Timeout of one call in milliseconds."
    )

    @property
    def is_restriction(self) -> bool:
        """Whether calls would be made or repeated against these options if they were ignored."""
        return self.approval == "always" or self.read_only is False or self.idempotent is False


class McpOptions(Part, Plugin.Config):
    """The `config` of the built-in tool `mcp`."""

    server: ServerOptions = Field(description="Where the server is.")
    tools: list[str] = Field(
        default_factory=list, description="Names of the tools that the model gets. Empty: all."
    )
    connection_mode: Literal["per_call", "pooled"] = Field(
        "per_call",
        description="How long a connection lasts. per_call: for one call. pooled: it is kept.",
    )
    pool_scope: Literal["session", "worker"] = Field(
        "session",
        description="Who shares a pooled connection: the runs of one session, or all runs of a worker.",
    )
    probe_on_preflight: bool = Field(
        False, description="Whether each run asks the server for its tools when it begins."
    )
    dedup_inflight: bool = Field(
        True,
        description="Whether concurrent identical calls of a tool that may be repeated are one call.",
    )
    prelaunch: Literal["off", "eager"] = Field(
        "off",
        description="When a pooled connection is opened. off: at the first call. eager: when a run begins.",
    )
    call_timeout_ms: int = Field(
        60_000,
        ge=1,
        le=LONGEST_TIMEOUT_MS,
        description="Timeout of one call in milliseconds, with the time to connect. `timeout_ms` of the tool "
        "overrides it.",
    )
    prefix: str = Field(
        "", pattern=r"^[a-zA-Z0-9_-]{0,40}$", description="Put before the name of each tool, as `git_`."
    )
    overrides: dict[str, McpToolOptions] = Field(
        default_factory=dict, description="Options of single tools, by their names on the server."
    )
    trust_annotations: bool = Field(
        True,
        description="Whether the hints of the server (read-only, idempotent, destructive) are believed.",
    )
    resources: bool = Field(
        False, description="Whether the model gets two tools to list and read the resources of the server."
    )
    prompts: bool = Field(
        False, description="Whether the model gets two tools to list and get the prompts of the server."
    )
    as_one_tool: bool = Field(
        False,
        description="Whether the model gets one tool with the id of the agents file and the parameters "
        "`tool` and `arguments`, as in the original SDK. If the server says of one of its tools that it "
        "destroys something, each call needs an approval.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> McpOptions:
        if self.prelaunch == "eager" and self.connection_mode != "pooled":
            raise problem("prelaunch", "eager needs connection_mode 'pooled'", key=("prelaunch",))
        if self.pool_scope == "worker" and self.connection_mode != "pooled":
            raise problem("pool_scope", "worker needs connection_mode 'pooled'", key=("pool_scope",))
        for name in ("overrides", "prefix", "resources", "prompts") if self.as_one_tool else ():
            if getattr(self, name):
                text = "has no effect on the one tool of as_one_tool"
                raise problem("as_one_tool", text, key=(name,))
        names = [own.name for own in self.overrides.values() if own.name is not None]
        if twice := [name for name, own in self.overrides.items() if names.count(own.name or "") > 1]:
            raise problem("override", "another tool has the same name", key=("overrides", twice[-1], "name"))
        if self.tools:
            unknown = [name for name in self.overrides if name not in self.tools]
            if unknown:
                raise problem("override", "the tool is not in 'tools'", key=("overrides", unknown[0]))
        return self


# --- what this machine must have -------------------------------------------------------------------------


def check_installed() -> None:
    """Raises `PluginLoadError` if the SDK is not installed."""
    if not _is_installed():
        raise PluginLoadError(
            "the tool 'mcp' needs the package mcp, which is not installed",
            hint="pip install 'openagents-worker[mcp]'",
        )


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return importlib.util.find_spec("mcp") is not None


def find_command(server: ServerOptions, env: Mapping[str, str]) -> str | None:
    """The path of a server's program; None for a server with a `url`. Raises `PluginConfigError`.

    It is searched in the PATH of the server and, without one, in that of the worker.
    """
    if server.command is None:
        return None
    path = env.get("PATH") or os.environ.get("PATH") or os.defpath
    if (found := _found(server.command, path)) is not None:
        return found
    text = f"there is no program {server.command!r} on this machine"
    raise config_error("server", "command", text=text, hint="install it, or give its path")


@lru_cache(maxsize=256)
def _found(command: str, path: str) -> str | None:
    return shutil.which(command, path=path)


def config_error(*path: str, text: str, hint: str | None = None) -> PluginConfigError:
    """A problem with an option, located in the agents file."""
    problems: Sequence[Any] = [ConfigProblem(path, text, hint)]
    return PluginConfigError(f"mcp: {'.'.join(path)}: {text}", hint=hint, problems=problems)
