"""Streams of chat completions: the only place that assembles the chunks of a reply.

Servers deviate from OpenAI in many ways. The rules for what belongs together:

- A fragment of a tool call belongs to the call with its id. A new id with a name begins a call, even under a
  known index: Ollama and Gemini send index 0 for all calls. Without an id, the index decides; without both,
  a fragment continues the last call, unless that is complete and the fragment has a name.
- Only one choice is read: that of the first chunk. A server that ignores `n` may number it as it likes.
- Usage that is only zeros never replaces other usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.errors import LLMResponseError
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.jsontext import dumps, loads, replaced, whole_text
from openagents_worker.llm.base import Delta, DeltaKind
from openagents_worker.llm.codec import TextJoiner
from openagents_worker.llm.openai_chat_replies import (
    CALL_FIELDS,
    OPAQUE_FIELDS,
    READABLE_FIELDS,
    raw_text,
    thinking_of,
)
from openagents_worker.llm.usage import usage_from_wire

__all__ = ["StreamedReply"]

JOINED_FIELDS = frozenset({"text", "summary", "data", "thinking"})
"""Fields of the items of an opaque list that arrive in pieces."""
# Sizes that count beside the text, so that many tiny pieces or calls reach the limit too.
CHARS_PER_PIECE = 16
CHARS_PER_CALL = 200


@dataclass(slots=True, eq=False)
class _StreamedCall:
    """A tool call, as received so far."""

    number: int
    index: Any = None
    id: Any = None
    name: Any = None
    arguments: TextJoiner = field(default_factory=TextJoiner)
    opaque: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether its arguments are a whole JSON object."""
        try:
            return isinstance(loads(self.arguments.whole), dict)
        except ValueError:
            return False


