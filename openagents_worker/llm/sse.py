"""Server-sent events: the only place that cuts a byte stream into events."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

__all__ = ["SSEDecoder"]

_LINE_END = re.compile("\r\n|\n|\r")


class SSEDecoder:
    r"""Turns bytes, split anywhere, into the data of whole events.

    Comments, `event:`, `id:` and `retry:` lines are dropped. An event that the end of the stream cuts off is
    never handed out, as the HTML standard says.

    >>> list(SSEDecoder().feed(b": hello\r\ndata: one\ndata: two\n\n"))
    ['one\ntwo']
    """

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._after_cr = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that this chunk completes."""
        for line in self._lines(self._text.decode(chunk)):
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data.clear()

    def _lines(self, text: str) -> list[str]:
        if not text:
            return []
        if self._after_cr:  # a line end of two characters, split over two chunks
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r") if text else False
        *lines, self._rest = _LINE_END.split(self._rest + text)
        return lines
