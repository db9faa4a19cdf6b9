"""Variables: the only place that replaces `${VAR}` in an agents file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from openagents_worker.agents.positions import Path
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.jsontext import check, is_whole, loads
from openagents_worker.secret_forms import remember_secret
from openagents_worker.secret_names import is_secrets_name

__all__ = ["VARIABLE", "Expanded", "VariableText", "as_field_type", "expand"]

VARIABLE = re.compile(
    r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]{0,1000}))?\}"
)  # the default is limited in length, because each "${" without an end is searched that far
SHORTEST_SECRET = 8  # characters; masking shorter values would replace ordinary words


class VariableText(str):
    """A text that was exactly one variable. It is converted if its field needs a number, boolean or null."""

    __slots__ = ()


@dataclass(slots=True)
class Expanded:
    """A document with its variables replaced. Only texts are changed, so no value can break the JSON."""

    value: Any
    missing: list[ConfigProblem] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    """The replaced values, with the variable (`${NAME}`) of each."""
    _incomplete_paths: tuple[int, set[Path]] | None = None
    """A cache of `is_incomplete`: the number of missing variables, and all paths to them."""

    def is_incomplete(self, path: Path) -> bool:
        """Whether the value at this path contains a variable that is not set."""
        if self._incomplete_paths is None or self._incomplete_paths[0] != len(self.missing):
            paths = {
                problem.path[:length] for problem in self.missing for length in range(len(problem.path) + 1)
            }
            self._incomplete_paths = len(self.missing), paths
        return path in self._incomplete_paths[1]

    def masked(self, text: str) -> str:
        """The text with the values of variables, which may be secrets, replaced by their names."""
        for value, name in self.filled.items():
            text = text.replace(value, name)
        return text


def expand(document: Any, env: Mapping[str, str]) -> Expanded:
    """Replace `${VAR}` and `${VAR:-default}`. The default is used if the variable is unset or empty."""
    result = Expanded(None)

    def expanded(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: expanded(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [expanded(item, (*path, place)) for place, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = VARIABLE.sub(lambda match: value_of(match, path), value)
        return VariableText(text) if VARIABLE.fullmatch(value) else text

    def value_of(match: re.Match[str], path: Path) -> str:
        name, default = match.groups()
        value = env.get(name)
        if default is None and value is None:
            hint = f"set it, or write ${{{name}:-default}}"
            result.missing.append(
                ConfigProblem(path, f"the environment variable {name} is not set", hint=hint)
            )
            return ""
        if value is not None and not is_whole(value):
            hint = "its value is not UTF-8 text"
            result.missing.append(
                ConfigProblem(path, f"the environment variable {name} cannot be read", hint=hint)
            )
            return ""
        if is_secrets_name(name):
            remember_secret(value)
        if value and len(value) >= SHORTEST_SECRET:
            result.filled[value] = f"${{{name}}}"
        return value or default or ""

    result.value = expanded(document, ())
    return result


def as_field_type(value: Any, annotation: Any) -> Any:
    """The value for a field of this type. The text of a variable is converted to a number, boolean or null if
    the field does not accept text."""
    if not isinstance(value, VariableText) or _accepts_text(annotation):
        return value
    try:
        parsed = loads(value)
        check(parsed)
    except ValueError:
        return value  # pydantic reports the mistake
    return parsed if parsed is None or isinstance(parsed, (bool, int, float)) else value


def _accepts_text(annotation: Any) -> bool:
    if annotation is str or annotation is Any:
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    return any(_accepts_text(part) for part in get_args(annotation))
