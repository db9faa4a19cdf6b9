"""Checks. The only place that holds a tool's arguments, or a run's answer, against a JSON Schema.

What comes back is read by a model that is to try again, so it names the place and what was expected there.
It never repeats a long value: an argument may be a secret, and the text reaches logs and events.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jsonschema
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable

from openagents_worker.errors import PluginConfigError, RequestInvalid
from openagents_worker.jsontext import dumps

__all__ = ["check_arguments", "check_output", "check_schema", "did_you_mean"]

MAX_PROBLEMS = 3  # a model mends the first few; a hundred lines of complaint only cost tokens
MAX_SHOWN_CHARS = 120


def check_arguments(schema: Mapping[str, Any], params: Any) -> str | None:
    """What is wrong with a call's arguments, in words for the model; None when they fit the schema.

    Raises `PluginConfigError` when the schema itself is no JSON Schema (draft 2020-12).

    >>> check_arguments({"properties": {"path": {}}, "additionalProperties": False}, {"pth": "a"})
    "unknown argument 'pth'; did you mean 'path'?"
    """
    return _told(_validator(json.dumps(schema, sort_keys=True)).iter_errors(params), "argument")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises `RequestInvalid` when what a run's answer should fit is no JSON Schema (draft 2020-12)."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RequestInvalid(
            f"output_type is no JSON Schema: {error.message} at {error.json_path}",
            hint="a JSON Schema object (draft 2020-12), or a name that the deployment has registered",
        ) from error


def check_output(schema: Mapping[str, Any], value: Any) -> str | None:
    """What is wrong with a run's answer, in words for the model; None when it fits the schema.

    Raises `RequestInvalid` for a schema that refers to what is not in it: nothing is fetched.

    >>> check_output({"required": ["city"]}, {})
    "field 'city' is missing"
    """
    try:
        return _told(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value), "field")
    except (Unresolvable, RecursionError) as error:
        raise RequestInvalid(f"output_type has a $ref that leads nowhere: {error}"[:500]) from error


def _told(found: Iterable[ValidationError], part: str) -> str | None:
    problems = sorted(found, key=lambda problem: [str(part) for part in problem.absolute_path])
    lines = list(dict.fromkeys(line for problem in problems for line in _lines(problem, part)))
    more = f"; and {len(lines) - MAX_PROBLEMS} more" if len(lines) > MAX_PROBLEMS else ""
    return "; ".join(lines[:MAX_PROBLEMS]) + more if lines else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else "; none is known"


@lru_cache(maxsize=1024)  # by text: a tool's schema is the same object or an equal one at every call
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    parsed = json.loads(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(parsed)
    except SchemaError as error:
        raise PluginConfigError(
            f"a tool's schema is no JSON Schema: {error.message} at {error.json_path}",
            hint="schema() returns a JSON Schema object, draft 2020-12",
        ) from error
    return jsonschema.Draft202012Validator(parsed, registry=Registry())  # an empty one: it fetches nothing


def _lines(problem: ValidationError, part: str) -> list[str]:
    where = problem.json_path.removeprefix("$").removeprefix(".")
    prefix = f"{where}: " if where else ""
    schema: Any = problem.schema
    given: Any = problem.instance
    if problem.validator == "additionalProperties" and problem.validator_value is False:
        known = list(schema.get("properties", {}))
        unknown = [name for name in given if name not in known]
        return [f"{prefix}unknown {part} {name!r}{did_you_mean(name, known)}" for name in unknown]
    if problem.validator == "required":
        absent = [name for name in schema["required"] if name not in given]
        return [f"{prefix}{part} {name!r} is missing" for name in absent]
    return [prefix + _expectation(problem, part)]


def _expectation(problem: ValidationError, part: str) -> str:
    wanted: Any = problem.validator_value
    given: Any = problem.instance
    match problem.validator:
        case "type":
            types = " or ".join([wanted] if isinstance(wanted, str) else wanted)
            return f"expected {types}, got {_kind(given)}"
        case "enum":
            return f"expected one of {', '.join(dumps(value) for value in wanted)}"
        case "minimum":
            return f"expected at least {wanted}"
        case "maximum":
            return f"expected at most {wanted}"
        case "minLength" | "maxLength":
            return f"expected {_bound(problem)} {wanted} characters, got {len(given)}"
        case "minItems" | "maxItems":
            return f"expected {_bound(problem)} {wanted} items, got {len(given)}"
        case "anyOf" | "oneOf" if problem.context:
            return _alternatives(problem, part)
    shown = json.dumps(wanted, ensure_ascii=False)[:MAX_SHOWN_CHARS]
    return f"does not satisfy {problem.validator} {shown}"


def _alternatives(problem: ValidationError, part: str) -> str:
    types = [
        inner.validator_value for inner in problem.context if inner.validator == "type" and not inner.path
    ]
    if len(types) == len(problem.context):
        return f"expected {' or '.join(map(str, types))}, got {_kind(problem.instance)}"
    nearest = best_match(problem.context)
    return "; ".join(_lines(nearest, part))


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
