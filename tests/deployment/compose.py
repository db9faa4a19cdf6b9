"""docker-compose.yml as Compose reads it. The only place that fills in its variables, as Docker does.

Compose puts what `.env` says into `${NAME}`, `${NAME:-default}` and `${NAME:?message}`, and passes on a name
of `environment` that has no value if it is set there. (The shell's environment counts as well; not here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tests.deployment.commands import ROOT

__all__ = ["SERVICES", "Missing", "environment_of", "filled_in", "load"]


class Missing(Exception):
    """Compose refuses to start: a variable that must be set is not. Its text is what Compose says."""


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


SERVICES: dict[str, Any] = load()["services"]


def environment_of(service: str, dotenv: Mapping[str, str]) -> dict[str, str]:
    """The variables that a service's container gets."""
    given = SERVICES[service].get("environment", {})
    passed_on = {name: dotenv[name] for name, value in given.items() if value is None and name in dotenv}
    return passed_on | {
        name: filled_in(str(value), dotenv) for name, value in given.items() if value is not None
    }


def filled_in(text: str, dotenv: Mapping[str, str]) -> str:
    """The text with its variables filled in; `$$` is a dollar. Raises `Missing`."""
    filled, rest = "", text
    while (at := rest.find("$")) >= 0:
        filled, rest = filled + rest[:at], rest[at + 1 :]
        if rest.startswith("$"):
            filled, rest = filled + "$", rest[1:]
        elif rest.startswith("{"):
            inside, rest = _in_braces(rest)
            filled += _value(inside, dotenv)
        else:
            raise ValueError(f"a dollar without braces in {text!r}")
    return filled + rest


def _in_braces(text: str) -> tuple[str, str]:
    """What is between the first brace and the one that closes it, and what comes after."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:at], text[at + 1 :]
    raise ValueError(f"a brace is not closed in {text!r}")


def _value(inside: str, dotenv: Mapping[str, str]) -> str:
    name, operator, rest = inside, "", ""
    if ":" in inside:
        name, _, rest = inside.partition(":")
        operator, rest = rest[0], rest[1:]
    value = dotenv.get(name, "")
    match operator:
        case "":
            return value
        case "-":
            return value or filled_in(rest, dotenv)
        case "?":
            if not value:
                raise Missing(f"required variable {name} is missing a value: {rest}")
            return value
        case _:
            raise ValueError(f"an operator that these tests do not know: {inside!r}")
