"""Problems. The only place that describes mistakes in a configuration: where, what, and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from openagents_worker.agents.positions import Path, json_path
from openagents_worker.errors import ConfigValidationError, OpenAgentsError, PluginConfigError

__all__ = [
    "ConfigProblem",
    "checked_config",
    "did_you_mean",
    "in_order",
    "problems_of",
    "problems_of_plugin",
    "rejected",
]

Model = TypeVar("Model", bound=BaseModel)


LONGEST_NAME = 256  # a longer one is not looked for among those that are known: that takes a time squared


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One mistake in a configuration. `path` begins where the configuration does; `line` counts from 1."""

    path: Path
    message: str
    hint: str | None = None
    code: str = ConfigValidationError.code
    line: int | None = None

    def under(self, *path: str | int) -> ConfigProblem:
        """The same mistake, seen from the configuration that holds this one at that path."""
        return replace(self, path=(*path, *self.path))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": json_path(self.path),
            "line": self.line,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
        }

    @property
    def text(self) -> str:
        """Line, path and message."""
        line = f"line {self.line}: " if self.line is not None else ""
        return f"{line}{json_path(self.path) or 'the file'}: {self.message}"

    def __str__(self) -> str:
        code = f" ({self.code})" if self.code != ConfigValidationError.code else ""
        return f"{self.text}{f'; {self.hint}' if self.hint else ''}{code}"


def in_order(problem: ConfigProblem) -> tuple[int, str]:
    """The key that sorts problems as they stand in the file."""
    return problem.line or 0, json_path(problem.path)


def rejected(source: str, problems: Sequence[ConfigProblem]) -> ConfigValidationError:
    """The error that tells of all problems of a configuration."""
    return ConfigValidationError(
        "\n  ".join([f"{source}:", *map(str, problems)]),
        file=source,
        problems=[problem.to_dict() for problem in problems],
    )


def did_you_mean(name: str, known: Iterable[str], what: str = "known") -> str:
    """A question where a known name is near, else the known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1) if len(name) <= LONGEST_NAME else []
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(names)}" if names else f"{what}: none"


Standing = Callable[[Path], tuple[Path, str]]
"""Says of a path the part of it that exists in a document, and what was found there, as a text to add."""


def problems_of(
    error: ValidationError, model: type[BaseModel] | None = None, *, standing: Standing | None = None
) -> list[ConfigProblem]:
    """What pydantic found; an unknown key of `model` itself gets a suggestion. Shows no value by itself."""
    return [
        _problem_of(dict(found), model, standing)
        for found in error.errors(include_url=False, include_input=False)
    ]


def _problem_of(
    found: Mapping[str, Any], model: type[BaseModel] | None, standing: Standing | None
) -> ConfigProblem:
    path: Path = tuple(found["loc"])
    context = found.get("ctx") or {}
    if "text" in context:  # a check of ours, which says all there is to say
        return ConfigProblem((*path, *context["key"]), context["text"], context["hint"])
    if found["type"] == "extra_forbidden" and model is not None and len(path) == 1:
        return ConfigProblem(
            path, "unknown key", did_you_mean(str(path[0]), model.model_fields, "known keys")
        )
    text = str(found["msg"])
    path, shown = standing(path) if standing is not None else (path, "")
    return ConfigProblem(path, f"{text[:1].lower()}{text[1:]}{shown}")


# --- plugins ---------------------------------------------------------------------------------------------


def checked_config(model: type[Model], config: Mapping[str, Any], owner: str) -> Model:
    """The config of a plugin, checked by its model.

    Raises `PluginConfigError` that names the plugin (`owner`) and every wrong key, and shows no value.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        problems = problems_of(error, model)
    raise PluginConfigError(f"{owner}: {'; '.join(map(str, problems))}", problems=problems)


def problems_of_plugin(error: OpenAgentsError, ref: Any) -> list[ConfigProblem]:
    """What is wrong with a plugin, seen from its reference in the agents file."""
    told: Sequence[ConfigProblem] = getattr(error, "problems", ())
    if told:
        return [replace(problem, code=error.code).under("config") for problem in told]
    place = "config" if isinstance(error, PluginConfigError) else "impl" if ref.impl else "type"
    return [ConfigProblem((place,), error.message, error.hint, error.code)]
