"""Time limits of a model call: for the connection, between two reads, and for the whole call."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.testing.model_server import ModelServer

PIECES = 8
HI = [{"role": "user", "content": "hi"}]


def dripping(pause_ms: int, *, pieces: int = PIECES) -> ModelServer:
    """A server that sends a reply in pieces, with pauses between them."""
    return ModelServer(lambda asked: {"text": "a " * pieces}, token_delay_ms=pause_ms)


async def ask(url: str, **options: Any) -> tuple[str, list[str]]:
    heard: list[str] = []

    async def listen(piece: str) -> None:
        heard.append(piece)

    given = {"provider": "openai_compatible", "api_base": url, "retry": {"max_attempts": 1}, **options}
    client = OpenAICompatibleClient(LLMOptions(**given), api_key=None)
    try:
        reply = await client.generate(messages=HI, on_delta=listen)
    finally:
        await client.aclose()
    return reply.output_text, heard


async def test_a_reply_may_take_longer_than_the_limit_between_two_reads() -> None:
    """Eight pieces, each within the limit, together take longer than the limit."""
    async with dripping(300) as server:
        text, heard = await ask(server.url, timeout_ms=1_500)

    assert text == "a " * PIECES
    assert len(heard) == PIECES


async def test_a_silence_longer_than_the_limit_ends_the_call() -> None:
    """Even if some pieces have already arrived."""
    async with dripping(30_000) as server:
        with pytest.raises(LLMConnectionError, match="ReadTimeout"):
            await ask(server.url, timeout_ms=100)


async def test_a_reply_that_does_not_end_is_ended_by_the_limit_of_the_call() -> None:
    """A server that sends a piece from time to time cannot hold a run longer than this limit."""
    async with dripping(50, pieces=10_000) as server:
        with pytest.raises(LLMConnectionError, match="no complete reply within 500 ms") as caught:
            await ask(server.url, timeout_ms=400, total_timeout_ms=500)

    assert caught.value.retryable
    assert "llm.total_timeout_ms" in str(caught.value)


async def test_the_limit_of_the_call_covers_its_tries_and_their_pauses() -> None:
    """A server that does not answer is not retried for longer than a call may take."""
    retry = {"max_attempts": 1_000, "initial_backoff_ms": 10, "max_backoff_ms": 10}
    async with dripping(30_000) as server:
        with pytest.raises(LLMConnectionError, match="no complete reply within 300 ms"):
            await ask(server.url, timeout_ms=100, total_timeout_ms=300, retry=retry)


async def test_a_listeners_own_timeout_is_not_taken_for_that_of_the_call() -> None:
    """It is raised unchanged."""

    async def listen(piece: str) -> None:
        raise TimeoutError("the listener's own")

    async with dripping(1) as server:
        client = OpenAICompatibleClient(
            LLMOptions(provider="openai_compatible", api_base=server.url), api_key=None
        )
        with pytest.raises(TimeoutError, match="the listener's own"):
            await client.generate(messages=HI, on_delta=listen)
        await client.aclose()


@pytest.mark.parametrize(
    ("options", "connect_s", "read_s"),
    [({}, 5.0, 120.0), ({"connect_timeout_ms": 250, "timeout_ms": 1_000}, 0.25, 1.0)],
)
async def test_each_request_has_its_two_limits(
    options: dict[str, Any], connect_s: float, read_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the agents file; by default 5 s to connect and 120 s between two reads."""
    asked: list[dict[str, float]] = []

    class Listening(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            asked.append(request.extensions["timeout"])
            return httpx.Response(200, json={"choices": [{"message": {"content": "hello"}}]})

    monkeypatch.setattr("openagents_worker.llm.http.ConnectionPool", lambda url, options: Listening())
    client = OpenAICompatibleClient(
        LLMOptions(provider="openai_compatible", api_base="http://model.test", **options), api_key=None
    )
    reply = await client.generate(messages=HI)
    await client.aclose()

    assert reply.output_text == "hello"
    assert [(limits["connect"], limits["read"]) for limits in asked] == [(connect_s, read_s)]


@pytest.mark.parametrize(
    ("options", "whole_call_ms"),
    [
        ({}, 600_000),
        ({"timeout_ms": 60_000}, 600_000),
        ({"timeout_ms": 900_000}, 900_000),
        ({"total_timeout_ms": 700_000}, 700_000),
    ],
)
def test_a_file_that_allows_longer_silences_allows_longer_calls(
    options: dict[str, Any], whole_call_ms: int
) -> None:
    """In a file of the original SDK, `timeout_ms` is the limit of the whole call."""
    assert LLMOptions(**options).whole_call_ms == whole_call_ms
