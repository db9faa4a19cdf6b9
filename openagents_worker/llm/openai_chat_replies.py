"""Replies of chat completions: the only place that reads a whole one, with the deviations of other servers.

`openai_chat_stream` assembles a streamed reply into a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import LLMConnectionError, LLMError, LLMResponseError, text_of
from openagents_worker.jsontext import replaced, whole_text
from openagents_worker.llm.base import FinishReason, LLMResponse, LLMToolCall
from openagents_worker.llm.conversation import cut_calls, is_blank, tool_call
from openagents_worker.llm.messages import Block
from openagents_worker.llm.usage import tools_of_message, usage_from_wire

__all__ = [
    "CALL_FIELDS",
    "OPAQUE_FIELDS",
    "READABLE_FIELDS",
    "WIRE_FORMAT",
    "finish_reason_of",
    "raw_text",
    "reply_from_wire",
    "thinking_of",
]

WIRE_FORMAT = "chat_completions"

OPAQUE_FIELDS = (
    "reasoning_content",
    "reasoning_details",
    "extra_content",
    "thinking_blocks",
    "provider_specific_fields",
)
"""Fields of a message that its provider wants back with the next request of the turn: DeepSeek and Kimi;
OpenRouter; Gemini; LiteLLM (two)."""
READABLE_FIELDS = ("reasoning_content", "reasoning")
"""Fields with reasoning as text. Groq sends `reasoning` and rejects it in a request."""
CALL_FIELDS = frozenset({"id", "type", "function", "index"})
"""The fields of a tool call in OpenAI's reference. Others are opaque: the provider gets them back."""

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "complete": FinishReason.STOP,
    "tool_calls": FinishReason.TOOL_CALLS,
    "tool_use": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "max_output_tokens": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "repetition": FinishReason.LENGTH,  # vLLM: the model said the same again and again
    "model_context_window_exceeded": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
    "safety": FinishReason.CONTENT_FILTER,
    "recitation": FinishReason.CONTENT_FILTER,
    "prohibited_content": FinishReason.CONTENT_FILTER,
    "blocklist": FinishReason.CONTENT_FILTER,
    "spii": FinishReason.CONTENT_FILTER,
    "sensitive": FinishReason.CONTENT_FILTER,
    "refusal": FinishReason.REFUSAL,
    "error": FinishReason.ERROR,
    "abort": FinishReason.ERROR,  # vLLM and SGLang: the server gave the reply up
    "network_error": FinishReason.ERROR,
    "insufficient_system_resource": FinishReason.ERROR,  # DeepSeek: the reply was interrupted
    "function_call_filter": FinishReason.ERROR,  # Gemini: the model wrote a call that cannot be read
    "malformed_function_call": FinishReason.ERROR,
}


def finish_reason_of(word: str | None, *, has_calls: bool, is_refusal: bool) -> FinishReason:
    """The neutral finish reason for a provider's word. Some servers say `stop` for tool calls, or nothing;
    Gemini adds details: `content_filter: PROHIBITED_CONTENT`."""
    plain = word.partition(":")[0].strip().lower() if word else ""
    known = _FINISH_REASONS.get(plain, FinishReason.OTHER) if word else FinishReason.STOP
    if known is FinishReason.STOP:
        if has_calls:
            return FinishReason.TOOL_CALLS
        return FinishReason.REFUSAL if is_refusal else FinishReason.STOP
    if known is FinishReason.TOOL_CALLS and not has_calls:
        return FinishReason.OTHER
    return known


# --- whole replies ---------------------------------------------------------------------------------------


def reply_from_wire(body: Any, *, provider: str) -> LLMResponse:
    """Parse a reply that was not streamed. Raises `LLMResponseError` if it is not a chat completion, and
    `LLMConnectionError` if the provider ended it with an error."""
    try:
        return _reply(body, provider)
    except LLMError:
        raise
    except Exception as error:  # a value of the wrong type can raise anything, for example OverflowError
        raise LLMResponseError(f"{provider}: the reply is not a chat completion ({error!r})") from error


def _reply(body: Any, provider: str) -> LLMResponse:
    choice = _first_choice(body["choices"])
    if choice is None:
        raise LLMResponseError(f"{provider}: the reply is not a chat completion (it has no choices)")
    message, model = choice.get("message"), _id_or_name(body.get("model"))
    if message is None:
        # A reply that Gemini has blocked has no message, but a reason.
        message = choice.get("delta", {}) if choice.get("finish_reason") else choice["delta"]
    content, refusal = message.get("content"), _text(message.get("refusal"))
    text = _text(content) or _transcript(message)
    calls = _calls(message, _id_or_name(body.get("id")) or "call")
    word = _id_or_name(choice.get("finish_reason"))
    reason = finish_reason_of(word, has_calls=bool(calls), is_refusal=bool(refusal) and not text)
    tools_used = tools_of_message(message, model)
    usage = usage_from_wire(body.get("usage"), service_tier=body.get("service_tier"), used_tools=tools_used)
    if reason is FinishReason.ERROR:
        broken = LLMConnectionError(f"{provider}: the model broke off its reply: {_reason(choice, text)}")
        broken.usage = usage
        raise broken
    if reason in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER) and calls and not calls[-1].arguments:
        calls = _cut_calls(message, calls)
    return LLMResponse(
        output_text=text or refusal,
        tool_calls=tuple(calls),
        usage=usage,
        stop_reason=word,
        model=model,
        provider=provider,
        response_id=_id_or_name(body.get("id")),
        content=_blocks(message, text, refusal),
        finish_reason=reason,
        provider_fields=_in_format(_opaque_fields(message)),
    )