class StreamedReply:
    """Assembles the chunks of a streamed reply into the body of a reply that is not streamed."""

    def __init__(self, *, max_chars: int | None = None) -> None:
        """`add` raises `ReplyTooLarge` once the reply exceeds `max_chars`. None: no limit."""
        self._head: dict[str, Any] = {}
        self._choice: Any = None
        self._text, self._reasoning, self._refusal = TextJoiner(), TextJoiner(), TextJoiner()
        self._calls: list[_StreamedCall] = []
        self._opaque: dict[str, Any] = {}
        self._annotations: list[Any] = []
        self._choice_error: Any = None
        self._finish_reason: Any = None
        self._usage: Mapping[str, Any] | None = None
        self._max_chars, self._chars = max_chars, 0

    @property
    def begun(self) -> bool:
        """Whether any text, reasoning or tool call has arrived."""
        return bool(self._text or self._reasoning or self._refusal or self._calls)

    @property
    def finished(self) -> bool:
        """Whether the finish reason has arrived. A stream that ends before it is incomplete."""
        return self._finish_reason is not None

    def add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        """Add one chunk and return its pieces.

        Raises `LLMResponseError` if it is not a valid chunk, and `ReplyTooLarge`.
        """
        try:
            self._head |= {name: chunk[name] for name in ("id", "model", "service_tier") if chunk.get(name)}
            if (usage := chunk.get("usage")) and (self._usage is None or usage_from_wire(usage) is not None):
                self._usage = usage
            deltas: list[Delta] = []
            for choice in chunk.get("choices") or ():  # the last chunk has usage and no choice
                if self._choice is None:
                    self._choice = choice.get("index") or 0
                if (choice.get("index") or 0) == self._choice:
                    deltas += self._add_choice(choice)
            return deltas
        except ReplyTooLarge:
            raise
        except Exception as error:
            raise LLMResponseError(f"a chunk of the stream cannot be read ({error!r})") from error

    def _add_choice(self, choice: Mapping[str, Any]) -> list[Delta]:
        delta = choice.get("delta") or choice.get("message") or {}
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._choice_error = choice.get("error") or self._choice_error
        self._add_opaque(delta)
        reasoning = next((delta[name] for name in READABLE_FIELDS if delta.get(name)), None)
        content, refusal = delta.get("content"), delta.get("refusal")
        pieces = [
            Delta(
                DeltaKind.REASONING,
                self._joined(self._reasoning, raw_text(reasoning) or thinking_of(content)),
            ),
            Delta(DeltaKind.TEXT, self._joined(self._text, raw_text(content))),
            Delta(DeltaKind.TEXT, self._joined(self._refusal, raw_text(refusal))),
        ]
        fragments = list(delta.get("tool_calls") or ())
        if isinstance(legacy := delta.get("function_call"), Mapping):
            fragments.append({"index": "function_call", "function": legacy})
        pieces += [self._add_fragment(fragment) for fragment in fragments]
        return [piece for piece in pieces if piece.text]

    def _joined(self, text: TextJoiner, piece: str) -> str:
        if not piece:
            return ""
        self._add_size(len(piece))
        return text.add(piece)

    def _add_opaque(self, delta: Mapping[str, Any]) -> None:
        for name in OPAQUE_FIELDS:
            if name != "reasoning_content" and (value := delta.get(name)):
                self._opaque[name] = self._merged(self._opaque.get(name), value)
        if isinstance(annotations := delta.get("annotations"), list) and annotations:
            self._add_size(len(dumps(replaced(annotations))))
            self._annotations += annotations
        if delta.get("reasoning_content"):
            self._opaque["reasoning_content"] = True  # its text is joined when the stream has ended

    def _merged(self, known: Any, value: Any) -> Any:
        """An opaque value with one that arrived later. Items of lists are joined if they have one index."""
        self._add_size(len(dumps(replaced(value))))
        if isinstance(known, str) and isinstance(value, str):
            return known + value
        if isinstance(known, dict) and isinstance(value, dict):
            return known | value
        if not isinstance(value, list):
            return value
        items = list(known) if isinstance(known, list) else []
        for item in value:
            last = items[-1] if items else None
            if last is not None and _belong_together(last, item):
                items[-1] = _joined_items(last, item)
            else:
                items.append(item)
        return items

    def _add_fragment(self, fragment: Mapping[str, Any]) -> Delta:
        function = fragment.get("function") or {}
        call = self._call_of(fragment, function)
        call.id = call.id or fragment.get("id")
        call.name = call.name or function.get("name")
        opaque = {name: value for name, value in fragment.items() if name not in CALL_FIELDS and value}
        if opaque:
            self._add_size(len(dumps(replaced(opaque))))
            call.opaque |= opaque
        text = _arguments_text(function)
        if len(text) == call.arguments.chars and text == call.arguments.whole and call.is_complete:
            text = ""  # the server repeats the whole call
        name = call.name if isinstance(call.name, str) else ""
        return Delta(DeltaKind.ARGUMENTS, self._joined(call.arguments, text), call.number, whole_text(name))

    def _call_of(self, fragment: Mapping[str, Any], function: Mapping[str, Any]) -> _StreamedCall:
        """The call that a fragment belongs to; a new one if it begins a call."""
        index, id_ = fragment.get("index"), fragment.get("id")
        if not isinstance(index, int | str | None):
            raise TypeError("the index of a tool call is neither a number nor a text")
        for call in self._calls:
            if id_ and call.id == id_ and (index is None or call.index == index):
                return call
        near = [call for call in self._calls if index is None or call.index == index]
        if not near or self._begins(near[-1], id_, function, has_index=index is not None):
            self._add_size(CHARS_PER_CALL)
            self._calls.append(_StreamedCall(len(self._calls), index))
            return self._calls[-1]
        return near[-1]

    @staticmethod
    def _begins(last: _StreamedCall, id_: Any, function: Mapping[str, Any], *, has_index: bool) -> bool:
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

    def _add_size(self, chars: int) -> None:
        self._chars += chars + CHARS_PER_PIECE
        if self._max_chars is not None and self._chars > self._max_chars:
            raise ReplyTooLarge(f"the reply has more than {self._max_chars} bytes")

    def body(self) -> dict[str, Any]:
        """The reply so far, in the shape of a reply that is not streamed."""
        for text in (self._text, self._reasoning, self._refusal, *(call.arguments for call in self._calls)):
            text.end()
        calls = [
            {
                **call.opaque,
                "id": call.id,
                "function": {"name": call.name, "arguments": call.arguments.whole},
            }
            for call in self._calls
        ]
        message = {"role": "assistant", "content": self._text.whole, "tool_calls": calls}
        opaque = dict(self._opaque)
        name = "reasoning_content" if opaque.pop("reasoning_content", None) else "reasoning"
        message |= opaque | ({name: self._reasoning.whole} if self._reasoning else {})
        message |= {"refusal": self._refusal.whole} if self._refusal else {}
        message |= {"annotations": self._annotations} if self._annotations else {}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        if self._choice_error is not None:
            choice["error"] = self._choice_error
        return {**self._head, "choices": [choice], "usage": self._usage}


def _arguments_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or ""
    return arguments if isinstance(arguments, str) else dumps(replaced(arguments))


def _belong_together(last: Any, item: Any) -> bool:
    """Whether two items of an opaque list are parts of the same item: their index and type are equal."""
    if not (isinstance(last, Mapping) and isinstance(item, Mapping)):
        return False
    return item.get("index") is not None and all(
        last.get(name) == item.get(name) for name in ("index", "type")
    )


def _joined_items(last: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(last)
    for name, value in item.items():
        known = joined.get(name)
        if name in JOINED_FIELDS and isinstance(known, str) and isinstance(value, str):
            joined[name] = known + value
        elif value is not None:
            joined[name] = value
    return joined
