"""Anthropic's replies: the only place that reads the bodies and the streams of the Messages API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openagents_worker.errors import LLMResponseError
from openagents_worker.jsontext import dumps, loads, replaced, whole_text
from openagents_worker.llm.anthropic_requests import CALLS_AT, CONTAINER, THINKING, WIRE_FORMAT
from openagents_worker.llm.base import Delta, DeltaKind, FinishReason, LLMResponse, LLMToolCall
from openagents_worker.llm.codec import TextJoiner
from openagents_worker.llm.conversation import cut_calls, tool_call
from openagents_worker.llm.messages import content_text, is_blank_text
from openagents_worker.llm.stream_reader import CHARS_PER_PIECE, BaseStreamReader
from openagents_worker.llm.structured import OUTPUT_TOOL
from openagents_worker.llm.usage import usage_from_wire

__all__ = ["StreamedMessage", "container_id", "joined_parts", "message_from_wire", "paused_content"]

FINISH_REASONS = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "tool_use": FinishReason.TOOL_CALLS,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "refusal": FinishReason.REFUSAL,
    "pause_turn": FinishReason.LENGTH,  # continued ten times, and still not complete
    "compaction": FinishReason.LENGTH,  # the same
}
PAUSES = frozenset({"pause_turn", "compaction"})
"""Stop reasons of a reply that its provider continues if it gets it back."""
CUTS = frozenset({"max_tokens", "model_context_window_exceeded"})
"""Stop reasons of a reply that was cut. If it ends with a call, its arguments are those that the model had
written so far."""
_OWN_CALL_FIELDS = ("caller", "toolset_name")
"""Fields of a call that the provider wants back."""

CHARS_PER_BLOCK = 200  # counts beside the text, so that many empty blocks reach the limit too


def message_from_wire(body: Any, *, provider: str) -> LLMResponse:
    """Parse a complete message. Raises `LLMResponseError` if it is not one."""
    try:
        return _reply(body, provider)
    except Exception as error:  # a value of the wrong type can raise anything, for example OverflowError
        raise LLMResponseError(f"{provider}: the reply is not a message ({error!r})") from error


def _reply(body: Any, provider: str) -> LLMResponse:
    stop_reason = _text_or_none(body.get("stop_reason"))
    blocks: list[dict[str, Any]] = []
    calls: list[LLMToolCall] = []
    places: list[int] = []
    sent = 0  # blocks that a request contains
    structured: Any = None
    for index, block in enumerate(body["content"]):
        if block["type"] == "tool_use" and block.get("name") == OUTPUT_TOOL:
            structured = replaced(block.get("input"))
            blocks.append({"type": "text", "text": dumps(structured)})
            sent += 1
        elif block["type"] == "tool_use":
            places.append(sent + len(calls))
            calls.append(_call(block, f"{_text_or_none(body.get('id')) or 'toolu'}_{index}"))
        else:
            blocks.append(_block(block))
            sent += not is_blank_text(blocks[-1])
    if stop_reason in CUTS and calls and places[-1] == sent + len(calls) - 1:
        calls = cut_calls(calls)
    if stop_reason == "refusal":  # what was written before it is void: no call of it is executed
        blocks, calls, places = _as_refusal(blocks, body.get("stop_details")), [], []
    is_kept = any(map(_is_more_than_text, blocks))  # otherwise the message has one text
    at_end = places == list(range(sent, sent + len(calls)))
    own: dict[str, Any] = {} if at_end or not is_kept else {CALLS_AT: places}
    if calls and (container := container_id(body)) is not None:
        own[CONTAINER] = container
    if unsigned := _unsigned_thinking(blocks):
        own[THINKING] = unsigned
    reason = FINISH_REASONS.get(stop_reason, FinishReason.OTHER) if stop_reason else None
    if structured is not None and not calls and reason is FinishReason.TOOL_CALLS:
        reason = FinishReason.STOP
    return LLMResponse(
        output_text=content_text(blocks),
        tool_calls=tuple(calls),
        usage=usage_from_wire(body.get("usage"), cache_is_apart=True),
        stop_reason=stop_reason,
        structured_output=structured if not calls else None,
        model=_text_or_none(body.get("model")),
        provider=provider,
        response_id=_text_or_none(body.get("id")),
        content=tuple(blocks) if is_kept else (),
        finish_reason=reason,
        provider_fields={WIRE_FORMAT: own} if own else {},
    )


def container_id(body: Mapping[str, Any]) -> str | None:
    """The container in which the provider's own tools ran; None if there was none.

    The request with the results of the reply's calls must name it, or the provider rejects it.
    """
    container = body.get("container")
    return _text_or_none(container.get("id")) if isinstance(container, Mapping) else None


def _text_or_none(value: Any) -> str | None:
    return whole_text(value) if isinstance(value, str) else None


def _text(value: Any) -> str:
    return whole_text(value) if isinstance(value, str) else ""


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a block of the reply to the neutral form. Blocks of the provider's own tools are unchanged."""
    match block["type"]:
        case "text":
            text = {"type": "text", "text": _text(block.get("text"))}
            return text | ({"citations": replaced(block["citations"])} if block.get("citations") else {})
        case "thinking":
            return {
                "type": "reasoning",
                "text": _text(block.get("thinking")),
                "signature": _text(block.get("signature")),
                "format": WIRE_FORMAT,
            }
        case "redacted_thinking":
            return {"type": "reasoning", "encrypted": _text(block.get("data")), "format": WIRE_FORMAT}
        case _:
            kept: dict[str, Any] = replaced(dict(block))
            return kept


