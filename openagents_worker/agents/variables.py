"""Variables. The only place that fills `${VAR}` into an agents file."""

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

__all__ = ["VARIABLE", "Expanded", "VariableText", "as_wanted", "expand"]

VARIABLE = re.compile(
    r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]{0,1000}))?\}"
)  # bounded: each start looks for its end
SHORTEST_SECRET = 8  # a shorter value is a word that may stand in any sentence


class VariableText(str):
    """A text that was one variable and nothing else: where the file wants a number, it is read as one."""

    __slots__ = ()


@dataclass(slots=True)
class Expanded:
    """A document with its variables filled in, inside of its texts only: no value can break the JSON."""

    value: Any
    missing: list[ConfigProblem] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    """The values of variables, with the names they stand under."""
    _above: tuple[int, set[Path]] | None = None
    """How many are missing, and every path that leads to one of them."""

    def is_incomplete(self, path: Path) -> bool:
        """Whether a variable that is not set stands there, or in what stands there."""
        if self._above is None or self._above[0] != len(self.missing):
            above = {
                problem.path[:length] for problem in self.missing for length in range(len(problem.path) + 1)
            }
            self._above = len(self.missing), above
        return path in self._above[1]

    def masked(self, text: str) -> str:
        """The text without the values of variables, which may be secrets: their names stand there instead."""
        for value, name in self.filled.items():
            text = text.replace(value, name)
        return text


def expand(document: Any, env: Mapping[str, str]) -> Expanded:
    """Fill in `${VAR}` and `${VAR:-default}`; the default stands where the variable is unset or empty."""
    result = Expanded(None)

    def expanded(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: expanded(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [expanded(item, (*path, place)) for place, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = VARIABLE.sub(lambda match: answer(match, path), value)
        return VariableText(text) if VARIABLE.fullmatch(value) else text

    def answer(match: re.Match[str], path: Path) -> str:
        name, default = match.groups()
        given = env.get(name)
        if default is None and given is None:
            hint = f"set it, or write ${{{name}:-default}}"
            result.missing.append(
                ConfigProblem(path, f"the environment variable {name} is not set", hint=hint)
            )
            return ""
        if given is not None and not is_whole(given):
            hint = "its value is not UTF-8 text"
            result.missing.append(
                ConfigProblem(path, f"the environment variable {name} cannot be read", hint=hint)
            )
            return ""
        if is_secrets_name(name):
            remember_secret(given)
        if given and len(given) >= SHORTEST_SECRET:
            result.filled[given] = f"${{{name}}}"
        return given or default or ""

    result.value = expanded(document, ())
    return result


def as_wanted(value: Any, annotation: Any) -> Any:
    """The value for a field of that type: a variable's text, as JSON where a number or boolean is wanted."""
    if not isinstance(value, VariableText) or _takes_text(annotation):
        return value
    try:
        read = loads(value)
        check(read)
    except ValueError:
        return value  # the field's own check says what is wrong
    return read if read is None or isinstance(read, (bool, int, float)) else value


def _takes_text(annotation: Any) -> bool:
    if annotation is str or annotation is Any:
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    return any(_takes_text(part) for part in get_args(annotation))
