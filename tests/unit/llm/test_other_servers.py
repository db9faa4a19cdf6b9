"""Replies as other servers send them, byte for byte: what they mean is understood, whole and streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    LLMContextTooLong,
    LLMError,
    LLMRateLimitError,
    LLMReplyFiltered,
    LLMResponseError,
)
from openagents_worker.llm.base import Delta, FinishReason, LLMResponse, ModelRequest
from openagents_worker.llm.http import Timing
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from tests.unit.llm.raw_server import JSON, STREAM, delta, raw_server, sse, whole

HTML = "content-type: text/html"
LOGIN = b"<!DOCTYPE html><html><head><title>Sign in &amp; go</title><script>x</script></head></html>"


class Listener:
    """Records the pieces of a streamed reply."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.pieces: list[Delta] = []

    async def on_text(self, text: str) -> None:
        self.text.append(text)

    async def on_piece(self, piece: Delta) -> None:
        self.pieces.append(piece)


async def _no_pause(_: float) -> None:
    return None


async def _ask(url: str, listener: Listener | None = None, **options: Any) -> LLMResponse:
    options = {"provider": "openai_compatible", "model": "m", "api_base": url} | options
    client = OpenAICompatibleClient(LLMOptions(**options), api_key=None, timing=Timing(sleep=_no_pause))
    request = ModelRequest([{"role": "user", "content": "hi"}])
    if listener is not None:
        request = ModelRequest(request.messages, on_delta=listener.on_text, on_piece=listener.on_piece)
    try:
        return await client.respond(request)
    finally:
        await client.aclose()


async def _reply(*chunks: bytes, head: str = STREAM, listener: Listener | None = None) -> LLMResponse:
    async with raw_server(*chunks, head=head) as url:
        return await _ask(url, listener or Listener())


async def _error(
    *chunks: bytes, head: str = JSON, status: str = "200 OK", streamed: bool = False
) -> LLMError:
    async with raw_server(*chunks, head=head, status=status) as url:
        with pytest.raises(LLMError) as caught:
            await _ask(url, Listener() if streamed else None, retry={"max_attempts": 1})
    return caught.value


def _call(
    index: int | None, id_: str | None, name: str | None, arguments: str, **more: Any
) -> dict[str, Any]:
    fragment: dict[str, Any] = {"function": {"arguments": arguments}, **more}
    if index is not None:
        fragment["index"] = index
    if id_ is not None:
        fragment["id"] = id_
    if name is not None:
        fragment["function"]["name"] = name
    return fragment


# --- tool calls in a stream ------------------------------------------------------------------------------

TWO = [("look", {"at": 1}), ("look", {"at": 2})]
FRAGMENTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, Any]]]] = {
    "OpenAI: pieces by index": (
        [
            _call(0, "a", "look", ""),
            _call(1, "b", "look", ""),
            _call(0, None, None, '{"at"'),
            _call(1, None, None, '{"at": 2}'),
            _call(0, None, None, ": 1}"),
        ],
        TWO,
    ),
    "Ollama and Gemini: index 0 for all": (
        [_call(0, "a", "look", '{"at": 1}'), _call(0, "b", "look", '{"at": 2}')],
        TWO,
    ),
    "Gemini: index 0 for all, empty ids": (
        [_call(0, "", "look", '{"at": 1}'), _call(0, "", "look", '{"at": 2}')],
        TWO,
    ),
    "no index": ([_call(None, "a", "look", '{"at": 1}'), _call(None, "b", "look", '{"at": 2}')], TWO),
    "no index, in pieces": (
        [
            _call(None, "a", "look", '{"at'),
            _call(None, None, None, '": 1}'),
            _call(None, "b", "look", ""),
            _call(None, None, None, '{"at": 2}'),
        ],
        TWO,
    ),
    "neither index nor id": (
        [_call(None, None, "look", '{"at": 1}'), _call(None, None, "look", '{"at": 2}')],
        TWO,
    ),
    "other names, one index, no ids": (
        [_call(0, None, "look", ""), _call(0, None, "wait", "{}")],
        [("look", {}), ("wait", {})],
    ),
    "another id with every piece": (
        [_call(0, "a", "look", '{"at'), _call(0, "b", None, '": 1}')],
        [("look", {"at": 1})],
    ),
    "the name with every piece": (
        [_call(0, "a", "look", '{"at'), _call(0, "a", "look", '": 1}')],
        [("look", {"at": 1})],
    ),
    "the whole call again": (
        [_call(0, "a", "look", '{"at": 1}'), _call(0, "a", "look", '{"at": 1}')],
        [("look", {"at": 1})],
    ),
    "one id, two indexes": (
        [_call(0, "a", "look", '{"at": 1}'), _call(1, "a", "look", '{"at": 2}')],
        TWO,
    ),
    "arguments that are an object": ([_call(0, "a", "look", {"at": 1})], [("look", {"at": 1})]),
}


