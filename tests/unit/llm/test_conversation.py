"""Conversations: whatever a model or a pattern wrote, the sent messages are accepted by every chat API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.errors import LLMRateLimitError, LLMResponseError
from openagents_worker.llm.base import LLMToolCall
from openagents_worker.llm.conversation import UniqueCallIds, repaired, tool_name, usable_calls
from openagents_worker.llm.failures import is_too_long
from openagents_worker.llm.openai_chat import messages_to_wire
from openagents_worker.testing.model_server.openai_rules import check_request

NO_RESULT = {"error": "tool.no_result", "message": "the call has no result"}


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def asks(*calls: dict[str, Any], content: Any = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def call(id_: Any = "c", name: Any = "add", arguments: Any = None) -> dict[str, Any]:
    return {"id": id_, "name": name, "arguments": {} if arguments is None else arguments}


def result(id_: Any = "c", content: Any = "1", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content, **more}


# --- names and ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("add", "add"),
        ("a-b_C9", "a-b_C9"),
        ("functions.add", "functions_add"),
        ("say hi!", "say_hi"),
        ("añadir", "a_adir"),
        ("x" * 65, "x" * 64),
        ("", "unnamed_tool"),
        (" ", "unnamed_tool"),
        ("💡", "unnamed_tool"),
        (None, "unnamed_tool"),
        (7, "unnamed_tool"),
    ],
)
def test_a_name_is_made_legal(name: Any, sent: str) -> None:
    """Invalid characters become `_`. A name without any valid character becomes `unnamed_tool`."""
    assert tool_name(name) == sent


def test_calls_of_a_reply_get_ids_of_their_own() -> None:
    """The ids are unique in the whole conversation, and the same in every attempt."""
    ids = UniqueCallIds([asks(call("a"))])
    calls = [LLMToolCall("x", id=id_) for id_ in ("a", "b", "b", None, "")]

    assert [each.id for each in usable_calls(calls, ids, 3)] == ["a_2", "b", "b_2", "call_3_4", "call_3_5"]


# --- repairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "sent"),
    [
        ([user("")], [user("(empty message)")]),
        ([user(None)], [user("(empty message)")]),
        ([user([])], [user("(empty message)")]),
        ([{"role": "system", "content": ""}, user()], [user()]),
        ([user(), {"role": "assistant", "content": None}, user()], [user(), user()]),
        (
            [user(), asks(content="I see."), user()],
            [user(), {"role": "assistant", "content": "I see."}, user()],
        ),
        ([user(), result()], [user()]),
        (
            [asks(call())],
            [
                asks(call()),
                {
                    **result(content=json.dumps(NO_RESULT, separators=(",", ":"))),
                    "name": "add",
                    "is_error": True,
                },
            ],
        ),
        ([asks(call()), result(), result(content="2")], [asks(call()), result()]),
        ([asks(call()), user(), result()], [asks(call()), result(), user()]),
        (
            [asks(call(), call()), result(), result(content="2")],
            [asks(call(), call("c_2")), result(), result("c_2", "2")],
        ),
        (
            [asks(call()), result(), asks(call()), result(content="2")],
            [asks(call()), result(), asks(call("c_2")), result("c_2", "2")],
        ),
        (
            [asks(call(None, None, "no object")), result(None, name=None)],
            [asks(call("call_1", "unnamed_tool")), result("call_1", name="unnamed_tool")],
        ),
        (
            [asks({"id": "c", "type": "function", "function": {"name": "a b", "arguments": "["}}), result()],
            [asks({"id": "c", "type": "function", "function": {"name": "a_b", "arguments": "{}"}}), result()],
        ),
    ],
)
def test_what_an_api_would_refuse_is_repaired(
    messages: list[dict[str, Any]], sent: list[dict[str, Any]]
) -> None:
    """Blank text, missing results, results without calls, duplicate ids, invalid names."""
    assert repaired(messages) == sent


def test_what_is_right_stays_the_same_object() -> None:
    """Messages that break no rule are sent unchanged."""
    messages = [
        {"role": "system", "content": "Be kind."},
        user([{"type": "image_url", "image_url": {"url": "data:"}}]),
        asks(call("a"), call("b")),
        result("a"),
        result("b"),
        {"role": "assistant", "content": "2"},
    ]

    assert all(one is other for one, other in zip(messages, repaired(messages), strict=True))


# --- whatever it is --------------------------------------------------------------------------------------

TEXT = st.sampled_from(["", " ", "\n", "hi", "null"])
CONTENT = TEXT | st.none() | st.just([])
ID = st.sampled_from(["a", "b", "a_2", "", " "]) | st.none() | st.integers(0, 1)
ARGUMENTS = st.sampled_from([{}, {"x": 1}, None, "", "null", "[1]", 7, []])
CALL = (
    st.fixed_dictionaries({}, optional={"id": ID, "name": TEXT | st.none(), "arguments": ARGUMENTS})
    | st.none()
)
MESSAGE = st.one_of(
    st.builds(lambda content: {"role": "user", "content": content}, CONTENT),
    st.builds(lambda content: {"role": "system", "content": content}, CONTENT),
    st.builds(lambda content: {"role": "assistant", "content": content}, CONTENT),
    st.builds(lambda calls, content: asks(*calls, content=content), st.lists(CALL, max_size=3), CONTENT),
    st.builds(result, ID, TEXT),
)
MESSAGES = st.lists(MESSAGE, max_size=8)


@given(MESSAGES)
def test_whatever_the_messages_the_request_is_accepted(messages: list[dict[str, Any]]) -> None:
    """Checked with the rules of the strictest server."""
    check_request({"model": "m", "messages": messages_to_wire([*messages, user()])})


@given(MESSAGES)
def test_what_was_repaired_needs_no_repair(messages: list[dict[str, Any]]) -> None:
    """So a conversation may be repaired any number of times."""
    once = repaired(messages)

    assert repaired(once) == once


@given(MESSAGES, MESSAGES)
def test_a_conversation_that_grows_keeps_its_beginning(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """The sent bytes have the same prefix, which prompt caches require."""
    grown = [*before, user(), *after]
    begins = messages_to_wire([*before, user()])
    after_a_question = not any(message["role"] == "tool" for message in after[: _to_the_next_reply(after)])

    if after_a_question:
        assert messages_to_wire(grown)[: len(begins)] == begins


def _to_the_next_reply(messages: list[dict[str, Any]]) -> int:
    roles = [message["role"] for message in messages]
    return roles.index("assistant") if "assistant" in roles else len(roles)


# --- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        "openai_compatible answered 400 (context_length_exceeded): no",
        "Please reduce the length of the messages or completion.",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 199000 + 8192 > 200000",
        "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576).",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
        "the request exceeds the available context size. try increasing the context size",
        "openai_compatible answered 413: Request Entity Too Large",
    ],
)
def test_a_request_that_is_too_long_is_known_by_what_providers_say(said: str) -> None:
    """Few providers send a code for it. A limit of tokens per minute is a different error."""
    assert is_too_long(LLMResponseError(said))
    assert not is_too_long(LLMRateLimitError(said))
    assert not is_too_long(
        LLMResponseError("The response was filtered due to the content management policy.")
    )
