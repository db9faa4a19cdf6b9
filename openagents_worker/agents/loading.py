"""Loading: the only place that reads an agents file. It finds all problems of the file at once.

Agents that are defined in Python are checked as further agents of the file, by the same rules.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Protocol, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from openagents_worker.agents.llm import LLMOptions
from openagents_worker.agents.part import Part
from openagents_worker.agents.plugin_refs import (
    ContextAssemblerRef,
    MemoryRef,
    PatternRef,
    ToolExecutorRef,
    ToolRef,
)
from openagents_worker.agents.positions import JsonText, NotJson, Path, read_json
from openagents_worker.agents.problems import ConfigProblem, file_order, problems_of, rejected
from openagents_worker.agents.schema import AgentDefinition, AppConfig, RuntimeOptions, duplicate_ids
from openagents_worker.agents.sections import DiagnosticsRef, SkillsRef
from openagents_worker.agents.variables import VARIABLE, Expanded, as_field_type, expand
from openagents_worker.errors import ConfigLoadError
from openagents_worker.jsontext import dumps
from openagents_worker.redaction import redact
from openagents_worker.secret_text import mask_prose
from openagents_worker.suggest import did_you_mean

__all__ = ["AgentInCode", "AgentsFile", "check_agent", "check_definition", "load_agents", "read_agents_file"]


MAX_FILE_BYTES = 4 * 1024 * 1024
"""An agent has a few KB. A worker reads the file at its start, which takes one second per megabyte."""
MAX_AGENTS = 5_000
MAX_PROBLEMS = 100
"""Largest number of problems that are reported for a file. More are usually one mistake, repeated."""


class AgentInCode(Protocol):
    """An agent that is defined in Python."""

    place: str
    """Its module and line, for people."""
    data: Mapping[str, Any]
    """Its definition as in the agents file. An `impl` may be a `CodePath`."""


@dataclass(frozen=True)
class AgentsFile:
    """An agents file that was read: its valid agents, and all problems.

    `config` is None if a section outside of `agents` is invalid, or if no agent is valid.
    """

    source: str
    config: AppConfig | None
    problems: tuple[ConfigProblem, ...]
    text: JsonText
    expanded: Expanded
    cleaned: Any
    """The document without its unknown keys."""
    places: Mapping[int, str] = field(default_factory=dict)
    """The places of the agents that are defined in Python, by their index in the list of all agents."""

    def agent_id(self, problem: ConfigProblem) -> str | None:
        """The id of the agent with the problem. None: another section, or an agent without an id."""
        if len(problem.path) < 2 or problem.path[0] != "agents":
            return None
        agent = self.expanded.value["agents"][problem.path[1]]
        id_ = agent.get("id") if isinstance(agent, dict) else None
        return str(id_) if isinstance(id_, str) and id_ else None

    def parts(self) -> Iterator[tuple[Path, Part]]:
        """Each valid part of each agent, with its path. The `runtime` of an agent comes first.

        Valid parts of invalid agents are included, so that a problem in one part hides none in the others.
        """
        for index, agent in enumerate(_list_under(self.cleaned, "agents")):
            if isinstance(agent, Mapping):
                yield from self._valid_parts(agent, _PARTS, "agents", index)
                for place, tool in enumerate(_list_under(agent, "tools")):
                    yield from self._valid_parts({place: tool}, {place: ToolRef}, "agents", index, "tools")
        if isinstance(self.cleaned, Mapping):
            yield from self._valid_parts(self.cleaned, _SECTIONS)
        runtime = self.cleaned.get("runtime") if isinstance(self.cleaned, Mapping) else None
        defaults = runtime.get("config") if isinstance(runtime, Mapping) else None
        if isinstance(defaults, Mapping):
            yield from self._valid_parts(defaults, _DEFAULTS, "runtime", "config")

    def _valid_parts(
        self, parent: Mapping[Any, Any], models: Mapping[Any, type[Part]], *path: str | int
    ) -> Iterator[tuple[Path, Part]]:
        for name, model in models.items():
            if parent.get(name) is None or self.expanded.is_incomplete((*path, name)):
                continue
            try:
                part = model.model_validate(parent[name])
            except ValidationError:  # already among the problems of the file
                continue
            yield (*path, name), part

    def located(self, problem: ConfigProblem) -> ConfigProblem:
        """The problem with its line number or place, and with the values of variables masked."""
        place = self.places.get(problem.path[1]) if _is_agent_problem(problem) else None  # type: ignore[arg-type]
        return replace(
            problem,
            message=self.expanded.masked(problem.message),
            hint=None if problem.hint is None else self.expanded.masked(problem.hint),
            line=None if place is not None else self.text.line(problem.path),
            place=place,
        )


_PARTS: Mapping[str, type[Part]] = {
    "runtime": RuntimeOptions,
    "llm": LLMOptions,
    "memory": MemoryRef,
    "pattern": PatternRef,
    "context_assembler": ContextAssemblerRef,
    "tool_executor": ToolExecutorRef,
}
_SECTIONS: Mapping[str, type[Part]] = {"diagnostics": DiagnosticsRef, "skills": SkillsRef}
_DEFAULTS: Mapping[str, type[Part]] = {
    "context_assembler": ContextAssemblerRef,
    "tool_executor": ToolExecutorRef,
}


def load_agents(path_or_text: FilePath | str, *, env: Mapping[str, str] | None = None) -> AppConfig:
    """Read the agents file at a path. A text that begins with `{` is read as the file's content.

    `${VAR}` is replaced with the variable's value in `env` (default: the environment of this process).
    `${VAR:-default}` is replaced with the default if the variable is unset or empty. If a string is exactly
    one variable and its field requires a number, a boolean or null, it is converted. Raises `ConfigLoadError`
    if the file cannot be read or is not JSON. Raises `ConfigValidationError` with all problems: line, path,
    what was found and what is expected. No error contains the value of a variable.
    """
    file = read_agents_file(path_or_text, env=env)
    if file.problems or file.config is None:
        raise rejected(file.source, file.problems)
    return file.config


def read_agents_file(
    path_or_text: FilePath | str,
    *,
    env: Mapping[str, str] | None = None,
    in_code: Sequence[AgentInCode] = (),
    may_be_absent: bool = False,
) -> AgentsFile:
    """Read an agents file as `load_agents` does, but return its problems together with its valid agents.

    `in_code` are agents that are defined in Python; they follow those of the file. `may_be_absent`: with
    such agents, there need not be a file. Raises `ConfigLoadError` if the file cannot be read or is not JSON.
    """
    if in_code and may_be_absent and not FilePath(path_or_text).exists():
        return _FileChecker("agents in Python", _EMPTY, Expanded({}), in_code).file()
    source, text = _read_source(path_or_text)
    document = _parse_json(source, text)
    expanded = expand(document.value, os.environ if env is None else env)
    return _FileChecker(source, document, expanded, in_code).file()


def check_agent(agent: AgentInCode) -> AgentDefinition:
    """The definition of an agent in Python. Raises `ConfigValidationError` with all its problems."""
    file = _FileChecker("an agent in Python", _EMPTY, Expanded({}), [agent]).file()
    if file.problems or file.config is None:
        raise rejected(file.source, file.problems)
    return file.config.agents[0]


def check_definition(document: Any, expanded: Expanded) -> AgentsFile:
    """The agents of a document that does not come from a file, and all its problems."""
    return _FileChecker("a stored definition", JsonText(document, {(): 1}), expanded).file()


_EMPTY = JsonText({}, {(): 1})


def _read_source(path_or_text: FilePath | str) -> tuple[str, str]:
    if isinstance(path_or_text, str) and path_or_text.lstrip().startswith("{"):
        _check_size("agents file", len(path_or_text))
        return "agents file", path_or_text
    path = FilePath(path_or_text)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        _check_size(str(path), len(raw))
        return str(path), raw.decode("utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        hint = "set OPENAGENTS_CONFIG to the path of your agents file, or write one: docs/first-agent.md"
        raise ConfigLoadError(f"{path}: there is no such file", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigLoadError(f"{path}: cannot be read: {why}") from error


def _check_size(source: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ConfigLoadError(
            f"{source}: it has more than {MAX_FILE_BYTES:,} bytes",
            hint="distribute the agents over several deployments, each with its own queue",
        )


def _parse_json(source: str, text: str) -> JsonText:
    try:
        return read_json(text)
    except NotJson as error:
        hint = None
        if text.startswith("${", error.offset):
            hint = 'put a variable in quotes, even for a number: "${NAME}"'
        where = f"line {error.line}, column {error.column}"
        raise ConfigLoadError(f"{source}: {error.what} at {where}: {error}", hint=hint) from error


class _FileChecker:
    """Checks one document after its variables were replaced."""

    def __init__(
        self, source: str, document: JsonText, expanded: Expanded, in_code: Sequence[AgentInCode] = ()
    ) -> None:
        self._source = source
        first = len(_list_under(document.value, "agents"))
        self._places = {first + index: agent.place for index, agent in enumerate(in_code)}
        data = [agent.data for agent in in_code]
        self._document = replace(document, value=_with_agents(document.value, data))
        self._expanded = replace(expanded, value=_with_agents(expanded.value, data))
        self._problems = list(expanded.missing)
        self._duplicates: set[Path] = set()

    def file(self) -> AgentsFile:
        """The result of the check. Each problem occurs once, in the order of the file."""
        self._check_count()
        cleaned = self._without_unknown_keys(self._expanded.value, AppConfig, ())
        if isinstance(cleaned, dict):
            self._find_duplicate_ids(cleaned)
        config = self._model(cleaned)
        invalid = {problem.path[1] for problem in self._problems if _is_agent_problem(problem)}
        if any(not _is_agent_problem(problem) for problem in self._problems):
            config = None
        elif invalid:
            valid = [agent for index, agent in enumerate(cleaned["agents"]) if index not in invalid]
            config = AppConfig.model_validate({**cleaned, "agents": valid}) if valid else None
        file = AgentsFile(self._source, config, (), self._document, self._expanded, cleaned, self._places)
        return replace(file, problems=tuple(self._located(file)))

    def _located(self, file: AgentsFile) -> list[ConfigProblem]:
        """Each problem once, in the order of the file. At most the first `MAX_PROBLEMS`."""
        unique = {(problem.path, problem.message): problem for problem in self._problems}
        by_line = sorted(unique.values(), key=lambda problem: self._document.line(problem.path))
        located = [file.located(problem) for problem in by_line[:MAX_PROBLEMS]]
        if len(by_line) > MAX_PROBLEMS:
            more = len(by_line) - MAX_PROBLEMS
            located.append(ConfigProblem((), f"{more:,} more problems are not shown", line=located[-1].line))
        return sorted(located[:MAX_PROBLEMS], key=file_order) + located[MAX_PROBLEMS:]

    def _check_count(self) -> None:
        """Raises `ConfigValidationError` for too many agents, before anything else is checked."""
        count = len(_list_under(self._expanded.value, "agents"))
        if count > MAX_AGENTS:
            line = self._document.line(("agents", MAX_AGENTS))
            problem = ConfigProblem(("agents",), f"{count:,} agents, {MAX_AGENTS:,} are allowed", line=line)
            raise rejected(self._source, [problem])

    def _model(self, cleaned: Any) -> AppConfig | None:
        """The validated document; None if it is invalid. Its problems are recorded."""
        try:
            return AppConfig.model_validate(cleaned)
        except ValidationError as error:
            found = problems_of(error, found_text=self._found_text)
            self._problems += self._without_missing_variables(
                [problem for problem in found if problem.path not in self._duplicates]
            )
            return None

    def _without_missing_variables(self, problems: Sequence[ConfigProblem]) -> Iterator[ConfigProblem]:
        """The problems, without those that are only the consequence of a variable that is not set."""
        return (problem for problem in problems if not self._expanded.is_incomplete(problem.path))

    # --- unknown keys, and checks of a whole part --------------------------------------------------------

    def _without_unknown_keys(self, data: Any, model: type[BaseModel], path: Path) -> Any:
        """The data of a part without its unknown keys: they would hide other problems of the part."""
        if not isinstance(data, Mapping):
            return data
        if issubclass(model, Part):
            found = [ConfigProblem((*path, *key), text) for key, text in model.problems_of_whole(data)]
            self._problems += self._without_missing_variables(found)
        cleaned: dict[str, Any] = {}
        for key, value in data.items():
            field = model.model_fields.get(key)
            if field is not None:
                cleaned[key] = self._value_without_unknown_keys(value, field.annotation, (*path, key))
            elif model.model_config.get("extra") == "allow":
                cleaned[key] = value
            else:
                hint = did_you_mean(key, model.model_fields, "known keys")
                self._problems.append(ConfigProblem((*path, key), "unknown key", hint))
        if issubclass(model, AgentDefinition) and cleaned.get("llm") is None:
            cleaned["llm"] = {}  # reported above; without it pydantic would report it again
        return cleaned

    def _value_without_unknown_keys(self, value: Any, annotation: Any, path: Path) -> Any:
        if get_origin(annotation) is list and isinstance(value, list):
            [item_type] = get_args(annotation)
            return [
                self._value_without_unknown_keys(item, item_type, (*path, index))
                for index, item in enumerate(value)
            ]
        model = _model_in(annotation)
        return (
            as_field_type(value, annotation)
            if model is None
            else self._without_unknown_keys(value, model, path)
        )

    def _find_duplicate_ids(self, document: Mapping[str, Any]) -> None:
        ids = _ids_in_section(document, "agents")
        first_index = {id_: index for index, id_ in reversed(list(enumerate(ids))) if isinstance(id_, str)}
        for path, _ in duplicate_ids(ids, "agents"):
            index = int(path[1])
            first = first_index[ids[index]]
            self._duplicates.add(path)
            text = f"{self._name_of_agent(first)} already has the id {ids[index]!r}"
            self._problems.append(ConfigProblem(path, text))
            same = f"{self._name_of_agent(index)} has the same id"
            self._problems.append(ConfigProblem(("agents", first, "id"), same))
        for place, agent in enumerate(_list_under(document, "agents")):
            for path, text in duplicate_ids(_ids_in_section(agent, "tools"), "tools"):
                self._problems.append(ConfigProblem(("agents", place, *path), text))

    def _name_of_agent(self, index: int) -> str:
        """How a problem refers to another agent."""
        name = self._places.get(index) or f"agents[{index}]"
        return f"{name} of {self._source}" if self._places and index not in self._places else name

    # --- found values in messages ------------------------------------------------------------------------

    def _found_text(self, path: Path) -> tuple[Path, str]:
        """The part of the path that exists in the file, and a text that shows the value there.

        The value is shown as written, before variables were replaced, so it cannot show their secrets.
        """
        value: Any = self._document.value
        for depth, part in enumerate(path):
            if not isinstance(value, (dict, list)):
                path = path[:depth]  # the rest are names of types that pydantic has tried
                break
            inner: Any = value
            try:
                value = inner[part]
            except (LookupError, TypeError):
                return path, ""  # the value is missing; the problem's text already says this
        if isinstance(value, (dict, list)):
            return path, f"; found {'an object' if isinstance(value, dict) else 'a list'}"
        if not (isinstance(value, str) and VARIABLE.fullmatch(value)):  # a variable name is not a secret
            value = next(
                iter(redact({str(next(reversed(path), "")): value}, max_chars=60, mask=mask_prose).values())
            )
        return path, f"; found {dumps(value)}"


def _is_agent_problem(problem: ConfigProblem) -> bool:
    """Whether the problem is in one agent of the list."""
    return problem.path[:1] == ("agents",) and isinstance(next(iter(problem.path[1:]), None), int)


def _with_agents(document: Any, data: Sequence[Mapping[str, Any]]) -> Any:
    """The document with more agents. Unchanged if it cannot have any, which is a problem of the file."""
    if not (data and isinstance(document, Mapping) and isinstance(document.get("agents", []), list)):
        return document
    return {**document, "agents": [*document.get("agents", ()), *data]}


def _list_under(data: Any, key: str) -> list[Any]:
    listed = data.get(key) if isinstance(data, Mapping) else None
    return listed if isinstance(listed, list) else []


def _ids_in_section(data: Any, key: str) -> list[Any]:
    return [item.get("id") if isinstance(item, Mapping) else None for item in _list_under(data, key)]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that holds a part, also if the field may be null. None: it holds no part."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None
