"""The contract of a wire format: how its codec builds request bodies, and reads whole and streamed replies.

A codec does no I/O. `openagents_worker.llm.http` sends its bodies and retries; it also recognises errors that
arrive in a reply with status 200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from openagents_worker.jsontext import whole_text
from openagents_worker.llm.base import Delta, LLMResponse, ModelRequest

__all__ = ["Codec", "StreamReader", "TextJoiner"]


class StreamReader(Protocol):
    """Assembles the chunks of one streamed reply."""

    @property
    def begun(self) -> bool:
        """Whether any text, reasoning or tool call has arrived."""

    @property
    def finished(self) -> bool:
        """Whether the reply is complete. A stream that ends before it is incomplete."""

    def add(self, chunk: Mapping[str, Any]) -> Sequence[Delta]:
        """Add one chunk and return its pieces. Raises `LLMResponseError` and `ReplyTooLarge`."""

    def resume(self) -> None:
        """Another stream continues the reply. It may begin with chunks that were read before."""

    def body(self) -> dict[str, Any]:
        """The reply so far, in the shape of a reply that is not streamed."""


class Codec(Protocol):
    """A provider's JSON format: builds request bodies and reads reply bodies. It does no I/O."""

    @property
    def end_of_stream(self) -> str:
        """The data of the event that ends the stream; "" if the stream just ends."""

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model. It is streamed if `request.is_streamed`."""

    def is_reply(self, body: Mapping[str, Any]) -> bool:
        """Whether a whole body has the shape of a reply, valid or not. Any other body is an error."""

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMResponseError` if it is not a reply, and `LLMConnectionError` if
        the provider says that it broke off. Sets `finish_reason`."""

    def stream(self, *, max_chars: int) -> StreamReader:
        """A reader for one streamed reply. It raises `ReplyTooLarge` after `max_chars` characters."""


class TextJoiner:
    r"""Joins pieces of text, and the halves of a surrogate pair that two pieces were cut between.

    >>> text = TextJoiner()
    >>> text.add("a\ud83d"), text.add("\ude00"), text.end(), text.whole
    ('a', '😀', '', 'a😀')
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._half = ""
        self.chars = 0
        """The length of `whole`."""

    def add(self, piece: str) -> str:
        """The text that is complete with this piece. The first half of a pair waits for the next piece."""
        text, self._half = self._half + piece, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        text = whole_text(text)
        self._keep(text)
        return text

    def end(self) -> str:
        """The rest: U+FFFD for a half that stayed alone."""
        rest, self._half = whole_text(self._half), ""
        self._keep(rest)
        return rest

    def _keep(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.chars += len(text)

    @property
    def whole(self) -> str:
        """All text so far, without half of a surrogate pair at its end."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def __bool__(self) -> bool:
        return bool(self._pieces or self._half)
