"""Streaming tools: the only place that makes texts for watchers and one result of what a tool yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from openagents_worker.errors import StepTooLarge, ToolError
from openagents_worker.jsontext import dumps
from openagents_worker.tools.typed import plain_json

__all__ = ["streamed_result"]

PIECES_PER_TURN = 100
"""After so many pieces the event loop serves others: a tool may yield without ever waiting."""

OnText = Callable[[str], Awaitable[None]]


async def streamed_result(chunks: Any, on_text: OnText, *, tool_name: str, max_chars: int) -> Any:
    """The result of a tool that yields it in pieces. `on_text` gets the text of each piece.

    A piece is a text, or an object with a text in `text` or `data`; any other value is shown as a line of
    JSON. `{"type": "result", "data": …}` is the result. Without one, the result is the whole text.
    Raises `ToolError` if the tool yields nothing of this kind, and `StepTooLarge` if the text is the result
    and has more than `max_chars` characters.
    """
    if not isinstance(chunks, AsyncIterator):
        raise ToolError(
            f"invoke_stream of {tool_name} returned a {type(chunks).__name__}, not an async iterator",
            tool_name,
            hint="write it as an async generator: async def … yield",
        )
    text, result = _YieldedText(max_chars), _NO_RESULT
    try:
        number = 0
        async for chunk in chunks:
            if isinstance(chunk, dict) and chunk.get("type") == "result":
                result = chunk.get("data")
                continue
            piece = _text_of(chunk, tool_name)
            text.add(piece)
            await on_text(piece)
            number += 1
            if number % PIECES_PER_TURN == 0:
                await asyncio.sleep(0)
    finally:
        if hasattr(chunks, "aclose"):
            await chunks.aclose()
    return text.whole(tool_name) if result is _NO_RESULT else plain_json(result, tool_name)


_NO_RESULT: Any = object()


class _YieldedText:
    """The text of a stream, up to a limit."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._chars = 0
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._chars += len(piece)
        if self._chars <= self._max_chars:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def whole(self, tool_name: str) -> str:
        if self._chars > self._max_chars:
            raise StepTooLarge(
                f"{tool_name} has yielded {self._chars:,} characters, {self._max_chars:,} can be its result",
                hint='yield {"type": "result", "data": …} with a summary, or a reference to the data',
            )
        return "".join(self._pieces)


def _text_of(chunk: Any, tool_name: str) -> str:
    if isinstance(chunk, str):
        return chunk
    if isinstance(chunk, dict):
        for field in ("text", "data"):
            if isinstance(chunk.get(field), str):
                return str(chunk[field])
    return f"{dumps(plain_json(chunk, tool_name))}\n"
