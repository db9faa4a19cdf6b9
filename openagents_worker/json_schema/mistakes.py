"""Mistakes. The only place that finds what is wrong with a value by a JSON Schema, and says it.

What comes back is read by a model that is to try again, so it names the place and what was expected there.
It never repeats a long value: an argument may be a secret, and the text reaches logs and events. It imports
little, as it also runs in a process of its own.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from typing import Any

import jsonschema
from jsonschema.exceptions import ValidationError, best_match
from referencing import Registry

from openagents_worker.suggest import did_you_mean

__all__ = ["mistakes"]

MAX_PROBLEMS = 3  # a model mends the first few; a hundred lines of complaint only cost tokens
MAX_FOUND = 100  # mistakes looked for: the rest is "more"
MAX_SHOWN_CHARS = 120
MAX_LINE_CHARS = 1_000
MAX_KEPT_CHARS = 8_192  # of a compiled schema that is kept: the largest take a megabyte of memory each


def mistakes(schema: str, value: Any, part: str) -> str | None:
    """What is wrong with a value, by a schema's JSON; None when it fits. `part` is what a field is called.

    The schema must be one that `read_schema` accepts.

    >>> mistakes('{"required": ["city"]}', {}, "field")
    "field 'city' is missing"
    """
    try:
        found = list(islice(_validator(schema).iter_errors(value), MAX_FOUND))
    except (ArithmeticError, ValueError):  # as when 10**400 is to be a multiple of 0.1
        return "a number is too large to be checked"
    problems = sorted(found, key=lambda problem: list(map(str, problem.absolute_path)))
    lines = list(dict.fromkeys(line for problem in problems for line in _lines(problem, part)))
    more = f"; and {len(lines) - MAX_PROBLEMS} more" if len(lines) > MAX_PROBLEMS else ""
    return "; ".join(_short(line) for line in lines[:MAX_PROBLEMS]) + more if lines else None


def _validator(schema: str) -> jsonschema.Draft202012Validator:
    return _kept(schema) if len(schema) <= MAX_KEPT_CHARS else _compiled(schema)


@lru_cache(maxsize=256)
def _kept(schema: str) -> jsonschema.Draft202012Validator:
    return _compiled(schema)


def _compiled(schema: str) -> jsonschema.Draft202012Validator:
    """The compiled schema; with an empty registry, which fetches nothing."""
    return jsonschema.Draft202012Validator(json.loads(schema), registry=Registry())


def _lines(problem: ValidationError, part: str) -> list[str]:
    where = _short(problem.json_path.removeprefix("$").removeprefix("."))
    prefix = f"{where}: " if where else ""
    schema: Any = problem.schema
    given: Any = problem.instance
    if problem.validator == "additionalProperties" and problem.validator_value is False:
        known = schema.get("properties", {})
        unknown = list(islice((name for name in given if name not in known), MAX_FOUND))
        guessed = unknown[:MAX_PROBLEMS]  # the others are only counted
        guesses = [
            f"{prefix}unknown {part} {_short(repr(name))}{did_you_mean(name, known)}" for name in guessed
        ]
        return guesses + [f"{prefix}unknown {part} {name!r}" for name in unknown[MAX_PROBLEMS:]]
    if problem.validator == "required":
        absent = [name for name in schema["required"] if name not in given]
        return [f"{prefix}{part} {name!r} is missing" for name in absent]
    if problem.validator in ("anyOf", "oneOf") and problem.context and not _differ_by_type(problem):
        return _lines(best_match(problem.context), part)[:MAX_PROBLEMS]
    return [prefix + _expectation(problem)]


def _expectation(problem: ValidationError) -> str:
    wanted: Any = problem.validator_value
    given: Any = problem.instance
    match problem.validator:
        case "type":
            types = " or ".join([wanted] if isinstance(wanted, str) else wanted)
            return f"expected {types}, got {_kind(given)}"
        case "enum":
            return f"expected one of {', '.join(map(_json, wanted))}"
        case "minimum":
            return f"expected at least {wanted}"
        case "maximum":
            return f"expected at most {wanted}"
        case "minLength" | "maxLength":
            return f"expected {_bound(problem)} {wanted} characters, got {len(given)}"
        case "minItems" | "maxItems":
            return f"expected {_bound(problem)} {wanted} items, got {len(given)}"
        case "anyOf" | "oneOf" if problem.context:
            alternatives = dict.fromkeys(str(inner.validator_value) for inner in problem.context)
            return f"expected {' or '.join(alternatives)}, got {_kind(given)}"
    shown = json.dumps(wanted, ensure_ascii=False)[:MAX_SHOWN_CHARS]
    return f"does not satisfy {problem.validator} {shown}"


def _differ_by_type(problem: ValidationError) -> bool:
    """Whether the value is of none of the types that the alternatives are for."""
    return all(inner.validator == "type" and not inner.path for inner in problem.context)


def _bound(problem: ValidationError) -> str:
    return "at least" if str(problem.validator).startswith("min") else "at most"


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _short(text: str) -> str:
    return text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]}…"
