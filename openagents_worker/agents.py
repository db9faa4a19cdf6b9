"""The agents file. The only place that reads one and says what may stand in it.

The format is the original SDK's: JSON with `${VAR}` and `${VAR:-default}` in its texts. Whatever is written
there is used, or rejected, or, where this system has its own answer, named in `notices()`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from openagents_worker.errors import AgentNotFoundError, ConfigLoadError, ConfigValidationError
from openagents_worker.models import RunBudget
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact

__all__ = [
    "AgentDefinition",
    "AppConfig",
    "ContextAssemblerRef",
    "DiagnosticsRef",
    "EventsRef",
    "LLMOptions",
    "LLMPricing",
    "LLMRetryOptions",
    "LoggingConfig",
    "MemoryRef",
    "MultiAgentConfig",
    "PatternRef",
    "PluginRef",
    "RuntimeConfig",
    "RuntimeOptions",
    "RuntimeRef",
    "SessionRef",
    "SkillsRef",
    "ToolExecutorRef",
    "ToolRef",
    "load_agents",
    "notices",
]

TOOL_ID = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")  # what the model providers accept as a function's name
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_MAX_PROBLEMS = 8  # a wrong file is often wrong everywhere for one reason; more lines do not help


def _problem(kind: str, text: str, *, key: str | None = None) -> PydanticCustomError:
    """A validation error whose text may contain anything; `key` is appended to its path."""
    return PydanticCustomError(kind, "{text}", {"text": text, "key": key})


def _not_supported(what: str, *, key: str | None = None) -> PydanticCustomError:
    return _problem("not_supported", f"{what} is not supported by this version", key=key)


def _did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


class _Part(BaseModel):
    """What all parts of the file share: frozen, finite numbers, unknown keys rejected with a suggestion."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or cls.model_config.get("extra") == "allow":
            return data
        for name in data:
            if name not in cls.model_fields:
                known = f"known keys: {', '.join(cls.model_fields)}"
                raise _problem(
                    "unknown_key",
                    f"unknown key; {_did_you_mean(str(name), cls.model_fields, known)}",
                    key=str(name),
                )
        return data


# --- models ----------------------------------------------------------------------------------------------


class LLMPricing(_Part):
    """Prices in USD per million tokens; None: not known, or as the provider's own table says."""

    input: float | None = Field(default=None, ge=0)
    output: float | None = Field(default=None, ge=0)
    cached_read: float | None = Field(default=None, ge=0)
    cached_write: float | None = Field(default=None, ge=0)


class LLMRetryOptions(_Part):
    """How often and how patiently a provider repeats one HTTP request before the error reaches the run."""

    max_attempts: int = Field(default=3, ge=1)
    initial_backoff_ms: int = Field(default=500, ge=0)
    max_backoff_ms: int = Field(default=5_000, ge=0)
    backoff_multiplier: float = Field(default=2.0, ge=1)
    retry_on_connection_errors: bool = True
    total_budget_ms: int | None = Field(default=None, ge=1)


class LLMOptions(_Part):
    """An agent's model. Further keys are the provider's own (`seed`, `top_p` …); it checks them."""

    model_config = ConfigDict(extra="allow")

    provider: str = Field(default="mock", min_length=1)
    model: str | None = None
    api_base: str | None = None
    api_key_env: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    timeout_ms: int = Field(default=30_000, ge=1)
    stream_endpoint: str | None = None
    pricing: LLMPricing | None = None
    retry: LLMRetryOptions = Field(default_factory=LLMRetryOptions)
    extra_headers: dict[str, str] = Field(default_factory=dict)
    reasoning_model: bool | None = None
    openai_api_style: Literal["chat_completions", "responses"] | None = None
    script: list[dict[str, Any]] | None = None
    latency_ms: int = Field(default=0, ge=0)


# --- plugins ---------------------------------------------------------------------------------------------


