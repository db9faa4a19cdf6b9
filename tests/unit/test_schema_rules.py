"""The rules for JSON Schemas: what is refused where a run is submitted or a worker starts, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from openagents_worker import RunRequest
from openagents_worker.errors import RequestInvalid
from openagents_worker.json_schema import keywords, rules
from openagents_worker.json_schema.rules import SchemaProblem, read_schema
from openagents_worker.models import parse_request
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from tests.support.refused_schemas import REFUSED, wide


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_is_refused_with_the_reason(name: str) -> None:
    """The text says where in the schema, what is wrong, and what the limit is."""
    schema, says = REFUSED[name]

    with pytest.raises(SchemaProblem) as refused:
        read_schema(schema)

    assert says in str(refused.value)
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("name", [name for name in REFUSED if isinstance(REFUSED[name][0], dict)])
def test_a_request_with_such_a_schema_is_refused_before_anything_is_accepted(name: str) -> None:
    """The producer needs nothing but the base installation to know it."""
    fields = {"agent_id": "a", "session_id": "s", "input_text": "hi", "output_type": REFUSED[name][0]}

    with pytest.raises(RequestInvalid) as refused:
        parse_request(fields)

    assert refused.value.code == "request.invalid"
    assert "output_type" in str(refused.value)


class Node(BaseModel):
    name: str = Field(pattern=r"^\w+$")
    children: list[Node] = []
    other: Node | dict[str, Node] | None = None


class City(BaseModel):
    name: str
    at: tuple[float, float]


class Trip(BaseModel):
    start: City
    stops: list[City]
    by: dict[str, City | int]


@pytest.mark.parametrize(
    ("schema", "is_bounded"),
    [
        ({}, True),
        (True, True),
        (Trip.model_json_schema(), True),
        (Node.model_json_schema(), False),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {}}, True),
        ({"$id": "https://x/s", "$ref": "https://x/s#/$defs/a", "$defs": {"a": {}}}, True),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", "type": "null"}}}, True),
        ({"$ref": "#/properties/a~1b%20c", "properties": {"a/b c": {}}}, True),
        ({"allOf": [{}] * 100, "x-own": [1, {"type": 5}]}, True),
        (wide(1_500), True),
        ({"uniqueItems": False, "maxItems": 3.0}, True),
        ({"uniqueItems": True}, False),
        ({"pattern": "^(?=.*[a-z])[a-z0-9]+$"}, False),
        ({"patternProperties": {"^x-": {}}}, False),
        ({"unevaluatedProperties": False}, False),
    ],
)
def test_what_is_allowed_says_whether_its_cost_is_bounded(schema: Any, is_bounded: bool) -> None:
    """Recursion, patterns and comparisons of everything with everything have no bound known beforehand."""
    assert (read_schema(schema).steps is not None) == is_bounded


@pytest.mark.parametrize("name", sorted(BUILTIN_TOOLS))
def test_our_own_tools_are_checked_at_once(name: str) -> None:
    """None of them needs another process."""
    steps = read_schema(BUILTIN_TOOLS[name]({}).schema()).steps

    assert steps is not None
    assert steps < 200


def test_the_steps_of_a_schema_are_those_of_each_way_through_it() -> None:
    """A definition counts as often as it is referred to."""
    once = read_schema({"properties": {"a": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"enum": [1, 2, 3]}}})
    twice = read_schema(
        {
            "properties": {"a": {"$ref": "#/$defs/c"}, "b": {"$ref": "#/$defs/c"}},
            "$defs": {"c": {"enum": [1, 2, 3]}},
        }
    )

    assert once.steps is not None
    assert twice.steps is not None
    assert twice.steps > 1.5 * once.steps


def test_a_pydantic_class_is_read_like_its_schema() -> None:
    """A class whose pattern the worker could not use is refused where it is submitted."""

    class Letters(BaseModel):
        text: str = Field(pattern=r"^\p{L}+$")

    with pytest.raises(RequestInvalid, match="not a regular expression"):
        parse_request(RunRequest(agent_id="a", session_id="s", input_text="hi", output_type=Letters))


# --- what is accepted is a JSON Schema -------------------------------------------------------------------

KEYWORDS = sorted(
    {*rules._SCHEMA_LISTS, *rules._SINGLE_SCHEMAS, *rules._NAMED_SCHEMAS, *keywords.TEXTS, *keywords.COUNTS}
    | {*keywords.NUMBERS, *keywords.FLAGS, *keywords.LISTS, "type", "required", "dependentRequired", "const"}
)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.0, 0.5, "", "a", "object", "#", "#/$defs/a", "http://x/", "[", [], ["a"],
    ["a", "a"], ["null"], ["null", "string"], [1], [{}], [{}, True], {}, {"a": {}}, {"a": ["b"]}, {"a": 1},
    {"type": "string"}, {"type": 7}, {"(": {}},
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.dictionaries(st.sampled_from(KEYWORDS), st.sampled_from(VALUES), max_size=3),
        lambda inner: st.builds(
            lambda outer, keyword, schema: {**outer, keyword: schema},
            st.dictionaries(st.sampled_from(KEYWORDS), st.sampled_from(VALUES), max_size=2),
            st.sampled_from(["items", "not", "if"]),
            inner,
        ),
        max_leaves=4,
    )
)
def test_whatever_is_accepted_is_a_schema_for_the_checker(schema: dict[str, Any]) -> None:
    """The rules take the place of the meta schema, whose check takes a hundred times as long."""
    before = copy.deepcopy(schema)
    try:
        read_schema(schema)
    except SchemaProblem:
        return
    finally:
        assert schema == before
    Draft202012Validator.check_schema(schema)


# --- what reading costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [wide, lambda n: {"anyOf": [wide(n // 4)] * 4}, lambda n: {"enum": list(range(n))}],
    ids=["fields", "branches", "values"],
)
def test_to_read_a_schema_twice_as_large_takes_twice_the_work(make: Callable[[int], Any]) -> None:
    """Work is counted in lines of the rules that are executed."""
    small, large = (lines_executed(lambda n=n: read_schema(make(n))) for n in (400, 800))

    assert large < 2.5 * small


def lines_executed(work: Callable[[], object]) -> int:
    import sys

    count, files = 0, {rules.__file__, keywords.__file__}

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    rules._read_json_text.cache_clear()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