@pytest.mark.parametrize("together", [False, True], ids=["one chunk each", "one chunk"])
@pytest.mark.parametrize("name", FRAGMENTS)
async def test_tool_calls_of_a_stream_are_told_apart(name: str, together: bool) -> None:
    """By id, name and index: no call is lost, and no arguments are glued together."""
    fragments, expected = FRAGMENTS[name]
    chunks = (
        [delta(tool_calls=fragments)]
        if together
        else [delta(tool_calls=[fragment]) for fragment in fragments]
    )

    reply = await _reply(sse(*chunks, delta("tool_calls"), "[DONE]"))

    assert [(call.name, dict(call.arguments)) for call in reply.tool_calls] == expected
    assert len({call.id for call in reply.tool_calls}) == len(expected) or name == "one id, two indexes"
    assert reply.finish_reason == FinishReason.TOOL_CALLS


# --- what is wanted back ---------------------------------------------------------------------------------

DETAILS = [
    {"type": "reasoning.text", "text": "Let me", "index": 0, "format": "anthropic-claude-v1"},
    {
        "type": "reasoning.text",
        "text": " see.",
        "signature": "abc",
        "index": 0,
        "format": "claude-v1",
    },
    {"type": "reasoning.encrypted", "data": "xyz", "index": 1},
]


@pytest.mark.parametrize(
    ("chunks", "fields", "shown"),
    [
        (
            [delta(reasoning_content="Let me"), delta(reasoning_content=" see.")],
            {"reasoning_content": "Let me see."},
            "Let me see.",
        ),
        (
            [
                delta(reasoning="Let me", reasoning_details=DETAILS[:1]),
                delta(reasoning=" see.", reasoning_details=DETAILS[1:]),
            ],
            {
                "reasoning_details": [
                    {
                        "type": "reasoning.text",
                        "text": "Let me see.",
                        "index": 0,
                        "format": "claude-v1",
                        "signature": "abc",
                    },
                    DETAILS[2],
                ]
            },
            "Let me see.",
        ),
        (
            [delta(extra_content={"google": {"thought_signature": "s"}})],
            {"extra_content": {"google": {"thought_signature": "s"}}},
            "",
        ),
        ([delta(reasoning="Let me see.")], {}, "Let me see."),
    ],
    ids=["DeepSeek and Kimi", "OpenRouter", "Gemini", "Groq"],
)
async def test_what_a_provider_wants_back_is_kept(
    chunks: list[dict[str, Any]], fields: dict[str, Any], shown: str
) -> None:
    """The opaque fields of a turn, joined from their pieces. Reasoning is streamed apart from the text."""
    listener = Listener()
    opaque = {"google": {"thought_signature": "t"}}
    call = delta(tool_calls=[_call(0, "a", "look", "{}", extra_content=opaque)])

    reply = await _reply(sse(*chunks, call, delta("tool_calls"), "[DONE]"), listener=listener)

    assert dict(reply.provider_fields) == ({"chat_completions": fields} if fields else {})
    assert reply.tool_calls[0].provider_fields == {"chat_completions": {"extra_content": opaque}}
    assert reply.reasoning_text == shown
    assert "".join(piece.text for piece in listener.pieces if piece.kind == "reasoning") == shown
    assert listener.text == []
    stored = LLMResponse.from_wire(json.loads(json.dumps(reply.to_wire())))
    assert replace(stored, usage=None) == replace(reply, usage=None)


async def test_half_a_character_at_the_end_of_a_chunk() -> None:
    """Half of an emoji in each of two chunks: in the text, in the reasoning, and in arguments."""
    listener = Listener()
    first, second = "\ud83d", "\ude00"
    chunks = [delta(content=half, reasoning_content=half) for half in (first, second)]
    calls = [
        delta(tool_calls=[_call(0, "a", "look", '{"at": "' + first)]),
        delta(tool_calls=[_call(0, None, None, second + '"}')]),
    ]

    reply = await _reply(sse(*chunks, *calls, delta("tool_calls"), "[DONE]"), listener=listener)

    assert (reply.output_text, reply.reasoning_text) == ("😀", "😀")
    assert reply.tool_calls[0].arguments == {"at": "😀"}
    assert listener.text == ["😀"]


