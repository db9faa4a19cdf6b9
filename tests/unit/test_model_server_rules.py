"""What the model server refuses of a chat completion: a request that passes is accepted by every server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.testing.model_server.openai_rules import check_request
from openagents_worker.testing.model_server.wire_format import InvalidRequest

Body = dict[str, Any]

GOOD: Body = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What is 1+1?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Thanks."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "now"}},
    ],
    "tool_choice": "auto",
}


def test_a_conversation_with_calls_and_results_is_accepted() -> None:
    """Results of one message's calls may come in any order."""
    check_request(GOOD)


def test_what_official_clients_send_along_is_accepted() -> None:
    """A name with a result, text or none beside calls, the field of an older form with nothing in it."""
    body = copy.deepcopy(GOOD)
    body["messages"][2].update(content="", function_call=None, refusal=None)
    body["messages"][3].update(name="now")

    check_request(body)


def message(at: int, **fields: Any) -> Callable[[Body], None]:
    return lambda body: body["messages"][at].update(fields)


def call(**fields: Any) -> Callable[[Body], None]:
    return lambda body: body["messages"][2]["tool_calls"][1].update(fields)


def function(**fields: Any) -> Callable[[Body], None]:
    return lambda body: body["messages"][2]["tool_calls"][1]["function"].update(fields)


def without(at: int) -> Callable[[Body], None]:
    return lambda body: body["messages"].pop(at)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(messages=[]), "Invalid 'messages'"),
        (lambda body: body.update(messages="hi"), "Invalid 'messages'"),
        (lambda body: body["messages"].append("hi"), r"'messages\[7\]': expected an object"),
        (message(1, role="human"), r"messages\[1\]\.role'"),
        (message(1, role=None), r"messages\[1\]\.role'"),
        (message(1, content=""), r"messages\[1\]\.content': it must not be empty"),
        (message(0, content=" \n"), r"messages\[0\]\.content': it must not be empty"),
        (message(5, content=""), r"messages\[5\]\.content': it must not be empty"),
        (message(5, content=None), r"messages\[5\]\.content': expected a string, got null"),
        (message(1, content=[]), "expected a string or an array of parts"),
        (message(1, content=[{"type": "text", "text": ""}]), "expected a string or an array of parts"),
        (message(3, content={"a": 1}), "expected a string or an array of parts"),
        (message(1, run_id="r1"), r"Unknown parameter: 'messages\[1\]\.run_id'"),
        (message(3, is_error=True), r"Unknown parameter: 'messages\[3\]\.is_error'"),
        (message(5, tool_calls=[]), "minimum length of 1"),
        (message(5, function_call={"name": "add", "arguments": "{}"}), "it was replaced by 'tool_calls'"),
        (call(id=""), r"tool_calls\[1\]\.id"),
        (call(id="c1"), "must be unique"),
        (call(type="tool"), "expected 'function'"),
        (function(name=""), "does not match pattern"),
        (function(name=None), "does not match pattern"),
        (function(name="say hi!"), "does not match pattern"),
        (function(name="x" * 65), "does not match pattern"),
        (function(arguments={}), "expected the JSON of an object"),
        (function(arguments=""), "expected the JSON of an object"),
        (function(arguments="[1]"), "expected the JSON of an object"),
        (function(arguments="{"), "expected the JSON of an object"),
        (without(3), "did not have response messages: c2"),
        (without(2), r"messages\[2\] with role 'tool' must be a response"),
        (message(3, tool_call_id="c1"), r"messages\[4\] with role 'tool' must be a response"),
        (message(3, tool_call_id=None), "tool_call_id"),
        (lambda body: body["messages"].insert(4, {"role": "user", "content": "?"}), "did not have response"),
        (lambda body: body["messages"].extend(body["messages"][2:5]), "must be unique"),
        (lambda body: body.update(tools=[]), "Invalid 'tools'"),
        (lambda body: body.pop("tools"), "only allowed when 'tools'"),
        (lambda body: body["tools"][1]["function"].update(name="add"), "names of tools must be unique"),
        (lambda body: body["tools"][1]["function"].update(name="a.b"), "does not match pattern"),
        (lambda body: body["tools"][0]["function"].update(parameters={}), "must be a JSON Schema of"),
    ],
)
def test_what_one_of_them_would_refuse_is_refused_and_named(
    change: Callable[[Body], None], said: str
) -> None:
    """The text is what a developer needs: which message or tool, and what is wrong with it."""
    body = copy.deepcopy(GOOD)
    change(body)

    with pytest.raises(InvalidRequest, match=said):
        check_request(body)
