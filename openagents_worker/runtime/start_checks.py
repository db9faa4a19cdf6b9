"""Start checks: the only place that finds problems of an agents file before the first run."""

from __future__ import annotations

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
    ToolRef,
    options_without_effect,
)
from openagents_worker.agents.part import Part
from openagents_worker.agents.positions import Path, json_path
from openagents_worker.agents.problems import ConfigProblem, file_order, problems_of_plugin
from openagents_worker.agents.schema import SKILLS_ID, SKILLS_IMPL
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.diagnostics import BUILTIN_DIAGNOSTICS
from openagents_worker.errors import PluginError, PluginLoadError, text_of
from openagents_worker.jsontext import dumps
from openagents_worker.llm.api_keys import is_readable_by_all
from openagents_worker.llm.limits import limit_name
from openagents_worker.llm.providers import make_client
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.runtime.plugins import make_plugin, with_limits
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from openagents_worker.tools.checks import schema_of_tool

__all__ = ["find_problems", "remarks"]


def remarks(config: AppConfig) -> list[str]:
    """One line for each option that has no effect, and for each file with a key that everybody can read."""
    lines = options_without_effect(config)
    for agent in config.agents:
        for options in (agent.llm.model_dump(include={"api_key_file"}), *agent.llm.fallbacks):
            path = options.get("api_key_file")
            if isinstance(path, str) and is_readable_by_all(path):
                lines.append(
                    f"agent {agent.id!r}: every user of this machine can read {path}, which holds a key of a "
                    "model; chmod 600"
                )
    return list(dict.fromkeys(lines))


def find_problems(file: AgentsFile, env: Mapping[str, str]) -> list[ConfigProblem]:
    """All problems of an agents file on this machine, in the file and in the plugins that it names."""
    problems = list(file.problems)
    limits: dict[Path, RuntimeOptions] = {}
    for path, part in file.parts():
        agent_path = path[:2]
        if isinstance(part, RuntimeOptions):
            limits[agent_path] = part
        found = _problems_of_part(part, limits.get(agent_path) or RuntimeOptions(), env)
        problems += [file.located(problem.under(*path)) for problem in found]
    problems += [file.located(problem) for problem in _different_limits(file)]
    return sorted(problems, key=file_order)


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
            return _problems_of_plugin("memory", part, BUILTIN_MEMORIES)
        case ContextAssemblerRef():
            return _problems_of_plugin("context_assembler", part, BUILTIN_ASSEMBLERS)
        case PatternRef():
            return _problems_of_plugin("pattern", with_limits(part, limits), BUILTIN_PATTERNS)
        case ToolRef():
            return _problems_of_plugin("tool", part, BUILTIN_TOOLS) if part.enabled else ()
        case SkillsRef():
            ref = ToolRef(id=SKILLS_ID, impl=SKILLS_IMPL, config=part.config.model_dump())
            return _problems_of_plugin("tool", ref, BUILTIN_TOOLS) if part.is_used else ()
        case DiagnosticsRef():
            return _problems_of_plugin("diagnostics", part, BUILTIN_DIAGNOSTICS)
    raise TypeError(f"{type(part).__name__} is not a part with a plugin")


def _problems_of_model(options: LLMOptions, env: Mapping[str, str]) -> list[ConfigProblem]:
    try:
        make_client(options, env=env)
    except PluginError as error:
        at_provider = [ConfigProblem(("provider",), error.message, error.hint)]
        found = getattr(error, "problems", ()) or at_provider
        return [replace(problem, code=error.code) for problem in found]
    return []


def _problems_of_plugin(
    kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]
) -> list[ConfigProblem]:
    try:
        plugin = make_plugin(kind, ref, known)
        if kind == "tool":
            _check_tool(plugin)
    except PluginError as error:
        return problems_of_plugin(error, ref)
    return []


def _check_tool(tool: Any) -> None:
    """Raises `PluginLoadError` if the description of a tool cannot be sent to a model or used for checks."""
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
