"""The prepared replies of the benchmarks: each client reads the same from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bench._raw_model import CHAT, EVENTS, MESSAGES, PIECES, RESPONSES, raw_model
from openagents_worker.llm.base import Delta, DeltaKind, ModelRequest
from tests.unit.llm.wire import ANTHROPIC, HI, Format, client_of
from tests.unit.llm.wire import CHAT as CHAT_FORMAT
from tests.unit.llm.wire import RESPONSES as RESPONSES_FORMAT

PATHS = {CHAT: CHAT_FORMAT, RESPONSES: RESPONSES_FORMAT, MESSAGES: ANTHROPIC}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with raw_model(0) as url:
        yield url


@pytest.mark.parametrize("wire", PATHS.values(), ids=lambda wire: wire.provider)
async def test_a_mixed_stream_has_as_many_pieces_of_each_kind(url: str, wire: Format) -> None:
    """All together are the pieces that the table of the benchmark counts."""
    pieces: dict[DeltaKind, list[str]] = {kind: [] for kind in DeltaKind}

    async def text(piece: str) -> None:
        pieces[DeltaKind.TEXT].append(piece)

    async def other(piece: Delta) -> None:
        pieces[piece.kind].append(piece.text)

    client = client_of(wire, f"{url}/mixed/v1")
    reply = await client.respond(ModelRequest(HI, on_delta=text, on_piece=other))
    await client.aclose()

    assert sum(map(len, pieces.values())) == PIECES
    assert min(map(len, pieces.values())) >= PIECES // 3
    assert reply.output_text == "".join(pieces[DeltaKind.TEXT])
    assert reply.reasoning_text == "".join(pieces[DeltaKind.REASONING])
    (call,) = reply.tool_calls
    assert (call.name, call.arguments) == ("note", json.loads("".join(pieces[DeltaKind.ARGUMENTS])))


@pytest.mark.parametrize("path", PATHS)
async def test_a_reply_has_the_same_text_whole_and_streamed(url: str, path: str) -> None:
    """The streamed one is shorter: it has fewer words."""
    client: Any = client_of(PATHS[path], f"{url}/text/v1")
    heard: list[str] = []

    async def hear(piece: str) -> None:
        heard.append(piece)

    whole = await client.respond(ModelRequest(HI))
    streamed = await client.respond(ModelRequest(HI, on_delta=hear))
    await client.aclose()

    assert len(heard) == PIECES
    assert whole.output_text.startswith(streamed.output_text)
    assert all(event.endswith("\n\n") for event in EVENTS[path](False))
