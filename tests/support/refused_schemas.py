"""Rejected JSON Schemas, each with the reason. The only place that lists them."""

from __future__ import annotations

from typing import Any

__all__ = ["REFUSED", "nested", "wide"]


def doubled(levels: int, keyword: str = "allOf") -> dict[str, Any]:
    """A schema of at most two kilobytes that applies 2 ** `levels` schemas to one value."""
    defs: dict[str, Any] = {
        f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "string"}}}


def nested(levels: int, keyword: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {keyword: schema}
    return schema


def chained(length: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {}}}


def wide(fields: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"field_{n:04}": {"type": "string"} for n in range(fields)}}


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], "a schema must be an object, not list"),
    "not JSON": ({"default": {1, 2}}, "it is not JSON"),
    "NaN": ({"minimum": float("nan")}, "it is not JSON"),
    "too many bytes": ({"description": "x" * 70_000}, "65,536 are allowed"),
    "too many values": ({"enum": [0] * 10_001}, "more than 10,000 values"),
    "too deep": (nested(70), "more than 64 levels deep"),
    "deeper than Python's stack": (nested(5_000), "more than 64 levels deep"),
    "not a type": ({"type": "strnig"}, "type: 'strnig' is not a type"),
    "a type twice": ({"type": ["null", "null"]}, "contains a type twice"),
    "a number as a schema": ({"properties": {"a": 1}}, "properties.a: a schema must be an object"),
    "a list of properties": ({"properties": ["a"]}, "properties: properties must be an object of schemas"),
    "items of draft 7": ({"items": [{}, {}]}, "items: a schema must be an object or a boolean, not a list"),
    "no alternative": ({"anyOf": []}, "anyOf must be a list of at least one schema"),
    "one name required": ({"required": "a"}, "required must be a list of names"),
    "a name required twice": ({"required": ["a", "a"]}, "required contains a name twice"),
    "less than nothing": ({"minLength": -1}, "minLength must be a whole number, 0 or more"),
    "half an item": ({"maxItems": 0.5}, "maxItems must be a whole number, 0 or more"),
    "a text as a limit": ({"maximum": "9"}, "maximum must be a number"),
    "multiples of nothing": ({"multipleOf": 0}, "multipleOf must be a number above 0"),
    "yes": ({"uniqueItems": "yes"}, "uniqueItems must be true or false"),
    "a number as a title": ({"title": 1}, "title must be a text"),
    "an id inside": ({"properties": {"a": {"$id": "http://x/"}}}, "$id is allowed in the outermost"),
    "a pattern that is not closed": ({"pattern": "("}, "'(' is not a regular expression"),
    "a pattern of another language": ({"pattern": r"\p{L}"}, "is not a regular expression"),
    "a pattern with groups in groups": ({"pattern": "(" * 490 + ")" * 490}, "not a regular expression"),
    "a long pattern": ({"pattern": "a" * 1_001}, "a pattern has 1,001 characters; 1,000 are allowed"),
    "a pattern as a name": ({"patternProperties": {"[": {}}}, "patternProperties.[: '[' is not a regular"),
    "many patterns": (
        {"allOf": [{"pattern": f"{n:03}" + "a" * 900} for n in range(12)]},
        "all patterns have more than 10,000 characters together",
    ),
    "a pattern with flags": ({"pattern": "(?i)abc"}, "a pattern with flags"),
    "a group with flags": ({"pattern": "(?i:abc)"}, "a pattern with flags"),
    "large sets of characters": (
        {"pattern": "[\\u0000-\\uffff]" * 11},
        "more than 10 sets with characters beyond Latin-1",
    ),
    "a ref to the web": ({"$ref": "http://10.0.0.1/s"}, "refers to another document, which is not fetched"),
    "a ref to a file": ({"items": {"$ref": "file:///etc/passwd"}}, "refers to another document"),
    "a ref to the meta schema": (
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        "refers to another document, which is not fetched",
    ),
    "a ref to nothing": ({"$ref": "#/$defs/none"}, "refers to nothing in this schema"),
    "a ref to a place of 5,000 digits": (
        {"allOf": [{}], "items": {"$ref": "#/allOf/" + "1" * 5_000}},
        "refers to nothing in this schema",
    ),
    "an id with a fragment": ({"$id": "#/$defs/a"}, "has a fragment"),
    "a ref to no anchor": ({"$ref": "#none"}, "refers to nothing in this schema"),
    "a ref to a text": ({"title": "a", "items": {"$ref": "#/title"}}, "a schema must be an object"),
    "a ref to a bad schema": (
        {"x-own": {"type": 1}, "items": {"$ref": "#/x-own"}},
        "x-own.type: type must be the name of a type",
    ),
    "a ref that is a number": ({"$ref": 1}, "$ref must be a text"),
    "itself": ({"$ref": "#"}, "refers back to its own schema"),
    "itself in a circle": (
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}}},
        "refers back to its own schema",
    ),
    "itself by an anchor": ({"$dynamicAnchor": "me", "allOf": [{"$dynamicRef": "#me"}]}, "refers back"),
    "doubled allOf": (doubled(20), "more than 500 schemas apply to one value"),
    "doubled anyOf": (doubled(20, "anyOf"), "more than 500 schemas apply to one value"),
    "doubled oneOf": (doubled(9, "oneOf"), "more than 500 schemas apply to one value"),
    "a long chain": (chained(100), "more than 64 schemas inside of one another"),
    "many alternatives": ({"anyOf": [{"const": n} for n in range(501)]}, "more than 500 schemas apply"),
}
