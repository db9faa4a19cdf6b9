"""The OpenAI-compatible client with a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    LLMContextTooLong,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    PluginConfigError,
)
from openagents_worker.llm.base import CallInfo, LLMResponse, OnDelta, current_call
from openagents_worker.llm.http import Timing
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.models import ErrorDetails
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.listening import listening
from tests.support.waiting import await_for
from tests.unit.llm.wire import Heard

KEY = "sk-very-secret-key"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
]


class Pauses:
    """A `sleep` that records its pauses, in milliseconds, and does not wait."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.ms.append(round(seconds * 1000, 3))


def _client(
    url: str, *, jitter: float = 1.0, pauses: Pauses | None = None, **options: Any
) -> OpenAICompatibleClient:
    options = {
        "provider": "openai_compatible",
        "model": "gpt-4o-mini",
        "api_base": url,
        "retry": {"max_attempts": 3, "max_backoff_ms": 5_000},
    } | options
    return OpenAICompatibleClient(
        LLMOptions(**options), api_key=KEY, timing=Timing(sleep=pauses or Pauses(), random=lambda: jitter)
    )


async def _ask(client: OpenAICompatibleClient, on_delta: OnDelta | None = None, **call: Any) -> LLMResponse:
    try:
        return await client.generate(**({"messages": list(HI)} | call), on_delta=on_delta)
    finally:
        await client.aclose()


@asynccontextmanager
async def _raw_server(*chunks: bytes, head: str = "content-type: text/event-stream") -> AsyncGenerator[str]:
    """A server that answers every request with these bytes, one write per chunk, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line[16:]) for line in request.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        await reader.readexactly(length)
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\nconnection: close\r\n\r\n".encode())
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with listening(answer) as port:
        yield f"http://127.0.0.1:{port}/v1"


def _sse(*events: Any) -> bytes:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def _delta(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"delta": delta, "finish_reason": finish_reason}]}


# --- what is sent ----------------------------------------------------------------------------------------


async def _sent(call: dict[str, Any], on_delta: OnDelta | None = None, **options: Any) -> ModelServerRequest:
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return {"text": "ok"}

    async with ModelServer(reply) as server:
        await _ask(_client(server.url, **options), on_delta, **call)
    return asked[0]


async def test_a_plain_request_says_what_was_asked_and_nothing_more() -> None:
    """Without a listener the reply is not streamed. Options that are not set are not sent."""
    request = await _sent({"tools": TOOLS, "tool_choice": "auto"}, temperature=0.5, max_tokens=99, seed=7)

    assert request.body == {
        "model": "gpt-4o-mini",
        "messages": HI,
        "temperature": 0.5,
        "max_tokens": 99,
        "tools": TOOLS,
        "tool_choice": "auto",
        "seed": 7,
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_a_call_may_differ_from_the_options() -> None:
    """Arguments of the call override the agent's options."""
    request = await _sent(
        {"model": "other", "temperature": 0.0, "max_tokens": 1}, temperature=1.0, max_tokens=9
    )

    assert (request.model, request.body["temperature"], request.body["max_tokens"]) == ("other", 0.0, 1)


@pytest.mark.parametrize("options", [{"model": "o3-mini"}, {"model": "gpt-5"}, {"reasoning_model": True}])
async def test_reasoning_models_get_other_parameters(options: dict[str, Any]) -> None:
    """They reject `temperature` and `max_tokens`, and need `max_completion_tokens`."""
    request = await _sent({}, temperature=0.5, max_tokens=99, **options)

    assert request.body["max_completion_tokens"] == 99
    assert not {"temperature", "max_tokens"} & set(request.body)


async def test_a_listener_means_a_stream_that_counts_its_tokens() -> None:
    """With `on_delta` the reply is streamed, and the request asks for its usage."""
    request = await _sent({}, Heard())

    assert request.body["stream"] is True
    assert request.body["stream_options"] == {"include_usage": True}


async def test_every_request_of_a_recorded_call_carries_its_key() -> None:
    """`Idempotency-Key` and `X-Call` are the same on every try. Ids that a header cannot hold are encoded."""
    token = current_call.set(CallInfo("rün", "main.3", "rün:u:main.3", 3))
    try:
        async with ModelServer([{"error": "server_error"}, {"text": "ok"}]) as server:
            await _ask(_client(server.url))
    finally:
        current_call.reset(token)

    received = [event for event in server.log if event["event"] == "received"]
    assert [(e["key"], e["call"]) for e in received] == [("r%C3%BCn:u:main.3", "main.3")] * 2