async def test_other_choices_are_not_mixed_into_the_text() -> None:
    """Only choice 0 is read."""
    other = {"choices": [{"index": 1, "delta": {"content": "NO"}, "finish_reason": None}]}

    reply = await _reply(sse(delta(content="yes"), other, delta("stop"), "[DONE]"))

    assert reply.output_text == "yes"


async def test_zeros_do_not_replace_the_token_counts() -> None:
    """Some gateways send a last chunk whose usage is only zeros."""
    counted = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}
    zeros = {"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}

    reply = await _reply(sse(delta("stop", content="hi"), counted, zeros, "[DONE]"))

    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (7, 3)


# --- why it ended ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("word", "message", "reason"),
    [
        ("stop", {"content": "hi"}, FinishReason.STOP),
        ("eos", {"content": "hi"}, FinishReason.STOP),
        ("length", {"content": "hi"}, FinishReason.LENGTH),
        ("max_tokens", {"content": "hi"}, FinishReason.LENGTH),
        ("max_output_tokens", {"content": "hi"}, FinishReason.LENGTH),
        ("repetition", {"content": "hi hi hi"}, FinishReason.LENGTH),
        ("length", {"content": "", "reasoning_content": "hm"}, FinishReason.LENGTH),
        ("content_filter", {"content": "half of"}, FinishReason.CONTENT_FILTER),
        ("stop", {"content": None, "refusal": "No."}, FinishReason.REFUSAL),
        ("stop", {"content": None}, FinishReason.STOP),
        ("STOP", {"content": "hi"}, FinishReason.STOP),
        ("because", {"content": "hi"}, FinishReason.OTHER),
        ("stop", {"content": "", "tool_calls": [_call(0, "a", "look", "{}")]}, FinishReason.TOOL_CALLS),
        (
            "function_call",
            {"content": None, "function_call": {"name": "look", "arguments": "{}"}},
            FinishReason.TOOL_CALLS,
        ),
    ],
)
async def test_why_a_reply_ended(
    word: str, message: dict[str, Any], reason: FinishReason, streamed: bool
) -> None:
    """The neutral reason, and the provider's own word beside it."""
    if streamed:
        reply = await _reply(sse(delta(**message), delta(word), "[DONE]"))
    else:
        async with raw_server(json.dumps(whole(word, **message)).encode(), head=JSON) as url:
            reply = await _ask(url)

    assert (reply.finish_reason, reply.stop_reason) == (reason, word)
    assert bool(reply.tool_calls) == (reason is FinishReason.TOOL_CALLS)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("content_filter: PROHIBITED_CONTENT", LLMReplyFiltered),
        ("function_call_filter: MALFORMED_FUNCTION_CALL", LLMConnectionError),
    ],
)
async def test_a_reply_of_gemini_that_has_only_a_reason(
    word: str, kind: type[LLMError], streamed: bool
) -> None:
    """What its filter blocks has no message at all. A call that cannot be read is asked for again."""
    body = {"id": "c", "model": "m", "choices": [{"index": 0, "finish_reason": word}]}

    error = await _error(
        sse(body, "[DONE]") if streamed else json.dumps(body).encode(),
        head=STREAM if streamed else JSON,
        streamed=streamed,
    )

    assert type(error) is kind


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_words_of_spoken_output_are_the_answer(streamed: bool) -> None:
    """Its content is null. What was spoken has a price of its own."""
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    usage |= {"completion_tokens_details": {"audio_tokens": 15}}
    if streamed:
        pieces = [delta(audio={"id": "a", "transcript": "Good "}), delta(audio={"transcript": "day."})]
        chunks = [*pieces, delta(audio={"data": "AAAA"}), delta("stop"), {"choices": [], "usage": usage}]
        reply = await _reply(sse(*chunks, "[DONE]"))
    else:
        spoken = {"id": "a", "data": "AAAA", "expires_at": 1, "transcript": "Good day."}
        body = whole(content=None, audio=spoken, usage=usage)
        async with raw_server(json.dumps(body).encode(), head=JSON) as url:
            reply = await _ask(url)

    assert (reply.output_text, reply.finish_reason) == ("Good day.", FinishReason.STOP)
    assert reply.usage is not None
    assert reply.usage.metadata["output_audio_tokens"] == 15


