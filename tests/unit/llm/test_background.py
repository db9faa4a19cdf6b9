"""Responses in the background: one request for each call, whatever breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from openagents_worker.errors import LLMConnectionError
from openagents_worker.llm.base import CallInfo, LLMResponse, current_call
from openagents_worker.testing.model_server import ModelServer
from tests.support.listening import listening
from tests.support.waiting import await_for
from tests.unit.llm.raw_server import sse
from tests.unit.llm.wire import HI, RESPONSES, Heard, client_of

MB = 1024 * 1024
BACKGROUND: dict[str, Any] = {"background": True, "background_poll_ms": 50, "retry": {"max_attempts": 1}}
TEXT = "one two three four five six seven"
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["polled", "streamed"])


class Notes:
    """The notes of one call, as the runtime keeps them between attempts."""

    def __init__(self) -> None:
        self.notes: list[Mapping[str, Any]] = []
        self.is_given_up = False

    async def note(self, value: Mapping[str, Any]) -> None:
        self.notes.append(value)

    def info(self) -> CallInfo:
        return CallInfo(
            "r",
            "model:1",
            "r:u:model:1",
            0,
            kind="model",
            noted=self.notes[-1] if self.notes else None,
            note=self.note,
            is_given_up=lambda: self.is_given_up,
        )


async def ask_in_background(
    server: ModelServer, notes: Notes, heard: Heard | None, **options: Any
) -> LLMResponse:
    options = BACKGROUND | options
    client = client_of(RESPONSES, server.url, **options)
    token = current_call.set(notes.info())
    try:
        return await client.generate(messages=list(HI), on_delta=heard)
    finally:
        current_call.reset(token)
        await client.aclose()


def _events(server: ModelServer) -> list[str]:
    return [entry["event"] for entry in server.log if entry["event"] != "answered"]


@STREAMED
async def test_the_id_of_the_response_is_noted_before_its_text(streamed: bool) -> None:
    """One request is sent; a reply that is not streamed is polled."""
    notes, heard = Notes(), Heard() if streamed else None
    async with ModelServer([{"text": TEXT}]) as server:
        reply = await ask_in_background(server, notes, heard)

    assert reply.output_text == TEXT
    assert [note["response_id"] for note in notes.notes] == [reply.response_id]
    assert "127.0.0.1" not in str(notes.notes)
    assert _events(server).count("received") == 1
    assert ("retrieved" in _events(server)) is not streamed


@pytest.mark.parametrize("fault", ["reset", "disconnect", "cut_stream"])
async def test_a_stream_that_breaks_is_continued_where_it_broke(fault: str) -> None:
    """No piece is missing, and none comes twice."""
    heard = Heard()
    async with ModelServer([{"error": fault}, {"text": TEXT}]) as server:
        reply = await ask_in_background(server, Notes(), heard)

    assert (reply.output_text, heard.text) == (TEXT, TEXT)
    assert _events(server) == ["received", "retrieved"]


@STREAMED
async def test_the_next_attempt_continues_the_response(streamed: bool) -> None:
    """The first one is cancelled because its worker stops. The provider is not told: the response goes on."""
    notes, begun = Notes(), asyncio.Event()

    async def hold(_: Any, number: int) -> None:
        if number > 3:
            await begun.wait()

    async with ModelServer([{"text": TEXT}], before_piece=hold) as server:
        first = asyncio.create_task(ask_in_background(server, notes, Heard() if streamed else None))
        await await_for(lambda: notes.notes, "the id is noted")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        begun.set()
        reply = await ask_in_background(server, notes, Heard() if streamed else None)

    assert reply.output_text == TEXT
    assert _events(server).count("received") == 1
    assert "cancelled" not in _events(server)


async def test_a_call_that_is_given_up_is_cancelled_at_the_provider() -> None:
    """Its run was cancelled, or its pattern does not want the reply any more."""
    notes = Notes()
    notes.is_given_up = True
    async with ModelServer(lambda _: {"text": TEXT, "latency_ms": 3_600_000}) as server:
        call = asyncio.create_task(ask_in_background(server, notes, Heard()))
        await await_for(lambda: notes.notes, "the id is noted")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    assert _events(server) == ["received", "cancelled"]


@STREAMED
async def test_a_response_that_has_failed_or_is_gone_is_asked_for_anew(streamed: bool) -> None:
    """By the attempt after the one that saw the failure. The provider forgets responses after a while."""
    notes = Notes()
    script = [{"error": "error_in_200", "message": "no more"}, {"text": TEXT}]
    async with ModelServer(script) as server:
        with pytest.raises(LLMConnectionError, match="no more"):
            await ask_in_background(server, notes, Heard() if streamed else None)
        reply = await ask_in_background(server, notes, Heard() if streamed else None)
        notes.notes.append({**notes.notes[-1], "response_id": "resp_4711"})
        again = await ask_in_background(server, notes, Heard() if streamed else None)

    assert (reply.output_text, again.output_text) == (TEXT, TEXT)
    assert _events(server).count("received") == 3


async def test_a_note_about_another_provider_is_not_used() -> None:
    """The agent got another `api_base` between two attempts."""
    notes = Notes()
    async with ModelServer([{"text": "old"}]) as old, ModelServer([{"text": "new"}]) as new:
        await ask_in_background(old, notes, Heard())
        reply = await ask_in_background(new, notes, Heard())

    assert reply.output_text == "new"
    assert _events(new) == ["received"]


async def test_the_reply_to_a_cancel_request_is_not_read() -> None:
    """A server may send one without end."""
    sent, over = 0, asyncio.Event()
    created = {"type": "response.created", "response": {"id": "r", "status": "queued"}}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + sse(created))
        try:
            while b"/cancel" in request:
                writer.write(b"x" * MB)
                await writer.drain()
                sent += MB
            await reader.read(-1)
        except OSError:
            over.set()
        finally:
            writer.close()

    notes, heard = Notes(), Heard()
    notes.is_given_up = True
    async with listening(answer) as port:
        client = client_of(RESPONSES, f"http://127.0.0.1:{port}/v1", **BACKGROUND)
        token = current_call.set(notes.info())
        asking = asyncio.create_task(client.generate(messages=list(HI), on_delta=heard))
        current_call.reset(token)
        await await_for(lambda: notes.notes, "the id is noted")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await over.wait()
        await client.aclose()

    assert sent < 16 * MB