def _unsigned_thinking(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The thinking in a reply without signatures, as DeepSeek and Kimi write it. "" if there is none.

    A message keeps its blocks only for their signatures, so it is an opaque field.
    """
    thoughts = [block for block in blocks if block.get("type") == "reasoning"]
    if any(thought.get("signature") or thought.get("encrypted") for thought in thoughts):
        return ""
    return "\n\n".join(thought["text"] for thought in thoughts if thought.get("text"))


def _as_refusal(blocks: list[dict[str, Any]], details: Any) -> list[dict[str, Any]]:
    """The blocks of a refused reply: its text is the refusal. Without a text, it is the explanation."""
    refused = [
        {"type": "refusal", "text": block["text"]} if block.get("type") == "text" else block
        for block in blocks
        if block.get("type") != "text" or block["text"].strip()
    ]
    explanation = details.get("explanation") if isinstance(details, Mapping) else None
    if isinstance(explanation, str) and explanation and not content_text(refused).strip():
        refused.append({"type": "refusal", "text": whole_text(explanation)})
    return refused


def _is_more_than_text(block: Mapping[str, Any]) -> bool:
    return block.get("type") != "text" or "citations" in block


def _call(block: Mapping[str, Any], default_id: str) -> LLMToolCall:
    call_id = _text_or_none(block.get("id"))
    call = tool_call(
        call_id if call_id and call_id.strip() else default_id, block.get("name"), block.get("input")
    )
    own = {name: replaced(block[name]) for name in _OWN_CALL_FIELDS if _is_stored(block.get(name))}
    if not own:
        return call
    fields = {WIRE_FORMAT: own}
    return LLMToolCall(
        call.name, call.arguments, call.id, call.raw_arguments, call.parse_error, provider_fields=fields
    )


def _is_stored(value: Any) -> bool:
    return value is not None and value != {"type": "direct"}  # called by the model itself: the default


# --- a turn that the provider has paused -----------------------------------------------------------------


def paused_content(body: Any) -> list[Any] | None:
    """The content of a reply that the provider pauses because its own tools take long, or after it has
    shortened the conversation; None for another one.

    The provider continues it if it gets the content back as the last message.
    """
    if not isinstance(body, Mapping) or body.get("stop_reason") not in PAUSES:
        return None
    content = body.get("content")
    if not isinstance(content, list) or not content:
        return None
    blocks = [block for block in content if isinstance(block, Mapping) and not _is_blank_block(block)]
    if len(blocks) < 1 or any(block.get("type") == "tool_use" for block in blocks):
        return None
    if isinstance(text := blocks[-1].get("text"), str):  # the API rejects white space at the end
        blocks[-1] = {**blocks[-1], "text": text.rstrip()}
    return blocks


def _is_blank_block(block: Mapping[str, Any]) -> bool:
    return block.get("type") == "text" and not _text(block.get("text")).strip()


def joined_parts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One message of the parts of a paused reply: all content, the sum of the usage, the rest of the last."""
    if len(parts) == 1 or not isinstance(parts[-1].get("content"), list):  # not a message: the codec says so
        return dict(parts[-1])
    content = [block for part in parts for block in part.get("content") or ()]
    usage: dict[str, Any] = {}
    for part in parts:
        usage = _sum(usage, part.get("usage"))
    containers = [part["container"] for part in parts if part.get("container")]
    return {**parts[-1], "content": content, "usage": usage, "container": next(reversed(containers), None)}


def _sum(total: dict[str, Any], usage: Any) -> dict[str, Any]:
    """The sum of the numbers in two objects, and their lists joined; of other values, the newer one."""
    if not isinstance(usage, Mapping):
        return total
    summed = dict(total)
    for name, value in usage.items():
        before = total.get(name)
        if isinstance(value, Mapping):
            summed[name] = _sum(before if isinstance(before, dict) else {}, value)
        elif _are_numbers(before, value) or (isinstance(before, list) and isinstance(value, list)):
            summed[name] = before + value
        elif value is not None or name not in summed:
            summed[name] = value
    return summed


def _are_numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


class StreamedMessage(BaseStreamReader):
    """Assembles the events of a streamed message into a complete message."""

    chunk_name = "an event"

    def __init__(self, *, max_chars: int | None = None) -> None:
        super().__init__(max_chars=max_chars)
        self._message: dict[str, Any] = {}
        self._blocks: dict[Any, dict[str, Any]] = {}
        self._pieces: dict[Any, dict[str, TextJoiner]] = {}
        self._citations: dict[Any, list[Any]] = {}
        self._calls: dict[Any, int] = {}
        self.begun = False
        """Whether any text, reasoning or tool call has arrived."""
        self.finished = False
        """Whether the stop reason has arrived. A stream that ends before it is incomplete."""

    def _add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        match chunk.get("type"):
            case "content_block_delta":
                return self._add_delta(chunk["index"], chunk["delta"])
            case "content_block_start":
                return self._begin_block(chunk["index"], chunk["content_block"])
            case "message_start":
                self._message = {**chunk["message"], "usage": dict(chunk["message"].get("usage") or {})}
            case "message_delta":
                self._message |= {name: value for name, value in chunk["delta"].items() if value is not None}
                usage = self._message.setdefault("usage", {})
                usage |= {name: value for name, value in (chunk.get("usage") or {}).items() if value}
                self.finished = self.finished or bool(self._message.get("stop_reason"))
            case _:  # ping, content_block_stop, message_stop, and what is not known yet
                pass
        return []

    def _begin_block(self, index: Any, block: Mapping[str, Any]) -> list[Delta]:
        if index in self._blocks:
            raise ValueError(f"block {index!r} begins twice")
        self._blocks[index] = dict(block)
        self._pieces[index] = {}
        self._add_size(CHARS_PER_BLOCK + (len(dumps(replaced(dict(block)))) if len(block) > 2 else 0))
        self.begun = True
        if _is_call(block):
            self._calls[index] = len(self._calls)
        begun = block.get("text") if block["type"] == "text" else None
        return _deltas(DeltaKind.TEXT, whole_text(begun)) if isinstance(begun, str) else []

    def _add_delta(self, index: Any, delta: Mapping[str, Any]) -> list[Delta]:
        block = self._blocks[index]
        match delta.get("type"):
            case "text_delta":
                return _deltas(DeltaKind.TEXT, self._append(index, "text", delta["text"]))
            case "thinking_delta":
                return _deltas(DeltaKind.REASONING, self._append(index, "thinking", delta["thinking"]))
            case "input_json_delta":
                piece = self._append(index, "input", delta["partial_json"])
                if index in self._calls:
                    return _deltas(DeltaKind.ARGUMENTS, piece, self._calls[index], _text(block.get("name")))
                is_output = block["type"] == "tool_use"  # otherwise it is a tool of the provider
                return _deltas(DeltaKind.TEXT, piece) if is_output else []
            case "signature_delta":
                self._append(index, "signature", delta["signature"])
            case "compaction_delta":
                for name in ("content", "encrypted_content"):
                    if isinstance(summary := delta.get(name), str):
                        self._append(index, name, summary)
            case "citations_delta":
                self._add_size(len(dumps(replaced(delta["citation"]))))
                self._citations.setdefault(index, []).append(delta["citation"])
            case _:
                pass
        return []

    def _append(self, index: Any, field: str, piece: str) -> str:
        self._add_size(len(piece) + CHARS_PER_PIECE)
        pieces = self._pieces[index]
        if field not in pieces:
            pieces[field] = TextJoiner()
        return pieces[field].add(piece)

    def body(self) -> dict[str, Any]:
        """The message so far, in the shape of one that is not streamed."""
        return {**self._message, "content": [self._block(index) for index in self._blocks]}

    def _block(self, index: Any) -> dict[str, Any]:
        block = dict(self._blocks[index])
        for field, pieces in self._pieces[index].items():
            begun = block.get(field)
            pieces.end()
            block[field] = (begun if isinstance(begun, str) else "") + pieces.whole
        if index in self._citations:
            block["citations"] = [*(block.get("citations") or ()), *self._citations[index]]
        if not isinstance(block.get("input"), str):
            return block
        return block if _is_call(block) else block | {"input": _parsed(block["input"] or "{}")}


def _is_call(block: Mapping[str, Any]) -> bool:
    """Whether a block is a call of one of our tools."""
    return block["type"] == "tool_use" and block.get("name") != OUTPUT_TOOL


def _deltas(kind: DeltaKind, text: str, tool_call: int = 0, tool_name: str = "") -> list[Delta]:
    return [Delta(kind, text, tool_call, tool_name)] if text else []


def _parsed(text: str) -> Any:
    """The output as JSON, or its text if the model wrote something else."""
    try:
        return loads(text, nan_is_null=True)
    except ValueError:
        return text
