"""Assembly: the only place that creates the parts of an agent from its definition."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from openagents_worker.agents import (
    AgentDefinition,
    AppConfig,
    ContextAssemblerRef,
    DiagnosticsRef,
    LLMOptions,
    MemoryRef,
    PluginRef,
    ToolExecutorRef,
    ToolRef,
)
from openagents_worker.agents.code import read_agents
from openagents_worker.agents.problems import ConfigProblem, rejected
from openagents_worker.agents.sections import McpLimits
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.budget import TokenBudgetAssembler
from openagents_worker.context.tokens import ESTIMATE
from openagents_worker.diagnostics import BUILTIN_DIAGNOSTICS
from openagents_worker.diagnostics.base import ReportExporter, exporter_of
from openagents_worker.errors import AgentUnavailable
from openagents_worker.jsontext import dumps
from openagents_worker.llm.api_keys import EnvironmentKey
from openagents_worker.llm.base import LLMClient, ModelClient
from openagents_worker.llm.current_call import quiet_http_clients
from openagents_worker.llm.providers import make_client
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.memory.chain import ChainMember, ChainMemory
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.runtime.kept_definitions import DefinitionKeeper, KeptAgent
from openagents_worker.runtime.original.functions import ParamsTool
from openagents_worker.runtime.original.tools import single_tool
from openagents_worker.runtime.plugins import load_plugins, make_plugin, may_have_jobs, with_limits
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.runtime.token_counters import counter_of
from openagents_worker.settings import Settings
from openagents_worker.tools.builtin import BUILTIN_TOOLSETS, TOOL_TYPES
from openagents_worker.tools.checks import SchemaChecks
from openagents_worker.tools.function import FunctionTool
from openagents_worker.tools.keyed import KeyedTool
from openagents_worker.tools.offload import Offload
from openagents_worker.tools.skills import SkillTools
from openagents_worker.tools.toolset import OpenedAtUse, SingleTool, Toolset, is_toolset

if TYPE_CHECKING:
    from openagents_worker.tools.mcp.connections import McpServers

__all__ = ["AgentParts", "Assembly", "UnavailableAgent"]

DEFAULT_ASSEMBLER = ContextAssemblerRef(type="default")


class AgentParts:
    """The parts of an agent for one attempt.

    Patterns and custom plugins (`impl`) are created for each attempt. Built-in memories, tools, assemblers
    and model clients keep no state of a run and are shared; if all parts are built in, this object is, too.
    """

    def __init__(
        self, assembly: Assembly, definition: AgentDefinition, kept: KeptAgent | None = None
    ) -> None:
        """`kept` is set if the definition is not that of this process. Then nothing is shared with it."""
        self._assembly = assembly
        self.definition = definition
        self.definition_hash = kept.definition_hash if kept else assembly.hashes[definition.id]
        self._owner = kept.owner if kept else definition.id
        self._counter = kept.counter if kept else assembly.counters.get(definition.id)
        self.own: list[Any] = []
        """The plugins that were created for this attempt: `aclose` closes them."""
        self.memory = self._memory("memory", definition.memory)
        ref = definition.context_assembler or DEFAULT_ASSEMBLER
        self.assembler = self._part("context_assembler", "context_assembler", ref, BUILTIN_ASSEMBLERS)
        self.toolsets: dict[str, Toolset] = {
            ref.id: _toolset(self._part(f"tool {ref.id}", "tool", ref, TOOL_TYPES))
            for ref in definition.tools
            if ref.enabled
        }
        """By the ids of the agents file. A single tool is a toolset of one."""

    @property
    def are_built_in(self) -> bool:
        """Whether nothing has to be created for an attempt, besides a copy of the pattern."""
        refs = [self.definition.tool_executor, *(ref.tool_executor for ref in self.definition.tools)]
        return (
            not self.own
            and self.definition.pattern.type in BUILTIN_PATTERNS
            and all(ref is None or ref.custom is None for ref in refs)
        )

    def executor(self, ref: ToolExecutorRef | None) -> Any:
        """The executor of the deployment that a reference names, for this attempt; None for any other."""
        custom = None if ref is None else ref.custom
        return None if custom is None else self._make("tool_executor", custom, {})

    def new_pattern(self) -> Any:
        """A new pattern. The limits of the agent are defaults for the config of the pattern.

        A built-in pattern has only its config before it is executed, so a copy of it is a new one.
        """
        definition = self.definition
        ref = self._assembly.shared(
            self._owner, "pattern", lambda: with_limits(definition.pattern, definition.runtime)
        )
        pattern = self._part("new pattern", "pattern", ref, BUILTIN_PATTERNS)
        return copy.copy(pattern) if ref.type in BUILTIN_PATTERNS else pattern

    @property
    def checks(self) -> SchemaChecks:
        return self._assembly.checks

    @property
    def offload(self) -> Offload:
        return self._assembly.offload

    def single_tools(self) -> dict[str, Any]:
        """The tools that the agents file names one by one, without those of toolsets."""
        return {id_: each.tool for id_, each in self.toolsets.items() if isinstance(each, SingleTool)}

    def model(self) -> LLMClient:
        if self._owner == self.definition.id:
            return self._assembly.model(self.definition)
        return self._assembly.client_of(self._owner, self.definition.llm)

    def _memory(self, slot: str, ref: MemoryRef) -> Any:
        """A memory, and the members of a chain: built-in ones are shared, custom ones are created."""
        memory = self._part(slot, "memory", ref, BUILTIN_MEMORIES)
        if not isinstance(memory, ChainMemory):
            return memory
        chain = copy.copy(memory)  # of this attempt: it may have custom members
        chain.members = [
            ChainMember(self._memory(f"{slot} {at}", member), _fails_run(member, ref))
            for at, member in enumerate(memory.cfg.memories)
        ]
        return chain

    def _part(self, slot: str, kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
        """A part of this agent. A built-in part is shared; a custom one, and a toolset, which knows the tools
        of its run, is created for this attempt."""
        if ref.type not in known or ref.type in BUILTIN_TOOLSETS:
            return self._make(kind, ref, known)
        return self._assembly.shared(self._owner, slot, lambda: self._make_with_offload(kind, ref, known))

    def _make_with_offload(self, kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
        """Create a plugin. A synchronous function tool gets a thread or process pool to execute in. A tool
        with an API key gets the function that is registered for keys."""
        plugin = make_plugin(kind, ref, known)
        if isinstance(plugin, FunctionTool):
            offload = self._assembly.offload
            plugin.run_sync = offload.in_process if plugin.execution_spec().cpu_bound else offload.in_thread
        elif isinstance(plugin, ParamsTool | SkillTools):
            plugin.run_sync = self._assembly.offload.in_thread
        if isinstance(plugin, TokenBudgetAssembler):
            plugin.counter = self._counter or ESTIMATE
        if isinstance(plugin, KeyedTool):
            plugin.resolve_key = EnvironmentKey(plugin.cfg.api_key_env, value=None).key
        if isinstance(ref, ToolRef) and hasattr(plugin, "attach"):  # the toolset of an MCP server
            plugin.attach(ref.id, self._assembly.mcp_servers, EnvironmentKey("", value=None).key)
        return OpenedAtUse(plugin) if kind == "tool" and is_toolset(plugin) else plugin

    def _make(self, kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
        plugin = self._make_with_offload(kind, ref, known)
        if ref.type not in known or ref.type in BUILTIN_TOOLSETS:
            self.own.append(plugin)
        return plugin

    async def aclose(self) -> None:
        """Close all plugins that were created for this attempt. Raises their errors at the end."""
        errors: list[Exception] = []
        for plugin in self.own:
            if hasattr(plugin, "close"):
                try:
                    await plugin.close()
                except Exception as error:  # noqa: BLE001 - the others must be closed as well
                    errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else ExceptionGroup("several plugins", errors)


def _fails_run(member: MemoryRef, chain: MemoryRef) -> bool:
    """Whether the run fails with a member of a chain: as the member says, else as the chain says."""
    return (member if "on_error" in member.model_fields_set else chain).on_error == "fail"


def _is_in_background(options: LLMOptions) -> bool:
    fields = [options.model_extra or {}, *options.fallbacks]
    return any(each.get("background") for each in fields)


async def _close(part: Any) -> None:
    close = getattr(part, "close", None)
    if close is not None and inspect.isawaitable(closing := close()):
        await closing


def _toolset(plugin: Any) -> Toolset:
    return plugin if isinstance(plugin, OpenedAtUse) else single_tool(plugin)


@dataclass(frozen=True, slots=True)
class UnavailableAgent:
    """An agent that this process cannot serve, and why. Its runs are left to other workers."""

    agent_id: str
    problems: tuple[ConfigProblem, ...]

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def reason(self) -> str:
        return "; ".join(problem.text for problem in self.problems)

    @property
    def hint(self) -> str | None:
        return "; ".join(dict.fromkeys(problem.hint for problem in self.problems if problem.hint)) or None

    def error(self) -> AgentUnavailable:
        message = f"this worker cannot serve the agent {self.agent_id!r}: {self.reason}"
        return AgentUnavailable(message, hint=self.hint, agent_id=self.agent_id)


class Assembly:
    """All agents of a process, and the objects that their runs share."""

    def __init__(
        self,
        config: AppConfig,
        *,
        env: Mapping[str, str],
        offload: Offload | None = None,
        checks: SchemaChecks | None = None,
        unavailable: Iterable[UnavailableAgent] = (),
        keeper: DefinitionKeeper | None = None,
    ) -> None:
        self.config = config
        self.keeper = keeper or DefinitionKeeper()
        self.redact_keys = config.redact_keys
        self.snapshot_last_n = (config.diagnostics or DiagnosticsRef()).error_snapshot_last_n
        self.offload = offload or Offload()
        self.checks = checks or SchemaChecks()
        self.unavailable = {agent.agent_id: agent for agent in unavailable}
        """Agents of the file that this process cannot serve. They are not in `config`."""
        self._env = env
        self._models: dict[str, LLMClient] = {}
        self._shared: dict[tuple[str, str], Any] = {}
        self._definitions = {agent.id: config.agent(agent.id) for agent in config.agents}
        self.counters = {
            agent.id: counter for agent in self._definitions.values() if (counter := counter_of(agent))
        }
        """The token counters of agents whose context assembler has a token budget."""
        quiet_http_clients()
        self.hashes = {agent.id: agent.definition_hash for agent in self._definitions.values()}

    @classmethod
    def from_settings(cls, settings: Settings, env: Mapping[str, str] | None = None) -> Assembly:
        """Import the plugins, read the agents, and create every part once to find problems at start.

        The agents are those of the agents file and those that the plugins have registered.

        Agents with problems become `unavailable`. Raises `PluginLoadError` or `ConfigLoadError`, and
        `ConfigValidationError` if a section for all agents is invalid or no agent can be served.
        """
        env = os.environ if env is None else env
        load_plugins(settings.imports)
        file = read_agents(settings.config, env=env, may_be_absent=settings.is_config_optional)
        problems = find_problems(file, env)
        if file.config is None or any(file.agent_id(problem) is None for problem in problems):
            raise rejected(file.source, problems)
        by_agent: dict[str, list[ConfigProblem]] = {}
        for problem in problems:
            by_agent.setdefault(file.agent_id(problem) or "", []).append(problem)
        servable = [agent for agent in file.config.agents if agent.id not in by_agent]
        if not servable:
            raise rejected(file.source, problems)
        return cls(
            file.config.model_copy(update={"agents": servable}),
            env=env,
            offload=Offload(threads=settings.tool_threads, processes=settings.tool_processes),
            checks=SchemaChecks(cpu_s=settings.check_cpu_s),
            unavailable=[UnavailableAgent(id_, tuple(found)) for id_, found in by_agent.items()],
            keeper=DefinitionKeeper.of(file, settings, env),
        )

    def parts(self, agent_id: str, kept: KeptAgent | None = None) -> AgentParts:
        """The parts of an agent for one attempt, in the definition of this process if `kept` is None.

        Raises `AgentUnavailable` if this process cannot serve it, `AgentNotFoundError` if it is unknown.
        """
        owner = agent_id if kept is None else kept.owner
        shared: AgentParts | None = self._shared.get((owner, "parts"))
        if shared is not None:
            return shared
        if kept is not None:
            parts = AgentParts(self, kept.definition, kept)
        elif agent_id in self.unavailable:
            raise self.unavailable[agent_id].error()
        else:
            parts = AgentParts(self, self._definitions.get(agent_id) or self.config.agent(agent_id))
        if parts.are_built_in:
            self._shared[owner, "parts"] = parts
        return parts

    def definition(self, agent_id: str) -> AgentDefinition | None:
        """The definition of an agent of this process; None if it is unknown or cannot be served."""
        return self._definitions.get(agent_id)

    def model(self, definition: AgentDefinition) -> LLMClient:
        return self.client_of(definition.id, definition.llm)

    def client_of(self, owner: str, options: LLMOptions) -> LLMClient:
        """The model client that all runs with the definition of this owner share."""
        client = self._models.get(owner)
        if client is None:
            client = self._models[owner] = make_client(options, env=self._env)
        return client

    def exporter(self) -> tuple[str, ReportExporter] | None:
        """The name and the exporter of the reports of ended runs; None if they are not exported."""
        ref = self.config.diagnostics or DiagnosticsRef()
        if ref.type == "null":
            return None
        plugin = self.shared("", "diagnostics", lambda: make_plugin("diagnostics", ref, BUILTIN_DIAGNOSTICS))
        return ref.name, exporter_of(plugin)

    def has_background_models(self) -> bool:
        """Whether the call of a model may go on at its provider without a worker (`llm.background`)."""
        return any(_is_in_background(agent.llm) for agent in self._definitions.values())

    def has_jobs(self) -> bool:
        """Whether a tool may start a job that goes on without a worker."""
        return any(
            may_have_jobs(ref) for agent in self._definitions.values() for ref in agent.tools if ref.enabled
        )

    async def cancel_response(
        self, agent_id: str, note: Mapping[str, Any], kept: KeptAgent | None = None, *, tenant: str | None
    ) -> bool:
        """Cancel what goes on at the provider of an agent's model; see `ModelClient.cancel_noted`.

        `kept`, and what is raised: as for `parts`.
        """
        client = self._model_of(agent_id, kept)
        return isinstance(client, ModelClient) and await client.cancel_noted(note, tenant=tenant)

    def _model_of(self, agent_id: str, kept: KeptAgent | None) -> LLMClient:
        if kept is not None:
            return self.client_of(kept.owner, kept.definition.llm)
        if agent_id in self.unavailable:
            raise self.unavailable[agent_id].error()
        return self.model(self._definitions.get(agent_id) or self.config.agent(agent_id))

    def shared(self, agent_id: str, slot: str, make: Callable[[], Any]) -> Any:
        """A part that all runs of an agent share, created by `make` on first use."""
        if (agent_id, slot) not in self._shared:
            self._shared[agent_id, slot] = make()
        return self._shared[agent_id, slot]

    def announcements(self) -> list[str]:
        """The agents that a worker announces at registration, as a flat list: id, JSON, id, JSON …"""
        announced: list[str] = []
        for agent in self._definitions.values():
            announced += [agent.id, dumps({"queue": agent.queue, "def_hash": self.hashes[agent.id]})]
        return announced

    @cached_property
    def mcp_servers(self) -> McpServers:
        """The connections of all runs to MCP servers."""
        from openagents_worker.tools.mcp.connections import McpServers  # imported late: few agents have one

        return McpServers(self.config.runtime.config.mcp or McpLimits())

    async def forget(self, owner: str) -> None:
        """Close the model client and the shared parts that were made for the definition of this owner."""
        if (client := self._models.pop(owner, None)) is not None:
            await client.aclose()
        for name in [name for name in self._shared if name[0] == owner]:
            await _close(self._shared.pop(name))

    async def aclose(self) -> None:
        for client in self._models.values():
            await client.aclose()
        if "mcp_servers" in self.__dict__:
            await self.mcp_servers.close()
        for part in self._shared.values():
            await _close(part)
        self.offload.close()
        await self.checks.aclose()
