"""The neutral message model: what a block is, and which blocks and fields a wire format sends."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.llm.base import FinishReason, LLMResponse, LLMToolCall, LLMUsage
from openagents_worker.llm.conversation import assistant_message, repaired
from openagents_worker.llm.messages import (
    MAX_BLOCKS,
    MAX_URL_CHARS,
    block_problem,
    content_problem,
    content_text,
)
from openagents_worker.llm.openai_chat import messages_to_wire
from openagents_worker.llm.transcript import MAX_TOOL_MESSAGES_BYTES, turn_entries, usable_entries
from openagents_worker.runtime.prompts import PromptDigests

PNG = {"type": "image", "data": "iVBORw0KGgo=", "media_type": "image/png"}
OPAQUE = {"chat_completions": {"reasoning_content": "hm"}}
SIGNED = {"chat_completions": {"extra_content": {"google": {"thought_signature": "abc"}}}}
REPLY = LLMResponse(
    "I look.",
    (LLMToolCall("look", {"at": 1}, "c1", provider_fields=SIGNED), LLMToolCall("look", {}, "c2")),
    LLMUsage(1, 2, 3),
    stop_reason="tool_use",
    content=({"type": "reasoning", "text": "hm", "signature": "s"}, {"type": "text", "text": "I look."}),
    finish_reason=FinishReason.TOOL_CALLS,
    provider_fields=OPAQUE,
    request_id="req-1",
)
RESULTS = [{"role": "tool", "tool_call_id": id_, "name": "look", "content": "1"} for id_ in ("c1", "c2")]


# --- blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "hi", "citations": [{"url": "https://example.com"}]},
        {"type": "image", "url": "https://example.com/a.png", "detail": "low"},
        PNG,
        {"type": "file", "data": "AAAA", "media_type": "application/pdf", "name": "a.pdf"},
        {"type": "file", "file_id": "file-1"},
        {"type": "reasoning", "encrypted": "AAAA", "id": "rs_1", "format": "responses"},
        {"type": "refusal", "text": "No."},
        {"type": "input_audio", "input_audio": {"data": 7}},
    ],
)
def test_a_valid_block(block: dict[str, Any]) -> None:
    """A block of a type that is not neutral is not checked: it belongs to one provider's format."""
    assert block_problem(block) is None


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("hi", "a block must be an object with a type"),
        ({"type": "text"}, "a text block needs a text"),
        ({"type": "text", "text": 7}, "text must be a text"),
        ({"type": "text", "text": "hi", "citations": ["a"]}, "citations must be a list of objects"),
        ({"type": "image"}, "an image needs exactly one of url, data"),
        ({**PNG, "url": "https://example.com"}, "an image needs exactly one of url, data"),
        ({**PNG, "media_type": "png"}, "media_type is not a media type"),
        ({**PNG, "data": "iVBORw0KGgo"}, "data is not base64"),
        ({**PNG, "detail": "huge"}, "detail must be one of low, high, auto"),
        (
            {"type": "image", "url": "data:image/png;base64,AAAA"},
            "url is not a URL; send bytes as data with a media_type",
        ),
        (
            {"type": "image", "url": "https://e.com/" + "a" * MAX_URL_CHARS},
            "url has 8,206 characters, 8,192 are allowed",
        ),
        (
            {"type": "file", "data": "AAAA"},
            "a file with data needs a media_type, for example application/pdf",
        ),
    ],
)
def test_an_invalid_block(block: Any, problem: str) -> None:
    """The problem names the field and what is allowed."""
    assert block_problem(block) == problem


def test_the_number_of_blocks_is_limited() -> None:
    """Like every other size; each problem names the block."""
    assert content_problem([PNG] * (MAX_BLOCKS + 1)) == "the content has 1,001 blocks, 1,000 are allowed"
    assert content_problem(["hi", {"type": "image"}]) == "content[1]: an image needs exactly one of url, data"


# --- replies ---------------------------------------------------------------------------------------------


def test_a_reply_survives_the_journal() -> None:
    """Blocks, opaque fields, finish reason and request id are stored with it."""
    assert LLMResponse.from_wire(REPLY.to_wire()) == REPLY


def test_earlier_versions_can_read_a_reply() -> None:
    """They create the calls with the fields they know, and reject others."""
    assert [set(call) for call in REPLY.to_wire()["tool_calls"]] == [{"id", "name", "arguments"}] * 2


def test_a_reply_of_an_earlier_version_has_no_finish_reason() -> None:
    """So a replayed run decides as it did: its replies are not taken for cut ones."""
    old = {"output_text": "cut", "stop_reason": "length"}

    assert LLMResponse.from_wire(old).finish_reason is None


# --- a message of a reply --------------------------------------------------------------------------------


