"""Redaction: secrets are masked everywhere, counts are not, and the size is limited."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.models import RunBudget
from openagents_worker.redaction import (
    MASK,
    MAX_VALUES,
    TooManyValues,
    redact,
    safe_text,
    safe_url,
    shown_json,
)
from openagents_worker.secret_forms import remember_secret


@pytest.mark.parametrize(
    "key",
    ["api_key", "apiKey", "X-API-Key", "OPENAI_API_KEY", "password", "DB_PASSWORD", "clientSecret",
     "token", "access_token", "refreshTokens", "Authorization", "proxy-authorization", "Set-Cookie",
     "private_key"],
)  # fmt: skip
def test_the_value_under_a_secrets_name_is_masked(key: str) -> None:
    """Names are compared without case, `-` and camel case; a part of the name is enough."""
    assert redact({"deep": [{key: "value"}]}) == {"deep": [{key: MASK}]}
    assert redact({key: {"inner": "value"}, "n": 1})["n"] == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("input_tokens", 7), ("max_tokens", None), ("total_tokens", 3.5), ("tokens", {"input": 7}),
     ("token_count", 7), ("api_key_env", "OPENAI_API_KEY"), ("tokenizer", "cl100k"), ("has_password", True)],
)  # fmt: skip
def test_counts_and_names_of_variables_are_no_secrets(key: str, value: Any) -> None:
    """`input_tokens` is a useful count, so it is kept."""
    assert redact({key: value}) == {key: value}


def test_a_numeric_password_is_still_a_password() -> None:
    """Only a count of tokens is not masked because it is a number."""
    assert redact({"password": 1234}) == {"password": MASK}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key sk-abcdefghijkl.", f"key sk-{MASK}."),
        ("Authorization: Bearer eyJhbGciOi.J9.x", f"Authorization: Bearer {MASK}"),
        ("redis://:pw@h:1/0 and amqp://u:p@ss@h//", f"redis://:{MASK}@h:1/0 and amqp://u:{MASK}@h//"),
        ("a task-force-of-nine at http://host:8080/a@b", "a task-force-of-nine at http://host:8080/a@b"),
        ("the bearer of news", "the bearer of news"),
    ],
)
def test_secrets_inside_of_texts_are_masked(text: str, shown: str) -> None:
    """Keys, bearer tokens and URL passwords are known by their form."""
    assert safe_text(text) == shown
    assert redact([text]) == [shown]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://me:pw@h/0", f"redis://me:{MASK}@h/0"),
        ("sentinel://:a@h1:1;sentinel://:b@h2:1/0", f"sentinel://:{MASK}@h1:1;sentinel://:{MASK}@h2:1/0"),
        ("unix:///run/r.sock?db=1&password=pw", f"unix:///run/r.sock?db=1&password={MASK}"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    """Hosts and databases stay: people need them to find a fault."""
    assert safe_url(url) == shown


def test_long_wide_and_deep_values_are_cut_and_say_so() -> None:
    """A cut is always visible, with the number of missing parts."""
    assert redact("x" * 12, max_chars=10) == "x" * 10 + "… <2 more characters>"
    assert redact(list(range(5)), max_items=2) == [0, 1, "<3 more>"]
    assert redact({"a": 1, "b": 2, "c": 3}, max_items=1) == {"a": 1, "…": "<2 more>"}
    assert redact([[[1, 2]]], max_depth=2) == [["<2 more inside>"]]


class Row(list[Any]):
    """A list that counts how many of its values were looked at."""

    looked = 0

    def __iter__(self) -> Any:
        for item in super().__iter__():
            Row.looked += 1
            yield item


def test_a_value_of_very_many_values_is_not_walked_to_its_end() -> None:
    """Each level contains two hundred times the next, so reading all of it would take forever."""
    value = Row(["x"] * 200)
    for _ in range(5):
        value = Row([value] * 200)
    Row.looked = 0

    shown = redact({"rows": value, "empty": []})

    assert Row.looked <= MAX_VALUES
    assert "<200 more inside>" in json.dumps(shown)
    assert shown["empty"] == []
    Row.looked = 0
    with pytest.raises(TooManyValues):
        shown_json({"rows": value}, is_whole=True)
    assert Row.looked <= MAX_VALUES


def test_a_cut_leaves_no_half_of_a_secret() -> None:
    """A key that the cut would have split is masked first."""
    shown = redact("x" * 8 + " sk-" + "s" * 40, max_chars=20)
    assert isinstance(shown, str)
    assert "sss" not in shown


def test_a_value_that_contains_itself_comes_to_an_end() -> None:
    """State of a plugin may be anything."""
    loop: list[Any] = []
    loop.append(loop)
    assert "more inside" in json.dumps(redact(loop))


def test_what_is_not_json_becomes_its_text() -> None:
    """Models are shown by their fields; times, bytes and objects as text, NaN as null."""
    at = datetime(2026, 1, 2, tzinfo=UTC)
    assert redact({"b": b"abc", "t": at, "n": float("nan"), "m": RunBudget(max_steps=3), 1: {2}}) == {
        "b": "<3 bytes>",
        "t": str(at),
        "n": None,
        "m": RunBudget(max_steps=3).model_dump(),
        "1": [2],
    }


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_the_result_is_always_json_and_redacting_twice_changes_nothing(value: Any) -> None:
    """A stored event may be redacted again on its way out."""
    once = redact(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    assert redact(once) == once


_NAMES = ["model", "call_id", "step_index", "input_tokens", "tokens", "token", "api_key", "pässe", "n" * 70]
_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        ["at redis://:pw@host/0", "password=hunter2", "sk-abcdefghijkl", "x" * 100, "go", "\ud800"]
    ),
)
_VALUES = st.recursive(
    st.one_of(_PLAIN, st.binary(max_size=3), st.datetimes()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


class _Name(str):
    """A key that is equal to another text than it shows."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "model" or str.__eq__(self, other)


