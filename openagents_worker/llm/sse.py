"""Server-sent events: the only place that cuts a byte stream into events."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

from openagents_worker.http_replies import ReplyTooLarge

__all__ = ["SSEDecoder"]

_LINE_END = re.compile("\r\n|\n|\r")
_EMPTY_LINES = re.compile("\n{3,}")  # equal to one empty line; a gigabyte of them must cost nothing


class SSEDecoder:
    r"""Decodes a byte stream, in chunks of any size, into the data of whole events.

    Comments and `id:` and `retry:` lines are dropped. `event` is the name of the event whose data was
    returned last, "" if it has none. An event that the end of the stream cuts off is never returned, as the
    HTML standard (server-sent events) requires. Each byte is read once, even if its line is very long.

    >>> list(SSEDecoder().feed(b": hello\r\ndata: one\ndata: two\n\n"))
    ['one\ntwo']
    """

    def __init__(self, *, max_event_chars: int | None = None) -> None:
        """`feed` raises `ReplyTooLarge` for a longer event or line. None: no limit."""
        self._text = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = io.StringIO()
        self._after_cr = False
        self.event = ""
        self._name = ""
        self._data: list[str] = []
        self._max = max_event_chars
        self._data_chars = 0

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that this chunk completes."""
        for line in self._lines(self._text.decode(chunk)):
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
                self._data_chars += len(line) + 1
                self._check()
            elif name == "event":
                self._name = value.strip()
            elif not line:
                name, self._name = self._name, ""
                if self._data:
                    self.event = name
                    yield "\n".join(self._data)
                    self._data.clear()
                    self._data_chars = 0

    def _lines(self, text: str) -> Iterator[str]:
        if not text:
            return
        if self._after_cr:  # "\r\n" was split over two chunks
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r") if text else False
        if "\n\n\n" in text:
            text = _EMPTY_LINES.sub("\n\n", text)
        *lines, rest = _LINE_END.split(text)
        if lines:
            lines[0] = self._rest.getvalue() + lines[0]
            self._rest = io.StringIO()
        self._rest.write(rest)
        self._check()
        yield from lines

    def _check(self) -> None:
        if self._max is not None and self._data_chars + self._rest.tell() > self._max:
            raise ReplyTooLarge(f"an event of the stream has more than {self._max} characters")
