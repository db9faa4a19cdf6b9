"""Loading. The only place that reads an agents file, and finds all that is wrong in it at once."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from openagents_worker.agents.llm import LLMOptions
from openagents_worker.agents.part import Part
from openagents_worker.agents.positions import JsonText, NotJson, Path, read_json
from openagents_worker.agents.problems import ConfigProblem, did_you_mean, in_order, problems_of, rejected
from openagents_worker.agents.schema import (
    AgentDefinition,
    AppConfig,
    ContextAssemblerRef,
    MemoryRef,
    PatternRef,
    RuntimeOptions,
    ToolRef,
    double_ids,
)
from openagents_worker.agents.variables import VARIABLE, Expanded, as_wanted, expand
from openagents_worker.errors import ConfigLoadError
from openagents_worker.jsontext import dumps
from openagents_worker.redaction import redact
from openagents_worker.secret_text import mask_prose

__all__ = ["AgentsFile", "load_agents", "read_agents_file"]


MAX_FILE_BYTES = 4 * 1024 * 1024
"""An agent takes a few KB. A worker reads its file before it does anything else, a second for a megabyte."""
MAX_AGENTS = 5_000
MOST_PROBLEMS = 100
"""Told of one file: whoever has more of them has the same one many times."""


@dataclass(frozen=True)
class AgentsFile:
    """An agents file that was read: the agents that are written correctly, and all that is wrong in it.

    `config` is None where a section that concerns all agents is wrong, or no agent is right.
    """

    source: str
    config: AppConfig | None
    problems: tuple[ConfigProblem, ...]
    text: JsonText
    expanded: Expanded
    cleaned: Any
    """The document without its unknown keys."""

    def agent_id(self, problem: ConfigProblem) -> str | None:
        """The id of the agent that the problem is about; None for other sections, and where it has no id."""
        if len(problem.path) < 2 or problem.path[0] != "agents":
            return None
        agent = self.expanded.value["agents"][problem.path[1]]
        id_ = agent.get("id") if isinstance(agent, dict) else None
        return str(id_) if isinstance(id_, str) and id_ else None

    def parts(self) -> Iterator[tuple[Path, Part]]:
        """Each part of each agent that is right by itself, with its path; an agent's `runtime` comes first.

        Also parts of agents that are not right: what is wrong in one part hides nothing in the others.
        """
        for index, agent in enumerate(_listed(self.cleaned, "agents")):
            if isinstance(agent, Mapping):
                yield from self._right(agent, _PARTS, "agents", index)
                for place, tool in enumerate(_listed(agent, "tools")):
                    yield from self._right({place: tool}, {place: ToolRef}, "agents", index, "tools")
        runtime = self.cleaned.get("runtime") if isinstance(self.cleaned, Mapping) else None
        defaults = runtime.get("config") if isinstance(runtime, Mapping) else None
        if isinstance(defaults, Mapping):
            yield from self._right(defaults, _DEFAULTS, "runtime", "config")

    def _right(
        self, of: Mapping[Any, Any], models: Mapping[Any, type[Part]], *path: str | int
    ) -> Iterator[tuple[Path, Part]]:
        for name, model in models.items():
            if of.get(name) is None or self.expanded.is_incomplete((*path, name)):
                continue
            try:
                part = model.model_validate(of[name])
            except ValidationError:  # which is a problem of the file already
                continue
            yield (*path, name), part

    def located(self, problem: ConfigProblem) -> ConfigProblem:
        """The problem with its line, and without the values of variables."""
        return replace(
            problem,
            message=self.expanded.masked(problem.message),
            hint=None if problem.hint is None else self.expanded.masked(problem.hint),
            line=self.text.line(problem.path),
        )


_PARTS: Mapping[str, type[Part]] = {
    "runtime": RuntimeOptions,
    "llm": LLMOptions,
    "memory": MemoryRef,
    "pattern": PatternRef,
    "context_assembler": ContextAssemblerRef,
}
_DEFAULTS: Mapping[str, type[Part]] = {"context_assembler": ContextAssemblerRef}


def load_agents(path_or_text: FilePath | str, *, env: Mapping[str, str] | None = None) -> AppConfig:
    """The agents file at a path, or the one whose text is given (a text that begins with `{`).

    `env` (default: this process's) answers `${VAR}`; `${VAR:-default}` stands for the default where the
    variable is unset or empty. A text that is one variable is read as a number, a boolean or null where the
    file wants one. Raises `ConfigLoadError` when the file cannot be read or is not JSON, and
    `ConfigValidationError` that names every mistake: file, line, path, what was found and what would be
    right. No error shows a variable's value.
    """
    file = read_agents_file(path_or_text, env=env)
    if file.problems or file.config is None:
        raise rejected(file.source, file.problems)
    return file.config


def read_agents_file(path_or_text: FilePath | str, *, env: Mapping[str, str] | None = None) -> AgentsFile:
    """The same, with what is right and what is wrong side by side.

    Raises `ConfigLoadError` when the file cannot be read at all.
    """
    source, text = _read(path_or_text)
    document = _parse(source, text)
    expanded = expand(document.value, os.environ if env is None else env)
    return _Checked(source, document, expanded).file()


def _read(path_or_text: FilePath | str) -> tuple[str, str]:
    if isinstance(path_or_text, str) and path_or_text.lstrip().startswith("{"):
        _check_size("agents file", len(path_or_text))
        return "agents file", path_or_text
    path = FilePath(path_or_text)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        _check_size(str(path), len(raw))
        return str(path), raw.decode("utf-8-sig")  # some editors begin a file with a mark
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
            hint="split its agents over several deployments, each with a queue of its own",
        )


def _parse(source: str, text: str) -> JsonText:
    try:
        return read_json(text)
    except NotJson as error:
        hint = None
        if text.startswith("${", error.offset):
            hint = 'put a variable in quotes, also for a number: "${NAME}"'
        where = f"line {error.line}, column {error.column}"
        raise ConfigLoadError(f"{source}: {error.what} at {where}: {error}", hint=hint) from error


class _Checked:
    """One look through an expanded document."""

    def __init__(self, source: str, document: JsonText, expanded: Expanded) -> None:
        self._source = source
        self._document = document
        self._expanded = expanded
        self._problems = list(expanded.missing)

    def file(self) -> AgentsFile:
        """The parts that are right, and every problem once, in the order of the file."""
        self._check_count()
        cleaned = self._cleaned(self._expanded.value, AppConfig, ())
        if isinstance(cleaned, dict):
            self._find_double_ids(cleaned)
        config = self._model(cleaned)
        wrong = {problem.path[1] for problem in self._problems if _is_of_agent(problem)}
        if any(not _is_of_agent(problem) for problem in self._problems):
            config = None
        elif wrong:
            right = [agent for place, agent in enumerate(cleaned["agents"]) if place not in wrong]
            config = AppConfig.model_validate({**cleaned, "agents": right}) if right else None
        file = AgentsFile(self._source, config, (), self._document, self._expanded, cleaned)
        return replace(file, problems=tuple(self._located(file)))

    def _located(self, file: AgentsFile) -> list[ConfigProblem]:
        """Each problem once, in the order of the file; of very many, those that come first in it."""
        once = {(problem.path, problem.message): problem for problem in self._problems}
        by_line = sorted(once.values(), key=lambda problem: self._document.line(problem.path))
        located = [file.located(problem) for problem in by_line[:MOST_PROBLEMS]]
        if len(by_line) > MOST_PROBLEMS:
            more = len(by_line) - MOST_PROBLEMS
            located.append(
                ConfigProblem((), f"{more:,} more mistakes stand behind these", line=located[-1].line)
            )
        return sorted(located[:MOST_PROBLEMS], key=in_order) + located[MOST_PROBLEMS:]

    def _check_count(self) -> None:
        """Raises `ConfigValidationError` at once: nobody wants to read what else is wrong in so many."""
        count = len(_listed(self._expanded.value, "agents"))
        if count > MAX_AGENTS:
            line = self._document.line(("agents", MAX_AGENTS))
            problem = ConfigProblem(("agents",), f"{count:,} agents, {MAX_AGENTS:,} are allowed", line=line)
            raise rejected(self._source, [problem])

    def _model(self, cleaned: Any) -> AppConfig | None:
        try:
            return AppConfig.model_validate(cleaned)
        except ValidationError as error:
            self._problems += self._told_once(problems_of(error, standing=self._standing))
            return None

    def _told_once(self, problems: Sequence[ConfigProblem]) -> Iterator[ConfigProblem]:
        """Without what only follows from a variable that is not set."""
        return (problem for problem in problems if not self._expanded.is_incomplete(problem.path))

    # --- unknown keys, and what parts say of each other --------------------------------------------------

    def _cleaned(self, data: Any, model: type[BaseModel], path: Path) -> Any:
        """The data of a part without its unknown keys, which would hide what else is wrong in it."""
        if not isinstance(data, Mapping):
            return data
        if issubclass(model, Part):
            found = [ConfigProblem((*path, *key), text) for key, text in model.problems_of_whole(data)]
            self._problems += self._told_once(found)
        cleaned: dict[str, Any] = {}
        for key, value in data.items():
            field = model.model_fields.get(key)
            if field is not None:
                cleaned[key] = self._cleaned_value(value, field.annotation, (*path, key))
            elif model.model_config.get("extra") == "allow":
                cleaned[key] = value
            else:
                hint = did_you_mean(key, model.model_fields, "known keys")
                self._problems.append(ConfigProblem((*path, key), "unknown key", hint))
        if issubclass(model, AgentDefinition) and cleaned.get("llm") is None:
            cleaned["llm"] = {}  # told above; it hides nothing else
        return cleaned

    def _cleaned_value(self, value: Any, annotation: Any, path: Path) -> Any:
        if get_origin(annotation) is list and isinstance(value, list):
            [of] = get_args(annotation)
            return [self._cleaned_value(item, of, (*path, place)) for place, item in enumerate(value)]
        model = _model_in(annotation)
        return as_wanted(value, annotation) if model is None else self._cleaned(value, model, path)

    def _find_double_ids(self, document: Mapping[str, Any]) -> None:
        ids = _ids(document, "agents")
        first_of = {id_: place for place, id_ in reversed(list(enumerate(ids))) if isinstance(id_, str)}
        for path, text in double_ids(ids, "agents"):
            first = first_of[ids[int(path[1])]]
            self._problems.append(ConfigProblem(path, text))
            self._problems.append(ConfigProblem(("agents", first, "id"), f"it is that of {path[1]} too"))
        for place, agent in enumerate(_listed(document, "agents")):
            for path, text in double_ids(_ids(agent, "tools"), "tools"):
                self._problems.append(ConfigProblem(("agents", place, *path), text))

    # --- what was found ----------------------------------------------------------------------------------

    def _standing(self, path: Path) -> tuple[Path, str]:
        """With what stands there, as written, before any variable was filled in: so no secret can show."""
        value: Any = self._document.value
        for depth, part in enumerate(path):
            if not isinstance(value, (dict, list)):
                path = path[:depth]  # pydantic goes on with the names of the types that it has tried
                break
            inner: Any = value
            try:
                value = inner[part]
            except (LookupError, TypeError):
                return path, ""  # it is missing, which the problem's text says
        if isinstance(value, (dict, list)):
            return path, f"; found {'an object' if isinstance(value, dict) else 'a list'}"
        if not (isinstance(value, str) and VARIABLE.fullmatch(value)):  # a variable's name is no secret
            value = next(
                iter(redact({str(next(reversed(path), "")): value}, max_chars=60, mask=mask_prose).values())
            )
        return path, f"; found {dumps(value)}"


def _is_of_agent(problem: ConfigProblem) -> bool:
    return problem.path[:1] == ("agents",) and len(problem.path) > 1


def _listed(data: Any, key: str) -> list[Any]:
    listed = data.get(key) if isinstance(data, Mapping) else None
    return listed if isinstance(listed, list) else []


def _ids(data: Any, key: str) -> list[Any]:
    return [item.get("id") if isinstance(item, Mapping) else None for item in _listed(data, key)]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The part that a field holds, also where it may be null."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None
