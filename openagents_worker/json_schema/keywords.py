"""JSON Schema keywords: the only place that checks the values of keywords that contain no subschemas."""

from __future__ import annotations

import re
from typing import Any

from openagents_worker.json_schema.places import escaped, kind_of, problem_at

__all__ = ["COUNTS", "FLAGS", "LISTS", "NUMBERS", "TEXTS", "TYPES", "check_shape"]

TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
TEXTS = frozenset(
    {"$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "title", "description", "format", "pattern"}
    | {"contentEncoding", "contentMediaType", "$ref", "$dynamicRef"}
)
COUNTS = frozenset(
    {"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"}
    | {"maxContains", "minContains"}
)
NUMBERS = frozenset({"maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "multipleOf"})
FLAGS = frozenset({"uniqueItems", "deprecated", "readOnly", "writeOnly"})
LISTS = frozenset({"enum", "examples"})
_ANCHOR = re.compile(r"[A-Za-z_][-A-Za-z0-9._]*")


def check_shape(at: str, keyword: str, value: Any) -> None:
    """Raises `SchemaProblem` if the keyword's value is not valid in draft 2020-12. `at`: a JSON pointer."""
    if keyword == "type":
        _check_type(at, value)
    elif keyword in TEXTS:
        if not isinstance(value, str):
            raise problem_at(at, f"{keyword} must be a text, not {kind_of(value)}")
        if keyword in ("$anchor", "$dynamicAnchor") and not _ANCHOR.fullmatch(value):
            raise problem_at(at, f"{keyword} {value[:80]!r} is not a valid name")
        if keyword == "$id" and "#" in value[:-1]:
            raise problem_at(at, f"$id {value[:80]!r} has a fragment; a place in a schema has $anchor")
    elif keyword in COUNTS:
        if not _is_number(value) or value < 0 or value != int(value):
            raise problem_at(at, f"{keyword} must be a whole number, 0 or more")
    elif keyword in NUMBERS:
        if not _is_number(value) or (keyword == "multipleOf" and value <= 0):
            raise problem_at(at, f"{keyword} must be a number{' above 0' * (keyword == 'multipleOf')}")
    elif keyword in FLAGS:
        if not isinstance(value, bool):
            raise problem_at(at, f"{keyword} must be true or false, not {kind_of(value)}")
    elif keyword in LISTS:
        if not isinstance(value, list):
            raise problem_at(at, f"{keyword} must be a list, not {kind_of(value)}")
    elif keyword == "required":
        _check_unique_names(at, keyword, value)
    elif keyword == "dependentRequired":
        if not isinstance(value, dict):
            raise problem_at(
                at, f"{keyword} must be an object whose values are lists of names, not {kind_of(value)}"
            )
        for name, names in value.items():
            _check_unique_names(f"{at}/{escaped(name)}", keyword, names)


def _check_type(at: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise problem_at(at, "type must be the name of a type, or a list of such names")
    for name in names:
        if name not in TYPES:
            raise problem_at(at, f"{name[:80]!r} is not a type; types are {', '.join(sorted(TYPES))}")
    if len(set(names)) < len(names):
        raise problem_at(at, "type contains a type twice")


def _check_unique_names(at: str, keyword: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise problem_at(at, f"{keyword} must be a list of names")
    if len(set(value)) < len(value):
        raise problem_at(at, f"{keyword} contains a name twice")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
