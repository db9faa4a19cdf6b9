"""Problems: the only place that describes mistakes in a configuration, with path, message and hint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from openagents_worker.agents.positions import Path, json_path
from openagents_worker.errors import ConfigValidationError, OpenAgentsError, PluginConfigError
from openagents_worker.secret_text import mask_prose
from openagents_worker.suggest import did_you_mean

__all__ = [
    "ConfigProblem",
    "checked_config",
    "file_order",
    "problems_of",
    "problems_of_plugin",
    "rejected",
]

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One mistake in a configuration. `path` is relative to that configuration; `line` counts from 1.

    `place` is set instead of `line` for an agent that is defined in Python: its module, line and id. The
    first two parts of `path` then stand for that agent.
    """

    path: Path
    message: str
    hint: str | None = None
    code: str = ConfigValidationError.code
    line: int | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        """Mask secrets: a found value may be a secret in the wrong place."""
        object.__setattr__(self, "message", mask_prose(self.message))
        object.__setattr__(self, "hint", None if self.hint is None else mask_prose(self.hint))

    def under(self, *path: str | int) -> ConfigProblem:
        """The same problem, with `path` prepended: relative to an enclosing configuration."""
        return replace(self, path=(*path, *self.path))

    def to_dict(self) -> dict[str, Any]:
        place = {} if self.place is None else {"place": self.place}
        return {
            "path": json_path(self.path if self.place is None else self.path[2:]),
            "line": self.line,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            **place,
        }

    @property
    def text(self) -> str:
        """Line, path and message, for people."""
        if self.place is not None:
            path = json_path(self.path[2:])
            return f"{self.place}: {path}{path and ': '}{self.message}"
        line = f"line {self.line}: " if self.line is not None else ""
        return f"{line}{json_path(self.path) or 'the file'}: {self.message}"

    def __str__(self) -> str:
        code = f" ({self.code})" if self.code != ConfigValidationError.code else ""
        return f"{self.text}{f'; {self.hint}' if self.hint else ''}{code}"


def file_order(problem: ConfigProblem) -> tuple[str, int, str]:
    """A sort key: the order of the problems in the file, then those of agents in Python."""
    return problem.place or "", problem.line or 0, json_path(problem.path)


def rejected(source: str, problems: Sequence[ConfigProblem]) -> ConfigValidationError:
    """The error with all problems of a configuration."""
    return ConfigValidationError(
        "\n  ".join([f"{source}:", *map(str, problems)]),
        file=source,
        problems=[problem.to_dict() for problem in problems],
    )


FoundText = Callable[[Path], tuple[Path, str]]
"""For a path: the part of it that exists in the document, and a text that shows the value found there."""


def problems_of(
    error: ValidationError, model: type[BaseModel] | None = None, *, found_text: FoundText | None = None
) -> list[ConfigProblem]:
    """The problems of a pydantic error. An unknown key of `model` itself gets a suggestion. Values are shown
    only by `found_text`."""
    return [
        _problem_of(dict(found), model, found_text)
        for found in error.errors(include_url=False, include_input=False)
    ]


def _problem_of(
    found: Mapping[str, Any], model: type[BaseModel] | None, found_text: FoundText | None
) -> ConfigProblem:
    path: Path = tuple(found["loc"])
    context = found.get("ctx") or {}
    if "text" in context:  # an error of `agents.part.problem`, whose text is complete
        return ConfigProblem((*path, *context["key"]), context["text"], context["hint"])
    if found["type"] == "extra_forbidden" and model is not None and len(path) == 1:
        return ConfigProblem(
            path, "unknown key", did_you_mean(str(path[0]), model.model_fields, "known keys")
        )
    text = str(found["msg"])
    path, shown = found_text(path) if found_text is not None else (path, "")
    return ConfigProblem(path, f"{text[:1].lower()}{text[1:]}{shown}")


# --- plugins ---------------------------------------------------------------------------------------------


def checked_config(model: type[Model], config: Mapping[str, Any], owner: str) -> Model:
    """Check the config of a plugin with its model.

    Raises `PluginConfigError` that names the plugin (`owner`) and every invalid key, but shows no value.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        problems = problems_of(error, model)
    raise PluginConfigError(f"{owner}: {'; '.join(map(str, problems))}", problems=problems)


def problems_of_plugin(error: OpenAgentsError, ref: Any) -> list[ConfigProblem]:
    """The problems of a plugin, with paths relative to its reference (`ref`) in the agents file."""
    config_problems: Sequence[ConfigProblem] = getattr(error, "problems", ())
    if config_problems:
        return [replace(problem, code=error.code).under("config") for problem in config_problems]
    place = "config" if isinstance(error, PluginConfigError) else "impl" if ref.impl else "type"
    return [ConfigProblem((place,), error.message, error.hint, error.code)]