class PluginRef(_Part):
    """A plugin: the name of a registered one (`type`) or a class (`impl`: `package.module.Class`)."""

    type: str | None = None
    impl: str | None = None
    config: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _type_or_impl(self) -> PluginRef:
        given = [name for name in ("type", "impl") if getattr(self, name)]
        if len(given) != 1:
            raise _problem(
                "type_or_impl",
                "give exactly one of 'type' (a registered name) and 'impl' (package.module.Class); "
                f"{'both are' if given else 'none is'} given",
            )
        if self.impl is not None and not re.fullmatch(r"\w+(\.\w+)+", self.impl):
            raise _problem("impl", "not of the form package.module.Class", key="impl")
        return self


class MemoryRef(PluginRef):
    on_error: Literal["continue", "fail"] = "continue"


class PatternRef(PluginRef):
    pass


class ContextAssemblerRef(PluginRef):
    pass


class ToolExecutorRef(PluginRef):
    """How tools are executed; `default` and `safe` both mean this system's own executor."""

    @model_validator(mode="after")
    def _is_ours(self) -> ToolExecutorRef:
        if self.type not in ("default", "safe"):
            found = f"type {self.type!r}" if self.type else "a class of one's own"
            raise _not_supported(f"a tool_executor other than 'default' and 'safe' ({found})")
        if self.config:
            raise _not_supported("a configuration of the tool_executor", key="config")
        return self


class ToolRef(PluginRef):
    """A tool of an agent. `id` is the function name that the model sees."""

    id: str
    enabled: bool = True
    timeout_ms: int | None = Field(default=None, ge=1)
    """How long one call may take; it goes before what the tool itself says."""

    @model_validator(mode="after")
    def _id_is_a_function_name(self) -> ToolRef:
        if not TOOL_ID.match(self.id):
            raise _problem(
                "tool_id",
                "a tool's id is the function name the model sees: 1 to 64 of a-z A-Z 0-9 _ -",
                key="id",
            )
        return self


# --- agents ----------------------------------------------------------------------------------------------


class RuntimeOptions(_Part):
    """Limits of every run of an agent; the pattern's own config goes before them."""

    max_steps: int = Field(default=16, ge=1)
    step_timeout_ms: int = Field(default=30_000, ge=1)
    session_queue_size: int = Field(default=1_000, ge=1)
    event_queue_size: int = Field(default=2_000, ge=1)