async def test_extra_headers_are_sent_and_win() -> None:
    """They may also replace the authorization header."""
    request = await _sent({}, extra_headers={"X-Team": "blue", "Authorization": "Basic abc"})

    assert request.headers["x-team"] == "blue"
    assert request.headers["authorization"] == "Basic abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_base": None}, "llm.api_base: missing"),
        ({"api_base": "localhost:8000"}, "not an http"),
        ({"api_base": "http://"}, "not an http"),
        ({"api_base": "http://x.test/v1/responses"}, "not the responses API"),
        ({"openai_api_style": "responses"}, "not the responses API"),
        ({"temprature": 1}, "temprature"),
        ({"top_p": 3}, "top_p"),
        ({"extra_headers": {"X-Key": "a\nb"}}, "X-Key: the value has characters"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    """A mistake in the agents file is found when the client is created, not by the first run."""
    with pytest.raises(PluginConfigError, match=message):
        _client(**({"url": "http://x.test/v1"} | options))


def test_a_key_with_a_line_end_is_refused_without_showing_it() -> None:
    """Keys that are read from files often end with a newline. The error does not quote them."""
    with pytest.raises(PluginConfigError) as caught:
        OpenAICompatibleClient(LLMOptions(api_base="http://x.test"), api_key=f"{KEY}\n")

    assert KEY not in str(caught.value)


async def test_a_stream_may_have_an_address_of_its_own() -> None:
    """Streamed requests go to `stream_endpoint`. A path is relative to `api_base`."""
    async with ModelServer([{"text": "ok"}]) as server:
        base = server.url.removesuffix("/v1")
        client = _client(f"{base}/elsewhere", stream_endpoint=f"{server.url}/chat/completions")
        reply = await _ask(client, Heard())

    assert reply.output_text == "ok"
    assert _client(base, stream_endpoint="/v1/stream").stream_url == f"{base}/v1/stream"


# --- what comes back -------------------------------------------------------------------------------------

FULL = {
    "text": "On it:\n two  calls 💡",
    "tool_calls": [
        {"name": "add", "arguments": {"x": 1, "note": "ünïcode, quite a long one"}},
        {"name": "now", "arguments": "{oops"},
    ],
    "usage": {"input_tokens": 100, "output_tokens": 20, "cached_tokens": 40},
}


async def test_a_streamed_reply_is_the_plain_one() -> None:
    """Text, calls, usage and cost are the same with and without a stream, and the pieces equal the text."""
    heard = Heard()
    pricing = LLMPricing(input=1, output=1, cached_read=0.5)
    async with ModelServer(lambda _: FULL) as server:
        plain = await _ask(_client(server.url, pricing=pricing), tools=TOOLS)
        streamed = await _ask(_client(server.url, pricing=pricing), heard, tools=TOOLS)

    assert heard.text == streamed.output_text == plain.output_text == FULL["text"]
    assert len(heard.pieces) > 3
    assert streamed.tool_calls == plain.tool_calls
    assert [(c.id, c.name, bool(c.parse_error)) for c in plain.tool_calls] == [
        ("call_0_0", "add", False),
        ("call_0_1", "now", True),
    ]
    assert plain.stop_reason == streamed.stop_reason == "tool_calls"
    assert streamed.usage is not None
    assert plain.usage is not None
    assert streamed.usage.metadata["ttft_ms"] > 0
    assert "ttft_ms" not in plain.usage.metadata
    for usage in (plain.usage, streamed.usage):
        assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (100, 20, 120)
        assert usage.metadata["cost_usd"] == pytest.approx((60 + 40 * 0.5 + 20) / 1e6)
        assert usage.metadata["retries"] == 0


STREAM = _sse(
    _delta(role="assistant", content=""),
    _delta(content="Grüße, "),
    _delta(content="Welt 💡"),
    _delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}]),
    _delta(tool_calls=[{"index": 0, "function": {"arguments": '{"x": "ü"}'}}]),
    _delta(finish_reason="tool_calls"),
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    "[DONE]",
)


def _cut(data: bytes, borders: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted(border % len(data) for border in borders), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks) if a != b]


