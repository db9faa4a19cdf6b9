"""The agents file: reading, checking and the models of its sections."""

from openagents_worker.agents.llm import LLMLimits, LLMOptions, LLMPricing, LLMRetryOptions
from openagents_worker.agents.loading import AgentsFile, load_agents, read_agents_file
from openagents_worker.agents.plugin_refs import (
    ContextAssemblerRef,
    MemoryRef,
    PatternRef,
    PluginRef,
    ToolExecutorRef,
    ToolRef,
)
from openagents_worker.agents.schema import (
    AgentDefinition,
    AppConfig,
    RuntimeConfig,
    RuntimeOptions,
    RuntimeRef,
    options_without_effect,
)
from openagents_worker.agents.sections import (
    DiagnosticsRef,
    EventsRef,
    LoggingConfig,
    MultiAgentConfig,
    SessionRef,
    SkillsRef,
)

__all__ = [
    "AgentDefinition",
    "AgentsFile",
    "AppConfig",
    "ContextAssemblerRef",
    "DiagnosticsRef",
    "EventsRef",
    "LLMLimits",
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
    "options_without_effect",
    "read_agents_file",
]
