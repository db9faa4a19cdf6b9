"""Start checks: the only place that finds problems of an agents file before the first run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from openagents_worker.agents import (
    AgentsFile,
    AppConfig,
    ContextAssemblerRef,
    DiagnosticsRef,
    LLMLimits,
    LLMOptions,
    MemoryRef,
    PatternRef,
    PluginRef,
    RuntimeOptions,
    SkillsRef,
    ToolExecutorRef,
    ToolRef,
    options_without_effect,
)
from openagents_worker.agents.part import Part
from openagents_worker.agents.positions import Path, json_path
from openagents_worker.agents.problems import ConfigProblem, file_order, problems_of_plugin
from openagents_worker.agents.schema import SKILLS_ID, SKILLS_IMPL
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.budget import TokenBudgetAssembler
from openagents_worker.context.tokens import token_counter
from openagents_worker.diagnostics import BUILTIN_DIAGNOSTICS
from openagents_worker.errors import PluginError, PluginLoadError, text_of
from openagents_worker.jsontext import dumps
from openagents_worker.llm.api_keys import is_readable_by_all
from openagents_worker.llm.limits import limit_name
from openagents_worker.llm.providers import make_client
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.memory.chain import ChainMemory
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.runtime.plugins import make_plugin, with_limits
from openagents_worker.tools.builtin import TOOL_TYPES
from openagents_worker.tools.checks import schema_of_tool
from openagents_worker.tools.jobs import check_job_methods
from openagents_worker.tools.specs import check_dependencies, spec_of
from openagents_worker.tools.toolset import is_toolset

__all__ = ["find_problems", "remarks"]

MAX_CHAINS = 5
READ_PREFERENCES = frozenset({"markdown_memory", "zep", "chain"})
"""The memories that store what the tool `remember_preference` notes."""


def remarks(config: AppConfig) -> list[str]:
    """One line for each option that has no effect, and for each file with a key that everybody can read."""
    lines = options_without_effect(config)
    for agent in config.agents:
        lines += [
            f"agent {agent.id!r}: memory_dir has no effect: the memory is kept in the session; "
            "store: directory keeps it in files"
            for ref in _memories_in(agent.memory)
            if ref.type == "markdown_memory" and "memory_dir" in ref.config and "store" not in ref.config
        ]
        for options in (agent.llm.model_dump(include={"api_key_file"}), *agent.llm.fallbacks):
            path = options.get("api_key_file")
            if isinstance(path, str) and is_readable_by_all(path):
                lines.append(
                    f"agent {agent.id!r}: every user of this machine can read {path}, which holds a key of a "
                    "model; chmod 600"
                )
    return list(dict.fromkeys(lines))


def _memories_in(ref: MemoryRef) -> Iterator[MemoryRef]:
    """A memory and the members of a chain."""
    yield ref
    if ref.type == "chain":
        for member in ChainMemory(ref.config).cfg.memories:
            yield from _memories_in(member)


def find_problems(file: AgentsFile, env: Mapping[str, str]) -> list[ConfigProblem]:
    """All problems of an agents file on this machine, in the file and in the plugins that it names."""
    problems = list(file.problems)
    limits: dict[Path, RuntimeOptions] = {}
    tools: defaultdict[Path, dict[str, tuple[Path, Any]]] = defaultdict(dict)
    for path, part in file.parts():
        agent_path = path[:2]
        if isinstance(part, RuntimeOptions):
            limits[agent_path] = part
        if isinstance(part, ToolRef):
            found, tool = _problems_of_tool(part) if part.enabled else ([], None)
            tools[agent_path][part.id] = path, tool
        else:
            found = list(_problems_of_part(part, limits.get(agent_path) or RuntimeOptions(), env))
        problems += [file.located(problem.under(*path)) for problem in found]
    problems += [file.located(problem) for problem in (*_different_limits(file), *_unread_preferences(file))]
    problems += [file.located(problem) for of_agent in tools.values() for problem in _not_there(of_agent)]
    return sorted(problems, key=file_order)


def _not_there(tools: Mapping[str, tuple[Path, Any]]) -> Iterator[ConfigProblem]:
    """Tools that others of the agent call, and that it does not have. A toolset may have them."""
    known = [id_ for id_, (_, tool) in tools.items() if tool is not None]
    if any(is_toolset(tool) for _, tool in tools.values()):
        return
    for id_, (path, tool) in tools.items():
        try:
            check_dependencies(tool, id_, known)
        except PluginError as error:
            yield ConfigProblem(path, error.message, error.hint)


def _different_limits(file: AgentsFile) -> Iterator[ConfigProblem]:
    """Limits of the fleet with the same key and other numbers than those of an earlier agent."""
    first: dict[str, tuple[Path, LLMLimits]] = {}
    for path, part in file.parts():
        if not isinstance(part, LLMOptions) or part.limits is None:
            continue
        own = (*path, "limits")
        key = limit_name(part.limits.key, provider=part.provider, model=part.model or "", tenant="")
        place, earlier = first.setdefault(key, (own, part.limits))
        if part.limits.numbers != earlier.numbers:
            yield ConfigProblem(
                own,
                f"the limit {key!r} has other numbers in {json_path(place)}",
                "agents with the same key share one limit: use the same numbers, or another key",
            )


def _problems_of_part(part: Part, limits: RuntimeOptions, env: Mapping[str, str]) -> Iterable[ConfigProblem]:
    """The problems of one part of an agent. The part is created once to find them."""
    match part:
        case RuntimeOptions():
            return ()
        case LLMOptions():
            return _problems_of_model(part, env)
        case MemoryRef():
            return _problems_of_memory(part)
        case ContextAssemblerRef():
            return _problems_of_plugin("context_assembler", part, BUILTIN_ASSEMBLERS)
        case PatternRef():
            return _problems_of_plugin("pattern", with_limits(part, limits), BUILTIN_PATTERNS)
        case ToolExecutorRef():
            return _problems_of_executor(part)
        case SkillsRef():
            ref = ToolRef(id=SKILLS_ID, impl=SKILLS_IMPL, config=part.config.model_dump())
            return _problems_of_plugin("tool", ref, TOOL_TYPES) if part.is_used else ()
        case DiagnosticsRef():
            return _problems_of_plugin("diagnostics", part, BUILTIN_DIAGNOSTICS)
    raise TypeError(f"{type(part).__name__} is not a part with a plugin")


def _problems_of_memory(ref: MemoryRef, levels: int = MAX_CHAINS) -> list[ConfigProblem]:
    """The problems of a memory, and of the members of a chain."""
    problems = _problems_of_plugin("memory", ref, BUILTIN_MEMORIES)
    if problems or ref.type != "chain":
        return problems
    if not levels:
        return [ConfigProblem(("config",), f"more than {MAX_CHAINS} chains are inside each other")]
    for at, member in enumerate(ChainMemory(ref.config).cfg.memories):
        found = _problems_of_memory(member, levels - 1)
        problems += [problem.under("config", "memories", at) for problem in found]
    return problems


def _unread_preferences(file: AgentsFile) -> Iterator[ConfigProblem]:
    """Tools that note what the agent shall remember, without a memory that reads the notes."""
    parts = list(file.parts())
    memories = {path[:2]: part for path, part in parts if isinstance(part, MemoryRef)}
    for path, part in parts:
        if isinstance(part, ToolRef) and part.enabled and part.type == "remember_preference":
            memory = memories.get(path[:2])
            if memory is not None and not _reads_preferences(memory):
                yield ConfigProblem(
                    path,
                    f"the memory {memory.type!r} does not store what the tool notes",
                    'use the memory markdown_memory, or a chain that has it: {"type": "chain", "config": '
                    '{"memories": [{"type": "window_buffer"}, {"type": "markdown_memory"}]}}',
                )


def _reads_preferences(ref: MemoryRef) -> bool:
    """Whether a memory stores what tools note for it. A custom one may."""
    if ref.type == "chain":
        members = ref.config.get("memories")
        return not isinstance(members, list) or any(
            isinstance(each, Mapping) and (each.get("impl") or each.get("type") in READ_PREFERENCES)
            for each in members
        )
    return ref.impl is not None or ref.type in READ_PREFERENCES


def _problems_of_model(options: LLMOptions, env: Mapping[str, str]) -> list[ConfigProblem]:
    try:
        make_client(options, env=env)
    except PluginError as error:
        at_provider = [ConfigProblem(("provider",), error.message, error.hint)]
        found = getattr(error, "problems", ()) or at_provider
        return [replace(problem, code=error.code) for problem in found]
    return []


def _problems_of_tool(ref: ToolRef) -> tuple[list[ConfigProblem], Any]:
    """The problems of a tool and of its executor, and the tool; None if it cannot be created."""
    problems: list[ConfigProblem] = []
    if ref.tool_executor is not None:
        problems += [problem.under("tool_executor") for problem in _problems_of_executor(ref.tool_executor)]
    try:
        tool = make_plugin("tool", ref, TOOL_TYPES)
        _check_tool(tool, ref.id)
        if ref.background:
            check_job_methods(tool, ref.id)
    except PluginError as error:
        return [*problems_of_plugin(error, ref), *problems], None
    return problems, tool


def _problems_of_executor(ref: ToolExecutorRef) -> list[ConfigProblem]:
    """The problems of the class of an executor. Others were found when the file was read."""
    return [] if ref.custom is None else _problems_of_plugin("tool_executor", ref.custom, {})


def _problems_of_plugin(
    kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]
) -> list[ConfigProblem]:
    try:
        plugin = make_plugin(kind, ref, known)
        if isinstance(plugin, TokenBudgetAssembler) and plugin.cfg.encoding is not None:
            token_counter(None, plugin.cfg.encoding)
    except PluginError as error:
        return problems_of_plugin(error, ref)
    return []


def _check_tool(tool: Any, tool_id: str) -> None:
    """Raises `PluginLoadError` if the description of a tool cannot be sent to a model or used for checks, and
    `PluginConfigError` for an execution spec that cannot be used."""
    spec_of(tool, tool_id)
    if not hasattr(tool, "describe"):
        return
    try:
        described = tool.describe()
        schema = described.get("parameters") or {}
        schema_of_tool(schema)
        dumps(described)
    except PluginError:
        raise
    except Exception as error:
        raise PluginLoadError(
            f"the description of the tool cannot be used: {type(error).__name__}: {text_of(error)}",
            hint="describe() returns name, description and parameters, a JSON Schema",
        ) from error
