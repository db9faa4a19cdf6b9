"""Content of spans: the only place that defines what a span shows of a request, a reply and a tool call.

Texts are reported only if the application asks for them. They are redacted and cut as in the events of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMResponse, ModelRequest
from openagents_worker.llm.current_call import ids_of_call
from openagents_worker.llm.messages import content_text
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import annotate, captures_content

__all__ = ["report_reply", "report_tool_content"]

log = get_logger(__name__)

MAX_MESSAGES = 50
"""The last messages of a prompt: those before them are in the spans of earlier calls."""

Show = Callable[[Any], Any]
"""Returns a redacted and shortened copy of a JSON value."""


def report_reply(request: ModelRequest, reply: LLMResponse, show: Show) -> None:
    """Set the attributes of the current span that a reply gives: model, id, reason of its end, limits.

    The reply is paid for: whatever the messages of a custom pattern are, this does not raise.
    """
    try:
        _report_reply(request, reply, show)
    except Exception:
        log.exception("traces.reply_not_reported", **ids_of_call())


def _report_reply(request: ModelRequest, reply: LLMResponse, show: Show) -> None:
    known = {
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.response.model": reply.model,
        "gen_ai.response.id": reply.response_id,
    }
    for name, value in known.items():
        if isinstance(value, str | int | float):
            annotate(name, value)
    if reply.finish_reason:
        annotate("gen_ai.response.finish_reasons", (str(reply.finish_reason),))
    if captures_content():
        system, others = _split(request.messages)
        if system:
            annotate("gen_ai.system_instructions", dumps(show(system)))
        annotate("gen_ai.input.messages", dumps(show(list(map(_message, others[-MAX_MESSAGES:])))))
        annotate("gen_ai.output.messages", dumps(show([_reply(reply)])))


def report_tool_content(arguments: Mapping[str, Any], result: Any, show: Show) -> None:
    """Set arguments and result of a tool as attributes of the current span, if they may be captured."""
    if captures_content():
        annotate("gen_ai.tool.call.arguments", dumps(show(arguments)))
        annotate("gen_ai.tool.call.result", dumps(show(result)))


def _split(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The instructions as parts, and the other messages."""
    system = [message for message in messages if message.get("role") in ("system", "developer")]
    others = [message for message in messages if message.get("role") not in ("system", "developer")]
    return [_text(content_text(message.get("content"))) for message in system], others


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "content": text}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "tool_call",
        "id": call.get("id"),
        "name": call.get("name"),
        "arguments": call.get("arguments"),
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in the form of the conventions: a role, and parts."""
    return {"role": message.get("role"), "parts": list(_parts(message))}


def _parts(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    text = content_text(message.get("content"))
    if message.get("role") == "tool":
        yield {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": text}
        return
    if text:
        yield _text(text)
    for call in message.get("tool_calls") or ():
        yield _call(call)


def _reply(reply: LLMResponse) -> dict[str, Any]:
    parts = [_text(reply.output_text)] if reply.output_text else []
    parts += [
        _call({"id": call.id, "name": call.name, "arguments": dict(call.arguments)})
        for call in reply.tool_calls
    ]
    return {"role": "assistant", "parts": parts, "finish_reason": reply.finish_reason or "stop"}
