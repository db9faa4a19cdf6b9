"""OpenAI's chat completions: the only place that reads and writes their JSON.

The reference is https://platform.openai.com/docs/api-reference/chat. vLLM, Ollama and most gateways implement
this API too; this module handles their deviations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.jsontext import dumps
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.base import LLMResponse, Message, ModelRequest
from openagents_worker.llm.conversation import is_blank, repaired
from openagents_worker.llm.endpoints import AZURE_HOSTS, bearer_headers
from openagents_worker.llm.http import Endpoint, HttpModelClient
from openagents_worker.llm.media import (
    AUDIO_FORMATS,
    ENDINGS,
    PDF,
    Readable,
    media_type_of,
    with_readable_media,
)
from openagents_worker.llm.messages import (
    BLOCK_TYPES,
    Block,
    content_blocks,
    content_text,
    data_url,
    fields_of_format,
)
from openagents_worker.llm.openai_chat_replies import WIRE_FORMAT, reply_from_wire
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.openai_options import OpenAIRequestOptions
from openagents_worker.llm.root_schemas import accepted_tool
from openagents_worker.llm.strict_servers import in_form, joined_instructions, prepared
from openagents_worker.llm.structured import output_schema, output_tool

__all__ = ["ChatCompletions", "OpenAICompatibleClient", "messages_to_wire"]

DEFAULT_MODEL = "gpt-4o-mini"
OTHER_PARTS = "The result follows in the next user message."
"""The text of a tool message whose result has no text, only images or files."""

_HEARS = re.compile(r"audio|omni|gemini|voxtral", re.IGNORECASE)
"""Names of models that take audio in chat completions."""
_REASONING = re.compile(r"(?:.*/)?(o[1-9]|gpt-[5-9](?!-chat))")


class OpenAICompatibleClient(HttpModelClient):
    """A model behind `POST {api_base}/chat/completions`: OpenAI itself, vLLM, Ollama, gateways."""

    def __init__(self, options: LLMOptions, *, api_key: ApiKeys | str | None, **more: Any) -> None:
        """Raises `PluginConfigError` for invalid options. `more`: the arguments of `HttpModelClient`."""
        checked = OpenAIRequestOptions.checked(options, api_key)
        endpoint = Endpoint(
            provider="openai_compatible",
            url=checked.url,
            stream_url=checked.stream_url,
            headers=checked.headers,
            secrets=checked.secrets,
            keys=checked.keys,
            key_headers=bearer_headers(options),
        )
        codec = ChatCompletions(options, checked.extras)
        super().__init__(options.model or DEFAULT_MODEL, options, endpoint=endpoint, codec=codec, **more)
        self.keeps_format = checked.extras.get("structured_output", "auto") != "auto"


def _is_openai(base: str | None) -> bool:
    """Whether the server is OpenAI itself, or Azure's."""
    host = httpx.URL(base or "").host
    return host == "api.openai.com" or host.endswith(AZURE_HOSTS)


class ChatCompletions:
    """The codec of chat completions; see `openagents_worker.llm.http.Codec`."""

    end_of_stream = "[DONE]"

    def __init__(self, options: LLMOptions, extras: Mapping[str, Any]) -> None:
        self._options = options
        ours = ("structured_output", "stream_options")
        self._extras = {name: value for name, value in extras.items() if name not in ours}
        self._stream_options = extras.get("stream_options", True)
        self._way_of_output = extras.get("structured_output", "auto")

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model."""
        request = self._with_output_format(request)
        tools, streaming = request.tools, request.is_streamed
        extras = self._extras
        tool_choice = request.tool_choice or extras.get("tool_choice")
        tool_fields = {"tools": [accepted_tool(tool) for tool in tools or ()], "tool_choice": tool_choice}
        no_tools = {"tool_choice": None, "parallel_tool_calls": None}
        stream_options = {"include_usage": True} if self._stream_options else None
        body = {
            "model": model,
            "messages": messages_to_wire(
                with_readable_media(request.messages, self._readable(model)), request.strict_forms
            ),
            "response_format": request.response_format,
            **self._sampling(model, request.temperature, request.max_tokens),
            **extras,
            **(tool_fields if tools else no_tools),
            **({"stream": True, "stream_options": stream_options} if streaming else {}),
        }
        return {name: value for name, value in body.items() if value is not None}

    def _readable(self, model: str) -> Readable:
        """What the model takes. Models that do not hear refuse every request with audio."""
        files = frozenset(ENDINGS) if model.startswith("bedrock/") else frozenset({PDF})  # by LiteLLM
        fetches = httpx.URL(self._options.api_base or "").host.endswith("openrouter.ai")
        return Readable(files, audio=_HEARS.search(model) is not None, file_urls=fetches)

    def _with_output_format(self, request: ModelRequest) -> ModelRequest:
        """The request with the schema of the output as this server takes it."""
        schema = output_schema(request.response_format)
        way = self._way_of_output
        if schema is None or way == "json_schema":
            return request
        if way == "tool":
            tools = [*(request.tools or ()), output_tool(schema)]
            return replace(request, response_format=None, tools=tools, tool_choice="required")
        if way == "json_object":
            return replace(request, response_format={"type": "json_object"})
        if way == "auto" and (not request.tools or _is_openai(self._options.api_base)):
            return request
        return replace(request, response_format=None)

    def _sampling(self, model: str, temperature: float | None, max_tokens: int | None) -> dict[str, Any]:
        temperature = self._options.temperature if temperature is None else temperature
        max_tokens = self._options.max_tokens if max_tokens is None else max_tokens
        is_reasoning = self._options.reasoning_model
        if is_reasoning is None:
            is_reasoning = _REASONING.match(model) is not None
        if is_reasoning:
            return {"max_completion_tokens": max_tokens}  # reasoning models reject the two older parameters
        return {"temperature": temperature, "max_tokens": max_tokens}

    def is_reply(self, body: Mapping[str, Any]) -> bool:
        """Whether a body has choices and no error."""
        return bool(body.get("choices")) and not body.get("error")

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMResponseError` if it is not a chat completion."""
        return reply_from_wire(body, provider=provider)

    def stream(self, *, max_chars: int) -> StreamedReply:
        """A reader that assembles the chunks of one stream; see `StreamedReply`."""
        return StreamedReply(max_chars=max_chars)


# --- requests --------------------------------------------------------------------------------------------


def messages_to_wire(messages: Sequence[Message], forms: Collection[str] = ()) -> list[dict[str, Any]]:
    """Convert neutral messages to OpenAI's format, repaired. OpenAI has no field for `is_error`: the text of
    the message describes the error. A tool message cannot have images, so they follow in a user message.
    `forms`: what is different for a strict server, see `openagents_worker.llm.strict_servers`."""
    messages = repaired(messages)
    wire = joined_instructions(_messages_with_parts(prepared(messages, forms) if forms else messages))
    return in_form(wire, forms) if forms else wire


def _messages_with_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    wire: list[dict[str, Any]] = []
    from_tools: list[dict[str, Any]] = []
    for message in messages:
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
        case "file" if block.get("data") and (audio := AUDIO_FORMATS.get(media_type_of(block))):
            return {"type": "input_audio", "input_audio": {"data": block["data"], "format": audio}}
        case "file" if "file" not in block:
            data = block.get("url") or (data_url(block) if block.get("data") else None)
            name = block.get("name") or ("file.pdf" if data else None)  # OpenAI refuses data without one
            file = {"file_id": block.get("file_id"), "file_data": data, "filename": name}
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