class AgentDefinition(_Part):
    """One agent: how it thinks, with which model and tools, and what it remembers."""

    id: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")]
    name: str
    memory: MemoryRef
    pattern: PatternRef
    llm: LLMOptions
    tool_executor: ToolExecutorRef | None = None
    context_assembler: ContextAssemblerRef | None = None
    tools: list[ToolRef] = Field(default_factory=list)
    runtime: RuntimeOptions = Field(default_factory=RuntimeOptions)
    queue: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")] | None = None
    limits: RunBudget | None = None
    """The most that a run of this agent may use, whatever its request asks for."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_model(cls, data: Any) -> Any:
        """`llm: null` cannot work. Only a pattern of one's own may do without: then it gets the mock."""
        if not isinstance(data, Mapping) or data.get("llm") is not None:
            return data
        pattern = data.get("pattern")
        if "llm" not in data and isinstance(pattern, Mapping) and pattern.get("impl"):
            return {**data, "llm": {}}
        raise _problem("no_model", 'an agent needs a model, for example {"provider": "mock"}', key="llm")

    @model_validator(mode="after")
    def _tool_ids_are_unique(self) -> AgentDefinition:
        _first_double([tool.id for tool in self.tools], "tools")
        return self

    @property
    def definition_hash(self) -> str:
        """sha256 of the definition as canonical JSON; the same when only a secret in it has changed."""
        said = self.model_dump(mode="json", exclude=None if self.limits else {"limits"})
        public = redact(said, max_chars=None, max_items=None, max_depth=64)
        text = json.dumps(public, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _first_double(ids: Sequence[str], field: str) -> None:
    for place, id_ in enumerate(ids):
        if id_ in ids[:place]:
            raise _problem(
                "double_id", f"{id_!r} is the id of {field}[{ids.index(id_)}] too", key=f"{field}[{place}].id"
            )


# --- the file --------------------------------------------------------------------------------------------


class LoggingConfig(_Part):
    """How log lines look. `auto_configure` writes ours also where the application has set up its own log."""

    auto_configure: bool = False
    level: str = "INFO"
    per_logger_levels: dict[str, str] = Field(default_factory=dict)
    pretty: bool = False
    stream: Literal["stderr", "stdout"] = "stderr"
    include_prefixes: list[str] | None = None
    exclude_prefixes: list[str] = Field(default_factory=list)
    redact_keys: list[str] = Field(default_factory=lambda: list(DEFAULT_REDACT_KEYS))
    max_value_length: int = Field(default=500, ge=1)
    show_time: bool = True
    show_path: bool = False
    loguru_sinks: list[JsonValue] = Field(default_factory=list)

    @model_validator(mode="after")
    def _levels_exist(self) -> LoggingConfig:
        named = {"level": self.level} | {
            f"per_logger_levels.{k}": v for k, v in self.per_logger_levels.items()
        }
        for key, level in named.items():
            if level.upper() not in LOG_LEVELS:
                raise _problem("level", f"not one of {', '.join(LOG_LEVELS)}", key=key)
        if self.loguru_sinks:
            raise _not_supported("loguru", key="loguru_sinks")
        return self


class _Selector(_Part):
    """A choice of the original that has one answer here: known names are accepted, `notices()` says so."""

    type: str
    config: dict[str, JsonValue] = Field(default_factory=dict)
    impl: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("impl") is not None:
            raise _not_supported("a class of one's own here", key="impl")
        known: tuple[str, ...] = cls.known()
        name = data.get("type", known[0])
        if name not in known:
            raise _problem(
                "selector", _did_you_mean(str(name), known, f"known: {', '.join(known)}"), key="type"
            )
        return {**data, "type": name}

    @classmethod
    def known(cls) -> tuple[str, ...]:
        raise NotImplementedError


class SessionRef(_Selector):
    @classmethod
    def known(cls) -> tuple[str, ...]:
        return ("in_memory", "jsonl_file", "sqlite")


class EventsRef(_Selector):
    @classmethod
    def known(cls) -> tuple[str, ...]:
        return ("async", "file_logging", "otel_bridge", "rich_console")


class RuntimeConfig(_Part):
    """Defaults for agents that do not choose themselves."""

    tool_executor: ToolExecutorRef | None = None
    context_assembler: ContextAssemblerRef | None = None
    mcp: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _no_mcp_yet(self) -> RuntimeConfig:
        if self.mcp:
            raise _not_supported("mcp", key="mcp")
        return self


class RuntimeRef(_Part):
    type: Literal["default"] = "default"
    config: RuntimeConfig = Field(default_factory=RuntimeConfig)


class SkillsRef(_Part):
    type: Literal["local"] = "local"
    config: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _none_yet(self) -> SkillsRef:
        for key, value in self.config.items():
            if key not in ("search_paths", "enabled"):
                raise _problem(
                    "unknown_key", "unknown key; known keys: search_paths, enabled", key=f"config.{key}"
                )
            if value:
                raise _not_supported("skills", key=f"config.{key}")
        return self


class DiagnosticsRef(_Part):
    type: str | None = "null"
    impl: str | None = None
    config: dict[str, JsonValue] = Field(default_factory=dict)
    error_snapshot_last_n: int = Field(default=10, ge=0)
    redact_keys: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _null_only(self) -> DiagnosticsRef:
        if self.impl is not None or self.type not in (None, "null"):
            raise _not_supported("diagnostics other than 'null'")
        if self.config:
            raise _not_supported("a configuration of diagnostics", key="config")
        return self


class MultiAgentConfig(_Part):
    enabled: bool = False
    default_session_isolation: Literal["isolated", "shared", "forked"] = "isolated"
    max_delegation_depth: int = Field(default=5, ge=1)
    default_child_budget: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _not_yet(self) -> MultiAgentConfig:
        if self.enabled:
            raise _not_supported("multi_agent", key="enabled")
        return self


class AppConfig(_Part):
    """A whole agents file, checked."""

    version: str = "1.0"
    agents: list[AgentDefinition] = Field(min_length=1)
    runtime: RuntimeRef = Field(default_factory=RuntimeRef)
    session: SessionRef | None = None
    events: EventsRef | None = None
    skills: SkillsRef = Field(default_factory=SkillsRef)
    logging: LoggingConfig | None = None
    diagnostics: DiagnosticsRef | None = None
    multi_agent: MultiAgentConfig | None = None

    @model_validator(mode="after")
    def _agent_ids_are_unique(self) -> AppConfig:
        _first_double([agent.id for agent in self.agents], "agents")
        return self

    @property
    def redact_keys(self) -> tuple[str, ...]:
        """Parts of key names whose values never leave the worker: ours and those the file adds."""
        added = [*(self.logging.redact_keys if self.logging else ())]
        added += self.diagnostics.redact_keys if self.diagnostics else ()
        return tuple(dict.fromkeys((*DEFAULT_REDACT_KEYS, *added))) if added else DEFAULT_REDACT_KEYS

    def agent(self, agent_id: str) -> AgentDefinition:
        """The agent with this id, the runtime's defaults filled in. Raises `AgentNotFoundError`."""
        for agent in self.agents:
            if agent.id == agent_id:
                return self._with_defaults(agent)
        known = [agent.id for agent in self.agents]
        listed = f"known agents: {', '.join(known)}"
        guess = _did_you_mean(agent_id, known, "")
        raise AgentNotFoundError(
            f"there is no agent {agent_id!r}", hint=f"{guess} {listed}".strip(), agent_id=agent_id
        )

    def _with_defaults(self, agent: AgentDefinition) -> AgentDefinition:
        defaults = {
            name: getattr(self.runtime.config, name)
            for name in ("tool_executor", "context_assembler")
            if getattr(agent, name) is None and getattr(self.runtime.config, name) is not None
        }
        return agent.model_copy(update=defaults) if defaults else agent


def notices(config: AppConfig) -> list[str]:
    """One line for each option that is accepted and means something else here than in the original."""
    lines = []
    if config.version != "1.0":
        lines.append(f"version {config.version!r} is read as '1.0'")
    if config.session is not None:
        lines.append(f"session.type {config.session.type!r}: sessions are kept in Redis")
    if config.events is not None:
        lines.append(f"events.type {config.events.type!r}: events are kept in Redis")
    if config.diagnostics is not None and "error_snapshot_last_n" in config.diagnostics.model_fields_set:
        lines.append("diagnostics.error_snapshot_last_n has no effect: the journal of a run is its snapshot")
    for place, agent in enumerate(config.agents):
        lines += [
            f"agents[{place}].runtime.{name} has no effect: queues are in Redis and bounded by its memory"
            for name in ("session_queue_size", "event_queue_size")
            if name in agent.runtime.model_fields_set
        ]
    return lines


# --- reading ---------------------------------------------------------------------------------------------


def load_agents(path_or_text: Path | str, *, env: Mapping[str, str] | None = None) -> AppConfig:
    """The agents file at a path, or the one whose text is given (a text that begins with `{`).

    `env` (default: this process's) answers `${VAR}`; `${VAR:-default}` stands for the default where the
    variable is unset or empty. Raises `ConfigLoadError` when the file cannot be read or is not JSON, and
    `ConfigValidationError` that names file, place, what was found and what would be right. No error shows a
    variable's value.
    """
    source, text = _read(path_or_text)
    document = _parse(source, text)
    expanded = _expand(source, document, os.environ if env is None else env)
    try:
        return AppConfig.model_validate(expanded)
    except ValidationError as error:
        raise _invalid(source, error, document) from None


def _read(path_or_text: Path | str) -> tuple[str, str]:
    if isinstance(path_or_text, str) and path_or_text.lstrip().startswith("{"):
        return "agents file", path_or_text
    path = Path(path_or_text)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "set OPENAGENTS_CONFIG to the path of your agents file"
        raise ConfigLoadError(f"{path}: there is no such file", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigLoadError(f"{path}: cannot be read: {why}") from error


def _parse(source: str, text: str) -> JsonValue:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        double = next((key for key in keys if keys.count(key) > 1), None)
        if double is not None:
            raise ConfigLoadError(f"{source}: an object has the key {double!r} twice")
        return dict(pairs)

    def not_json(constant: str) -> Any:
        raise ConfigLoadError(f"{source}: {constant} is not JSON")

    try:
        document: JsonValue = json.loads(text, object_pairs_hook=without_doubles, parse_constant=not_json)
    except json.JSONDecodeError as error:
        hint = None
        if text.startswith("${", error.pos):
            hint = 'put a variable in quotes, also for a number: "${NAME}"'
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigLoadError(f"{source}: not JSON at {where}: {error.msg}", hint=hint) from error
    return document


def _expand(source: str, document: JsonValue, env: Mapping[str, str]) -> JsonValue:
    """The document with variables filled in, inside of its texts only: no value can break the JSON."""
    missing: list[str] = []

    def expanded(value: JsonValue, path: tuple[str | int, ...]) -> JsonValue:
        if isinstance(value, dict):
            return {key: expanded(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [expanded(item, (*path, place)) for place, item in enumerate(value)]
        return _VARIABLE.sub(lambda match: answer(match, path), value) if isinstance(value, str) else value

    def answer(match: re.Match[str], path: tuple[str | int, ...]) -> str:
        name, default = match.groups()
        if default is None and name not in env:
            missing.append(f"{_json_path(path)}: the environment variable {name} is not set")
            return ""
        return env.get(name, "") if default is None else env.get(name) or default

    result = expanded(document, ())
    if missing:
        raise _rejected(source, missing, hint="set it, or write ${NAME:-default}")
    return result


def _invalid(source: str, error: ValidationError, document: JsonValue) -> ConfigValidationError:
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        path, text = problem["loc"], str(problem["msg"])
        key = problem.get("ctx", {}).get("key")
        where = ".".join(part for part in (_json_path(path), key) if part) or "the file"
        found = "" if key else _found(document, path)
        lines.append(f"{where}: {text[:1].lower()}{text[1:]}{found}")
    return _rejected(source, lines)


def _rejected(source: str, lines: Sequence[str], hint: str | None = None) -> ConfigValidationError:
    more = [f"… and {len(lines) - _MAX_PROBLEMS} more"] if len(lines) > _MAX_PROBLEMS else []
    return ConfigValidationError("\n  ".join([f"{source}:", *lines[:_MAX_PROBLEMS], *more]), hint=hint)


def _json_path(path: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _found(document: JsonValue, path: Sequence[str | int]) -> str:
    """What stands there, as written, before any variable was filled in: so no secret can show."""
    value: Any = document
    for part in path:
        try:
            value = value[part]
        except (LookupError, TypeError):
            return ""  # it is missing, which the problem's text says
    if isinstance(value, (dict, list)):
        return f"; found {'an object' if isinstance(value, dict) else 'a list'}"
    if not (isinstance(value, str) and _VARIABLE.fullmatch(value)):  # a variable's name is no secret
        value = next(iter(redact({str(next(reversed(path), "")): value}, max_chars=60).values()))
    return f"; found {json.dumps(value, ensure_ascii=False)}"