def test_the_next_request_contains_what_the_provider_wants_back() -> None:
    """Opaque fields of the turn and of each call; only for the wire format that wrote them."""
    message = assistant_message(REPLY, REPLY.tool_calls)

    sent = messages_to_wire([message, *RESULTS])[0]
    assert sent["reasoning_content"] == "hm"
    assert [call.get("extra_content") for call in sent["tool_calls"]] == [
        {"google": {"thought_signature": "abc"}},
        None,
    ]
    assert sent["content"] == [{"type": "text", "text": "I look."}]
    foreign = {**message, "provider_fields": {"responses": {"a": 1}}}
    assert "a" not in messages_to_wire([foreign, *RESULTS])[0]


def test_opaque_fields_never_replace_ours() -> None:
    """A field under the name of a message's own field is not sent."""
    message = {
        "role": "assistant",
        "content": "hi",
        "provider_fields": {"chat_completions": {"role": "user"}},
    }

    assert messages_to_wire([message]) == [{"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("content", "is_text"),
    [
        ((), True),
        (({"type": "text", "text": "I look."},), True),
        (({"type": "reasoning", "text": "hm"}, {"type": "text", "text": "I look."}), True),
        (({"type": "reasoning", "encrypted": "x"}, {"type": "text", "text": "I look."}), False),
        (({"type": "text", "text": "I look.", "citations": [{"n": 1}]},), False),
        (({"type": "refusal", "text": "No."},), False),
    ],
)
def test_a_message_has_blocks_only_if_they_say_more(content: Any, is_text: bool) -> None:
    """Text stays text, which earlier versions and most servers understand."""
    message = assistant_message(LLMResponse("I look.", content=content))

    assert isinstance(message["content"], str) is is_text


def test_the_transcript_keeps_the_opaque_fields() -> None:
    """If they make the turn too large, only they are left out: providers need them in their own turn."""
    ids = {"run_id": "r", "agent_id": "a"}
    messages = [dict(assistant_message(REPLY, REPLY.tool_calls)), *RESULTS]
    large = [{**messages[0], "provider_fields": {"x": {"y": "z" * MAX_TOOL_MESSAGES_BYTES}}}, *RESULTS]

    whole = usable_entries(turn_entries("q", "a", ids, stop_reason="completed", tool_messages=messages))
    cut = usable_entries(turn_entries("q", "a", ids, stop_reason="completed", tool_messages=large))
    assert whole[1]["tool_messages"] == messages
    assert "provider_fields" not in cut[1]["tool_messages"][0]
    assert "provider_fields" not in cut[1]["tool_messages"][0]["tool_calls"][0]


def test_opaque_fields_do_not_change_the_identity_of_a_prompt() -> None:
    """They follow from recorded replies, and a worker of an earlier version does not send them."""
    message = dict(assistant_message(REPLY, REPLY.tool_calls))
    bare = {key: value for key, value in message.items() if key != "provider_fields"}
    bare["tool_calls"] = [{**call, "provider_fields": {}} for call in message["tool_calls"]]
    del bare["tool_calls"][0]["provider_fields"], bare["tool_calls"][1]["provider_fields"]

    digests = [PromptDigests().digests_of({"messages": [each]}, {}, "") for each in (message, bare)]
    assert digests[0] == digests[1]


# --- requests --------------------------------------------------------------------------------------------


def test_images_and_files_are_sent_as_parts() -> None:
    """By URL, by their bytes, or by the id of an uploaded file."""
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "url": "https://example.com/a.png", "detail": "low"},
        PNG,
        {"type": "file", "data": "AAAA", "media_type": "application/pdf", "name": "a.pdf"},
        {"type": "file", "file_id": "file-1"},
    ]

    assert messages_to_wire([{"role": "user", "content": content}])[0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ]


def test_an_image_from_a_tool_follows_in_a_user_message() -> None:
    """Chat completions accept only text in a tool message. The results of a turn stay together."""
    calls = [{"id": id_, "name": "look", "arguments": {}} for id_ in ("c1", "c2")]
    seen = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "seen"}, PNG]}
    only_image = {"role": "tool", "tool_call_id": "c2", "content": [PNG]}

    sent = messages_to_wire([{"role": "assistant", "tool_calls": calls}, seen, only_image])

    assert [message["role"] for message in sent] == ["assistant", "tool", "tool", "user"]
    assert [message["content"] for message in sent[1:3]] == [
        "seen",
        "The result follows in the next user message.",
    ]
    assert [part["type"] for part in sent[3]["content"]] == ["text", "image_url", "text", "image_url"]


def test_blank_blocks_are_left_out() -> None:
    """Providers reject a text block without text. A message without any other content is treated as empty."""
    blank = {"type": "text", "text": " "}

    assert repaired([{"role": "user", "content": [blank, PNG]}])[0]["content"] == [PNG]
    assert repaired([{"role": "user", "content": [blank]}])[0]["content"] == "(empty message)"
    assert repaired([{"role": "assistant", "content": [{"type": "reasoning", "text": "hm"}]}]) == []


def test_the_text_of_blocks() -> None:
    """Text and refusals; reasoning is not part of an answer."""
    blocks = [
        {"type": "reasoning", "text": "hm"},
        {"type": "text", "text": "a"},
        {"type": "refusal", "text": "b"},
    ]

    assert content_text(blocks) == "ab"
