"""Server-sent events: the only place that cuts a byte stream into events."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

from openagents_worker.http_replies import ReplyTooLarge

__all__ = ["SSEDecoder"]

LINE_CHARS = 6  # the name of a field, which counts beside its value: many empty lines reach the limit too
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
        self._has_rest = self._after_cr = False
        self.event = ""
        self._name = ""
        self._data: list[str] = []
        self._max = float("inf") if max_event_chars is None else max_event_chars
        self._data_chars = 0

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that this chunk completes."""
        lines = self._lines(self._text.decode(chunk))
        rest = lines.pop()
        for line in lines:
            if line.startswith("data:"):
                self._add_data(line[6:] if line.startswith(" ", 5) else line[5:])
            elif line:
                self._add_field(line)
            elif self._data:
                self.event, self._name = self._name, ""
                data = self._data[0] if len(self._data) == 1 else "\n".join(self._data)
                self._data.clear()
                self._data_chars = 0
                yield data
            else:
                self._name = ""
        if rest:
            self._rest.write(rest)
            self._has_rest = True
            self._check(self._data_chars + self._rest.tell())

    def _add_data(self, value: str) -> None:
        self._data.append(value)
        self._data_chars += len(value) + LINE_CHARS
        self._check(self._data_chars)

    def _add_field(self, line: str) -> None:
        """A line that is neither empty nor data with a value."""
        self._check(self._data_chars + len(line))
        name, _, value = line.partition(":")
        if name == "event":
            self._name = value.strip()
        elif name == "data":
            self._add_data("")

    def _lines(self, text: str) -> list[str]:
        """The lines that this text completes, and last the beginning of a line that it does not complete."""
        if self._after_cr and text:  # "\r\n" was split over two chunks
            text = text.removeprefix("\n")
            self._after_cr = False
        if "\n\n\n" in text:
            text = _EMPTY_LINES.sub("\n\n", text)
        if "\r" in text:
            self._after_cr = text.endswith("\r")
            lines = _LINE_END.split(text)
        else:
            lines = text.split("\n")
        if self._has_rest and len(lines) > 1:
            lines[0] = self._rest.getvalue() + lines[0]
            self._rest = io.StringIO()
            self._has_rest = False
        return lines

    def _check(self, chars: int) -> None:
        if chars > self._max:
            raise ReplyTooLarge(f"an event of the stream has more than {self._max} characters")