@given(st.lists(st.integers(min_value=0), max_size=12))
def test_a_reply_does_not_depend_on_how_the_network_cuts_it(borders: list[int]) -> None:
    """The reply and its text are the same, wherever the network splits the stream."""

    async def read() -> tuple[LLMResponse, str]:
        heard = Heard()
        async with _raw_server(*_cut(STREAM, borders)) as url:
            return await _ask(_client(url), heard), heard.text

    reply, text = asyncio.run(read())

    assert reply.output_text == text == "Grüße, Welt 💡"
    assert [(c.id, c.name, c.arguments) for c in reply.tool_calls] == [("a", "add", {"x": "ü"})]
    assert reply.usage is not None
    assert reply.usage.total_tokens == 5


async def test_a_server_that_cannot_stream_is_understood() -> None:
    """A complete JSON body instead of a stream is the reply; the listener gets it in one piece."""
    body = json.dumps({"choices": [{"message": {"content": "all at once"}, "finish_reason": "stop"}]})
    heard = Heard()

    async with _raw_server(body.encode(), head="content-type: application/json") as url:
        reply = await _ask(_client(url), heard)

    assert reply.output_text == heard.text == "all at once"
    assert reply.usage is not None
    assert reply.usage.metadata["estimated"] is True


async def test_a_connection_lost_after_the_last_word_loses_nothing() -> None:
    """After the finish reason, the reply is complete even if the connection fails."""
    half_a_chunk = b"400\r\n" + _sse(_delta(content="done", finish_reason="stop"))

    async with _raw_server(half_a_chunk, head="transfer-encoding: chunked") as url:
        reply = await _ask(_client(url), Heard())

    assert reply.output_text == "done"


# --- failures --------------------------------------------------------------------------------------------


async def _failure(client: OpenAICompatibleClient, on_delta: OnDelta | None = None) -> LLMError:
    with pytest.raises(LLMError) as caught:
        await _ask(client, on_delta)
    return caught.value


