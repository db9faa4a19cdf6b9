"""The conversation of a run. The only place that turns its checkpoints, and transcripts, into messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.dashboard.shown_text import LongText, long_text, short_text
from openagents_worker.llm.messages import readable_text, result_content
from openagents_worker.models import RunRecord
from openagents_worker.store.checkpoints import Checkpoint

__all__ = ["ShownMessage", "conversation_of", "messages_of_transcript"]

MAX_CALLS = 50  # of one message


@dataclass(frozen=True, slots=True)
class ShownMessage:
    """A message. `role` is user, assistant or tool. `calls` are the tools that the model asked for."""

    role: str
    title: str
    text: LongText
    calls: tuple[tuple[str, LongText], ...] = ()
    is_error: bool = False


def conversation_of(record: RunRecord, checkpoints: Sequence[Checkpoint]) -> list[ShownMessage]:
    """The question, the replies of the model, the results of tools, and the answer."""
    messages = list(_question(record))
    for checkpoint in checkpoints:
        messages += _message_of(checkpoint)
    result = record.result
    if result is not None and result.ok and result.final_output is not None:
        answer = long_text(result.final_output)
        if not messages or messages[-1].text != answer:
            messages.append(ShownMessage("assistant", "answer", answer))
    return messages


def messages_of_transcript(transcript: Iterable[Mapping[str, Any]]) -> list[ShownMessage]:
    """The messages that a session has stored."""
    return [
        ShownMessage(
            str(message.get("role", "?"))[:40],
            str(message.get("role", "?"))[:40],
            long_text(readable_text(message.get("content"))),
            tuple(_calls(message)),
        )
        for message in transcript
    ]


def _question(record: RunRecord) -> Iterator[ShownMessage]:
    if record.request is not None:
        yield ShownMessage("user", "user", long_text(record.request.input_text))


def _message_of(checkpoint: Checkpoint) -> Iterator[ShownMessage]:
    value = checkpoint.value
    if checkpoint.error is not None and checkpoint.kind in ("model", "tool"):
        text = f"{checkpoint.error.code}: {checkpoint.error.message}"
        yield ShownMessage(
            "tool", f"{checkpoint.kind} {short_text(checkpoint.name, 80)}", long_text(text), (), True
        )
    elif checkpoint.kind == "model" and isinstance(value, Mapping):
        yield ShownMessage(
            "assistant",
            f"assistant ({short_text(checkpoint.name, 80)})",
            long_text(_text_of(value)),
            tuple(_calls(value)),
        )
    elif checkpoint.kind == "tool":
        yield ShownMessage("tool", f"tool {short_text(checkpoint.name, 80)}", long_text(_shown_result(value)))


def _shown_result(value: Any) -> Any:
    """The result of a tool; images and files in it are only named."""
    content = result_content(value)
    return value if content is None else readable_text(content)


def _text_of(value: Mapping[str, Any]) -> Any:
    return next((value[name] for name in ("output_text", "content", "text") if value.get(name)), "")


def _calls(message: Mapping[str, Any]) -> Iterator[tuple[str, LongText]]:
    calls = message.get("tool_calls")
    for call in calls[:MAX_CALLS] if isinstance(calls, list) else ():
        if isinstance(call, Mapping):
            function = call.get("function")
            named = function if isinstance(function, Mapping) else call
            yield short_text(named.get("name"), 80), long_text(named.get("arguments"))
