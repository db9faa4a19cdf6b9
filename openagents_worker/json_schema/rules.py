"""Rules for JSON Schemas. The only place that says which schemas are accepted, and how much a check may cost.

A schema comes from whoever submits a run, or from a tool. The same rules hold where it is accepted and where
it is used. They are JSON Schema draft 2020-12 with limits: of size, of nesting, of the branches that apply to
one value, of patterns. They need nothing but the standard library, so that a producer has them too.
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
    kind,
    problem,
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

MAX_SCHEMA_BYTES = 65_536  # as JSON in UTF-8: larger ones are no text that a model reads before it answers
MAX_SCHEMA_VALUES = 10_000  # JSON values in it: as many are read in some 20 ms
MAX_SCHEMA_DEPTH = 64  # levels of lists and objects: a schema of 20 nested objects has about 60
MAX_BRANCHES = 500  # schemas that apply to one and the same value once every $ref is followed
MAX_PATTERN_CHARS = 1_000
MAX_PATTERNS_CHARS = 10_000  # of all patterns together: each one is compiled where the schema is accepted
MAX_WIDE_CLASSES = 10  # [一-龥] and the like in all patterns together: Python compiles each for 5 ms
MAX_IN_PLACE_DEPTH = 64  # schemas inside of one another that apply to one value: each costs Python's stack
MAX_FOLLOWED_DEPTH = 96  # levels of a schema with every $ref followed; beyond that the cost is not computed
STEPS_OF_A_REF = 10  # to look up where a $ref leads takes as long as ten other steps

_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_ONE_SCHEMA = frozenset(
    {"not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames"}
    | {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}
)
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"})
_NOT_APPLIED = frozenset({"$defs", "definitions", "contentSchema"})
_REFS = frozenset({"$ref", "$dynamicRef"})

_UNBOUNDED = frozenset(
    {"pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"}
    | {"$dynamicRef"}
)
"""Keywords whose check may take longer than the number of values in schema and value says."""

_FLAGS_OF_PATTERN = re.compile(r"\(\?[aiLmsux-]+[):]")
_WIDE = re.compile(r"[^\x00-\xff]|\\[uUN]")


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema that is accepted. `text` is its JSON, by which a compiled one is found again.

    `steps` bounds what a check costs for each value in what is checked; None where nothing is known of that.
    """

    text: str
    steps: int | None


