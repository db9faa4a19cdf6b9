"""Assembly. The one module that knows the concrete classes: it makes an agent's parts from its definition."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from openagents_worker.agents import AgentDefinition, AppConfig, PluginRef, load_agents
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.errors import PluginLoadError
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.providers import make_client
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.models import dumps
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.settings import Settings
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from openagents_worker.tools.validation import did_you_mean

__all__ = ["AgentParts", "Assembly"]

_REQUIRED = {
    "pattern": ("execute",),
    "tool": ("invoke",),
    "memory": ("inject", "writeback"),
    "context_assembler": ("assemble",),
}


class AgentParts:
    """An agent's parts. Patterns and classes of one's own are made for every attempt; what we ship keeps no run's
    state and is shared, like the model's client and its connections."""

    def __init__(self, assembly: Assembly, definition: AgentDefinition) -> None:
        self._assembly = assembly
        self.definition = definition
        self._own: list[Any] = []
        self.memory = self._make("memory", definition.memory, BUILTIN_MEMORIES)
        ref = definition.context_assembler or assembly.config.runtime.config.context_assembler
        self.assembler = (
            self._make("context_assembler", ref, BUILTIN_ASSEMBLERS)
            if ref
            else BUILTIN_ASSEMBLERS["default"]()
        )
        self._tools = {
            ref.id: assembly.shared_tool(definition.id, ref.id, ref) or self._make("tool", ref, BUILTIN_TOOLS)
            for ref in definition.tools
            if ref.enabled
        }

    def new_pattern(self) -> Any:
        """A pattern for one attempt; the agent's runtime limits stand under its own config."""
        ref = self.definition.pattern
        limits = {
            "max_steps": self.definition.runtime.max_steps,
            "step_timeout_ms": self.definition.runtime.step_timeout_ms,
        }
        return self._make(
            "pattern", ref.model_copy(update={"config": {**limits, **ref.config}}), BUILTIN_PATTERNS
        )

    def tools(self) -> dict[str, Any]:
        return self._tools

    def model(self) -> LLMClient:
        return self._assembly.model(self.definition)

    def _make(self, kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
        made = make_plugin(kind, ref, known)
        if ref.impl:
            self._own.append(made)
        return made

    async def aclose(self) -> None:
        """Close what was made for this attempt alone."""
        for plugin in self._own:
            close = getattr(plugin, "close", None)
            if close is not None:
                await close()


class Assembly:
    """All agents of a process, with what their runs share."""

    def __init__(self, config: AppConfig, *, env: Mapping[str, str]) -> None:
        self.config = config
        self._env = env
        self._models: dict[str, LLMClient] = {}
        self._tools: dict[tuple[str, str], Any] = {}

    @classmethod
    def from_settings(cls, settings: Settings, env: Mapping[str, str] | None = None) -> Assembly:
        """Load the agents file and make every part once: what cannot work is known before the first run."""
        env = os.environ if env is None else env
        for module in settings.imports:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise PluginLoadError(
                    f"OPENAGENTS_IMPORTS names {module!r}, which cannot be imported: {error}"
                ) from error
        assembly = cls(load_agents(settings.config, env=env), env=env)
        for agent in assembly.config.agents:
            assembly.parts(agent.id).new_pattern()
        return assembly

    def parts(self, agent_id: str) -> AgentParts:
        """The parts of one attempt of that agent. Raises `AgentNotFoundError` with a suggestion."""
        return AgentParts(self, self.config.agent(agent_id))

    def model(self, definition: AgentDefinition) -> LLMClient:
        client = self._models.get(definition.id)
        if client is None:
            client = self._models[definition.id] = make_client(definition.llm, env=self._env)
        return client

    def shared_tool(self, agent_id: str, tool_id: str, ref: PluginRef) -> Any | None:
        """A tool that we ship, made once per agent; None for a class of one's own."""
        if ref.impl:
            return None
        if (agent_id, tool_id) not in self._tools:
            self._tools[agent_id, tool_id] = make_plugin("tool", ref, BUILTIN_TOOLS)
        return self._tools[agent_id, tool_id]

    def announcements(self) -> list[str]:
        """What a worker tells of its agents at registration: id, JSON, id, JSON …"""
        told: list[str] = []
        for agent in self.config.agents:
            told += [agent.id, dumps({"queue": agent.queue, "def_hash": agent.definition_hash})]
        return told

    async def aclose(self) -> None:
        for client in self._models.values():
            await client.aclose()
        for tool in self._tools.values():
            close = getattr(tool, "close", None)
            if close is not None:
                await close()


def make_plugin(kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
    """An instance of what a reference names. Raises `PluginLoadError` or `PluginConfigError`."""
    made = _class_of(kind, ref, known)(config=dict(ref.config))
    missing = [name for name in _REQUIRED[kind] if not hasattr(made, name)]
    if missing:
        raise PluginLoadError(f"{ref.impl or ref.type} is no {kind}: it has no {' and no '.join(missing)}")
    return made


def _class_of(kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ref.type:
        if ref.type not in known:
            raise PluginLoadError(f"no {kind} is named {ref.type!r}{did_you_mean(ref.type, known)}")
        return known[ref.type]
    module_name, _, name = (ref.impl or "").rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise PluginLoadError(
            f"cannot load {kind} {ref.impl!r}: {error}", hint="package.module.Class, importable by the worker"
        ) from error
    return found