class _Text(str):
    __slots__ = ()


class _Number(int):
    pass


class _Object(dict[Any, Any]):
    pass


class _Items(list[Any]):
    pass


def _subclassed(value: Any) -> Any:
    """An equal value of other types, for which there are no short cuts."""
    match value:
        case bool():
            return value
        case str():
            return _Text(value)
        case int():
            return _Number(value)
        case list():
            return _Items(map(_subclassed, value))
        case dict():
            return _Object((_subclassed(key), _subclassed(item)) for key, item in value.items())
    return value


@given(
    payload=st.dictionaries(st.one_of(st.sampled_from(_NAMES), st.integers(0, 2)), _VALUES, max_size=40),
    options=st.sampled_from([{}, {"max_chars": 5}, {"max_items": 2}, {"max_items": None}, {"max_depth": 1}]),
)
def test_the_short_cuts_for_plain_types_change_nothing(
    payload: dict[Any, Any], options: dict[str, Any]
) -> None:
    """The values of most events have plain types, which are checked first. Each one is shown as an equal
    value of a subclass is."""
    assert repr(redact(payload, **options)) == repr(redact(_subclassed(payload), **options))


@pytest.mark.parametrize(
    ("harmless", "secret"),
    [
        ({"token": 7}, {"token": "abc"}),
        ({"token": None}, {"token": "abc"}),
        ({"tokens": 7}, {"tokens": [7]}),
        ({"password": None}, {"password": 7}),
        ({"password": True}, {"password": 7.5}),
    ],
)
def test_a_harmless_value_does_not_open_the_name_for_a_secret(
    harmless: dict[str, Any], secret: dict[str, Any]
) -> None:
    """Whether a value is masked depends on its type, too. What is remembered about a name does not change
    that."""
    for _ in range(2):
        assert redact(harmless) == harmless
    assert list(redact(secret).values()) == [MASK]


def test_a_key_that_only_claims_to_be_equal_is_shown_under_its_own_name() -> None:
    """A class of a key can have any `__eq__`. Only plain names are remembered."""
    assert redact({"model": "abc"}) == {"model": "abc"}
    key = _Name("password")
    assert redact({key: "abc"}) == {"password": MASK}


def test_a_name_is_masked_from_the_moment_when_it_becomes_known_as_a_secret() -> None:
    """Names of fields are remembered as they are shown. A new secret makes them be looked at again."""
    name = "k3y-0f-a-t3nant-9931"
    assert name in shown_json({name: 1})
    assert name in shown_json({name: 1})
    remember_secret(name)
    assert name not in shown_json({name: 1})
