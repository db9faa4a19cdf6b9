"""The streams between a transport and a session of the SDK, as a connection observes them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from openagents_worker.telemetry.logs import get_logger

__all__ = [
    "MAX_LOGGED",
    "SCHEMA",
    "ObservedReader",
    "ObservedWriter",
    "log_invalid_message",
    "mend",
    "mended",
    "simplify",
]

log = get_logger(__name__)

MAX_LOGGED = 200  # of one connection
MENDED_ON_LOOP = 256 * 1024  # bytes; more of them can take a tenth of a second
_ESCAPE = re.compile(rb"(\\u[dD][89abAB]..\\u[dD][c-fC-F]..)|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
"""A pair of surrogates, half of one, or another escape sequence of JSON."""


async def mend(message: bytes) -> bytes:
    """As `mended`, without blocking the event loop."""
    if len(message) <= MENDED_ON_LOOP:
        return mended(message)
    return await asyncio.to_thread(mended, message)


def mended(message: bytes) -> bytes:
    r"""JSON in which half of a surrogate pair, or bytes that are not UTF-8, are replaced by U+FFFD.

    A text that was cut in the middle of an emoji ends so, and the SDK drops the whole message.

    >>> print(mended(rb'["a\ud83d", "\ud83d\ude00", "\\ud83d"]').decode())
    ["a\ufffd", "\ud83d\ude00", "\\ud83d"]
    """
    if not message.isascii():
        message = message.decode(errors="replace").encode()
    if b"\\ud" in message or b"\\uD" in message:
        message = _ESCAPE.sub(lambda found: rb"\ufffd" if found[2] else found[0], message)
    return message


SCHEMA = "openagents-worker/inputSchema"
"""The entry of `_meta` with the schema of a tool, as the server has sent it."""


LISTS = ("tools", "content", "contents", "messages", "resources", "prompts")
MAX_ELEMENTS = 1_001  # of a list; one more than is used, so that the rest can be reported


def simplify(message: Any) -> None:
    """Let the SDK see only what it can check in a short time, and what is valid of a list of tools.

    Version 2 checks each element of a result on the event loop: 100,000 blocks take many seconds. It refuses
    a whole list for one tool, for example for a schema without a type, a property with the schema `true`, or
    an invalid icon. Each schema is checked later by itself (`listed`).
    """
    response = getattr(message, "message", None)
    result = getattr(getattr(response, "root", response), "result", None)
    if not isinstance(result, dict):
        return
    for name in LISTS:
        if isinstance(elements := result.get(name), list):
            del elements[MAX_ELEMENTS:]
    if isinstance(tools := result.get("tools"), list) and "content" not in result:
        result["tools"] = [_shown_to_sdk(tool) for tool in tools if isinstance(tool, dict)]


def _shown_to_sdk(tool: dict[str, Any]) -> dict[str, Any]:
    texts = {name: tool[name] for name in ("title", "description") if isinstance(tool.get(name), str)}
    hints = tool.get("annotations")
    hints = hints.items() if isinstance(hints, dict) else ()
    return {
        "name": tool["name"] if isinstance(tool.get("name"), str) else "",
        **texts,
        "inputSchema": {"type": "object"},
        "annotations": {name: hint for name, hint in hints if isinstance(hint, bool)},
        "_meta": {SCHEMA: tool.get("inputSchema")},
    }


def log_invalid_message(server: str, number: int, text: str) -> None:
    """Log what a server has sent in place of a message, unless its connection has sent too many of them."""
    if number <= MAX_LOGGED:
        log.warning("mcp.invalid_message", server=server, text=text)
    elif number == MAX_LOGGED + 1:
        log.warning("mcp.invalid_messages_dropped", server=server, lines=MAX_LOGGED)


class ObservedWriter:
    """The stream to a transport. Calls `note` for each message before the transport gets it."""

    def __init__(self, stream: Any, note: Any) -> None:
        self._stream = stream
        self._note = note

    async def send(self, message: Any) -> None:
        self._note(message)
        await self._stream.send(message)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def close(self) -> None:
        self._stream.close()

    async def __aenter__(self) -> ObservedWriter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class ObservedReader:
    """The stream from a transport, as `simplify` leaves its messages. Sets `ended` at its end."""

    def __init__(self, stream: Any, ended: asyncio.Event) -> None:
        self._stream = stream
        self._ended = ended

    @property
    def last_context(self) -> Any:
        """Read by version 2 of the SDK."""
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> Any:
        try:
            message = await self._stream.receive()
            simplify(message)
            return message
        except BaseException:
            self._ended.set()
            raise

    def __aiter__(self) -> ObservedReader:
        return self

    async def __anext__(self) -> Any:
        try:
            message = await self._stream.__anext__()
            simplify(message)
            return message
        except BaseException:
            self._ended.set()
            raise

    async def aclose(self) -> None:
        self._ended.set()
        await self._stream.aclose()

    def close(self) -> None:
        self._stream.close()

    async def __aenter__(self) -> ObservedReader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
