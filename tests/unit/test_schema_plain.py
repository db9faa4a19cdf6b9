"""Plain schemas: the fast check never accepts what the complete check rejects."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker.json_schema.plain import acceptance_of
from openagents_worker.json_schema.rules import read_schema

WORDS = st.sampled_from(["", "a", "b", "ab", "abc"])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 1.0, 1.5, True, False, float("nan"), float("inf"), 10**400])
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
TYPES = st.sampled_from(["array", "boolean", "integer", "null", "number", "object", "string"])
BOUNDS = st.sampled_from([0, 1, 2, 1.5])
LENGTHS = st.sampled_from([0, 1, 2])


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.booleans(),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries(
            {},
            optional={
                "type": st.one_of(TYPES, st.lists(TYPES, min_size=1, max_size=3, unique=True)),
                "title": WORDS,
                "enum": st.lists(st.one_of(WORDS, st.sampled_from([None, True, 1])), min_size=1, max_size=3),
                "const": st.one_of(WORDS, st.sampled_from([None, True, 1])),
                "properties": st.dictionaries(WORDS, inner, max_size=2),
                "required": st.lists(WORDS, max_size=2, unique=True),
                "additionalProperties": inner,
                "items": inner,
                "minItems": LENGTHS,
                "maxItems": LENGTHS,
                "minLength": LENGTHS,
                "maxLength": LENGTHS,
                "minimum": BOUNDS,
                "maximum": BOUNDS,
                "exclusiveMinimum": BOUNDS,
                "not": inner,
            },
        ),
    )


SCHEMAS = st.recursive(st.sampled_from([{}, True, {"type": "string"}]), _schemas, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, VALUES)
def test_what_the_fast_check_accepts_is_valid(schema: Any, value: Any) -> None:
    """It may reject a valid value, which the complete check then accepts."""
    if acceptance_of(schema)(value):
        jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    "value",
    [
        {"city": "Bern"},
        {"city": "Bern", "days": 3, "unit": "C", "tags": ["a", "b"], "until": None, "more": {"any": [1]}},
    ],
)
def test_usual_arguments_are_accepted_without_the_complete_check(value: Any) -> None:
    """The schema of a function with simple parameters, as pydantic writes it."""
    schema = {
        "type": "object",
        "title": "Forecast",
        "properties": {
            "city": {"type": "string", "minLength": 1, "description": "the name of the city"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14, "default": 1},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 9},
            "until": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
            "more": {"type": "object"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    read_schema(schema)

    assert acceptance_of(schema)(value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "string"}}},
        {"type": "string", "pattern": "a"},
        {"minimum": 1},
        {"type": "string", "unknown": 1},
    ],
)
def test_a_schema_with_other_rules_accepts_nothing(schema: Any) -> None:
    """Whatever is not known here is left to the complete check."""
    assert not any(acceptance_of(schema)(value) for value in ("a", 1, None, {}, []))
