"""Fallbacks and responses in the background: each call is paid once, to the model that answered it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.llm.base import CallInfo, LLMResponse, current_call
from openagents_worker.llm.fallbacks import FallbackClient
from openagents_worker.llm.openai_responses import OpenAIResponsesClient
from openagents_worker.llm.providers import make_client
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.waiting import await_for
from tests.unit.llm.wire import HI

TEXT = "one two three four five six seven"


class Notes:
    """The notes of one call, as the runtime keeps them between attempts."""

    def __init__(self) -> None:
        self.newest: Mapping[str, Any] | None = None

    async def note(self, value: Mapping[str, Any]) -> None:
        self.newest = value

    def info(self) -> CallInfo:
        return CallInfo(
            "r",
            "c",
            "r:u:c",
            0,
            kind="model",
            noted=self.newest,
            note=self.note,
            is_given_up=lambda: False,
        )


async def ask_with_fallback(first: str, second: str, notes: Notes) -> LLMResponse:
    """One attempt of a call of gpt-5, whose fallback is gpt-4o at the second URL."""
    options: dict[str, Any] = {
        "provider": "openai_responses",
        "model": "gpt-5",
        "background": True,
        "background_poll_ms": 50,
        "retry": {"max_attempts": 1},
        "api_base": first,
        "fallbacks": [{"model": "gpt-4o", "api_base": second, "share_key": True}],
    }
    client = make_client(LLMOptions(**options), env={"OPENAI_API_KEY": "k"})
    token = current_call.set(notes.info())
    try:
        return await client.generate(messages=list(HI))
    finally:
        current_call.reset(token)
        await client.aclose()


@pytest.mark.parametrize("is_same", [False, True], ids=["another server", "the same server"])
async def test_the_next_attempt_continues_the_response_of_the_fallback(is_same: bool) -> None:
    """It does not ask the first model, which may answer again: both answers would be paid for."""
    asked: list[str] = []
    is_up = asyncio.Event()

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        model = str(request.body["model"])
        asked.append(model)
        if model == "gpt-5":
            return {"text": "not asked for"} if is_up.is_set() else {"error": "server_error"}
        return {"text": TEXT}

    async def hold(_: Any, number: int) -> None:
        if number > 3:
            await is_up.wait()

    notes = Notes()
    async with (
        ModelServer(reply, before_piece=hold) as first,
        ModelServer(reply, before_piece=hold) as other,
    ):
        urls = first.url, first.url if is_same else other.url
        attempt = asyncio.create_task(ask_with_fallback(*urls, notes))
        await await_for(lambda: notes.newest, "the id is noted")
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        is_up.set()
        reply_of_next = await ask_with_fallback(*urls, notes)

    assert asked == ["gpt-5", "gpt-4o"]
    assert reply_of_next.output_text == TEXT
    assert reply_of_next.usage is not None
    assert reply_of_next.usage.metadata["fallback"] == "openai_responses/gpt-4o"


async def test_a_response_is_cancelled_before_another_model_is_asked() -> None:
    """Its state cannot be read, but it goes on at the provider, and would be paid for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path = head.split(" ")[:2]
        length = next(
            (int(line[15:]) for line in head.lower().split("\r\n") if line[:15] == "content-length:"), 0
        )
        model = json.loads(await reader.readexactly(length)).get("model") if length else None
        asked.append(model or f"{method} {path}")
        status, reply = "200 OK", {"id": "resp_1", "object": "response", "status": "queued", "output": []}
        if model == "gpt-4o":
            part = {"type": "output_text", "text": TEXT}
            output = [{"type": "message", "role": "assistant", "content": [part]}]
            reply = {"id": "resp_2", "object": "response", "status": "completed", "output": output}
        elif method == "GET":
            status, reply = "429 Slow\r\nretry-after: 600", {"error": {"message": "no"}}
        writer.write(
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n".encode()
        )
        writer.write(json.dumps(reply).encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    notes = Notes()
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        reply = await ask_with_fallback(url, url, notes)

    assert reply.output_text == TEXT
    assert asked == [
        "gpt-5",
        "GET /v1/responses/resp_1",
        "POST /v1/responses/resp_1/cancel",
        "gpt-4o",
    ]


async def test_each_model_of_a_call_has_an_idempotency_key_of_its_own() -> None:
    """A server may answer a key that it knows with what it has answered before, or refuse it."""
    keys: list[str] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        keys.append(request.headers["idempotency-key"])
        return {"text": "ok"} if request.body["model"] == "gpt-4o" else {"error": "server_error"}

    async with ModelServer(reply) as server:
        for _ in range(2):
            await ask_with_fallback(server.url, server.url, Notes())

    assert keys == ["r:u:c", "r:u:c:fallback-1"] * 2


async def test_a_fault_of_a_script_meets_a_call_once() -> None:
    """Also in a script that one server says for both models: the second one gets the reply."""
    async with ModelServer([{"error": "server_error"}, {"text": TEXT}]) as server:
        reply = await ask_with_fallback(server.url, server.url, Notes())

    assert reply.output_text == TEXT


async def test_a_response_is_cancelled_with_the_key_of_the_client_that_created_it() -> None:
    """At one URL, the key of another account does not find it: it would go on."""
    keys: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        keys.extend(
            line.split()[-1] for line in head.split("\r\n") if line.lower().startswith("authorization:")
        )
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        options: dict[str, Any] = {
            "provider": "openai_responses",
            "model": "gpt-5",
            "background": True,
            "api_base": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1",
            "fallbacks": [{"model": "gpt-4o", "api_key_env": "OTHER"}],
        }
        client = make_client(LLMOptions(**options), env={"OPENAI_API_KEY": "first", "OTHER": "second"})
        assert isinstance(client, FallbackClient)
        first = client._clients[0]
        assert isinstance(first, OpenAIResponsesClient)
        note = {"response_id": "resp_1", "api": first._api}
        for model in ("gpt-4o", "gpt-5", None):
            await client.cancel_noted({**note, "model": model}, tenant=None)
        await client.aclose()

    assert keys == ["second", "first", "first"]
