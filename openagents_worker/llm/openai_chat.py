"""OpenAI's chat completions: the only place that reads and writes their JSON.

The reference is https://platform.openai.com/docs/api-reference/chat. vLLM, Ollama and most gateways implement
this API too; this module handles their deviations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMResponseError
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.llm.base import LLMResponse, LLMToolCall, LLMUsage, Message, ModelRequest, token_count
from openagents_worker.llm.conversation import is_blank, repaired, tool_call
from openagents_worker.llm.http import Endpoint, HttpModelClient
from openagents_worker.llm.messages import (
    BLOCK_TYPES,
    Block,
    content_blocks,
    content_text,
    data_url,
    fields_of_format,
)
from openagents_worker.llm.openai_options import OpenAIRequestOptions

__all__ = ["OpenAICompatibleClient", "StreamedReply", "messages_to_wire", "reply_from_wire"]

DEFAULT_MODEL = "gpt-4o-mini"
WIRE_FORMAT = "chat_completions"
OTHER_PARTS = "The result follows in the next user message."
"""The text of a tool message whose result has no text, only images or files."""

_REASONING = re.compile(r"(?:.*/)?(o1|o3|o4|gpt-5)")


class OpenAICompatibleClient(HttpModelClient):
    """A model behind `POST {api_base}/chat/completions`: OpenAI itself, vLLM, Ollama, gateways."""

    def __init__(self, options: LLMOptions, *, api_key: str | None, **more: Any) -> None:
        """Raises `PluginConfigError` for invalid options. `more`: the arguments of `HttpModelClient`."""
        checked = OpenAIRequestOptions.checked(options, api_key)
        endpoint = Endpoint(
            provider="openai_compatible",
            url=checked.url,
            stream_url=checked.stream_url,
            headers=checked.headers,
            secrets=checked.secrets,
            key_env=options.api_key_env or "OPENAI_API_KEY",
        )
        codec = ChatCompletions(options, checked.extras)
        super().__init__(options.model or DEFAULT_MODEL, options, endpoint=endpoint, codec=codec, **more)


class ChatCompletions:
    """The codec of chat completions; see `openagents_worker.llm.http.Codec`."""

    end_of_stream = "[DONE]"

    def __init__(self, options: LLMOptions, extras: Mapping[str, Any]) -> None:
        self._options = options
        self._extras = extras

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model."""
        tools, streaming = request.tools, request.on_delta is not None
        tool_fields = {"tools": tools, "tool_choice": request.tool_choice}
        body = {
            "model": model,
            "messages": messages_to_wire(request.messages),
            "response_format": request.response_format,
            **self._sampling(model, request.temperature, request.max_tokens),
            **self._extras,
            **(tool_fields if tools else {"parallel_tool_calls": None}),
            **({"stream": True, "stream_options": {"include_usage": True}} if streaming else {}),
        }
        return {name: value for name, value in body.items() if value is not None}

    def _sampling(self, model: str, temperature: float | None, max_tokens: int | None) -> dict[str, Any]:
        temperature = self._options.temperature if temperature is None else temperature
        max_tokens = self._options.max_tokens if max_tokens is None else max_tokens
        is_reasoning = self._options.reasoning_model
        if is_reasoning is None:
            is_reasoning = _REASONING.match(model) is not None
        if is_reasoning:
            return {"max_completion_tokens": max_tokens}  # reasoning models reject the two older parameters
        return {"temperature": temperature, "max_tokens": max_tokens}

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMResponseError` if it is not a chat completion."""
        return reply_from_wire(body, provider=provider)

    def stream(self, *, max_chars: int) -> StreamedReply:
        """A reader that assembles the chunks of one stream; see `StreamedReply`."""
        return StreamedReply(max_chars=max_chars)


# --- requests --------------------------------------------------------------------------------------------


def messages_to_wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert neutral messages to OpenAI's format, repaired. OpenAI has no field for `is_error`: the text of
    the message describes the error. A tool message cannot have images, so they follow in a user message."""
    wire: list[dict[str, Any]] = []
    from_tools: list[dict[str, Any]] = []
    for message in repaired(messages):
        if message["role"] != "tool" and from_tools:
            wire.append({"role": "user", "content": from_tools})
            from_tools = []
        wire.append(_message_to_wire(message))
        if message["role"] == "tool":
            from_tools += _parts_beside_text(message)
    return [*wire, {"role": "user", "content": from_tools}] if from_tools else wire


def _message_to_wire(message: Message) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if role == "tool":
        text = _tool_text(content)
        return {"role": "tool", "tool_call_id": message.get("tool_call_id"), "content": text}
    own = fields_of_format(message, WIRE_FORMAT)
    content = _content_to_wire(content)
    if calls := message.get("tool_calls"):
        wire_calls = [_call_to_wire(call) for call in calls]
        return {
            **own,
            "role": role,
            "content": None if is_blank(content) else content,
            "tool_calls": wire_calls,
        }
    return {**own, "role": role, "content": content}


def _content_to_wire(content: Any) -> Any:
    """The content with its blocks as OpenAI's parts; a text unchanged. Reasoning is in opaque fields."""
    if not isinstance(content, list | tuple):
        return content
    return [_part(block) for block in content_blocks(content) if block.get("type") != "reasoning"]


def _part(block: Block) -> dict[str, Any]:
    """OpenAI's part for a block. A block that is not neutral is sent unchanged."""
    match block.get("type"):
        case "text":
            return {name: value for name, value in block.items() if name != "citations"}
        case "refusal" if "text" in block:
            return {"type": "refusal", "refusal": block["text"]}
        case "image":
            image = {"url": block.get("url") or data_url(block), "detail": block.get("detail")}
            return {"type": "image_url", "image_url": _without_none(image)}
        case "file" if "file" not in block:
            data = block.get("url") or (data_url(block) if block.get("data") else None)
            file = {"file_id": block.get("file_id"), "file_data": data, "filename": block.get("name")}
            return {"type": "file", "file": _without_none(file)}
        case _:
            return dict(block)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _tool_text(content: Any) -> str:
    """The text of a tool's result. Content that is not neutral blocks is sent as its JSON."""
    if isinstance(content, str):
        return content
    if not _are_neutral(content):
        return dumps(content)
    return content_text(content) or OTHER_PARTS


def _parts_beside_text(message: Message) -> list[dict[str, Any]]:
    """The images and files of a tool's result, after a line that names their call."""
    content = message.get("content")
    if not _are_neutral(content):
        return []
    parts = [
        _part(block)
        for block in content_blocks(content)
        if block["type"] not in ("text", "refusal", "reasoning")
    ]
    title = f"Result of the tool call {message.get('tool_call_id')}:"
    return [{"type": "text", "text": title}, *parts] if parts else []


def _are_neutral(content: Any) -> bool:
    return (
        isinstance(content, list | tuple)
        and bool(content)
        and all(isinstance(block, Mapping) and block.get("type") in BLOCK_TYPES for block in content)
    )


def _call_to_wire(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:  # already in OpenAI's format: the pattern was written for this provider
        return dict(call)
    function = {"name": call["name"], "arguments": dumps(call.get("arguments") or {})}
    own = fields_of_format(call, WIRE_FORMAT)
    return {**own, "id": call.get("id"), "type": "function", "function": function}


# --- replies ---------------------------------------------------------------------------------------------


def reply_from_wire(body: Any, *, provider: str) -> LLMResponse:
    """Parse a reply that was not streamed. Raises `LLMResponseError` if it is not a chat completion."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = _text(message.get("content")) or _text(message.get("refusal"))
        calls = [
            _call_from_wire(call, f"{_id_or_name(body.get('id')) or 'call'}_{index}")
            for index, call in enumerate(message.get("tool_calls") or ())
        ]
        reply = LLMResponse(
            output_text=text,
            tool_calls=tuple(calls),
            usage=_usage(body.get("usage")),
            stop_reason=_id_or_name(choice.get("finish_reason")),
            model=_id_or_name(body.get("model")),
            provider=provider,
            response_id=_id_or_name(body.get("id")),
        )
    except Exception as error:  # a value of the wrong type can raise anything, for example OverflowError
        raise LLMResponseError(f"{provider}: the reply is not a chat completion ({error!r})"[:500]) from error
    if reply.stop_reason == "content_filter" and not text and not calls:
        raise LLMResponseError(f"{provider}: the provider's filter blocked the reply (content_filter)")
    return reply


def _call_from_wire(call: Any, default_id: str) -> LLMToolCall:
    """A tool call; it gets `default_id` if it has no id. A value that is not a call has the name ""."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return LLMToolCall("", {}, default_id, parse_error="the call has no function")
    call_id = call.get("id")
    usable = isinstance(call_id, str) and not is_blank(call_id)
    return tool_call(
        whole_text(call_id) if usable else default_id, function.get("name"), function.get("arguments")
    )


def _id_or_name(value: Any) -> str | None:
    """An id or a name as text. Some servers send a number. None: the value is neither text nor a number."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return whole_text(value) if isinstance(value, str) else str(replaced(value)) if is_number else None


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return whole_text(content)
    return "".join(_text(part.get("text")) for part in content)  # a list of parts


def _usage(usage: Mapping[str, Any] | None) -> LLMUsage | None:
    if not usage:
        return None
    input_tokens = token_count(usage.get("prompt_tokens"))
    output_tokens = token_count(usage.get("completion_tokens"))
    cached = token_count((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
    total = token_count(usage.get("total_tokens")) or input_tokens + output_tokens
    return LLMUsage(input_tokens, output_tokens, total, {"cached_tokens": cached} if cached else {})


# Sizes that count beside the text, so that many tiny pieces or calls reach the limit too.
CHARS_PER_PIECE = 16
CHARS_PER_CALL = 200


@dataclass(slots=True)
class _StreamedCall:
    """A tool call, as received so far."""

    id: Any = None
    name: Any = None
    arguments: list[str] = field(default_factory=list)


class StreamedReply:
    """Assembles the chunks of a streamed reply into the body of a reply that is not streamed."""

    def __init__(self, *, max_chars: int | None = None) -> None:
        """`add` raises `ReplyTooLarge` once the reply exceeds `max_chars`. None: no limit."""
        self._head: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._calls: dict[Any, _StreamedCall] = {}
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._max_chars, self._chars = max_chars, 0

    @property
    def begun(self) -> bool:
        """Whether any text or tool call has arrived."""
        return bool(self._pieces or self._calls)

    @property
    def finished(self) -> bool:
        """Whether the finish reason has arrived. A stream that ends before it is incomplete."""
        return self._finish_reason is not None

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Add one chunk and return its text.

        Raises `LLMResponseError` if it is not a valid chunk, and `ReplyTooLarge`.
        """
        try:
            self._head |= {name: chunk[name] for name in ("id", "model") if chunk.get(name)}
            self._usage = chunk.get("usage") or self._usage
            choice = next(iter(chunk.get("choices") or ()), None)  # the last chunk has usage and no choice
            return "" if choice is None else self._add_choice(choice)
        except ReplyTooLarge:
            raise
        except Exception as error:
            raise LLMResponseError(f"a chunk of the stream cannot be read ({error!r})"[:500]) from error

    def _add_choice(self, choice: Mapping[str, Any]) -> str:
        delta = choice.get("delta") or {}
        for fragment in delta.get("tool_calls") or ():
            self._add_fragment(fragment)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        piece = _text(delta.get("content")) or _text(delta.get("refusal"))
        if piece:
            self._pieces.append(piece)
            self._add_size(len(piece))
        return piece

    def _add_fragment(self, fragment: Mapping[str, Any]) -> None:
        function = fragment.get("function") or {}
        slot = self._slot(fragment)
        call = self._calls.get(slot)
        if call is None:
            call = self._calls[slot] = _StreamedCall()
            self._add_size(CHARS_PER_CALL)
        call.id = call.id or fragment.get("id")
        call.name = call.name or function.get("name")
        arguments = function.get("arguments") or ""
        text = arguments if isinstance(arguments, str) else dumps(replaced(arguments))
        if text:
            call.arguments.append(text)
            self._add_size(len(text))

    def _add_size(self, chars: int) -> None:
        self._chars += chars + CHARS_PER_PIECE
        if self._max_chars is not None and self._chars > self._max_chars:
            raise ReplyTooLarge(f"the reply has more than {self._max_chars} bytes")

    def _slot(self, fragment: Mapping[str, Any]) -> Any:
        """The call that a fragment belongs to. Some servers send no index; there, a new id starts a call."""
        if fragment.get("index") is not None:
            return fragment["index"]
        last = next(reversed(self._calls), 0)
        known = self._calls.get(last)
        is_new = known is not None and fragment.get("id") and fragment["id"] != known.id
        return f"call {len(self._calls)}" if is_new else last

    def body(self) -> dict[str, Any]:
        """The reply so far, in the shape of a reply that is not streamed."""
        calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": "".join(call.arguments)}}
            for call in self._calls.values()
        ]
        message = {"role": "assistant", "content": "".join(self._pieces), "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        return {**self._head, "choices": [choice], "usage": self._usage}
