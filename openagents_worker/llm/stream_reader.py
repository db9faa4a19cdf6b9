"""The base of the readers of streams: limits the size of a streamed reply, and translates errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import LLMResponseError
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.llm.base import Delta

__all__ = ["BaseStreamReader"]

CHARS_PER_PIECE = 16  # counts beside the text of a piece, so that many tiny pieces reach the limit too


class BaseStreamReader:
    """Assembles the chunks of one streamed reply. A subclass reads its format; see `codec.StreamReader`."""

    chunk_name = "a chunk"
    """What the format calls a chunk, for errors."""

    def __init__(self, *, max_chars: int | None = None) -> None:
        """`add` raises `ReplyTooLarge` once the reply exceeds `max_chars`. None: no limit."""
        self._max_chars, self._chars = max_chars, 0

    def add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        """Add one chunk and return its pieces. None of them is empty.

        Raises `LLMResponseError` if it cannot be read, and `ReplyTooLarge`. Unknown chunks are ignored: the
        providers add new ones.
        """
        try:
            return self._add(chunk)
        except ReplyTooLarge:
            raise
        except Exception as error:  # a value of the wrong type can raise anything, for example OverflowError
            raise LLMResponseError(f"{self.chunk_name} of the stream cannot be read ({error!r})") from error

    def resume(self) -> None:
        """Another stream continues the reply. Only a format with numbered chunks can be continued."""

    def _add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        """Add one chunk and return its pieces. It may raise anything."""
        raise NotImplementedError

    def _add_size(self, chars: int) -> None:
        """Count characters of the reply. Raises `ReplyTooLarge`."""
        self._chars += chars
        self._check_size(self._chars)

    def _check_size(self, chars: int) -> None:
        if self._max_chars is not None and chars > self._max_chars:
            raise ReplyTooLarge(f"the reply has more than {self._max_chars} bytes")