def read_schema(schema: Any) -> Schema:
    """The schema as it is checked with. Raises `SchemaProblem`.

    >>> read_schema({"type": "strnig"})
    Traceback (most recent call last):
        ...
    openagents_worker.json_schema.places.SchemaProblem: type: 'strnig' is not a type; types are array, \
boolean, integer, null, number, object, string
    """
    if not isinstance(schema, Mapping | bool):
        raise SchemaProblem(f"a schema is an object, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except RecursionError:
        raise SchemaProblem(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep") from None
    except (TypeError, ValueError) as error:
        raise SchemaProblem(f"it is not JSON: {error}"[:300]) from None
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise SchemaProblem(f"it has {size:,} bytes as JSON; {MAX_SCHEMA_BYTES:,} are allowed")
    return _read(text)


@lru_cache(maxsize=256)  # a tool's schema is the same text in every run
def _read(text: str) -> Schema:
    schema = json.loads(text)
    _check_size(schema)
    reading = _Reading(schema)
    reading.check()
    return Schema(text, reading.steps())


def _check_size(schema: Any) -> None:
    """Raises `SchemaProblem` for too many values, and for too many levels of them."""
    level, depth, count = [schema], 0, 1
    while level:
        inner = [value for each in level for value in _inside(each)]
        depth, count = depth + 1, count + len(inner)
        if depth > MAX_SCHEMA_DEPTH + 1:
            raise SchemaProblem(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if count > MAX_SCHEMA_VALUES:
            raise SchemaProblem(f"it has more than {MAX_SCHEMA_VALUES:,} values in it")
        level = inner


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())
    return iter(value) if isinstance(value, list) else iter(())


@dataclass(slots=True)
class _SchemaPart:
    """One schema inside of a schema, and which others are applied with it."""

    steps: int = 1
    is_bounded: bool = True
    here: list[str] = field(default_factory=list)
    """Places of the schemas that apply to the same value."""
    inside: list[str] = field(default_factory=list)


class _Reading:
    """A schema while it is read. A place in it is a JSON pointer."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._base = schema.get("$id", "") if isinstance(schema, dict) else ""
        self._parts: dict[str, _SchemaPart] = {}
        self._anchors: dict[str, str] = {}
        self._refs: list[tuple[str, str]] = []
        self._patterns: set[str] = set()

    def check(self) -> None:
        """Raises `SchemaProblem` for the first thing that is not allowed."""
        waiting: list[tuple[str, Any]] = [("", self._root)]
        while waiting:
            while waiting:
                place, schema = waiting.pop()
                if place not in self._parts:
                    waiting += self._schema(place, schema)
            refs, self._refs = self._refs, []
            for place, ref in refs:
                target, schema = self._target(place, ref)
                self._parts[place].here.append(target)
                waiting.append((target, schema))
        self._check_branches()

    # --- one schema --------------------------------------------------------------------------------------

    def _schema(self, place: str, schema: Any) -> list[tuple[str, Any]]:
        """Check the keywords of one schema; the schemas inside of it are returned with their places."""
        part = self._parts[place] = _SchemaPart()
        if isinstance(schema, bool):
            return []
        if not isinstance(schema, dict):
            raise problem(place, f"a schema is an object or a boolean, not {kind(schema)}")
        found: list[tuple[str, Any]] = []
        for keyword, value in schema.items():
            at = f"{place}/{escaped(keyword)}"
            if keyword in _SCHEMAS or keyword in _ONE_SCHEMA or keyword in _NAMED_SCHEMAS:
                inner = _schemas_of(at, keyword, value)
                found += inner
                if keyword not in _NOT_APPLIED:
                    places = [each for each, _ in inner]
                    (part.here if keyword in _IN_PLACE else part.inside).extend(places)
                    part.steps += len(places)
            else:
                self._assertion(at, place, keyword, value, part)
            if keyword in _UNBOUNDED and (keyword, value) != ("uniqueItems", False):
                part.is_bounded = False
            if keyword == "patternProperties":
                for pattern in value:
                    self._pattern(f"{at}/{escaped(pattern)}", pattern)
        return found

    def _assertion(self, at: str, place: str, keyword: str, value: Any, part: _SchemaPart) -> None:
        """A keyword that has no schemas in it; one that is not known says nothing and is left alone."""
        check_shape(at, keyword, value)
        if keyword in _REFS:
            self._refs.append((place, value))
            part.steps += STEPS_OF_A_REF
        elif keyword in ("enum", "const", "required", "dependentRequired"):
            part.steps += _count(value)
        elif keyword in ("$anchor", "$dynamicAnchor"):
            self._anchors[value] = place
        elif keyword == "$id" and place:
            raise problem(at, "$id is allowed in the outermost schema only")
        elif keyword == "pattern":
            self._pattern(at, value)
        else:
            part.steps += 1

    def _pattern(self, at: str, pattern: str) -> None:
        """Raises `SchemaProblem` for a pattern that Python's `re` does not read, or not within the limits."""
        if len(pattern) > MAX_PATTERN_CHARS:
            raise problem(at, f"a pattern has {len(pattern):,} characters; {MAX_PATTERN_CHARS:,} are allowed")
        self._patterns.add(pattern)
        if sum(map(len, self._patterns)) > MAX_PATTERNS_CHARS:
            raise problem(at, f"all patterns have more than {MAX_PATTERNS_CHARS:,} characters together")
        if sum(each.count("[") for each in self._patterns if _WIDE.search(each)) > MAX_WIDE_CLASSES:
            raise problem(at, f"patterns have more than {MAX_WIDE_CLASSES} sets of characters beyond Latin-1")
        if _FLAGS_OF_PATTERN.search(pattern):  # they are not in ECMA 262, and take long to compile
            raise problem(at, "a pattern with flags, as in (?i), is not allowed; write [Aa] for both cases")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError, ValueError, Warning) as error:
            raise problem(at, f"{pattern[:80]!r} is not a regular expression: {error}") from None

    # --- $ref --------------------------------------------------------------------------------------------

    def _target(self, place: str, ref: str) -> tuple[str, Any]:
        """Where a $ref leads, and the schema there."""
        fragment = self._fragment(ref)
        if fragment is None:
            raise problem(
                place,
                f"$ref {ref[:200]!r} leads nowhere: nothing is fetched; write #/$defs/… for a schema here",
            )
        pointer = fragment if not fragment or fragment.startswith("/") else self._anchors.get(fragment)
        found = MISSING if pointer is None else at_pointer(self._root, pointer)
        if pointer is None or found is MISSING:
            raise problem(place, f"$ref {ref[:200]!r} leads nowhere in this schema")
        return canonical(pointer), found

    def _fragment(self, ref: str) -> str | None:
        """What follows the # of a reference to this schema; None of one to another."""
        base, _, fragment = ref.partition("#")
        is_here = not base or base == self._base.partition("#")[0]
        return unquote(fragment) if is_here else None

    # --- cost --------------------------------------------------------------------------------------------

    def _check_branches(self) -> None:
        """Raises `SchemaProblem` where too many schemas apply to one value, and where they never end."""
        known: dict[str, tuple[int, int]] = {}
        for place in self._parts:
            self._branches(place, known, [])

    def _branches(self, place: str, known: dict[str, tuple[int, int]], way: list[str]) -> tuple[int, int]:
        """How many schemas apply to one value with this one, and how deep they lie in one another."""
        if place in known:
            return known[place]
        if place in way:
            raise problem(place, "a $ref leads back to its own schema without going into the value")
        if len(way) >= MAX_IN_PLACE_DEPTH:
            raise problem(
                place, f"more than {MAX_IN_PLACE_DEPTH} schemas inside of one another apply to a value"
            )
        inner = [self._branches(each, known, [*way, place]) for each in self._parts[place].here]
        count = 1 + sum(each for each, _ in inner)
        depth = 1 + max((each for _, each in inner), default=0)
        if count > MAX_BRANCHES:
            raise problem(
                place, f"with every $ref followed, more than {MAX_BRANCHES} schemas apply to one value"
            )
        if depth > MAX_IN_PLACE_DEPTH:
            raise problem(
                place, f"more than {MAX_IN_PLACE_DEPTH} schemas inside of one another apply to a value"
            )
        known[place] = count, depth
        return known[place]

    def steps(self) -> int | None:
        """How often keywords are looked at for one value, at most; None where that does not bound the cost.

        Without recursion, each way through the schema meets a value at most once. So all ways together, times
        the number of values, are the largest number of steps.
        """
        return self._steps("", {}, [])

    def _steps(self, place: str, known: dict[str, int | None], way: list[str]) -> int | None:
        if place in known:
            return known[place]
        part = self._parts[place]
        if not part.is_bounded or place in way or len(way) > MAX_FOLLOWED_DEPTH:
            return None
        total: int | None = part.steps
        for each in (*part.here, *part.inside):
            inner = self._steps(each, known, [*way, place])
            if inner is None or total is None:
                total = None
                break
            total += inner
        known[place] = total
        return total


def _schemas_of(at: str, keyword: str, value: Any) -> list[tuple[str, Any]]:
    """The schemas that stand under a keyword, with their places."""
    if keyword in _ONE_SCHEMA:
        return [(at, value)]
    if keyword in _SCHEMAS:
        if not isinstance(value, list) or not value:
            raise problem(at, f"{keyword} is a list of at least one schema")
        return [(f"{at}/{index}", each) for index, each in enumerate(value)]
    if not isinstance(value, dict):
        raise problem(at, f"{keyword} is an object of schemas, not {kind(value)}")
    return [(f"{at}/{escaped(name)}", each) for name, each in value.items()]


def _count(value: Any) -> int:
    level, count = [value], 1
    while level:
        level = [inner for each in level for inner in _inside(each)]
        count += len(level)
    return count
