"""Streams: what a model or a tool has sent and no watcher has received yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, assert_never

from openagents_worker.jsontext import dumps, whole_text
from openagents_worker.llm.base import Delta, DeltaKind

__all__ = ["OutputStream", "ReplyPace", "ReplyStream"]

PUBLISH_S = 0.05  # pieces of one reply are collected for this long: at most 20 events a second
MAX_PUBLISH_S = 0.5  # also beside very many other replies: a person reads along
PUBLISHED_A_SECOND = 500  # by all runs of a process: each time costs 0.2 ms in the worker, and one script

DELTA_CHARS = 64 * 1024  # of one `llm.delta` or `tool.delta` event
MAX_NAME_CHARS = 200  # of a tool's name, which each of its events repeats; a model may write any text


class ReplyPace:
    """How long pieces of a reply are collected: the longer, the more replies the process streams at once.

    >>> pace = ReplyPace()
    >>> for _ in range(100):
    ...     pace.begin()
    >>> pace.interval_s
    0.2
    """

    def __init__(self) -> None:
        self._replies = 0

    def begin(self) -> None:
        """Count a reply that is streamed from now on."""
        self._replies += 1

    def end(self) -> None:
        self._replies -= 1

    @property
    def interval_s(self) -> float:
        """The seconds between two publications of one reply."""
        return min(max(PUBLISH_S, self._replies / PUBLISHED_A_SECOND), MAX_PUBLISH_S)


class _Unsent:
    """One text of a streamed reply: its unsent pieces, and how many characters were sent."""

    def __init__(self) -> None:
        self.tool_name = ""
        self._parts: list[str] = []
        self.sent = 0
        self.chars = 0

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self.chars += len(text)

    def take(self, max_chars: int) -> Iterator[tuple[int, str]]:
        """The unsent characters in parts with their offsets. They count as sent from now on."""
        unsent = "".join(self._parts)
        self._parts.clear()
        self.chars = 0
        for begin in range(0, len(unsent), max_chars):
            text = unsent[begin : begin + max_chars]
            yield self.sent, whole_text(text)
            self.sent += len(text)


class ReplyStream:
    """The unsent pieces of a streamed reply: its text, its reasoning, and the arguments of its tool calls."""

    event = "llm.delta"

    def __init__(self) -> None:
        self._text, self._reasoning = _Unsent(), _Unsent()
        self._arguments: dict[int, _Unsent] = {}

    @property
    def has_unsent(self) -> bool:
        return bool(self._text or self._reasoning or any(self._arguments.values()))

    def add(self, piece: Delta) -> None:
        match piece.kind:
            case DeltaKind.TEXT:
                self._text.add(piece.text)
            case DeltaKind.REASONING:
                self._reasoning.add(piece.text)
            case DeltaKind.ARGUMENTS:
                arguments = self._arguments.get(piece.tool_call)
                if arguments is None:
                    arguments = self._arguments[piece.tool_call] = _Unsent()
                arguments.tool_name = arguments.tool_name or piece.tool_name[:MAX_NAME_CHARS]
                arguments.add(piece.text)
            case _:
                assert_never(piece.kind)

    def take(self, call: str, attempt: int) -> list[str]:
        """The payloads of `llm.delta` events for the unsent pieces, which count as sent from now on.

        One event has one kind of text. Each kind, and the arguments of each tool call, count offsets of
        their own.
        """
        of_call = {"call": call, "attempt": attempt}
        payloads: list[str] = []
        if self._reasoning:
            payloads += _payloads(self._reasoning, of_call, kind=DeltaKind.REASONING.value)
        if self._text:
            payloads += _payloads(self._text, of_call, kind=DeltaKind.TEXT.value)
        for number, unsent in self._arguments.items():
            tool = {"tool_call": number, "tool_name": unsent.tool_name}
            payloads += _payloads(unsent, of_call, kind=DeltaKind.ARGUMENTS.value, **tool)
        return payloads


class OutputStream:
    """The unsent text of the output of a tool."""

    event = "tool.delta"

    def __init__(self) -> None:
        self._text = _Unsent()

    @property
    def has_unsent(self) -> bool:
        return bool(self._text)

    @property
    def unsent_chars(self) -> int:
        return self._text.chars

    def add(self, text: str) -> None:
        self._text.add(text)

    def take(self, call: str, attempt: int) -> list[str]:
        """The payloads of `tool.delta` events for the unsent text, which counts as sent from now on."""
        return list(_payloads(self._text, {"call_id": call, "attempt": attempt}))


def _payloads(unsent: _Unsent, of_call: Mapping[str, Any], **more: Any) -> Iterator[str]:
    for offset, text in unsent.take(DELTA_CHARS):
        yield dumps({**of_call, "offset": offset, "text": text, **more})
