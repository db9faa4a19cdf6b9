"""Digests of prompts: the same for the same question, another one for whatever changes the answer."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.llm.base import FixedMessage
from openagents_worker.runtime.prompts import PromptDigests

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "hi"}


def digests(messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    return PromptDigests().digests_of({"messages": messages, **options}, {}, "")


def test_a_message_that_is_changed_in_place_is_another_question() -> None:
    """A pattern may use one list and one message again and again."""
    seen, known, message = PromptDigests(), {}, dict(USER)
    found = []
    for text in ("a", "b", "c", "a"):
        message["content"] = text
        found.append(seen.digests_of({"messages": [SYSTEM, message]}, known, ""))
    assert len(set(found)) == 3
    assert found[0] == found[3]


def test_a_part_of_a_message_that_is_changed_in_place_is_seen() -> None:
    """Also deep inside."""
    seen, known = PromptDigests(), {}
    part = {"type": "text", "text": "a"}
    message = {"role": "user", "content": [part]}
    before = seen.digests_of({"messages": [message]}, known, "")
    part["text"] = "b"
    assert seen.digests_of({"messages": [message]}, known, "") != before


def test_a_prompt_that_grows_is_what_it_is_when_read_at_once() -> None:
    """What was kept of a conversation changes nothing; others in between do not, either."""
    seen, known, messages = PromptDigests(), {}, [FixedMessage(SYSTEM)]
    for number in range(20):
        messages.append(FixedMessage(role="user", content=str(number)))
        grown = seen.digests_of({"messages": list(messages)}, known, "")
        assert grown == digests([dict(message) for message in messages])
        seen.digests_of({"messages": [USER, {"role": "user", "content": str(number)}]}, known, "")
    shortened = [messages[0], *messages[5:]]
    assert seen.digests_of({"messages": shortened}, known, "") == digests(
        [dict(message) for message in shortened]
    )


def test_ids_of_tool_calls_count_by_their_order() -> None:
    """A provider that sends none gets new ones every time."""

    def turn(*ids: str) -> list[dict[str, Any]]:
        calls = [{"id": id_, "name": "add", "arguments": {}} for id_ in ids]
        results = [{"role": "tool", "tool_call_id": id_, "name": "add", "content": "1"} for id_ in ids]
        return [USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results]

    assert digests(turn("x", "y")) == digests(turn("call_1", "call_2"))
    swapped = turn("x", "y")
    swapped[2]["tool_call_id"], swapped[3]["tool_call_id"] = "y", "x"
    assert digests(swapped) != digests(turn("x", "y"))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "m2"},
        {"temperature": 0.5},
        {"max_tokens": 5},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_whatever_changes_the_answer_is_asked(options: dict[str, Any]) -> None:
    """Another model, other tools, other options: another question, in its core, too."""
    plain = digests([SYSTEM, USER])
    other = digests([SYSTEM, USER], **options)
    assert plain[0] != other[0]
    assert plain[1] != other[1]


@pytest.mark.parametrize("field", ["cache_control", "metadata"])
def test_what_does_not_change_the_answer_is_not_asked(field: str) -> None:
    assert digests([SYSTEM, USER]) == digests([SYSTEM, {**USER, field: {"type": "ephemeral"}}])


def test_the_core_is_the_prompt_without_instructions() -> None:
    """A date in the system prompt changes the question, and not its core."""
    monday, tuesday = ({"role": role, "content": "It is late."} for role in ("system", "developer"))
    whole, core = digests([monday, USER])
    other, same = digests([tuesday, USER])
    assert whole != other
    assert core == same == digests([USER])[1]
    assert core != digests([{"role": "user", "content": "bye"}])[1]
