"""Streams of chat completions: the only place that assembles the chunks of a reply.

`openai_chat_calls` decides which fragments of tool calls belong together. Two other rules, for servers that
deviate from OpenAI:

- Only one choice is read: that of the first chunk. A server that ignores `n` may number it as it likes.
- Usage that is only zeros never replaces other usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.llm.base import Delta, DeltaKind
from openagents_worker.llm.codec import TextJoiner
from openagents_worker.llm.opaque_fields import StreamedField
from openagents_worker.llm.openai_chat_calls import StreamedCall, StreamedCalls
from openagents_worker.llm.openai_chat_replies import CALL_FIELDS, OPAQUE_FIELDS, raw_text, thinking_of
from openagents_worker.llm.stream_reader import CHARS_PER_PIECE, BaseStreamReader
from openagents_worker.llm.usage import usage_from_wire

__all__ = ["StreamedReply"]

HEAD_FIELDS = ("id", "model", "service_tier")
JOINED_OPAQUE_FIELDS = tuple(name for name in OPAQUE_FIELDS if name != "reasoning_content")
CHARS_PER_CALL = 200  # counts beside the text, so that many empty calls reach the limit too


class StreamedReply(BaseStreamReader):
    """Assembles the chunks of a streamed reply into the body of a reply that is not streamed."""

    def __init__(self, *, max_chars: int | None = None) -> None:
        super().__init__(max_chars=max_chars)
        self._head: dict[str, Any] = {}
        self._choice: Any = None
        self._text, self._reasoning, self._refusal = TextJoiner(), TextJoiner(), TextJoiner()
        self._has_reasoning_content = False
        self._calls = StreamedCalls()
        self._opaque: dict[str, StreamedField] = {}
        self._annotations: list[Any] = []
        self._choice_error: Any = None
        self._finish_reason: Any = None
        self._usage: Mapping[str, Any] | None = None

    @property
    def begun(self) -> bool:
        """Whether any text, reasoning or tool call has arrived."""
        return bool(self._text or self._reasoning or self._refusal or self._calls)

    @property
    def finished(self) -> bool:
        """Whether the finish reason has arrived. A stream that ends before it is incomplete."""
        return self._finish_reason is not None

    def _add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        for name in HEAD_FIELDS:
            if value := chunk.get(name):
                self._head[name] = value
        if (usage := chunk.get("usage")) and (self._usage is None or usage_from_wire(usage) is not None):
            self._usage = usage
        deltas: list[Delta] = []
        for choice in chunk.get("choices") or ():  # the last chunk has usage and no choice
            if self._choice is None:
                self._choice = choice.get("index") or 0
            if (choice.get("index") or 0) == self._choice:
                deltas += self._add_choice(choice)
        return deltas

    def _add_choice(self, choice: Mapping[str, Any]) -> list[Delta]:
        delta = choice.get("delta") or choice.get("message") or {}
        if reason := choice.get("finish_reason"):
            self._finish_reason = reason
        if error := choice.get("error"):
            self._choice_error = error
        self._add_opaque(delta)
        pieces: list[Delta] = []
        content = delta.get("content")
        if reasoning := self._reasoning_of(delta, content):
            self._join(DeltaKind.REASONING, self._reasoning, reasoning, pieces)
        if text := raw_text(content) or _spoken(delta):
            self._join(DeltaKind.TEXT, self._text, text, pieces)
        if refusal := raw_text(delta.get("refusal")):
            self._join(DeltaKind.TEXT, self._refusal, refusal, pieces)
        for fragment in delta.get("tool_calls") or ():
            self._add_fragment(fragment, pieces)
        if isinstance(legacy := delta.get("function_call"), Mapping):
            self._add_fragment({"index": "function_call", "function": legacy}, pieces)
        return pieces

    def _reasoning_of(self, delta: Mapping[str, Any], content: Any) -> str:
        """The readable reasoning of a chunk; "" if it has none."""
        if reasoning := delta.get("reasoning_content"):
            self._has_reasoning_content = True
        else:
            reasoning = delta.get("reasoning")
        return (raw_text(reasoning) if reasoning else "") or thinking_of(content)

    def _join(self, kind: DeltaKind, text: TextJoiner, piece: str, pieces: list[Delta]) -> None:
        """Add a piece to its text, and to `pieces` what is complete with it."""
        self._add_size(len(piece) + CHARS_PER_PIECE)
        if whole := text.add(piece):
            pieces.append(Delta(kind, whole))

    def _add_opaque(self, delta: Mapping[str, Any]) -> None:
        for name in JOINED_OPAQUE_FIELDS:
            if value := delta.get(name):
                self._add_size(len(dumps(replaced(value))) + CHARS_PER_PIECE)
                self._opaque.setdefault(name, StreamedField()).add(value)
        if isinstance(annotations := delta.get("annotations"), list) and annotations:
            self._add_size(len(dumps(replaced(annotations))) + CHARS_PER_PIECE)
            self._annotations += annotations

    def _add_fragment(self, fragment: Mapping[str, Any], pieces: list[Delta]) -> None:
        function = fragment.get("function") or {}
        call = self._calls.of(fragment, function)
        if call is None:
            self._add_size(CHARS_PER_CALL + CHARS_PER_PIECE)
            call = self._calls.begin(fragment)
        self._calls.keep_name_and_id(call, fragment, function)
        self._keep_opaque(call, fragment)
        arguments = _arguments_text(function)
        if not arguments or call.is_repeated_by(arguments):
            return
        self._add_size(len(arguments) + CHARS_PER_PIECE)
        if text := call.add_arguments(arguments):
            name = whole_text(call.name) if isinstance(call.name, str) else ""
            pieces.append(Delta(DeltaKind.ARGUMENTS, text, call.number, name))

    def _keep_opaque(self, call: StreamedCall, fragment: Mapping[str, Any]) -> None:
        if fragment.keys() <= CALL_FIELDS:
            return
        opaque = {name: value for name, value in fragment.items() if name not in CALL_FIELDS and value}
        if opaque:
            self._add_size(len(dumps(replaced(opaque))) + CHARS_PER_PIECE)
            call.opaque |= opaque

    def body(self) -> dict[str, Any]:
        """The reply so far, in the shape of a reply that is not streamed."""
        for text in (self._text, self._reasoning, self._refusal):
            text.end()
        message: dict[str, Any] = {"role": "assistant", "content": self._text.whole}
        message |= {"tool_calls": self._calls.bodies()}
        message |= {name: field.whole for name, field in self._opaque.items()}
        name = "reasoning_content" if self._has_reasoning_content else "reasoning"
        message |= {name: self._reasoning.whole} if self._reasoning else {}
        message |= {"refusal": self._refusal.whole} if self._refusal else {}
        message |= {"annotations": self._annotations} if self._annotations else {}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        if self._choice_error is not None:
            choice["error"] = self._choice_error
        return {**self._head, "choices": [choice], "usage": self._usage}


def _spoken(delta: Mapping[str, Any]) -> str:
    """A piece of the transcript of spoken output. Its bytes are not kept."""
    audio = delta.get("audio")
    return raw_text(audio.get("transcript")) if isinstance(audio, Mapping) else ""


def _arguments_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or ""
    return arguments if isinstance(arguments, str) else dumps(replaced(arguments))