def _first_choice(choices: Any) -> Any:
    """Choice 0. A server that ignores `n` may number its only choice as it likes."""
    numbered = [choice for choice in choices or () if choice is not None]
    return next((choice for choice in numbered if not choice.get("index")), next(iter(numbered), None))


def _reason(choice: Mapping[str, Any], text: str) -> str:
    error = choice.get("error")
    message = error.get("message") if isinstance(error, Mapping) else error
    return text_of(message or text or choice.get("finish_reason"))


def _calls(message: Mapping[str, Any], reply_id: str) -> list[LLMToolCall]:
    """The tool calls of a message; its `function_call`, which older servers send, is one too."""
    raw = list(message.get("tool_calls") or ())
    if not raw and isinstance(message.get("function_call"), Mapping):
        raw = [{"function": message["function_call"]}]
    return [_call_from_wire(call, f"{reply_id}_{index}") for index, call in enumerate(raw)]


def _cut_calls(message: Mapping[str, Any], calls: list[LLMToolCall]) -> list[LLMToolCall]:
    """The calls of a reply that was cut. Without any text of its arguments, it was cut in the last one."""
    last = (message.get("tool_calls") or [{"function": message.get("function_call")}])[-1]
    function = last.get("function") if isinstance(last, Mapping) else None
    is_whole = isinstance(function, Mapping) and function.get("arguments")
    return calls if is_whole else cut_calls(calls)


def _call_from_wire(call: Any, default_id: str) -> LLMToolCall:
    """A tool call; it gets `default_id` if it has no id. A value that is not a call has the name ""."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return LLMToolCall("", {}, default_id, parse_error="the call has no function")
    call_id = call.get("id")
    usable = isinstance(call_id, str) and not is_blank(call_id)
    parsed = tool_call(
        whole_text(call_id) if usable else default_id, function.get("name"), function.get("arguments")
    )
    opaque = {name: value for name, value in call.items() if name not in CALL_FIELDS and value is not None}
    return LLMToolCall(
        parsed.name,
        parsed.arguments,
        parsed.id,
        parsed.raw_arguments,
        parsed.parse_error,
        provider_fields=_in_format(replaced(opaque)),
    )


def _opaque_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = replaced({name: message[name] for name in OPAQUE_FIELDS if message.get(name)})
    return fields


def _in_format(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {WIRE_FORMAT: dict(fields)} if fields else {}


def _blocks(message: Mapping[str, Any], text: str, refusal: str) -> tuple[Block, ...]:
    """The blocks of a message; none if its text and its opaque fields say everything."""
    blocks: list[Block] = []
    reasoning = _text(message.get("reasoning")) or thinking_of(message.get("content"))
    if reasoning and not message.get("reasoning_content"):
        blocks.append({"type": "reasoning", "text": reasoning})
    citations = message.get("annotations")
    cited = isinstance(citations, list) and all(isinstance(each, Mapping) for each in citations) and citations
    if text and (blocks or refusal or cited):
        blocks.append({"type": "text", "text": text} | ({"citations": replaced(citations)} if cited else {}))
    if refusal:
        blocks.append({"type": "refusal", "text": refusal})
    return tuple(blocks)


def thinking_of(content: Any) -> str:
    """The reasoning inside a list of parts, as Mistral sends it."""
    if not isinstance(content, list):
        return ""
    thoughts = (part.get("thinking") for part in content if isinstance(part, Mapping))
    return "".join(_text(thought) for thought in thoughts if thought)


def _transcript(message: Mapping[str, Any]) -> str:
    """The words of spoken output, which has no text beside them."""
    audio = message.get("audio")
    return _text(audio.get("transcript")) if isinstance(audio, Mapping) else ""


def _id_or_name(value: Any) -> str | None:
    """An id or a name as text. Some servers send a number. None: the value is neither text nor a number."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return whole_text(value) if isinstance(value, str) else str(replaced(value)) if is_number else None


def _text(content: Any) -> str:
    return whole_text(raw_text(content))


def raw_text(content: Any) -> str:
    """The text of a content, which may be a list of parts. Halves of surrogate pairs are kept."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(raw_text(part.get("text")) for part in content)
