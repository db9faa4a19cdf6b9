"""Errors of providers: no secret in them, the right code, and no request too many; with every wire format."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.llm.base import CallInfo, Delta, DeltaKind, LLMResponse, current_call
from openagents_worker.llm.providers import make_client
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.llm.structured import response_format
from openagents_worker.patterns.answers import checked_answer
from openagents_worker.runtime.reply_stream import ReplyStream
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, delta, sse, whole
from tests.unit.llm.wire import ANTHROPIC, CHAT, HI, KEY, RESPONSES, Format, Heard, ask, client_of

SHOWN = KEY[:10]
"""A part of the key that is longer than what an error message may show."""
FORM = response_format("city", {"type": "object", "properties": {"name": {"type": "string"}}})


async def _asked(
    wire: Format, reply: Callable[[Any], Sent], *, streamed: bool = False, form: Any = None, **options: Any
) -> LLMResponse:
    async with answering(reply) as url:
        heard = Heard() if streamed else None
        return await ask(client_of(wire, url, **options), on_delta=heard, response_format=form)


async def _error(wire: Format, *sent: Any, streamed: bool = False, **options: Any) -> LLMError:
    """The error for a reply: JSON values, sent whole or as the events of a stream."""
    body = sse(*sent) if streamed else json.dumps(sent[0]).encode()
    answer = Sent((body,), STREAM if streamed else JSON)
    with pytest.raises(LLMError) as caught:
        await _asked(wire, lambda _: answer, streamed=streamed, **{"retry": {"max_attempts": 1}, **options})
    return caught.value


async def _failed_with_fallback(reply: Callable[[Any], Sent], info: CallInfo, **options: Any) -> LLMError:
    """The error of a call in a run, whose model `m` has the fallback `n`."""
    listener = Heard() if options.pop("streamed", False) else None
    retry = {"initial_backoff_ms": 0, **options.pop("retry")}
    token = current_call.set(info)
    try:
        async with answering(reply) as url:
            fields = {"provider": CHAT.provider, "model": "m", "api_base": url, "retry": retry, **options}
            client = make_client(LLMOptions(**fields, fallbacks=[{"model": "n"}]), env={})
            with pytest.raises(LLMError) as caught:
                await ask(client, on_delta=listener)
    finally:
        current_call.reset(token)
    return caught.value


# --- secrets ---------------------------------------------------------------------------------------------


def _failed(code: str, message: str) -> dict[str, Any]:
    error = {"code": code, "message": message}
    return {"object": "response", "id": "r", "status": "failed", "error": error, "output": []}


def _broken(message: str) -> dict[str, Any]:
    reply = whole("error", content="")
    reply["choices"][0]["error"] = {"message": message}
    return reply


def _broken_chunk(message: str) -> dict[str, Any]:
    chunk = delta("error")
    chunk["choices"][0]["error"] = {"message": message}
    return chunk


def _block(index: str) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": ""}}


@pytest.mark.parametrize("before", [0, 400, 440, 460, 470], ids=lambda chars: f"after {chars} characters")
@pytest.mark.parametrize(
    ("wire", "streamed", "sent"),
    [
        (RESPONSES, False, lambda text: [_failed("server_error", text)]),
        (RESPONSES, False, lambda text: [_failed(text, "no")]),
        (RESPONSES, True, lambda text: [{"type": "response.failed", "response": _failed("oops", text)}]),
        (CHAT, False, lambda text: [_broken(text)]),
        (CHAT, True, lambda text: [_broken_chunk(text)]),
        (ANTHROPIC, True, lambda text: [_block(text), _block(text)]),
    ],
    ids=["failed", "failed code", "failed stream", "broken off", "broken off stream", "not readable"],
)
async def test_no_error_of_a_reply_contains_the_key(
    wire: Format, streamed: bool, sent: Callable[[str], list[Any]], before: int
) -> None:
    """Nor a part of it, where a long message is cut."""
    error = await _error(wire, *sent("x" * before + f" {KEY} is not valid"), streamed=streamed)

    assert SHOWN not in str(error)
    assert len(error.message) <= 500


# --- codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("server_error", "oops", LLMConnectionError),
        ("vector_store_timeout", "late", LLMConnectionError),
        ("image_generation_server_error", "oops", LLMConnectionError),
        ("image_file_too_large", "no", LLMResponseError),
        ("rate_limit_exceeded", "slow", LLMRateLimitError),
        ("invalid_prompt", "no", LLMResponseError),
        ("image_content_policy_violation", "no", LLMReplyFiltered),
        ("context_length_exceeded", "Your input exceeds the context window", LLMContextTooLong),
        ("insufficient_quota", "You exceeded your current quota", LLMResponseError),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_failed_response_has_the_code_that_any_provider_gets(
    code: str, message: str, kind: type[LLMError], streamed: bool
) -> None:
    """One table for all wire formats."""
    failed = _failed(code, message)
    sent = {"type": "response.failed", "response": failed} if streamed else failed

    error = await _error(RESPONSES, sent, streamed=streamed)

    assert type(error) is kind
    assert code in error.message
    assert message in error.message


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("headers", "ms"),
    [
        ("retry-after: 7", 7_000),
        ("x-ratelimit-reset-tokens: 2s\r\nx-ratelimit-remaining-tokens: 0", 2_000),
        ("server: x", None),
    ],
)
async def test_a_failed_response_says_in_its_headers_how_long_to_wait(
    headers: str, ms: int | None, streamed: bool
) -> None:
    """The error is in the body of a reply with status 200. It has the id of its request, too."""
    failed = _failed("rate_limit_exceeded", "slow")
    body = sse({"type": "response.failed", "response": failed}) if streamed else json.dumps(failed).encode()
    head = f"{STREAM if streamed else JSON}\r\nx-request-id: req-7\r\n{headers}"

    with pytest.raises(LLMRateLimitError) as caught:
        await _asked(RESPONSES, lambda _: Sent((body,), head), streamed=streamed, retry={"max_attempts": 1})

    assert (caught.value.retry_after_ms, caught.value.request_id) == (ms, "req-7")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("bio_policy", LLMReplyFiltered),
        ("cyber_policy", LLMReplyFiltered),
        ("misalignment_policy_violation", LLMReplyFiltered),
        ("data_residency_mismatch", LLMResponseError),
        ("vector_store_timeout", LLMConnectionError),
        ("server_is_overloaded", LLMConnectionError),
    ],
)
async def test_a_response_that_the_provider_blocks_is_not_asked_for_again(
    code: str, kind: type[LLMError], streamed: bool
) -> None:
    """It would be blocked again, and each try is paid for."""
    failed = _failed(code, "no")
    error = await _error(
        RESPONSES,
        {"type": "response.failed", "response": failed} if streamed else failed,
        streamed=streamed,
        retry={"max_attempts": 1},
    )

    assert type(error) is kind


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("max_output_tokens", "length"),
        ("max_messages", "length"),
        ("something new", "length"),
        (None, "length"),
        ("content_filter", "content_filter"),
    ],
)
async def test_a_response_that_is_not_complete_is_not_an_answer(
    why: str | None, reason: str, streamed: bool
) -> None:
    """Whatever the reason is."""
    part = {"type": "output_text", "text": "half of", "annotations": []}
    response = {"id": "r", "object": "response", "status": "incomplete"}
    response |= {"output": [{"type": "message", "content": [part]}], "incomplete_details": {"reason": why}}
    event = {"type": "response.incomplete", "response": response}
    body = sse(event) if streamed else json.dumps(response).encode()

    reply = await _asked(RESPONSES, lambda _: Sent((body,), STREAM if streamed else JSON), streamed=streamed)

    assert reply.finish_reason == reason
    with pytest.raises(LLMResponseError):
        checked_answer(reply)


@pytest.mark.parametrize("wire", [CHAT, ANTHROPIC, RESPONSES], ids=lambda wire: wire.provider)
async def test_a_rate_limit_says_in_its_headers_when_it_is_reset(wire: Format) -> None:
    """If there is no Retry-After."""
    head = f"{JSON}\r\nx-ratelimit-reset-requests: 1m30s\r\nx-ratelimit-remaining-requests: 0"
    sent = Sent((b"{}",), head, "429 Slow")

    with pytest.raises(LLMRateLimitError) as caught:
        await _asked(wire, lambda _: sent, retry={"max_attempts": 1})

    assert caught.value.retry_after_ms == 90_000


GEMINI_LIMIT = (
    "You exceeded your current quota, please check your plan and billing details. For more information on "
    "this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
)


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (
            429,
            {
                "code": 429,
                "message": GEMINI_LIMIT,
                "status": "RESOURCE_EXHAUSTED",
                "details": [{"retryDelay": "21s"}],
            },
            LLMRateLimitError,
        ),
        (429, {"code": "insufficient_quota", "message": GEMINI_LIMIT}, LLMResponseError),
        (429, {"code": None, "message": GEMINI_LIMIT}, LLMResponseError),
        (
            400,
            {"code": 400, "message": "API key not valid. Please pass a valid API key."},
            LLMAuthError,
        ),
    ],
    ids=["limit of a minute", "no money", "no money, no code", "invalid key"],
)
async def test_a_limit_that_ends_is_not_a_quota_that_is_used_up(
    status: int, error: dict[str, Any], kind: type[LLMError]
) -> None:
    """Gemini says `billing` in both. It states a wait if the limit ends by itself."""
    answer = Sent((json.dumps({"error": error}).encode(),), JSON, f"{status} No")

    with pytest.raises(LLMError) as caught:
        await _asked(CHAT, lambda _: answer, retry={"max_attempts": 1})

    assert type(caught.value) is kind


OF_OPENAI = "Rate limit reached for gpt-5 on requests per min. Limit: 3 / min. Please try again in {}. "
OF_GROQ = "Rate limit reached for model `m`. Please try again in {}. Need more tokens? Upgrade today: "
OF_AZURE = "Requests have exceeded the token rate limit of your current tier. Please retry after {}. "
WITHOUT = "Rate limit reached for m on requests per min. Limit: 60 / min. Add a payment method: "
BILLING = "https://example.com/settings/billing"


@pytest.mark.parametrize(
    ("text", "wait_ms"),
    [
        (OF_OPENAI.format("20s"), 20_000),
        (OF_OPENAI.format("1m2.5s"), 62_500),
        (OF_OPENAI.format("120ms"), 120),
        (OF_GROQ.format("2h0m7.66s"), 7_207_660),
        (OF_AZURE.format("6 seconds"), 6_000),
        (OF_AZURE.format("1 second"), 1_000),
        (WITHOUT, None),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_text_of_a_limit_says_how_long_to_wait(
    text: str, wait_ms: int | None, streamed: bool
) -> None:
    """Gateways and streams have no header for it. A link to the billing does not make it a used-up quota."""
    error = {"error": {"message": text + BILLING, "type": "requests", "code": "rate_limit_exceeded"}}
    answer = (
        Sent((sse(error),), STREAM) if streamed else Sent((json.dumps(error).encode(),), JSON, "429 Slow")
    )

    with pytest.raises(LLMRateLimitError) as caught:
        await _asked(CHAT, lambda _: answer, streamed=streamed, retry={"max_attempts": 1})

    assert caught.value.retry_after_ms == wait_ms


@pytest.mark.parametrize("wire", [CHAT], ids=["chat"])
async def test_a_filtered_reply_has_the_id_of_its_request(wire: Format) -> None:
    answer = Sent(
        (json.dumps(whole("content_filter", content="")).encode(),), f"{JSON}\r\nx-request-id: req-7"
    )

    with pytest.raises(LLMReplyFiltered) as caught:
        await _asked(wire, lambda _: answer)

    assert caught.value.request_id == "req-7"


# --- requests --------------------------------------------------------------------------------------------


async def test_a_schema_that_is_rejected_costs_one_of_the_tries() -> None:
    """The failed requests before it count too."""
    asked: list[bool] = []

    def reply(body: Any) -> Sent:
        asked.append("response_format" in body)
        text = "response_format is not supported" if len(asked) == 2 else "oops"
        status = "400 No" if len(asked) == 2 else "500 No"
        return Sent((json.dumps({"error": {"message": text}}).encode(),), JSON, status)

    with pytest.raises(LLMConnectionError) as caught:
        await _asked(CHAT, reply, form=FORM, retry={"max_attempts": 4})

    assert asked == [True, True, False, False]
    assert caught.value.requests == 4


@pytest.mark.parametrize("status", [401, 403, 413], ids=["key", "forbidden", "too long"])
async def test_only_a_rejected_request_is_repeated_without_its_schema(status: int) -> None:
    """An error with another cause may name the schema by chance."""
    asked: list[Any] = []

    def reply(body: Any) -> Sent:
        asked.append(body)
        text = json.dumps({"error": {"message": "no access to json_schema grammar"}})
        return Sent((text.encode(),), JSON, f"{status} No")

    with pytest.raises(LLMResponseError):
        await _asked(CHAT, reply, form=FORM)

    assert len(asked) == 1


OF_OPENAI = (
    "Invalid schema for response_format 'b': In context=(), 'additionalProperties' is required to be false."
)
OF_ANTHROPIC = "output_config.format.schema: For 'array' type, property 'maxItems' is not supported"
OF_A_SERVER = "response_format of type json_schema is not supported"


@pytest.mark.parametrize(
    ("message", "formats"),
    [
        (OF_OPENAI, ["a", "b", None, None, "a"]),
        (OF_ANTHROPIC, ["a", "b", None, None, "a"]),
        (OF_A_SERVER, ["a", "b", None, None, None]),
    ],
    ids=["OpenAI", "Anthropic", "a server without schemas"],
)
async def test_a_schema_that_is_rejected_is_left_out_of_its_own_requests_only(
    message: str, formats: list[str | None]
) -> None:
    """The output of other runs of the agent keeps its schema, unless the server knows no schemas."""
    sent: list[str | None] = []

    def reply(body: Any) -> Sent:
        form = body.get("response_format")
        sent.append(form and form["json_schema"]["name"])
        if sent[-1] == "b":
            return Sent((json.dumps({"error": {"message": message}}).encode(),), JSON, "400 No")
        return Sent((json.dumps(whole(content="{}")).encode(),), JSON)

    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    async with answering(reply) as url:
        client = client_of(CHAT, url)
        for name in ("a", "b", "b", "a"):
            await client.generate(messages=list(HI), response_format=response_format(name, schema))
        await client.aclose()

    assert sent == formats


async def test_the_requests_of_all_models_count() -> None:
    """A fallback gets one request if the first model has used up the tries, and the others if it has not."""
    models: list[str] = []

    def reply(body: Any) -> Sent:
        models.append(body["model"])
        return Sent((b"{}",), JSON, "500 No")

    info = CallInfo("r", "c", "k", 0, may_suspend=True)
    error = await _failed_with_fallback(reply, info, retry={"max_attempts": 3})

    assert models == ["m", "m", "m", "n"]
    assert (error.requests, error.is_final) == (4, True)


async def test_the_requests_before_a_reply_that_broke_off_count() -> None:
    """The first model is busy for long, the stream of the second breaks off."""
    busy = Sent((b"{}",), f"{JSON}\r\nretry-after: 60", "429 Slow")
    broken = Sent((sse(delta(content="hi")),))

    error = await _failed_with_fallback(
        lambda body: broken if body["model"] == "n" else busy,
        CallInfo("r", "c", "k", 0, requests=1, may_suspend=True),
        streamed=True,
        retry={"max_attempts": 3},
    )

    assert (error.requests, error.is_final) == (2, True)


async def test_an_error_that_may_not_be_retried_stays_final_with_fallbacks() -> None:
    """`retry_on_connection_errors: false` holds for the call, not for one model."""
    error = await _failed_with_fallback(
        lambda _: Sent((), "content-length: 9"),
        CallInfo("r", "c", "k", 0, may_suspend=True),
        retry={"max_attempts": 6, "retry_on_connection_errors": False},
    )

    assert type(error) is LLMConnectionError
    assert error.is_final


# --- streams ---------------------------------------------------------------------------------------------


async def test_the_only_choice_of_a_stream_may_have_any_number() -> None:
    """A whole reply is read like that, too."""
    chunk = delta("stop", content="yes")
    chunk["choices"][0]["index"] = 1

    reply = await _asked(CHAT, lambda _: Sent((sse(chunk, "[DONE]"),)), streamed=True)

    assert reply.output_text == "yes"


async def test_zeros_do_not_replace_the_token_counts_of_anthropic() -> None:
    """Some gateways count the input at the begin only, others at the end only."""
    begin = {"type": "message", "content": [], "usage": {"input_tokens": 7, "output_tokens": 1}}
    events = [
        {"type": "message_start", "message": begin},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "hi"}},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"input_tokens": 0, "output_tokens": 3},
        },
    ]

    reply = await _asked(ANTHROPIC, lambda _: Sent((sse(*events),)), streamed=True)

    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (7, 3)


def test_an_event_without_data_leaves_no_name_behind() -> None:
    """The name of an event does not become that of the next one."""
    events = SSEDecoder()

    assert list(events.feed(b"event: error\n\ndata: {}\n\n")) == ["{}"]
    assert events.event == ""


def test_the_items_of_a_response_have_a_limit() -> None:
    """Whether or not their text has arrived in pieces before."""
    item = {"type": "message", "content": [{"type": "output_text", "text": "x" * 1_000}]}
    reader = RESPONSES.codec().stream(max_chars=10_000)

    def read() -> None:
        for number in range(20):
            reader.add({"type": "response.output_item.done", "output_index": number, "item": item})

    with pytest.raises(ReplyTooLarge):
        read()


def test_the_name_of_a_tool_has_a_limit_in_each_event() -> None:
    """A model may write any text as a name."""
    stream = ReplyStream()
    stream.add(Delta(DeltaKind.ARGUMENTS, "{}", 0, "n" * 100_000))

    (payload,) = stream.take("c", 1)

    assert len(payload) < 500


def test_a_text_that_an_error_ended_is_not_an_answer() -> None:
    """A client of somebody else may return it as a reply."""
    with pytest.raises(LLMResponseError, match="ended with an error"):
        checked_answer(LLMResponse("half an ans", finish_reason="error"), accept_truncated=True)
