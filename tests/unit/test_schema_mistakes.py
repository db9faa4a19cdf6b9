"""Argument checks: what the model reads when its arguments do not fit the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.json_schema.mistakes import mistakes
from openagents_worker.json_schema.rules import read_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1},
        "mode": {"enum": ["w", "a"]},
        "limit": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "until": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "token": {"type": "string", "pattern": "^[a-z]+$"},
    },
    "required": ["path"],
    "additionalProperties": False,
}


def check_arguments(schema: Any, params: Any) -> str | None:
    return mistakes(read_schema(schema).text, params, "argument")


@pytest.mark.parametrize("params", [{"path": "a"}, {"path": "a", "mode": "w", "until": None, "tags": ["x"]}])
def test_arguments_that_fit_are_fine(params: dict[str, Any]) -> None:
    """None means: call the tool."""
    assert check_arguments(SCHEMA, params) is None


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({}, "argument 'path' is missing"),
        ({"path": 3}, "path: expected string, got integer"),
        ({"path": ""}, "path: expected at least 1 characters, got 0"),
        ({"path": "a", "mode": "x"}, 'mode: expected one of "w", "a"'),
        ({"path": "a", "limit": 0}, "limit: expected at least 1"),
        ({"path": "a", "limit": 10}, "limit: expected at most 9"),
        ({"path": "a", "limit": True}, "limit: expected integer, got boolean"),
        ({"path": "a", "tags": ["x", 1.5]}, "tags[1]: expected string, got number"),
        ({"path": "a", "tags": ["x", "y", "z"]}, "tags: expected at most 2 items, got 3"),
        ({"path": "a", "until": "now"}, "until: expected integer or null, got string"),
        ({"path": "a", "lmit": 1}, "unknown argument 'lmit'; did you mean 'limit'?"),
        ("path=a", "expected object, got string"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_was_expected(params: Any, told: str) -> None:
    """One line says which argument, what it should be and what it was."""
    assert check_arguments(SCHEMA, params) == told


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_that_cannot_be_computed_with_is_a_mistake(number: float) -> None:
    """And no exception of the checker's."""
    assert check_arguments({"items": {"multipleOf": 0.1}}, [number]) == "a number is too large to be checked"


CHOICE = {
    "properties": {
        "who": {
            "items": {
                "anyOf": [
                    {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                    {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}},
                ]
            }
        }
    }
}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"who": ["ada"]}, "who[0]: expected object, got string"),
        ({"who": [{"id": 1}, {"id": "x"}]}, "who[1]: argument 'name' is missing"),
    ],
)
def test_of_alternatives_the_nearest_is_told_with_its_place(params: Any, told: str) -> None:
    """Once, and not once for each alternative."""
    assert check_arguments(CHOICE, params) == told


def test_a_misspelt_required_argument_is_one_story_in_two_lines() -> None:
    """The model reads both what is missing and what it wrote instead."""
    told = check_arguments(SCHEMA, {"pth": "a"})

    assert told == "unknown argument 'pth'; did you mean 'path'?; argument 'path' is missing"


def test_many_mistakes_are_counted_and_not_all_told() -> None:
    """Three are told, the rest is a number."""
    told = check_arguments(SCHEMA, {"path": "a", "a": 1, "b": 2, "c": 3, "d": 4, "e": 5})

    assert told is not None
    assert told.endswith("; and 2 more")


def test_a_rejected_value_is_never_repeated() -> None:
    """What a model sent may be a secret, and the text reaches logs and events."""
    told = check_arguments(SCHEMA, {"path": "a", "token": "SECRET-123"})

    assert told == 'token: does not satisfy pattern "^[a-z]+$"'
