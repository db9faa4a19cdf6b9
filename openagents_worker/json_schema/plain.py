"""Plain schemas: a fast check that only finds values that are certainly valid.

Most arguments of tools are valid, and most schemas have only types, properties and bounds. Such a schema is
compiled to a few functions, which take a tenth of the time of the complete check. They are strict: a value
that they do not accept may still be valid, and is checked by `mistakes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Accepts", "acceptance_of"]

Accepts = Callable[[Any], bool]
"""Whether a value is certainly valid."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}
_ANNOTATIONS = frozenset(
    {"$comment", "$schema", "default", "deprecated", "description", "examples", "format", "readOnly", "title"}
    | {"writeOnly"}
)
_KEYWORDS = frozenset(
    {"additionalProperties", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum"}
    | {"properties", "required", "type"}
)


def _accepts_nothing(_: Any) -> bool:
    """The check for a schema that is not plain."""
    return False


def _accepts_all(_: Any) -> bool:
    return True


def acceptance_of(schema: Any) -> Accepts:
    """The check for a schema. `schema` is one that `read_schema` has accepted.

    >>> accepts = acceptance_of({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}})
    >>> accepts({"n": 1}), accepts({"n": 0}), accepts({"n": 1.0})
    (True, False, False)
    """
    if schema is True:
        return _accepts_all
    if not isinstance(schema, Mapping):
        return _accepts_nothing
    rules = {name: rule for name, rule in schema.items() if name not in _ANNOTATIONS}
    if not rules:
        return _accepts_all
    if set(rules) == {"anyOf"}:
        return _any_of([acceptance_of(each) for each in rules["anyOf"]])
    if rules.keys() <= {"enum", "type"} and rules.get("type", "string") == "string":
        return _one_of(rules["enum"]) if "enum" in rules else _of_types({str: _accepts_all})
    if not rules.keys() <= _KEYWORDS or "type" not in rules:
        return _accepts_nothing
    names = [rules["type"]] if isinstance(rules["type"], str) else rules["type"]
    kinds = [kind for name in names for kind in _TYPES[name]]
    return _of_types({kind: _CHECK_OF_KIND[kind](rules) for kind in kinds})


def _of_types(checks: Mapping[type, Accepts]) -> Accepts:
    def accepts(value: Any) -> bool:
        check = checks.get(type(value))
        return check is not None and check(value)

    return accepts


def _one_of(values: Sequence[Any]) -> Accepts:
    """Only texts are compared: whether `1` equals `true` or `1.0` is decided by the complete check."""
    texts = frozenset(each for each in values if isinstance(each, str))
    return lambda value: type(value) is str and value in texts


def _any_of(branches: Sequence[Accepts]) -> Accepts:
    def accepts(value: Any) -> bool:
        return any(branch(value) for branch in branches)

    return accepts


def _without_rules(_: Mapping[str, Any]) -> Accepts:
    return _accepts_all


def _number(rules: Mapping[str, Any]) -> Accepts:
    return _between(rules.get("minimum"), rules.get("maximum"))


def _text(rules: Mapping[str, Any]) -> Accepts:
    return _of_length(_between(rules.get("minLength"), rules.get("maxLength")))


def _list(rules: Mapping[str, Any]) -> Accepts:
    has_length = _of_length(_between(rules.get("minItems"), rules.get("maxItems")))
    item = acceptance_of(rules.get("items", True))

    def accepts(value: Any) -> bool:
        return has_length(value) and (item is _accepts_all or all(map(item, value)))

    return accepts


def _object(rules: Mapping[str, Any]) -> Accepts:
    required = frozenset(rules.get("required", ()))
    properties = {name: acceptance_of(each) for name, each in rules.get("properties", {}).items()}
    other = acceptance_of(rules.get("additionalProperties", True))

    def accepts(value: Any) -> bool:
        if not required <= value.keys():
            return False
        return all(properties.get(name, other)(item) for name, item in value.items())

    return accepts


def _between(least: float | None, most: float | None) -> Accepts:
    if least is None and most is None:
        return _accepts_all

    def accepts(number: Any) -> bool:
        return (least is None or number >= least) and (most is None or number <= most)

    return accepts


def _of_length(accepts_length: Accepts) -> Accepts:
    if accepts_length is _accepts_all:
        return _accepts_all
    return lambda value: accepts_length(len(value))


_CHECK_OF_KIND: Mapping[type, Callable[[Mapping[str, Any]], Accepts]] = {
    bool: _without_rules,
    dict: _object,
    float: _number,
    int: _number,
    list: _list,
    str: _text,
    type(None): _without_rules,
}
