"""Sections of the agents file other than `agents`: the only place that defines their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from openagents_worker.agents.part import Part, not_supported, problem
from openagents_worker.agents.plugin_refs import PluginRef
from openagents_worker.agents.positions import Path
from openagents_worker.models.budget import RunBudget
from openagents_worker.redaction import DEFAULT_REDACT_KEYS
from openagents_worker.suggest import did_you_mean

__all__ = [
    "DiagnosticsRef",
    "EventsRef",
    "LoggingConfig",
    "McpLimits",
    "MultiAgentConfig",
    "SessionRef",
    "SkillsRef",
]

LONGEST_S = 7 * 24 * 60 * 60
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _checked_level(name: str) -> str:
    if name.upper() not in LOG_LEVELS:
        raise problem("level", f"must be one of {', '.join(LOG_LEVELS)}")
    return name


LevelName = Annotated[str, AfterValidator(_checked_level)]


class LoggingConfig(Part):
    """The format of log lines. `auto_configure` writes them even if the application has its own log."""

    auto_configure: bool = Field(
        default=False, description="Whether log lines are written even if the application has its own log."
    )
    level: LevelName = Field(
        default="INFO", description="The lowest level that is written: DEBUG, INFO, WARNING, ERROR, CRITICAL."
    )
    per_logger_levels: dict[str, LevelName] = Field(
        default_factory=dict, description="Levels of single loggers, by their names."
    )
    pretty: bool = Field(default=False, description="Whether each field is written on a separate line.")
    stream: Literal["stderr", "stdout"] = Field(default="stderr", description="Where log lines go.")
    include_prefixes: list[str] | None = Field(
        default=None, description="Only loggers whose names begin with one of these are written. null: all."
    )
    exclude_prefixes: list[str] = Field(
        default_factory=list, description="Loggers whose names begin with one of these are not written."
    )
    redact_keys: list[str] = Field(
        default_factory=lambda: list(DEFAULT_REDACT_KEYS),
        description="Further parts of field names whose values are secrets; the built-in ones stay.",
    )
    max_value_length: int = Field(
        default=500, ge=1, description="Longest text of a field in a log line, in characters."
    )
    show_time: bool = Field(default=True, description="Whether a text line begins with the time.")
    show_path: bool = Field(
        default=False, description="Whether a text line names file and line of its source."
    )
    loguru_sinks: list[JsonValue] = Field(
        default_factory=list, description="Must be empty: loguru is not supported."
    )

    @model_validator(mode="after")
    def _no_loguru(self) -> LoggingConfig:
        if self.loguru_sinks:
            raise not_supported("loguru", key=("loguru_sinks",))
        return self


class _IgnoredChoice(Part):
    """An option of the original SDK without effect (`options_without_effect`). Known values are accepted."""

    type: str = Field(description="The original SDK's choice. Accepted; here everything is kept in Redis.")
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="The original SDK's options. Accepted; has no effect."
    )
    impl: str | None = Field(default=None, description="The original SDK's class. Accepted, and not loaded.")

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known_types: tuple[str, ...] = cls.known_types()
        name = data.get("type", known_types[0])
        if name not in known_types:
            raise problem("selector", did_you_mean(str(name), known_types), key=("type",))
        return {**data, "type": name}

    @property
    def named(self) -> str:
        """What the file names, for a notice."""
        return f"type {self.type!r}" if self.impl is None else f"impl {self.impl!r}"

    @classmethod
    def known_types(cls) -> tuple[str, ...]:
        """The types that the original SDK has. One of them is accepted and then ignored."""
        raise NotImplementedError


class SessionRef(_IgnoredChoice):
    """The original SDK's choice of a session store. Here sessions are always kept in Redis."""

    @classmethod
    def known_types(cls) -> tuple[str, ...]:
        return ("in_memory", "jsonl_file", "sqlite")


class EventsRef(_IgnoredChoice):
    """The original SDK's choice of an event bus. Here events are always kept in Redis."""

    @classmethod
    def known_types(cls) -> tuple[str, ...]:
        return ("async", "file_logging", "otel_bridge", "rich_console")


class SkillsConfig(Part):
    """Where skill packages are, and which of them are offered."""

    search_paths: list[str] = Field(
        default_factory=lambda: ["skills"],
        description="Folders with skill packages; a relative path is below the folder of the worker.",
    )
    enabled: list[str] = Field(
        default_factory=list, description="Names of the skills that are offered. Empty: all."
    )


class SkillsRef(Part):
    """Skills for all agents of the file. Without search_paths and enabled, there are none."""

    type: Literal["local"] = Field(default="local", description="Must be local.")
    config: SkillsConfig = Field(
        default_factory=SkillsConfig, description="Which skills there are: search_paths and enabled."
    )

    @property
    def is_used(self) -> bool:
        """Whether the file names skills. A folder that only happens to be there is not read."""
        return bool(self.config.model_fields_set and self.config.search_paths)


class DiagnosticsRef(PluginRef):
    """The exporter that gets a report of every run that has ended, and what a failed run leaves."""

    type: str | None = Field(
        default="null", description="Name of an exporter: null, rich, langfuse or phoenix. Give type or impl."
    )
    error_snapshot_last_n: int = Field(
        default=10,
        ge=0,
        le=100,
        description="Number of tool calls and of messages in the error snapshot of a failed run.",
    )
    redact_keys: list[str] = Field(
        default_factory=list,
        description="Further parts of field names whose values are secrets; the built-in ones stay.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_a_name(cls, data: Any) -> Any:
        """The type null of JSON is that of the name; with `impl`, there is no type."""
        if not isinstance(data, Mapping) or data.get("type") is not None:
            return data
        return {**data, "type": None if data.get("impl") else "null"}

    @classmethod
    def problems_of_whole(cls, data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
        if data.get("type") and data.get("impl"):
            yield (), "set 'type' (a registered name) or 'impl' (package.module.Class), not both"

    @property
    def name(self) -> str:
        return self.impl or self.type or "null"


class MultiAgentConfig(Part):
    """Delegation between agents: the defaults of `context.delegate` and of the delegation tools."""

    enabled: bool = Field(
        default=False,
        description="Whether context.agent_router exists, for plugins of the original SDK. "
        "context.delegate always does.",
    )
    default_session_isolation: Literal["isolated", "shared", "forked"] = Field(
        default="isolated",
        description="The session of a child run: a new one, that of its parent, or a copy of it.",
    )
    max_delegation_depth: int = Field(
        default=5, ge=1, le=50, description="The largest number of runs above a child run."
    )
    default_child_budget: RunBudget | None = Field(
        default=None, description="The budget of a child run without a budget of its own. null: no limit."
    )


# --- MCP -------------------------------------------------------------------------------------------------


class McpLimits(Part):
    """The connections of a worker to MCP servers (`runtime.config.mcp`)."""

    max_pooled_sessions: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Number of pooled connections of a worker. If all are in use, further calls have a "
        "connection of their own.",
    )
    max_idle_seconds: float = Field(
        default=600.0,
        gt=0,
        le=LONGEST_S,
        description="Seconds after which a pooled connection that nobody uses is closed.",
    )
    preflight_cache_success_ttl: float = Field(
        default=300.0,
        ge=0,
        le=LONGEST_S,
        description="Seconds for which the list of tools of a server is used for further runs. "
        "0: each run asks the server.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
