"""Storable values: other values are rejected or replaced, and every reader can read the result."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, TypeAdapter

from openagents_worker.jsontext import (
    LARGEST_INTEGER,
    MAX_NESTING,
    SMALLEST_INTEGER,
    BadValue,
    NestedTooDeeply,
    canonical_json,
    check,
    dumps,
    is_whole,
    loads,
    replaced,
    whole_text,
)

HALF = "\ud800"


def nested(levels: int, bottom: Any = 1) -> Any:
    value = bottom
    for level in range(levels):
        value = [value] if level % 2 else {"x": value}
    return value


# --- refusing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path", "says"),
    [
        (HALF, "", "surrogate"),
        ({"x": [1, 2, 3, f"a{HALF}"]}, "x[3]", "surrogate"),
        ({"x": ("a", {"y": "\udfff"})}, "x[1].y", "surrogate"),
        ({HALF: 1}, "\ufffd", "surrogate"),
        (2**63, "", "64 bits"),
        (-(2**63) - 1, "", "64 bits"),
        ({"n": 10**5000}, "n", "64 bits"),
        (math.nan, "", "NaN"),
        ({"a": {"b": math.inf}}, "a.b", "NaN"),
        ([-math.inf], "[0]", "NaN"),
        (1e999, "", "NaN"),
        (nested(MAX_NESTING + 1), "x[0].x[0]", "100 levels"),
        (nested(50_001), "x[0].x[0]", "100 levels"),
        ({2**64: HALF}, f".{2**64}", "surrogate"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_by_its_path(value: Any, path: str, says: str) -> None:
    """Whoever sent it finds it, also in a large request."""
    with pytest.raises(BadValue, match=says) as raised:
        check(value)

    assert raised.value.path.startswith(path.removeprefix("."))
    assert len(str(raised.value)) < 500
    str(raised.value).encode()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        LARGEST_INTEGER,
        SMALLEST_INTEGER,
        1.7976931348623157e308,
        "😀\0",
        nested(MAX_NESTING),
        {"x": object()},
        b"\xff",
    ],
)
def test_what_breaks_no_rule_passes(value: Any) -> None:
    """A value that is not JSON is rejected by the model of the field."""
    check(value)


# --- replacing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (f"a{HALF}b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ([2**63, -(2**63) - 1], ["9223372036854775808", "-9223372036854775809"]),
        ([10**5000], [hex(10**5000)]),
        ([math.nan, math.inf, -math.inf], [None, None, None]),
        ({2: "a", None: "b", True: "c", 1.5: "d"}, {"2": "a", "null": "b", "true": "c", "1.5": "d"}),
        ({HALF: {HALF: HALF}}, {"\ufffd": {"\ufffd": "\ufffd"}}),
        ((1, (2,)), [1, [2]]),
    ],
)
def test_what_json_has_no_place_for_is_replaced(value: Any, stored: Any) -> None:
    """By its stored form: a program gets the same value live and in a replay."""
    assert replaced(value) == stored
    assert loads(dumps(replaced(value))) == stored


@pytest.mark.parametrize("value", [object(), b"x", {(1, 2): 3}, [{1}], {"x": object()}])
def test_what_is_not_json_is_not_replaced(value: Any) -> None:
    """Its meaning is unknown."""
    with pytest.raises(TypeError):
        replaced(value)


def test_a_circle_is_not_taken_for_a_deep_value() -> None:
    """The text names its type."""
    value: list[Any] = []
    value.append({"x": value})

    with pytest.raises(ValueError, match="Circular"):
        replaced(value)


@pytest.mark.parametrize("levels", [MAX_NESTING + 1, 200, 1_000, 50_000])
def test_what_is_nested_too_deeply_is_an_error(levels: int) -> None:
    """Also where Python itself would give up."""
    with pytest.raises(NestedTooDeeply, match="more than 100 levels"):
        replaced(nested(levels))


def test_a_value_that_is_read_back_as_it_is_stays_the_same_object() -> None:
    """Nothing is copied for the sake of one rule."""
    value = {"x": [nested(MAX_NESTING - 3), 1.5, "ü", LARGEST_INTEGER, None, True]}

    assert replaced(value) is value


# --- properties ------------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**4200, -(10**4200), 2**63, -(2**63) - 1])
    | st.floats()
    | st.text(st.characters())
    | st.text(st.sampled_from(["\ud800", "\udc00", "\ud83d", "\ude00", "a", "\0", "ü"]))
)
KEYS = st.text(st.characters()) | st.sampled_from([HALF, "", "a", "\ud83d\ude00"])
NASTY: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
JSON_BY_PYDANTIC: TypeAdapter[Any] = TypeAdapter(JsonValue)


@given(NASTY)
def test_every_reader_reads_what_was_replaced(value: Any) -> None:
    """Python's decoder, ours and pydantic; each returns the original value."""
    stored = replaced(value)
    text = dumps(stored)

    check(stored)
    assert loads(text) == stored
    assert loads(text.encode()) == stored
    assert json.loads(canonical_json(stored)) == stored
    assert JSON_BY_PYDANTIC.validate_json(text) == stored
    assert replaced(stored) is stored


@given(NASTY)
def test_what_is_not_refused_is_not_replaced(value: Any) -> None:
    """Both columns of the table have the same rows."""
    try:
        check(value)
    except BadValue:
        assert replaced(value) is not value
    else:
        assert replaced(value) is value


@given(st.text(st.characters()))
def test_a_whole_text_can_be_sent(text: str) -> None:
    """And one that was whole is not changed."""
    whole = whole_text(text)

    assert is_whole(whole)
    assert (whole is text) == is_whole(text)


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[NaN]",
        "Infinity",
        "[-Infinity]",
        "[" * 100_000,
        "1" * 5_000,
        b"\xff",
        '{"a":' * 5_000,
        "[1] 2",
    ],
)
def test_what_cannot_be_read_is_one_kind_of_error(text: str | bytes) -> None:
    """A reader has to handle only one class for every mistake in the text."""
    with pytest.raises(ValueError):
        loads(text)


def test_what_older_versions_have_stored_is_read() -> None:
    """The rules apply only to values that are written from now on."""
    assert loads(dumps(nested(150))) == nested(150)
    assert loads(dumps(2**200)) == 2**200


def test_nan_of_a_server_counts_as_null() -> None:
    """Some send it among log probabilities."""
    assert loads('{"logprobs": [-Infinity, NaN, 1]}', nan_is_null=True) == {"logprobs": [None, None, 1]}