async def test_a_message_in_place_of_a_delta() -> None:
    """Some servers stream one chunk with the whole message."""
    chunk = whole("stop", content="hi")

    assert (await _reply(sse(chunk, "[DONE]"))).output_text == "hi"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_reply_that_the_server_gave_up_is_retried(streamed: bool) -> None:
    """vLLM and SGLang say `abort`. What was said until then is not an answer."""
    body = whole("abort", content="half of")

    error = await _error(
        sse(body, "[DONE]") if streamed else json.dumps(body).encode(),
        head=STREAM if streamed else JSON,
        streamed=streamed,
    )

    assert isinstance(error, LLMConnectionError)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_reply_that_ended_with_an_error_is_retried(streamed: bool) -> None:
    """OpenRouter sends the error of the provider behind it inside the choice."""
    choice = {"index": 0, "delta": {"content": "half"}, "finish_reason": "error"}
    choice |= {"error": {"code": 502, "message": "upstream died"}, "message": {"content": "half"}}
    body = {"choices": [choice]}

    error = await _error(
        sse(body, "[DONE]") if streamed else json.dumps(body).encode(),
        head=STREAM if streamed else JSON,
        streamed=streamed,
    )

    assert isinstance(error, LLMConnectionError)
    assert "upstream died" in error.message


async def test_partial_text_is_never_an_answer() -> None:
    """A stream that ends without a finish reason broke off, even if it says [DONE]."""
    error = await _error(sse(delta(content="half"), "[DONE]"), head=STREAM, streamed=True)

    assert isinstance(error, LLMConnectionError)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_filtered_reply_without_text_is_an_error(streamed: bool) -> None:
    """The provider blocked it: a retry would be blocked too."""
    body = json.dumps(whole("content_filter", content=None)).encode()

    assert isinstance(await _error(body, streamed=streamed), LLMReplyFiltered)


# --- errors ----------------------------------------------------------------------------------------------

