"""Agents in Python: the only place that turns the arguments of `Agent` into a definition, and registers it.

The fields, their checks and their defaults are those of the agents file. An agent in Python can also hold
classes and functions themselves, where the file holds their paths.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from openagents_worker.agents.code_path import CodePath, code_of
from openagents_worker.agents.loading import AgentsFile, check_agent, read_agents_file
from openagents_worker.agents.positions import Path
from openagents_worker.agents.problems import ConfigProblem, rejected
from openagents_worker.agents.schema import AgentDefinition
from openagents_worker.jsontext import MAX_NESTING, BadValue, check
from openagents_worker.models import RunBudget

__all__ = [
    "Agent",
    "agent",
    "is_pattern_function",
    "read_agents",
    "register_agent",
    "registered_agents",
    "unregister_agents",
]

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

PACKAGE = __name__.partition(".")[0]
DEFAULT_MEMORY = "buffer"
PATTERN_HINT = "a function pattern is `async def name(context)`; a class pattern has the method execute"
TOOL_HINT = "a tool is a function with a docstring, a class, the name of a built-in tool, or a mapping"


class Agent:
    """An agent that is defined in Python, with the fields of the agents file.

    `llm="provider:model"` is short for a mapping. `pattern` is the name of a built-in one, a class, or an
    async function that takes the run's context. `tools` are functions, classes, names of built-in tools,
    import paths, or mappings as in the file, whose `impl` may be the function itself. `system_prompt` is an
    option of the pattern. Raises `ConfigValidationError` with all problems: the module and the line of the
    agent, the field, what is expected.

    >>> async def greet(context: Any) -> str:
    ...     return f"Hello, {context.input_text}!"
    >>> Agent("greeter", pattern=greet).definition.memory.type
    'buffer'
    """

    def __init__(
        self,
        id: str,
        *,
        name: str | None = None,
        llm: Mapping[str, Any] | str | None = None,
        pattern: str | Mapping[str, Any] | type | Callable[..., Awaitable[Any]] = "react",
        system_prompt: str | None = None,
        tools: Sequence[str | Mapping[str, Any] | type | Callable[..., Any]] = (),
        memory: str | Mapping[str, Any] | None = None,
        context_assembler: str | Mapping[str, Any] | None = None,
        tool_executor: str | Mapping[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
        limits: RunBudget | Mapping[str, Any] | None = None,
        queue: str | None = None,
    ) -> None:
        self.id = id
        self.place = f"the agent {id!r} at {_place_of_caller()}"
        self._problems: list[ConfigProblem] = []
        fields: dict[str, Any] = {
            "id": id,
            "name": id if name is None else name,
            "memory": self._reference("memory", DEFAULT_MEMORY if memory is None else memory),
            "pattern": self._pattern(pattern, system_prompt),
            "llm": _model(llm),
            "tools": self._tools(tools),
            "context_assembler": self._reference("context_assembler", context_assembler),
            "tool_executor": self._reference("tool_executor", tool_executor),
            "runtime": None if runtime is None else _copied(runtime),
            "limits": limits.model_dump(exclude_unset=True)
            if isinstance(limits, RunBudget)
            else _copied(limits),
            "queue": queue,
        }
        self.data: Mapping[str, Any] = {field: value for field, value in fields.items() if value is not None}
        self._check_values()
        if self._problems:
            raise rejected("an agent in Python", self._problems)
        self.definition: AgentDefinition = check_agent(self)

    def __repr__(self) -> str:
        return f"<{self.place}>"

    def _add_problem(self, *path: str | int, message: str, hint: str | None = None) -> None:
        self._problems.append(ConfigProblem(("agents", 0, *path), message, hint, place=self.place))

    def _check_values(self) -> None:
        """Report what a JSON text cannot contain, such as NaN or an object."""
        try:
            check(self.data)
        except BadValue as error:
            self._add_problem(message=str(error))
            return
        for path, value in _not_json(self.data, ()):
            self._add_problem(*path, message=f"must be a JSON value; found a {type(value).__name__}")

    # --- fields ------------------------------------------------------------------------------------------

    def _pattern(self, pattern: Any, system_prompt: str | None) -> Any:
        if not isinstance(pattern, str | Mapping | type | CodePath) and not is_pattern_function(pattern):
            what = f"a {type(pattern).__name__} is not a pattern"
            self._add_problem("pattern", message=what, hint=PATTERN_HINT)
            return {"type": "react"}
        ref = self._reference("pattern", pattern)
        if system_prompt is None or not isinstance(ref, dict):
            return ref
        config = ref.get("config", {})
        if not isinstance(config, Mapping):
            return ref  # reported by the check of the reference
        if "system_prompt" in config:
            self._add_problem("pattern", "config", "system_prompt", message="it is also set as system_prompt")
        return {**ref, "config": {**config, "system_prompt": system_prompt}}

    def _tools(self, tools: Any) -> list[Any] | None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            self._add_problem("tools", message=f"must be a list; found a {type(tools).__name__}")
            return None
        return [self._tool(index, tool) for index, tool in enumerate(tools)] or None

    def _tool(self, index: int, tool: Any) -> Any:
        if not isinstance(tool, str | Mapping) and not callable(tool):
            what = f"a {type(tool).__name__} is not a tool"
            self._add_problem("tools", index, message=what, hint=TOOL_HINT)
            return {"id": "invalid", "type": "invalid"}
        ref = self._reference("tools", tool)
        if isinstance(tool, str):
            return {"id": tool.rpartition(".")[2], **ref}
        impl = ref.get("impl")
        if "id" not in ref and isinstance(impl, str):
            code = code_of(impl)
            return {"id": impl.rpartition(".")[2] if code is None else _tool_id(code), **ref}
        return ref

    def _reference(self, field: str, value: Any) -> Any:
        """A reference to a plugin as the file has it: from a name, an import path, a mapping, or the code."""
        if value is None:
            return None
        if isinstance(value, str):
            return {"impl" if "." in value else "type": value}
        if not isinstance(value, Mapping):
            return {"impl": CodePath.of(value)}
        ref: dict[str, Any] = _copied(value)
        if "impl" in ref and not isinstance(ref["impl"], str | None) and callable(ref["impl"]):
            ref["impl"] = CodePath.of(ref["impl"])
        return ref


def _model(llm: Any) -> Any:
    """The `llm` section; `provider:model` is split at the first colon."""
    if not isinstance(llm, str):
        return _copied(llm)
    provider, _, model = llm.partition(":")
    return {"provider": provider, "model": model} if model else {"provider": provider}


def _copied(value: Any, levels: int = MAX_NESTING) -> Any:
    """A copy in which mappings are dicts and sequences are lists, as in a parsed JSON text.

    What is nested too deeply is not copied: `check` reports it.
    """
    if levels and isinstance(value, Mapping):
        return {key: _copied(item, levels - 1) for key, item in value.items()}
    if levels and isinstance(value, list | tuple):
        return [_copied(item, levels - 1) for item in value]
    return value


def _not_json(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The parts of a value that are not JSON values, with their paths."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_json(item, (*path, key)) if isinstance(key, str) else [((*path, str(key)), key)]
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_json(item, (*path, index))
    elif not (value is None or isinstance(value, str | int | float)):
        yield path, value


def _tool_id(code: Any) -> str:
    """The name under which the model sees a tool, if its reference has no id."""
    # `tool_name` of a class may be a property, and `_tool_name` is what the original SDK's `@tool` sets.
    given = [getattr(code, attribute, None) for attribute in ("tool_name", "_tool_name", "name")]
    names = (*given, getattr(code, "__name__", None), type(code).__name__)
    return re.sub(r"\W", "_", next(name for name in names if isinstance(name, str) and name))


def is_pattern_function(code: object) -> bool:
    """Whether an object is an async function that can be called with the context of a run alone."""
    if not inspect.iscoroutinefunction(code):
        return False
    try:
        inspect.signature(code).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _place_of_caller() -> str:
    """Module and line of the first caller outside of this library."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


