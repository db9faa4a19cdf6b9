"""Rules for JSON Schemas: the only place that decides which schemas are accepted, and estimates check costs.

A schema comes from a producer or from a tool. The same rules are applied at submission and in the worker.
They are JSON Schema draft 2020-12 with limits on size, nesting, patterns, and the number of subschemas that
apply to one value. The module needs only the standard library, so that a producer can use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from openagents_worker.json_schema.keywords import check_shape
from openagents_worker.json_schema.places import (
    MISSING,
    SchemaProblem,
    at_pointer,
    canonical,
    escaped,
    kind_of,
    problem_at,
)

__all__ = [
    "MAX_BRANCHES",
    "MAX_PATTERNS_CHARS",
    "MAX_PATTERN_CHARS",
    "MAX_SCHEMA_BYTES",
    "MAX_SCHEMA_DEPTH",
    "MAX_SCHEMA_VALUES",
    "Schema",
    "SchemaProblem",
    "read_schema",
]

MAX_SCHEMA_BYTES = 65_536  # as JSON in UTF-8: a model cannot make use of a larger schema
MAX_SCHEMA_VALUES = 10_000  # JSON values in the schema; so many are read in about 20 ms
MAX_SCHEMA_DEPTH = 64  # levels of lists and objects: a schema of 20 nested objects has about 60
MAX_BRANCHES = 500  # subschemas that apply to the same value, with every $ref followed
MAX_PATTERN_CHARS = 1_000
MAX_PATTERNS_CHARS = 10_000  # of all patterns together: each one is compiled when the schema is accepted
MAX_WIDE_CLASSES = 10  # sets such as [一-龥] in all patterns together: Python compiles each in 5 ms
MAX_IN_PLACE_DEPTH = 64  # nested subschemas that apply to the same value: each uses Python's stack
MAX_EXPANDED_DEPTH = 96  # levels of a schema with every $ref followed; beyond, the cost is not computed
STEPS_PER_REF = 10  # resolving a $ref takes as long as ten other steps

_SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE_SCHEMAS = frozenset(
    {"not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames"}
    | {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}
)
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_APPLY_TO_SAME_VALUE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"})
_NOT_APPLIED = frozenset({"$defs", "definitions", "contentSchema"})
_REFS = frozenset({"$ref", "$dynamicRef"})

_UNBOUNDED_COST = frozenset(
    {"pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"}
    | {"$dynamicRef"}
)
"""Keywords whose check may take longer than in proportion to the number of values in schema and value."""

_PATTERN_FLAGS = re.compile(r"\(\?[aiLmsux-]+[):]")
_BEYOND_LATIN_1 = re.compile(r"[^\x00-\xff]|\\[uUN]")


@dataclass(frozen=True, slots=True)
class Schema:
    """An accepted schema. `text` is its JSON; compiled schemas are cached by it.

    `steps` is an upper bound for the keywords that are evaluated per JSON value in the checked value. None:
    there is no known bound.
    """

    text: str
    steps: int | None


def read_schema(schema: Any) -> Schema:
    """Check a schema and prepare it for checks of values. Raises `SchemaProblem` if it is not accepted.

    >>> read_schema({"type": "strnig"})
    Traceback (most recent call last):
        ...
    openagents_worker.json_schema.places.SchemaProblem: type: 'strnig' is not a type; types are array, \
