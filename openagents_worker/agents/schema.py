"""The agents file: the only place that defines its format.

The format is that of the original SDK. Each option is used, rejected, or accepted without effect.
`options_without_effect` lists the options that have no effect or another meaning here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from openagents_worker.agents.llm import LLMOptions
from openagents_worker.agents.part import LONGEST_MS, Part, problem
from openagents_worker.agents.plugin_refs import (
    ContextAssemblerRef,
    MemoryRef,
    PatternRef,
    ToolExecutorRef,
    ToolRef,
)
from openagents_worker.agents.positions import Path
from openagents_worker.agents.sections import (
    DiagnosticsRef,
    EventsRef,
    LoggingConfig,
    McpLimits,
    MultiAgentConfig,
    SessionRef,
    SkillsRef,
)
from openagents_worker.errors import AgentNotFoundError
from openagents_worker.jsontext import canonical_json
from openagents_worker.models import RunBudget
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact
from openagents_worker.secret_forms import mask_secrets
from openagents_worker.suggest import agent_hint

__all__ = [
    "AgentDefinition",
    "AppConfig",
    "RuntimeConfig",
    "RuntimeOptions",
    "RuntimeRef",
    "duplicate_ids",
    "options_without_effect",
]

# --- agents ----------------------------------------------------------------------------------------------


class RuntimeOptions(Part):
    """Limits of every run of an agent. The config of the pattern overrides them."""

    max_steps: int = Field(
        default=16, ge=1, description="Number of steps (model turns) after which a run ends as max_steps."
    )
    step_timeout_ms: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_MS,
        description="Timeout of one step (a model call and its tool calls) in milliseconds. "
        "After that, the step is retried. null: no limit.",
    )
    session_queue_size: int = Field(
        default=1_000, ge=1, description="Number of runs. Accepted; has no effect: queues are in Redis."
    )
    event_queue_size: int = Field(
        default=2_000, ge=1, description="Number of events. Accepted; has no effect: queues are in Redis."
    )


_Identifier = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")]


def _queue_name(name: str) -> str:
    if text := problem_with_queue(name):
        raise problem("queue", text)
    return name


class AgentDefinition(Part):
    """One agent: how it thinks, with which model and tools, and what it remembers."""

    id: _Identifier = Field(
        description="The name that requests use: 1 to 256 characters without whitespace; unique in the file."
    )
    name: str = Field(description="A name for people.")
    memory: MemoryRef = Field(description="What the agent remembers of earlier runs of a session.")
    pattern: PatternRef = Field(
        description="The loop between model and tools. Its config contains the system prompt."
    )
    llm: LLMOptions = Field(description="The model that answers.")
    tool_executor: ToolExecutorRef | None = Field(
        default=None, description="How the tools are executed. null: as in runtime.config, or default."
    )
    context_assembler: ContextAssemblerRef | None = Field(
        default=None,
        description="Which part of the transcript a run sees. null: as in runtime.config, or all.",
    )
    tools: list[ToolRef] = Field(
        default_factory=list, description="The tools that the model may call; their ids are unique."
    )
    runtime: RuntimeOptions = Field(
        default_factory=RuntimeOptions, description="Limits for every run of this agent."
    )
    queue: Annotated[_Identifier, AfterValidator(_queue_name)] | None = Field(
        default=None, description="The Celery queue of its runs. null: OPENAGENTS_QUEUE."
    )
    limits: RunBudget | None = Field(
        default=None,
        description="Upper limits for the budget of a request. null: no limit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_a_model(cls, data: Any) -> Any:
        """Use the mock model for a custom pattern without an `llm` section."""
        if not isinstance(data, Mapping) or data.get("llm") is not None:
            return data
        for key, text in cls.problems_of_whole(data):
            raise problem("no_model", text, key=key)
        return {**data, "llm": {}}

    @classmethod
    def problems_of_whole(cls, data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
        """A missing `llm` section. It may be left out only with a custom pattern; null is never valid."""
        pattern = data.get("pattern")
        may_be_absent = "llm" not in data and isinstance(pattern, Mapping) and pattern.get("impl")
        if data.get("llm") is None and not may_be_absent:
            yield ("llm",), 'an agent needs a model, for example {"provider": "mock"}'

    @model_validator(mode="after")
    def _tool_ids_are_unique(self) -> AgentDefinition:
        _reject_duplicate_ids([tool.id for tool in self.tools], "tools")
        return self

    @property
    def definition_hash(self) -> str:
        """The SHA-256 of the agent's definition as canonical JSON. It does not depend on secrets in it.

        Options that the file leaves out are not hashed, so a changed default does not change the hash.
        """
        public = redact(
            self.model_dump(mode="json", exclude_unset=True),
            max_chars=None,
            max_items=None,
            max_depth=64,
            mask=_mask_by_form,
        )
        text = canonical_json(public)
        return hashlib.sha256(text.encode()).hexdigest()


def _mask_by_form(text: str) -> str:
    return mask_secrets(text, known=False)  # the hash must not depend on the secrets that this process knows


def duplicate_ids(ids: Sequence[Any], field: str) -> Iterator[tuple[Path, str]]:
    """For each id that already occurs earlier in the list: its path and an error text."""
    first: dict[str, int] = {}
    for index, id_ in enumerate(ids):
        if isinstance(id_, str) and first.setdefault(id_, index) != index:
            yield (field, index, "id"), f"{field}[{first[id_]}] already has the id {id_!r}"


def _reject_duplicate_ids(ids: Sequence[str], field: str) -> None:
    for path, text in duplicate_ids(ids, field):
        raise problem("double_id", text, key=path)


SKILLS_ID = "skills"
"""The id of the toolset that an agent gets from the section `skills`, unless it has a tool with this id."""
SKILLS_IMPL = "openagents_worker.tools.skills.SkillTools"


# --- the file --------------------------------------------------------------------------------------------


class RuntimeConfig(Part):
    """Defaults for agents that do not have these options."""

    tool_executor: ToolExecutorRef | None = Field(
        default=None, description="How tools are executed, for agents without this option. null: default."
    )
    context_assembler: ContextAssemblerRef | None = Field(
        default=None,
        description="Which part of the transcript a run sees, for agents without this option. null: all.",
    )
    mcp: McpLimits | None = Field(
        default=None, description="Limits for connections to MCP servers. null: the defaults."
    )


class RuntimeRef(Part):
    """The `runtime` section: defaults for all agents."""

    type: Literal["default"] = Field(default="default", description="Must be default.")
    config: RuntimeConfig = Field(
        default_factory=RuntimeConfig, description="Defaults for agents without these options."
    )


class AppConfig(Part):
    """A complete, valid agents file."""

    version: str = Field(
        default="1.0", description="The version of the format. Every version is read as 1.0."
    )
    agents: list[AgentDefinition] = Field(
        min_length=1, description="The agents, at least one; their ids are unique."
    )
    runtime: RuntimeRef = Field(default_factory=RuntimeRef, description="Defaults for all agents.")
    session: SessionRef | None = Field(
        default=None, description="Accepted for the original SDK: sessions are kept in Redis."
    )
    events: EventsRef | None = Field(
        default=None, description="Accepted for the original SDK: events are kept in Redis."
    )
    skills: SkillsRef = Field(
        default_factory=SkillsRef, description="Skills that every agent can load. Default: none."
    )
    logging: LoggingConfig | None = Field(
        default=None, description="How log lines look. null: as the OPENAGENTS_LOG_ settings say."
    )
    diagnostics: DiagnosticsRef | None = Field(
        default=None, description="Where reports of ended runs go, and further keys to redact. null: nowhere."
    )
    multi_agent: MultiAgentConfig | None = Field(
        default=None, description="Delegation between agents. null: the defaults."
    )

    @model_validator(mode="after")
    def _agent_ids_are_unique(self) -> AppConfig:
        _reject_duplicate_ids([agent.id for agent in self.agents], "agents")
        return self

    @property
    def redact_keys(self) -> tuple[str, ...]:
        """Parts of field names whose values are redacted: the built-in ones and those that the file adds."""
        added = [*(self.logging.redact_keys if self.logging else ())]
        added += self.diagnostics.redact_keys if self.diagnostics else ()
        return tuple(dict.fromkeys((*DEFAULT_REDACT_KEYS, *added))) if added else DEFAULT_REDACT_KEYS

    def agent(self, agent_id: str) -> AgentDefinition:
        """The agent with this id, with the defaults of `runtime.config`. Raises `AgentNotFoundError`."""
        for agent in self.agents:
            if agent.id == agent_id:
                return self._with_defaults(agent)
        known = [agent.id for agent in self.agents]
        hint = agent_hint(agent_id, known)
        raise AgentNotFoundError(f"there is no agent {agent_id!r}", hint=hint, agent_id=agent_id)

    def _with_defaults(self, agent: AgentDefinition) -> AgentDefinition:
        defaults: dict[str, Any] = {
            name: getattr(self.runtime.config, name)
            for name in ("tool_executor", "context_assembler")
            if getattr(agent, name) is None and getattr(self.runtime.config, name) is not None
        }
        if self.skills.is_used and all(tool.id != SKILLS_ID for tool in agent.tools):
            config = self.skills.config.model_dump()
            defaults["tools"] = [*agent.tools, ToolRef(id=SKILLS_ID, impl=SKILLS_IMPL, config=config)]
        return agent.model_copy(update=defaults) if defaults else agent


def options_without_effect(config: AppConfig) -> list[str]:
    """One line for each option that has no effect or another meaning than in the original SDK."""
    lines = []
    if config.version != "1.0":
        lines.append(f"version {config.version!r} is read as '1.0'")
    if config.session is not None:
        lines.append(f"session.{config.session.named}: sessions are kept in Redis")
    if config.events is not None:
        lines.append(f"events.{config.events.named}: events are kept in Redis; handle.events() reads them")
    for agent in config.agents:
        lines += [
            f"agent {agent.id!r}: runtime.{name} has no effect: queues are in Redis and bounded by its memory"
            for name in ("session_queue_size", "event_queue_size")
            if name in agent.runtime.model_fields_set
        ]
    return lines
