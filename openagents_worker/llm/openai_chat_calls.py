"""Tool calls in streams of chat completions: the only place that decides which fragments belong together.

Servers deviate from OpenAI in many ways. The rules:

- A fragment of a tool call belongs to the call with its id. A new id with a name begins a call, even under a
  known index: Ollama and Gemini send index 0 for all calls. Without an id, the index decides; without both,
  a fragment continues the last call, unless that is complete and the fragment has a name.
- A fragment that repeats the arguments of a complete call adds nothing to it.

A fragment costs the same, however many came before it and whatever its server repeats in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openagents_worker.jsontext import loads
from openagents_worker.llm.codec import TextJoiner

__all__ = ["ObjectEnd", "StreamedCall", "StreamedCalls"]

_TEXT_END = re.compile(r'["\\]')
_BRACKET = re.compile(r'["{}\[\]]')
_NOT_BLANK = re.compile(r"[^ \t\r\n]")


class ObjectEnd:
    """Finds the end of a JSON object that arrives in pieces. Each character is read once.

    `is_reached` is true if the brackets match and nothing follows; whether it is valid JSON is not checked.

    >>> end = ObjectEnd()
    >>> [end.add(piece) or end.is_reached for piece in ('{"a": "}', '"', "}", " ", "{}")]
    [False, False, True, True, False]
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._after_backslash = False
        self._has_begun = self._is_followed = False

    @property
    def is_reached(self) -> bool:
        return self._has_begun and self._depth == 0 and not self._is_followed

    def add(self, piece: str) -> None:
        at = 0
        while at < len(piece) and not self._is_followed:
            if self._after_backslash:
                self._after_backslash = False
                at += 1
            elif self._in_text:
                at = self._read_text(piece, at)
            elif self._depth:
                at = self._read_structure(piece, at)
            else:
                at = self._read_outside(piece, at)

    def _read_text(self, piece: str, at: int) -> int:
        found = _TEXT_END.search(piece, at)
        if found is None:
            return len(piece)
        self._in_text = found[0] != '"'
        self._after_backslash = self._in_text
        return found.end()

    def _read_structure(self, piece: str, at: int) -> int:
        found = _BRACKET.search(piece, at)
        if found is None:
            return len(piece)
        if found[0] == '"':
            self._in_text = True
        else:
            self._depth += 1 if found[0] in "{[" else -1
        return found.end()

    def _read_outside(self, piece: str, at: int) -> int:
        found = _NOT_BLANK.search(piece, at)
        if found is None:
            return len(piece)
        if found[0] == "{" and not self._has_begun:
            self._has_begun, self._depth = True, 1
        else:
            self._is_followed = True
        return found.end()


class StreamedCall:
    """A tool call, as received so far."""

    def __init__(self, number: int, index: Any) -> None:
        self.number = number
        self.index = index
        self.id: str | int | None = None
        self.name: Any = None
        self.opaque: dict[str, Any] = {}
        self.arguments = TextJoiner()
        self._end = ObjectEnd()
        self._unread: list[str] = []  # pieces that `_end` has not read: most servers never need it
        self._is_object: bool | None = None

    def add_arguments(self, piece: str) -> str:
        """Add a piece of the arguments, and return the text that is complete with it."""
        self._unread.append(piece)
        return self.arguments.add(piece)

    @property
    def is_complete(self) -> bool:
        """Whether its arguments are a whole JSON object."""
        for piece in self._unread:
            self._end.add(piece)
        self._unread.clear()
        if not self._end.is_reached:
            return False
        if self._is_object is None:  # only blanks can follow, so it is parsed once
            self._is_object = _is_object(self.arguments.whole)
        return self._is_object

    def is_repeated_by(self, arguments: str) -> bool:
        """Whether it is complete and these are its arguments again."""
        known = self.arguments
        return len(arguments) == known.chars and arguments == known.whole and self.is_complete

    def body(self) -> dict[str, Any]:
        """The call in the shape of a reply that is not streamed."""
        self.arguments.end()
        function = {"name": self.name, "arguments": self.arguments.whole}
        return {**self.opaque, "id": self.id, "function": function}


class StreamedCalls:
    """The tool calls of one streamed reply, in the order of their first fragments."""

    def __init__(self) -> None:
        self._calls: list[StreamedCall] = []
        self._by_id: dict[tuple[Any, Any], StreamedCall] = {}
        """The first call with an id and an index. Without the index: the first one with the id."""
        self._last_by_index: dict[Any, StreamedCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def bodies(self) -> list[dict[str, Any]]:
        """The calls in the shape of a reply that is not streamed."""
        return [call.body() for call in self._calls]

    def of(self, fragment: Mapping[str, Any], function: Mapping[str, Any]) -> StreamedCall | None:
        """The call that a fragment belongs to. None: it begins a call.

        Raises TypeError for an index that is neither a number nor a text.
        """
        index, id_ = _index_of(fragment), _id_of(fragment)
        if id_ and (known := self._by_id.get((id_, index))) is not None:
            return known
        if index is not None:
            last = self._last_by_index.get(index)
        else:
            last = self._calls[-1] if self._calls else None
        if last is None or _begins(last, id_, function, has_index=index is not None):
            return None
        return last

    def begin(self, fragment: Mapping[str, Any]) -> StreamedCall:
        """Add the call that a fragment begins."""
        call = StreamedCall(len(self._calls), _index_of(fragment))
        self._calls.append(call)
        if call.index is not None:
            self._last_by_index[call.index] = call
        return call

    def keep_name_and_id(
        self, call: StreamedCall, fragment: Mapping[str, Any], function: Mapping[str, Any]
    ) -> None:
        """Keep the name and the id of a fragment, if its call has none."""
        call.name = call.name or function.get("name")
        if not call.id and (id_ := _id_of(fragment)):
            call.id = id_
            for key in ((id_, call.index), (id_, None)):
                first = self._by_id.get(key)
                if first is None or call.number < first.number:
                    self._by_id[key] = call


def _index_of(fragment: Mapping[str, Any]) -> int | str | None:
    index = fragment.get("index")
    if not isinstance(index, int | str | None):
        raise TypeError("the index of a tool call is neither a number nor a text")
    return index


def _id_of(fragment: Mapping[str, Any]) -> str | int | None:
    id_ = fragment.get("id")
    return id_ if isinstance(id_, str | int) else None


def _begins(last: StreamedCall, id_: Any, function: Mapping[str, Any], *, has_index: bool) -> bool:
    """Whether a fragment that may continue `last` begins another call."""
    name = function.get("name")
    if id_ and last.id and not has_index:
        return True
    if not name or not last.name:
        return False  # some servers send another id with every fragment
    if id_ and last.id:
        # Another id and a name: another call, unless the server repeats the name of an open call.
        return name != last.name or last.is_complete or not last.arguments
    return name != last.name or last.is_complete


def _is_object(text: str) -> bool:
    try:
        return isinstance(loads(text), dict)
    except ValueError:
        return False