boolean, integer, null, number, object, string
    """
    if not isinstance(schema, Mapping | bool):
        raise SchemaProblem(f"a schema must be an object, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except RecursionError:
        raise SchemaProblem(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep") from None
    except (TypeError, ValueError) as error:
        raise SchemaProblem(f"it is not JSON: {error}"[:300]) from None
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise SchemaProblem(f"it has {size:,} bytes as JSON; {MAX_SCHEMA_BYTES:,} are allowed")
    return _read_json_text(text)


@lru_cache(maxsize=256)  # a tool's schema is the same text in every run
def _read_json_text(text: str) -> Schema:
    schema = json.loads(text)
    _check_size(schema)
    reading = _SchemaReader(schema)
    reading.check()
    return Schema(text, reading.steps())


def _check_size(schema: Any) -> None:
    """Raises `SchemaProblem` for too many values, and for too many levels of nesting."""
    level, depth, count = [schema], 0, 1
    while level:
        inner = [value for each in level for value in _child_values(each)]
        depth, count = depth + 1, count + len(inner)
        if depth > MAX_SCHEMA_DEPTH + 1:
            raise SchemaProblem(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if count > MAX_SCHEMA_VALUES:
            raise SchemaProblem(f"it has more than {MAX_SCHEMA_VALUES:,} values in it")
        level = inner


def _child_values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())
    return iter(value) if isinstance(value, list) else iter(())


@dataclass(slots=True)
class _SchemaPart:
    """The cost of one subschema, and the places of the subschemas that it applies."""

    steps: int = 1
    is_bounded: bool = True
    here: list[str] = field(default_factory=list)
    """Places of subschemas that apply to the same value."""
    inside: list[str] = field(default_factory=list)
    """Places of subschemas that apply to parts of the value."""


class _SchemaReader:
    """Checks one schema and computes its cost. Places in the schema are JSON pointers."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._base = schema.get("$id", "") if isinstance(schema, dict) else ""
        self._parts: dict[str, _SchemaPart] = {}
        self._anchors: dict[str, str] = {}
        self._refs: list[tuple[str, str]] = []
        self._patterns: set[str] = set()

    def check(self) -> None:
        """Raises `SchemaProblem` for the first violation of a rule."""
        waiting: list[tuple[str, Any]] = [("", self._root)]
        while waiting:
            while waiting:
                place, schema = waiting.pop()
                if place not in self._parts:
                    waiting += self._check_schema(place, schema)
            refs, self._refs = self._refs, []
            for place, ref in refs:
                target, schema = self._resolve_ref(place, ref)
                self._parts[place].here.append(target)
                waiting.append((target, schema))
        self._check_branches()

    # --- one schema --------------------------------------------------------------------------------------

    def _check_schema(self, place: str, schema: Any) -> list[tuple[str, Any]]:
        """Check the keywords of one subschema. Returns the subschemas inside it, with their places."""
        part = self._parts[place] = _SchemaPart()
        if isinstance(schema, bool):
            return []
        if not isinstance(schema, dict):
            raise problem_at(place, f"a schema must be an object or a boolean, not {kind_of(schema)}")
        found: list[tuple[str, Any]] = []
        for keyword, value in schema.items():
            at = f"{place}/{escaped(keyword)}"
            if keyword in _SCHEMA_LISTS or keyword in _SINGLE_SCHEMAS or keyword in _NAMED_SCHEMAS:
                inner = _schemas_of(at, keyword, value)
                found += inner
                if keyword not in _NOT_APPLIED:
                    places = [each for each, _ in inner]
                    (part.here if keyword in _APPLY_TO_SAME_VALUE else part.inside).extend(places)
                    part.steps += len(places)
            else:
                self._check_keyword(at, place, keyword, value, part)
            if keyword in _UNBOUNDED_COST and (keyword, value) != ("uniqueItems", False):
                part.is_bounded = False
            if keyword == "patternProperties":
                for pattern in value:
                    self._check_pattern(f"{at}/{escaped(pattern)}", pattern)
        return found

    def _check_keyword(self, at: str, place: str, keyword: str, value: Any, part: _SchemaPart) -> None:
        """Check a keyword that contains no subschemas. Unknown keywords are ignored."""
        check_shape(at, keyword, value)
        if keyword in _REFS:
            self._refs.append((place, value))
            part.steps += STEPS_PER_REF
        elif keyword in ("enum", "const", "required", "dependentRequired"):
            part.steps += _value_count(value)
        elif keyword in ("$anchor", "$dynamicAnchor"):
            self._anchors[value] = place
        elif keyword == "$id" and place:
            raise problem_at(at, "$id is allowed in the outermost schema only")
        elif keyword == "pattern":
            self._check_pattern(at, value)
        else:
            part.steps += 1

    def _check_pattern(self, at: str, pattern: str) -> None:
        """Raises `SchemaProblem` for a pattern that exceeds a limit or that Python's `re` cannot compile."""
        if len(pattern) > MAX_PATTERN_CHARS:
            raise problem_at(
                at, f"a pattern has {len(pattern):,} characters; {MAX_PATTERN_CHARS:,} are allowed"
            )
        self._patterns.add(pattern)
        if sum(map(len, self._patterns)) > MAX_PATTERNS_CHARS:
            raise problem_at(at, f"all patterns have more than {MAX_PATTERNS_CHARS:,} characters together")
        if sum(each.count("[") for each in self._patterns if _BEYOND_LATIN_1.search(each)) > MAX_WIDE_CLASSES:
            raise problem_at(
                at, f"patterns have more than {MAX_WIDE_CLASSES} sets with characters beyond Latin-1"
            )
        if _PATTERN_FLAGS.search(pattern):  # ECMA 262 has no inline flags, and they take long to compile
            raise problem_at(
                at, "a pattern with flags, as in (?i), is not allowed; write [Aa] for both cases"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError, ValueError, Warning) as error:
            raise problem_at(at, f"{pattern[:80]!r} is not a regular expression: {error}") from None

    # --- $ref --------------------------------------------------------------------------------------------

    def _resolve_ref(self, place: str, ref: str) -> tuple[str, Any]:
        """The place to which a $ref refers, and the subschema there."""
        fragment = self._local_fragment(ref)
        if fragment is None:
            raise problem_at(
                place,
                f"$ref {ref[:200]!r} refers to another document, which is not fetched; use #/$defs/…",
            )
        pointer = fragment if not fragment or fragment.startswith("/") else self._anchors.get(fragment)
        found = MISSING if pointer is None else at_pointer(self._root, pointer)
        if pointer is None or found is MISSING:
            raise problem_at(place, f"$ref {ref[:200]!r} refers to nothing in this schema")
        return canonical(pointer), found

    def _local_fragment(self, ref: str) -> str | None:
        """The part after the # of a reference into this schema; None for a reference to another document."""
        base, _, fragment = ref.partition("#")
        is_here = not base or base == self._base.partition("#")[0]
        return unquote(fragment) if is_here else None

    # --- cost --------------------------------------------------------------------------------------------

    def _check_branches(self) -> None:
        """Raises `SchemaProblem` if too many or infinitely many subschemas apply to one value."""
        known: dict[str, tuple[int, int]] = {}
        for place in self._parts:
            self._branches(place, known, [])

    def _branches(self, place: str, known: dict[str, tuple[int, int]], path: list[str]) -> tuple[int, int]:
        """The number of subschemas that apply to a value together with this one, and their nesting depth."""
        if place in known:
            return known[place]
        if place in path:
            raise problem_at(place, "a $ref refers back to its own schema for the same value: it never ends")
        if len(path) >= MAX_IN_PLACE_DEPTH:
            raise problem_at(
                place, f"more than {MAX_IN_PLACE_DEPTH} schemas inside of one another apply to a value"
            )
        inner = [self._branches(each, known, [*path, place]) for each in self._parts[place].here]
        count = 1 + sum(each for each, _ in inner)
        depth = 1 + max((each for _, each in inner), default=0)
        if count > MAX_BRANCHES:
            raise problem_at(
                place, f"with every $ref followed, more than {MAX_BRANCHES} schemas apply to one value"
            )
        if depth > MAX_IN_PLACE_DEPTH:
            raise problem_at(
                place, f"more than {MAX_IN_PLACE_DEPTH} schemas inside of one another apply to a value"
            )
        known[place] = count, depth
        return known[place]

    def steps(self) -> int | None:
        """An upper bound for the keywords that are evaluated per JSON value. None: there is no known bound.

        Without recursion, each path through the schema reaches a value at most once. So the steps of all
        paths, multiplied by the number of values, bound the whole check.
        """
        return self._steps("", {}, [])

    def _steps(self, place: str, known: dict[str, int | None], path: list[str]) -> int | None:
        if place in known:
            return known[place]
        part = self._parts[place]
        if not part.is_bounded or place in path or len(path) > MAX_EXPANDED_DEPTH:
            return None
        total: int | None = part.steps
        for each in (*part.here, *part.inside):
            inner = self._steps(each, known, [*path, place])
            if inner is None or total is None:
                total = None
                break
            total += inner
        known[place] = total
        return total


def _schemas_of(at: str, keyword: str, value: Any) -> list[tuple[str, Any]]:
    """The subschemas in the value of a keyword, with their places."""
    if keyword in _SINGLE_SCHEMAS:
        return [(at, value)]
    if keyword in _SCHEMA_LISTS:
        if not isinstance(value, list) or not value:
            raise problem_at(at, f"{keyword} must be a list of at least one schema")
        return [(f"{at}/{index}", each) for index, each in enumerate(value)]
    if not isinstance(value, dict):
        raise problem_at(at, f"{keyword} must be an object of schemas, not {kind_of(value)}")
    return [(f"{at}/{escaped(name)}", each) for name, each in value.items()]


def _value_count(value: Any) -> int:
    level, count = [value], 1
    while level:
        level = [inner for each in level for inner in _child_values(each)]
        count += len(level)
    return count