@pytest.mark.parametrize(
    ("entry", "error", "tries"),
    [
        ({"error": "rate_limit"}, LLMRateLimitError, 3),
        ({"error": "server_error"}, LLMConnectionError, 3),
        ({"error": "server_error", "status": 502}, LLMConnectionError, 3),
        ({"error": "server_error", "status": 503}, LLMConnectionError, 3),
        ({"error": "server_error", "status": 504}, LLMConnectionError, 3),
        ({"error": "response", "status": 408}, LLMConnectionError, 3),
        ({"error": "connection"}, LLMConnectionError, 3),
        ({"error": "disconnect"}, LLMConnectionError, 3),
        ({"error": "hang"}, LLMConnectionError, 3),
        ({"error": "response"}, LLMResponseError, 1),
        ({"error": "response", "status": 404}, LLMResponseError, 1),
        ({"error": "response", "status": 409}, LLMConnectionError, 3),
        ({"error": "response", "status": 425}, LLMConnectionError, 3),
        ({"error": "server_error", "status": 529}, LLMConnectionError, 3),
        ({"error": "response", "status": 401}, LLMAuthError, 1),
        ({"error": "response", "status": 403}, LLMAuthError, 1),
        ({"error": "response", "status": 413}, LLMContextTooLong, 1),
        ({"error": "response", "status": 422}, LLMResponseError, 1),
        ({"error": "bad_json"}, LLMResponseError, 1),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_every_failure_has_its_class_and_its_tries(
    entry: dict[str, Any], error: type[LLMError], tries: int, streamed: bool
) -> None:
    """Temporary failures are tried three times, permanent ones are raised at once. Each has its class."""
    async with ModelServer(lambda _: entry) as server:
        client = _client(server.url, timeout_ms=150 if entry["error"] == "hang" else 5000)
        # Text that was heard is not heard twice: a stream that breaks in the middle has one try.
        tries = 1 if streamed and entry["error"] == "disconnect" else tries
        failed = await _failure(client, Heard() if streamed else None)

    assert type(failed) is error
    assert [event["event"] for event in server.log].count("received") == tries


@pytest.mark.defect("L01")
async def test_a_failure_that_passes_is_not_noticed() -> None:
    """After two failed tries the third returns the reply. The usage has the number of retries."""
    async with ModelServer([{"error": "connection"}, {"error": "server_error"}, {"text": "there"}]) as server:
        reply = await _ask(_client(server.url))

    assert reply.output_text == "there"
    assert reply.usage is not None
    assert reply.usage.metadata["retries"] == 2


@pytest.mark.parametrize("fault", ["disconnect", "cut_stream"])
async def test_an_incomplete_stream_is_a_connection_error(fault: str) -> None:
    """A stream without a finish reason is not a reply, even if it ends properly. Delivered text stays."""
    heard = Heard()

    async with ModelServer([{"error": fault}, {"text": "never"}]) as server:
        failed = await _failure(_client(server.url), heard)

    assert isinstance(failed, LLMConnectionError)
    assert heard.text.startswith("This reply")


async def test_a_stream_that_ends_before_its_first_text_is_retried() -> None:
    """No text was delivered, so none is delivered twice."""
    torn = _sse(_delta(role="assistant", content=""))
    heard = Heard()

    async with _raw_server(torn) as url:
        pauses = Pauses()
        await _failure(_client(url, pauses=pauses), heard)

    assert len(pauses.ms) == 2
    assert heard.pieces == []


@pytest.mark.parametrize(
    ("inside", "error"),
    [
        ({"message": "slow down", "code": "rate_limit_exceeded"}, LLMRateLimitError),
        ({"message": "slow down", "code": 429}, LLMRateLimitError),
        ({"message": "overloaded", "type": "server_error"}, LLMConnectionError),
        ("engine died", LLMConnectionError),
        ({"message": "too long", "code": "context_length_exceeded"}, LLMContextTooLong),
        ({"message": "bad", "type": "invalid_request_error"}, LLMResponseError),
    ],
)
async def test_an_error_inside_a_stream_is_that_error(inside: Any, error: type[LLMError]) -> None:
    """Servers that fail after they sent status 200 send the error in the stream."""
    async with _raw_server(_sse(_delta(content="Hel"), {"error": inside})) as url:
        failed = await _failure(_client(url), Heard())

    assert type(failed) is error
    assert (inside if isinstance(inside, str) else inside["message"]) in failed.message


async def test_a_refused_connection_is_a_connection_error() -> None:
    """A refused connection is retryable, and the hint names the options to check."""
    async with ModelServer([]) as server:
        gone = server.url

    failed = await _failure(_client(gone))

    assert isinstance(failed, LLMConnectionError)
    assert "llm.api_base" in str(failed)


async def test_connection_errors_may_be_left_to_the_run() -> None:
    """With `retry_on_connection_errors` false, a connection error is raised at once."""
    async with ModelServer(lambda _: {"error": "connection"}) as server:
        await _failure(_client(server.url, retry={"retry_on_connection_errors": False}))

    assert [event["event"] for event in server.log] == ["received", "answered"]


async def test_the_providers_words_are_kept_and_the_key_is_not() -> None:
    """The error has the provider's code and message, limited in length and without the key."""

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        words = f"{request.headers['authorization']} {request.headers['api-key']} is wrong " + "x" * 9999
        return {"error": "response", "status": 401, "message": words}

    async with ModelServer(reply) as server:
        client = _client(server.url, api_key_env="TEAM_KEY", extra_headers={"api-key": "another-secret"})
        failed = await _failure(client)
    shown = str(failed) + repr(ErrorDetails.from_exception(failed))

    assert "answered 401 (invalid_request_error): Bearer *** *** is wrong" in failed.message
    assert len(failed.message) <= 500
    assert "TEAM_KEY" in str(failed)
    assert KEY not in shown
    assert "another-secret" not in shown


async def test_a_used_up_quota_is_not_a_rate_limit() -> None:
    """`insufficient_quota` has status 429, but a retry is useless: the error is raised at once."""
    body = json.dumps({"error": {"message": "pay", "type": "insufficient_quota"}}).encode()

    async with _raw_server(body, head="content-type: application/json") as url:
        failed = await _failure(_client(url))

    assert type(failed) is LLMResponseError
    assert "is used up" in str(failed)


async def test_a_page_of_html_is_not_a_reply() -> None:
    """A URL that serves a web page is a response error, with and without a stream."""
    async with _raw_server(b"<html>Welcome</html>", head="content-type: text/html") as url:
        plain, streamed = await _failure(_client(url)), await _failure(_client(url), Heard())

    assert type(plain) is type(streamed) is LLMResponseError


# --- patience --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jitter", "pauses"), [(1.0, [100, 200, 400]), (0.5, [50, 100, 200]), (0.0, [0, 0, 0])]
)
async def test_the_pause_grows_and_has_full_jitter(jitter: float, pauses: list[float]) -> None:
    """A random share of an exponentially growing time."""
    noted = Pauses()

    async with ModelServer(lambda _: {"error": "server_error"}) as server:
        retry = {"max_attempts": 4, "initial_backoff_ms": 100}
        await _failure(_client(server.url, jitter=jitter, pauses=noted, retry=retry))

    assert noted.ms == pauses


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
async def test_the_time_a_provider_asks_for_is_a_floor(jitter: float) -> None:
    """Jitter never makes the pause shorter than `retry-after-ms`."""
    pauses = Pauses()

    async with ModelServer([{"error": "rate_limit", "retry_after_ms": 700}, {"text": "ok"}]) as server:
        await _ask(_client(server.url, jitter=jitter, pauses=pauses, retry={"initial_backoff_ms": 100}))

    assert pauses.ms == [700]


@pytest.mark.parametrize(
    "retry", [{"max_backoff_ms": 1000}, {"max_backoff_ms": 60_000, "total_budget_ms": 2000}]
)
async def test_a_long_wait_is_left_to_the_run(retry: dict[str, Any]) -> None:
    """Beyond twice the longest pause, or the budget, the client does not sleep: the run is suspended."""
    pauses = Pauses()

    async with ModelServer([{"error": "rate_limit", "retry_after_ms": 2001}, {"text": "ok"}]) as server:
        failed = await _failure(_client(server.url, pauses=pauses, retry=retry))

    assert isinstance(failed, LLMRateLimitError)
    assert failed.retry_after_ms == 2001
    assert pauses.ms == []


async def test_a_server_error_that_names_a_time_is_a_rate_limit() -> None:
    """503 with `Retry-After` reaches the run with that time, so that the run does not resume earlier."""
    entry = {"error": "server_error", "status": 503, "retry_after_ms": 90_000}

    async with ModelServer(lambda _: entry) as server:
        failed = await _failure(_client(server.url))

    assert isinstance(failed, LLMRateLimitError)
    assert failed.retry_after_ms == 90_000


# --- many, and gone --------------------------------------------------------------------------------------


async def test_two_hundred_slow_calls_wait_side_by_side() -> None:
    """A waiting call needs only a coroutine: no call is answered before all of them have arrived."""
    everybody = asyncio.Barrier(200)

    async def reply(_: ModelServerRequest) -> dict[str, Any]:
        await everybody.wait()
        return {"text": "at last"}

    async with ModelServer(reply) as server:
        client = _client(server.url)
        calls = [client.generate(messages=list(HI), on_delta=Heard() if n % 2 else None) for n in range(200)]
        replies = await asyncio.gather(*calls)
        await client.aclose()

    assert {reply.output_text for reply in replies} == {"at last"}


async def test_connections_are_used_again() -> None:
    """Consecutive calls share one connection, also with streams."""
    async with ModelServer(lambda _: {"text": "ok"}) as server:
        client = _client(server.url)
        for n in range(4):
            await client.generate(messages=list(HI), on_delta=Heard() if n % 2 else None)
        opened = server.connections
        await client.aclose()

    assert opened == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cancelled_call_closes_its_connection(streamed: bool) -> None:
    """Cancelling ends the request at once, also at the server."""
    async with ModelServer(lambda _: {"text": "a b c d e f"}, latency_ms=20, token_delay_ms=100) as server:
        client = _client(server.url)
        task = asyncio.create_task(client.generate(messages=list(HI), on_delta=Heard() if streamed else None))
        await await_for(lambda: server.log, "the server got the request")

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await await_for(lambda: len(server.log) == 2, "the server noticed")
        await client.aclose()


async def test_a_listener_that_fails_ends_the_call_with_its_own_error() -> None:
    """An exception of `on_delta` is not retried, and is raised unchanged."""

    async def listen(piece: str) -> None:
        raise KeyError(piece)

    async with ModelServer(lambda _: {"text": "a b"}) as server:
        with pytest.raises(KeyError):
            await _ask(_client(server.url), listen)

    assert [event["event"] for event in server.log].count("received") == 1