# --- the registry ----------------------------------------------------------------------------------------

_REGISTERED: dict[str, Agent] = {}


def register_agent(agent: Agent) -> Agent:
    """Let the workers that import this module serve the agent. Returns the agent.

    Raises `ConfigValidationError`, naming both places, if an agent with its id is registered already.

    >>> _ = register_agent(Agent("support", llm="openai_compatible:gpt-5-mini", system_prompt="Be brief."))
    """
    if not isinstance(agent, Agent):
        raise TypeError(f"register_agent takes an Agent, not a {type(agent).__name__}")
    known = _REGISTERED.setdefault(agent.id, agent)
    if known is not agent:
        problem = ConfigProblem(
            ("agents", 0, "id"),
            f"{known.place} is registered already",
            hint="ids are unique; a module that is imported under two names registers its agents twice",
            place=agent.place,
        )
        raise rejected("agents in Python", [problem])
    return agent


def agent(id: str, /, **options: Any) -> Callable[[F], F]:
    """Register an agent whose pattern is the decorated async function. The function stays callable.

    `options` are those of `Agent`, except `pattern`. Raises as `Agent` and `register_agent` do.

    >>> @agent("researcher", llm="mock")
    ... async def researcher(context: Any) -> str:
    ...     return (await context.call_llm(context.input_text)).output_text
    """
    if "pattern" in options:
        raise TypeError("agent() takes no pattern: the decorated function is the pattern")

    def decorate(function: F) -> F:
        register_agent(Agent(id, pattern=function, **options))
        return function

    return decorate


def registered_agents() -> tuple[Agent, ...]:
    """All agents that were registered in this process, in the order of their registration."""
    return tuple(_REGISTERED.values())


def read_agents(
    path: FilePath | str, *, env: Mapping[str, str] | None = None, may_be_absent: bool = False
) -> AgentsFile:
    """The agents file together with all registered agents, and all their problems.

    `may_be_absent`: with registered agents, there need not be a file. Raises `ConfigLoadError`.
    """
    return read_agents_file(path, env=env, in_code=registered_agents(), may_be_absent=may_be_absent)


def unregister_agents(*ids: str) -> None:
    """Forget registered agents, for tests. Without ids: all of them."""
    for id in ids or tuple(_REGISTERED):
        _REGISTERED.pop(id, None)
