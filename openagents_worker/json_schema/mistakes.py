"""Mistakes: the only place that checks a value against a JSON Schema and describes what is wrong with it.

The text is for a model that will try again, so it names the place and what was expected there. It never
repeats a long value: an argument may be a secret, and the text is written to logs and events. The module
imports little because it also runs in the check process.
"""

from __future__ import annotations

import json
import sys
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from openagents_worker.json_schema.plain import acceptance_of
from openagents_worker.suggest import did_you_mean

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

__all__ = ["is_certainly_valid", "is_validator_loaded", "load_validator", "mistakes"]

MAX_PROBLEMS = 3  # described in the text: a model corrects the first few, more would only cost tokens
MAX_FOUND = 100  # the search stops here; the text only counts those that it does not describe
MAX_SHOWN_CHARS = 120
MAX_LINE_CHARS = 1_000
MAX_CACHED_CHARS = 8_192  # longer schemas are not cached: compiled, the largest take 1 MB of memory each


def mistakes(schema: str, value: Any, part: str) -> str | None:
    """What is wrong with a value, as a text; None if it is valid. `schema` is the text of a `Schema`, which
    `read_schema` has accepted. `part` is the word for a field in the text.

    >>> mistakes('{"required": ["city"]}', {}, "field")
    "field 'city' is missing"
    """
    checks = _checks(schema)
    if checks.accepts(value):
        return None
    try:
        found = list(islice(checks.validator.iter_errors(value), MAX_FOUND))
    except (ArithmeticError, ValueError):  # for example multipleOf 0.1 for 10**400
        return "a number is too large to be checked"
    problems = sorted(found, key=lambda problem: list(map(str, problem.absolute_path)))
    lines = list(dict.fromkeys(line for problem in problems for line in _describe(problem, part)))
    more = f"; and {len(lines) - MAX_PROBLEMS} more" if len(lines) > MAX_PROBLEMS else ""
    return "; ".join(_shortened(line) for line in lines[:MAX_PROBLEMS]) + more if lines else None


def is_certainly_valid(schema: str, value: Any) -> bool:
    """Whether the fast check of a schema accepts the value. If not, `mistakes` needs the validator."""
    return _checks(schema).accepts(value)


def is_validator_loaded() -> bool:
    """Whether `mistakes` imports nothing."""
    return "jsonschema" in sys.modules


def load_validator() -> None:
    """Import what the complete check needs, which takes 0.1 s: call it in a thread.

    Most workers never need it, and it would delay the first run of each.
    """
    import jsonschema  # noqa: F401


class _Checks:
    """The fast check of a schema, and the complete one, which is made at its first use."""

    def __init__(self, schema: str) -> None:
        self._content = json.loads(schema)
        self.accepts = acceptance_of(self._content)

    @cached_property
    def validator(self) -> Draft202012Validator:
        """The compiled schema. Its registry is empty, so that no reference is fetched."""
        from jsonschema import Draft202012Validator
        from referencing import Registry

        return Draft202012Validator(self._content, registry=Registry())


def _checks(schema: str) -> _Checks:
    return _cached_checks(schema) if len(schema) <= MAX_CACHED_CHARS else _Checks(schema)


@lru_cache(maxsize=256)
def _cached_checks(schema: str) -> _Checks:
    return _Checks(schema)


def _describe(problem: ValidationError, part: str) -> list[str]:
    """One or more texts for an error of `jsonschema`, each with its place in the value."""
    where = _shortened(problem.json_path.removeprefix("$").removeprefix("."))
    prefix = f"{where}: " if where else ""
    schema: Any = problem.schema
    instance: Any = problem.instance
    if problem.validator == "additionalProperties" and problem.validator_value is False:
        known = schema.get("properties", {})
        unknown = list(islice((name for name in instance if name not in known), MAX_FOUND))
        guessed = unknown[:MAX_PROBLEMS]  # the others are only counted
        guesses = [
            f"{prefix}unknown {part} {_shortened(repr(name))}; {did_you_mean(name, sorted(known))}"
            for name in guessed
        ]
        return guesses + [f"{prefix}unknown {part} {name!r}" for name in unknown[MAX_PROBLEMS:]]
    if problem.validator == "required":
        absent = [name for name in schema["required"] if name not in instance]
        return [f"{prefix}{part} {name!r} is missing" for name in absent]
    if problem.validator in ("anyOf", "oneOf") and problem.context and not _all_expect_other_types(problem):
        from jsonschema.exceptions import best_match

        return _describe(best_match(problem.context), part)[:MAX_PROBLEMS]
    return [prefix + _expectation_text(problem)]


def _expectation_text(problem: ValidationError) -> str:
    wanted: Any = problem.validator_value
    instance: Any = problem.instance
    match problem.validator:
        case "type":
            types = " or ".join([wanted] if isinstance(wanted, str) else wanted)
            return f"expected {types}, got {_json_type(instance)}"
        case "enum":
            return f"expected one of {', '.join(map(_json, wanted))}"
        case "minimum":
            return f"expected at least {wanted}"
        case "maximum":
            return f"expected at most {wanted}"
        case "minLength" | "maxLength":
            return f"expected {_at_least_or_at_most(problem)} {wanted} characters, got {len(instance)}"
        case "minItems" | "maxItems":
            return f"expected {_at_least_or_at_most(problem)} {wanted} items, got {len(instance)}"
        case "anyOf" | "oneOf" if problem.context:
            alternatives = dict.fromkeys(str(inner.validator_value) for inner in problem.context)
            return f"expected {' or '.join(alternatives)}, got {_json_type(instance)}"
    shown = json.dumps(wanted, ensure_ascii=False)[:MAX_SHOWN_CHARS]
    return f"does not satisfy {problem.validator} {shown}"


def _all_expect_other_types(problem: ValidationError) -> bool:
    """Whether every alternative fails because the value has another type."""
    return all(inner.validator == "type" and not inner.path for inner in problem.context)


def _at_least_or_at_most(problem: ValidationError) -> str:
    return "at least" if str(problem.validator).startswith("min") else "at most"


def _json_type(value: Any) -> str:
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


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]}…"