INSIDE: dict[str, tuple[bytes, str, type[LLMError], str]] = {
    "OpenAI": (
        b'{"error": {"message": "slow down", "type": "rate_limit_error"}}',
        JSON,
        LLMRateLimitError,
        "slow",
    ),
    "vLLM": (
        b'{"object": "error", "message": "no such model", "type": "NotFoundError", "code": 404}',
        JSON,
        LLMResponseError,
        "no such model",
    ),
    "FastAPI": (b'{"detail": "Not authenticated"}', JSON, LLMAuthError, "Not authenticated"),
    "a text": (b'{"error": "model \'x\' not found"}', JSON, LLMResponseError, "model 'x' not found"),
    "FastAPI validation": (
        b'{"detail": [{"loc": ["body"], "msg": "field required"}], "code": 422}',
        JSON,
        LLMResponseError,
        "field required",
    ),
    "Cloudflare": (
        b'{"success": false, "errors": [{"code": 7003, "message": "no route"}], "result": null}',
        JSON,
        LLMConnectionError,
        "no route",
    ),
    "Gemini": (
        b'[{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED",'
        b' "details": [{"retryDelay": "21s"}]}}]',
        JSON,
        LLMRateLimitError,
        "quota",
    ),
    "Anthropic": (
        b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}',
        JSON,
        LLMConnectionError,
        "Overloaded",
    ),
    "TGI": (
        b'{"error": "Model is overloaded", "error_type": "overloaded"}',
        JSON,
        LLMConnectionError,
        "overloaded",
    ),
    "a code and a message": (b'{"code": 401, "message": "bad key"}', JSON, LLMAuthError, "bad key"),
    "OpenRouter": (
        b'{"error": {"code": 400, "message": "Provider returned error",'
        b' "metadata": {"raw": "max_tokens must be smaller"}}}',
        JSON,
        LLMResponseError,
        "max_tokens must be smaller",
    ),
    "too long": (
        b'{"error": {"message": "This model\'s maximum context length is 8192 tokens"}}',
        JSON,
        LLMContextTooLong,
        "8192",
    ),
    "moderation": (
        b'{"error": {"code": 403, "message": "input was flagged"}}',
        JSON,
        LLMReplyFiltered,
        "flagged",
    ),
    "no credits": (
        b'{"error": {"code": 402, "message": "Insufficient credits"}}',
        JSON,
        LLMResponseError,
        "credits",
    ),
    "JSON under another label": (
        b'{"error": {"message": "bad", "code": 400}}',
        "content-type: text/plain",
        LLMResponseError,
        "bad",
    ),
    "JSON labelled as a stream": (
        b'{"error": {"message": "bad", "code": 400}}',
        STREAM,
        LLMResponseError,
        "bad",
    ),
    "a login page": (LOGIN, HTML, LLMResponseError, "Sign in & go"),
    "a page labelled as JSON": (LOGIN, JSON, LLMResponseError, "Sign in & go"),
    "a page labelled as a stream": (LOGIN, STREAM, LLMResponseError, "Sign in & go"),
    "an empty body": (b"", JSON, LLMConnectionError, "empty body"),
    "something else": (b'{"status": "ok"}', JSON, LLMResponseError, '{"status":"ok"}'),
    "text": (b"hello", JSON, LLMResponseError, "hello"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", INSIDE)
async def test_an_error_inside_a_200_is_recognised(name: str, streamed: bool) -> None:
    """In the shape of any provider, with the provider's words. What a retry cannot mend is not retried."""
    body, head, kind, words = INSIDE[name]

    error = await _error(body, head=head, streamed=streamed)

    assert type(error) is kind
    assert words in error.message


EVENTS: dict[str, tuple[bytes, type[LLMError], str]] = {
    "event: error": (
        b'event: error\ndata: {"message": "the engine died"}\n\n',
        LLMConnectionError,
        "engine died",
    ),
    "event: error with text": (b"event: error\ndata: out of memory\n\n", LLMConnectionError, "out of memory"),
    "vLLM": (
        sse({"object": "error", "message": "too long: maximum context length", "code": 400}),
        LLMContextTooLong,
        "too long",
    ),
    "detail": (sse({"detail": "gone", "status": 404}), LLMResponseError, "gone"),
    "a page": (sse("<html><title>Bad gateway</title></html>"), LLMConnectionError, "Bad gateway"),
}


@pytest.mark.parametrize("name", EVENTS)
async def test_an_error_inside_a_stream_is_recognised(name: str) -> None:
    """After pieces of the reply, in the shape of any provider."""
    body, kind, words = EVENTS[name]

    error = await _error(sse(delta(content="half")) + body, head=STREAM, streamed=True)

    assert type(error) is kind
    assert words in error.message


@pytest.mark.parametrize(
    ("status", "head", "body", "kind", "shown"),
    [
        ("301 Moved", "location: https://new.example/v1", b"", LLMResponseError, "https://new.example/v1"),
        ("307 Temporary", "location: /v2", b"", LLMResponseError, "/v2"),
        ("404 Not Found", HTML, b"<h1>Not here</h1>" + b" " * 999, LLMResponseError, "Not here"),
        ("402 Payment", JSON, b'{"error": "pay"}', LLMResponseError, "is used up"),
        ("429 Slow", "retry-after: 7", b"{}", LLMRateLimitError, "answered 429"),
        ("500 Oops", "x-request-id: req-7", b"{}", LLMConnectionError, "answered 500"),
    ],
)
async def test_an_http_error_says_what_happened(
    status: str, head: str, body: bytes, kind: type[LLMError], shown: str
) -> None:
    """The provider's text, and for a redirect its target."""
    error = await _error(body, head=head, status=status)

    assert type(error) is kind
    assert shown in str(error)
    assert error.request_id == ("req-7" if "req-7" in head else None)
    assert error.retry_after_ms == (7000 if "retry-after" in head else None)


# --- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("label", [JSON, STREAM, HTML, "content-type: text/plain", "x-none: 1"])
async def test_the_bytes_decide_not_the_label(label: str, streamed: bool) -> None:
    """A whole reply and a stream are recognised under any label, asked for or not."""
    body = json.dumps(whole(content="hi")).encode()
    stream = b": hello\n\ndata:\n\n" + sse(delta(content="hi"), delta("stop"), "[DONE]")
    listener = Listener() if streamed else None

    for sent in (body, b"\xef\xbb\xbf \n" + body, stream):
        async with raw_server(sent, head=label) as url:
            assert (await _ask(url, listener)).output_text == "hi"
    assert listener is None or listener.text == ["hi"] * 3


async def test_the_request_id_and_the_speed_are_kept() -> None:
    """The provider's support asks for the id; the speed is part of the measurements."""
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 30}}
    stream = sse(delta(content="hi"), delta("stop"), usage, "[DONE]")

    reply = await _reply(stream, head=f"{STREAM}\r\nrequest-id: req-9")

    assert reply.request_id == "req-9"
    assert reply.usage is not None
    assert reply.usage.metadata["tokens_per_s"] > 0
    assert reply.usage.metadata["ttft_ms"] >= 0
