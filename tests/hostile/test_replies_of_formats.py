"""Replies in the wire formats of Anthropic and of OpenAI's responses that are not what they should be."""

from __future__ import annotations

from typing import Any

from tests.hostile.matrix import LIBRARY
from tests.hostile.table import Attack, Case, cases, hostile

LARGE = "x" * 300_000  # more than the reply of these agents may have
DEEP: Any = "end"
for _ in range(500):
    DEEP = [DEEP]

UNUSABLE = ("llm.response", "llm.connection")
TOO_LARGE = "llm.too_large"


# --- Anthropic -------------------------------------------------------------------------------------------


def message(*content: Any, stop: Any = "end_turn", **more: Any) -> dict[str, Any]:
    return {"type": "message", "id": "m", "content": list(content), "stop_reason": stop, **more}


def begun(block: Any, index: Any = 0) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(delta: Any, index: Any = 0) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


TEXT = {"type": "text", "text": ""}
START = {"type": "message_start", "message": message(stop=None)}
STOP = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "later"}}

MESSAGES = {
    "a block of no type": ([message({"text": "a"})], UNUSABLE),
    "a block that is a number": ([message(7)], UNUSABLE),
    "content that is an object": ([{**message(), "content": {"a": 1}}], UNUSABLE),
    "a call of a number": ([message({"type": "tool_use", "name": 7, "input": 7})], "tool.not_found"),
    "arguments in 500 levels": (
        [message({"type": "tool_use", "name": "x", "input": DEEP})],
        "tool.not_found",
    ),
    "counts that are texts": ([message(TEXT, usage={"input_tokens": "many"})], "llm.empty"),
    "a text of 300,000 characters": ([message({"type": "text", "text": LARGE})], TOO_LARGE),
    "an error in the body": ([OVERLOADED], "llm.connection"),
    "an error in the stream": ([START, begun(TEXT), OVERLOADED], "llm.connection"),
    "a stream without its end": ([START, begun(TEXT), piece({"type": "text_delta", "text": "a"})], UNUSABLE),
    "a piece of no block": ([START, piece({"type": "text_delta", "text": "a"}), STOP], UNUSABLE),
    "a block that begins twice": ([START, begun(TEXT), begun(TEXT), STOP], UNUSABLE),
    "an index that is an object": ([START, begun(TEXT, {}), STOP], UNUSABLE),
    "a piece that is a number": ([START, begun(TEXT), piece({"type": "text_delta", "text": 7})], UNUSABLE),
    "10,000 blocks": ([START, *(begun(TEXT, n) for n in range(10_000)), STOP], TOO_LARGE),
    "300,000 characters in pieces": (
        [START, begun(TEXT), *[piece({"type": "text_delta", "text": LARGE[:30_000]})] * 10],
        TOO_LARGE,
    ),
}


# --- responses -------------------------------------------------------------------------------------------


def response(*output: Any, status: Any = "completed", **more: Any) -> dict[str, Any]:
    return {"object": "response", "id": "r", "status": status, "output": list(output), **more}


def said(text: Any) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "output_text", "text": text}]}


def event(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "output_index": 0, **more}


def failed(code: Any) -> dict[str, Any]:
    return response(status="failed", error={"code": code, "message": "why"})


CREATED = event("created", response=response(status="in_progress"))
DONE = event("completed", response=response(said("fine")))

RESPONSES = {
    "an item of no type": ([response({"id": "a"})], UNUSABLE),
    "an item that is a number": ([response(7)], UNUSABLE),
    "output that is an object": ([{**response(), "output": {"a": 1}}], UNUSABLE),
    "a call of a number": (
        [response({"type": "function_call", "name": 7, "arguments": 7})],
        "tool.not_found",
    ),
    "a text that is a number": ([response(said(7))], "llm.empty"),
    "a status that is a number": ([response(said("a"), status=7)], "completed"),
    "a text of 300,000 characters": ([response(said(LARGE))], TOO_LARGE),
    "a failure without an error": ([response(status="failed", error=None)], UNUSABLE),
    "a failure with a number": ([failed(7)], UNUSABLE),
    "a failure of the key": ([failed("invalid_api_key")], "llm.auth"),
    "a failure of the limit": ([failed("rate_limit_exceeded")], "llm.rate_limit"),
    "an error that is a text": ([response(status="failed", error="why")], UNUSABLE),
    "a failure in the stream": (
        [CREATED, event("failed", response=failed("server_error"))],
        "llm.connection",
    ),
    "an error event": ([CREATED, {"type": "error", "code": "rate_limit_exceeded"}], "llm.rate_limit"),
    "a stream without its end": ([CREATED, event("output_text.delta", delta="a")], UNUSABLE),
    "a piece that is a number": ([CREATED, event("output_text.delta", delta=7), DONE], UNUSABLE),
    "an index that is an object": (
        [CREATED, {**event("output_text.delta", delta="a"), "output_index": {}}, DONE],
        UNUSABLE,
    ),
    "items of 300,000 characters": (
        [CREATED, *[event("output_item.done", item=said(LARGE[:30_000]))] * 10, DONE],
        TOO_LARGE,
    ),
}


@hostile(LIBRARY, [*cases("anthropic_reply", MESSAGES), *cases("responses_reply", RESPONSES)])
def test_replies_of_other_formats(case: Case, attack: Attack) -> None:
    attack(case)
