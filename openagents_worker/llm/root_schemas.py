"""Roots of schemas: the only place that writes a tool's schema without what providers refuse at its root.

Anthropic and OpenAI refuse a whole request if one of its tools has `anyOf`, `oneOf` or `allOf` at the root of
its schema; OpenAI refuses `enum`, `const` and `not` there, too. Tools of MCP servers have such schemas. They
are sent as one object with the properties of all branches, and the description of the tool says which of
these belong together. The arguments of a call are checked with the complete schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from openagents_worker.json_schema.places import MISSING, at_pointer
from openagents_worker.jsontext import dumps

__all__ = ["REFUSED_AT_ROOT", "accepted_function", "accepted_tool"]

REFUSED_AT_ROOT = ("anyOf", "oneOf", "allOf", "enum", "const", "not")
MAX_DEPTH = 16
"""Levels of branches and references that are followed. What is below them is not described."""
MAX_RULE_CHARS = 500
"""OpenAI accepted 1,024 characters of a description for long, and some servers with its API still do."""

ANYTHING: tuple[Any, ...] = (True, {})
"""The schemas that say nothing."""

Schema = Mapping[str, Any]


def accepted_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function tool in OpenAI's format with an accepted schema; another tool as it is."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or (accepted := accepted_function(function)) is function:
        return tool
    return {**tool, "function": accepted}


def accepted_function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool with a schema whose root every provider accepts; usually as it is.

    >>> schema = {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    >>> accepted = accepted_function({"name": "t", "parameters": schema})
    >>> accepted["parameters"]
    {'properties': {'a': {}, 'b': {}}, 'type': 'object'}
    >>> accepted["description"]
    'The arguments must have at least one of these sets: a; b.'
    """
    schema = function.get("parameters")
    if not isinstance(schema, Mapping) or schema.keys().isdisjoint(REFUSED_AT_ROOT):
        return function
    merged = _Merging(schema).of(schema, MAX_DEPTH)
    kept = {name: value for name, value in schema.items() if name not in (*REFUSED_AT_ROOT, "$ref")}
    parameters = {**kept, "type": "object", "properties": merged.properties}
    if merged.required:
        parameters["required"] = list(merged.required)
    rules = [rule for rule in merged.rules if len(rule) <= MAX_RULE_CHARS]
    texts = [text for text in (function.get("description"), *rules) if text]
    # A strict schema requires all of its properties, so one with branches was never strict.
    rest = {name: value for name, value in function.items() if name != "strict"}
    return {**rest, "parameters": parameters} | ({"description": "\n\n".join(texts)} if texts else {})


class _Merged(NamedTuple):
    """What a schema with all of its branches says of an object."""

    properties: dict[str, Any]
    required: Sequence[str]
    rules: Sequence[str]
    """What properties and required names do not say, as sentences."""


class _Merging:
    """Merges the branches of one schema."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def of(self, schema: Any, depth: int) -> _Merged:
        """The schema and its branches as one object. What is required in every branch is required."""
        if depth <= 0 or not isinstance(schema, Mapping):
            return _Merged({}, (), ())
        properties: dict[str, Any] = {
            name: self._without_refs_to_branches(part, depth)
            for name, part in _mapping(schema.get("properties")).items()
        }
        required, rules = _names(schema.get("required")), list[str]()
        for part in [*self._referred(schema), *_branches(schema, "allOf")]:
            inner = self.of(part, depth - 1)
            properties = _both(properties, inner.properties)
            required, rules = [*required, *inner.required], [*rules, *inner.rules]
        for keyword in ("anyOf", "oneOf"):
            if branches := [self.of(part, depth - 1) for part in _branches(schema, keyword)]:
                own = {name: part for name, part in properties.items() if part not in ANYTHING}
                properties = {**properties, **_either(branches), **own}
                required = [*required, *_common(branches)]
                rules += _rule(keyword, branches)
        return _Merged(properties, tuple(dict.fromkeys(required)), rules)

    def _referred(self, schema: Schema) -> list[Any]:
        """The schema that this one refers to."""
        ref = schema.get("$ref")
        return [self._target(ref)] if isinstance(ref, str) else []

    def _target(self, ref: str) -> Any:
        base, _, pointer = ref.partition("#")
        found = MISSING if base or not pointer.startswith("/") else at_pointer(self._root, unquote(pointer))
        return {} if found is MISSING else found

    def _without_refs_to_branches(self, value: Any, depth: int) -> Any:
        """A part of the schema in which nothing refers to a branch of the root: these are not sent.
        JavaScript's libraries write such references for what two branches have in common."""
        if isinstance(value, list):
            return [self._without_refs_to_branches(item, depth) for item in value]
        if not isinstance(value, Mapping):
            return value
        ref = value.get("$ref")
        if isinstance(ref, str) and ref.startswith(tuple(f"#/{name}/" for name in REFUSED_AT_ROOT)):
            return {} if depth <= 0 else self._without_refs_to_branches(self._target(ref), depth - 1)
        return {name: self._without_refs_to_branches(item, depth) for name, item in value.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list | tuple) else []


def _branches(schema: Schema, keyword: str) -> list[Any]:
    branches = schema.get(keyword)
    return list(branches) if isinstance(branches, list | tuple) else []


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of two schemas that apply to the same object."""
    joined = dict(first)
    for name, part in second.items():
        known = joined.get(name, True)
        if known in ANYTHING or known == part:
            joined[name] = part
        elif part not in ANYTHING:
            joined[name] = {"allOf": [known, part]}
    return joined


def _either(branches: Sequence[_Merged]) -> dict[str, Any]:
    """The properties of all branches, of which one applies."""
    found: dict[str, list[Any]] = {}
    for branch in branches:
        for name, part in branch.properties.items():
            if part not in (parts := found.setdefault(name, [])):
                parts.append(part)
    return {name: parts[0] if len(parts) == 1 else _any_of(parts) for name, parts in found.items()}


def _any_of(parts: list[Any]) -> Any:
    return {} if any(part in ANYTHING for part in parts) else {"anyOf": parts}


def _common(branches: Sequence[_Merged]) -> list[str]:
    return [name for name in branches[0].required if all(name in branch.required for branch in branches)]


def _rule(keyword: str, branches: Sequence[_Merged]) -> list[str]:
    """The sentence that says which names belong together; none if a branch requires nothing of its own."""
    common = _common(branches)
    sets = list(dict.fromkeys(_set(branch, common) for branch in branches))
    if not all(sets) or len(sets) < 2:
        return []
    number = "exactly one" if keyword == "oneOf" else "at least one"
    return [f"The arguments must have {number} of these sets: {'; '.join(sets)}."]


def _set(branch: _Merged, common: Sequence[str]) -> str:
    """What a branch requires and others do not: names, and fixed values."""
    shown = []
    for name in branch.required:
        schema = _mapping(branch.properties.get(name))
        if "const" in schema:
            shown.append(f"{name} = {dumps(schema['const'])}")
        elif name not in common:
            shown.append(name)
    return ", ".join(shown)
