"""Transcripts: the only place that decides what a run adds to its session, and which entries later runs use.

**A run adds one complete turn, or nothing.** A turn is a question, the tool calls with their results, and an
answer.

| the run | is added to the transcript |
|---|---|
| completed with an answer | the turn |
| completed without an answer (no text, or None) | nothing |
| failed for any reason: rejected by the provider, step limit or budget reached, invalid output … | nothing |
| was interrupted by another run (`on_busy="interrupt"`) | the turn so far, with a note as its answer |
| was cancelled otherwise, rolled back or poisoned | nothing |

Reasons for adding nothing: A provider that rejected a question (content filter, too long) would reject it
again with every later question of the session. A question without an answer breaks the alternation of roles.
And a failed run may be resumed, which would ask its question twice. The same rule holds for the session's
state and artifacts: a run writes to its session only when it completes. The record of the run keeps its input
and its error.

A stored turn is two entries, both or neither: `{"role": "user", "content", "run_id", "agent_id"}` and
`{"role": "assistant", "content", "run_id", "agent_id", "stop_reason", "is_error": false}`. The second entry
has `"tool_messages": [...]`, the messages between the two, if there are any.

Entries that only older versions stored (an error's text as an answer, blank messages) are left out when a
session is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, NESTING_OF_OLD, dumps, replaced, size_of
from openagents_worker.llm.base import FixedMessage, LLMResponse, Message
from openagents_worker.llm.conversation import is_blank, repaired, user_text
from openagents_worker.llm.messages import READABLE_REASONING

__all__ = [
    "INTERRUPTED",
    "answer_fields",
    "interrupted_entries",
    "is_continuation",
    "model_messages",
    "summary_entries",
    "turn_entries",
    "turns_of",
    "usable_entries",
]

MAX_ANSWER_FIELDS_BYTES = 64 * 1024
"""Largest size of the opaque fields of an answer as JSON: signatures, encrypted reasoning."""
MAX_TOOL_MESSAGES_BYTES = 256 * 1024
"""Largest size of one turn's tool messages as JSON: every later run of the session pays for their tokens."""

INTERRUPTED = "(The user interrupted this turn with a new message, before there was an answer.)"
"""The answer in the turn of an interrupted run."""
SUMMARY_REQUEST = "Summarize our conversation so far."
"""The question to which a summary of earlier turns is the answer."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MODEL_FIELDS = ("content", "tool_calls", "tool_call_id", "name", "provider_fields")
"""The fields of an entry that a model gets besides its role."""


def turn_entries(
    question: str, output: Any, ids: Mapping[str, str], *, stop_reason: str, tool_messages: Any = ()
) -> list[dict[str, Any]]:
    """The entries that a completed run adds to the transcript; none if its answer is blank.

    `tool_messages` are the messages between question and answer. The last one may be the answer: its
    `provider_fields` are stored. The messages are left out if they are incomplete, not JSON or too large; if
    they are too large only with the bytes of images or with `provider_fields`, only these are left out.
    Raises TypeError or ValueError if the output is not JSON.
    """
    answer = "" if output is None else output if isinstance(output, str) else dumps(output)
    if is_blank(answer):
        return []
    entry: dict[str, Any] = {
        "role": "assistant",
        "content": answer,
        **ids,
        "stop_reason": stop_reason,
        "is_error": False,
    }
    return _turn(question, entry, ids, tool_messages)


def interrupted_entries(
    question: str, ids: Mapping[str, str], *, tool_messages: Any = ()
) -> list[dict[str, Any]]:
    """The entries that a run adds to the transcript if another run has interrupted it: always two.

    A tool call without a result gets one that says that the call was interrupted.
    """
    entry = {
        "role": "assistant",
        "content": INTERRUPTED,
        **ids,
        "stop_reason": "cancelled",
        "is_error": False,
    }
    return _turn(question, entry, ids, tool_messages)


def summary_entries(summary: str) -> list[dict[str, Any]]:
    """The entries that stand for turns that a summary has replaced.

    Not a system message: what a user has said must not become an instruction of the operator.
    """
    return [
        {"role": "user", "content": SUMMARY_REQUEST, "is_summary": True},
        {"role": "assistant", "content": summary, "is_summary": True},
    ]


def _turn(
    question: str, answer: dict[str, Any], ids: Mapping[str, str], tool_messages: Any
) -> list[dict[str, Any]]:
    """The two entries of a turn. A message that was sent to the run before its first call belongs to the
    question, because roles must alternate."""
    asked = user_text(question)
    between, fields = _without_answer(tool_messages)
    kept = _complete_tool_messages(between)
    if kept and kept[0]["role"] == "user":
        asked = f"{asked}\n\n{kept.pop(0)['content']}"
    if kept:
        answer["tool_messages"] = kept
    if fields:
        answer["provider_fields"] = fields
    return [{"role": "user", "content": asked, **ids}, answer]


def answer_fields(reply: LLMResponse) -> dict[str, dict[str, Any]]:
    """The opaque fields of an answer that its provider wants back in later turns. Readable reasoning belongs
    to its own turn: DeepSeek rejects it in a later one."""
    kept = {
        wire_format: {name: value for name, value in fields.items() if name not in READABLE_REASONING}
        for wire_format, fields in reply.provider_fields.items()
    }
    return {wire_format: fields for wire_format, fields in kept.items() if fields}


def _without_answer(messages: Any) -> tuple[Any, dict[str, Any]]:
    """The messages without the answer at their end, and the answer's opaque fields."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
        return messages, {}
    fields = last.get("provider_fields")
    try:
        plain = replaced(dict(fields), MAX_NESTING) if isinstance(fields, Mapping) else {}
        return messages[:-1], plain if size_of(plain) <= MAX_ANSWER_FIELDS_BYTES else {}
    except (TypeError, ValueError, RecursionError):  # a custom pattern may return anything
        return messages[:-1], {}


def turns_of(entries: Sequence[Any], begin: int) -> list[tuple[int, int, list[dict[str, Any]]]]:
    """The stored entries in parts that must not be divided: positions (the end excluded) and usable entries.

    `begin` is the position of the first entry. A part is a question with its answer, a message with tool
    calls with their results, or one entry. Entries that no run uses are parts with an empty list.
    """
    parts: list[tuple[int, int, list[dict[str, Any]]]] = []
    at = 0
    while at < len(entries):
        count = _part_length(entries, at)
        parts.append((begin + at, begin + at + count, usable_entries(entries[at : at + count])))
        at += count
    return parts


def is_continuation(entry: Any) -> bool:
    """Whether an entry may belong to a part that begins before it."""
    if not isinstance(entry, Mapping):
        return False
    return entry.get("role") == "tool" or bool(entry.get("run_id") and entry.get("role") == "assistant")


def _part_length(entries: Sequence[Any], at: int) -> int:
    """The number of entries that belong together from here on."""
    entry, end = entries[at], at + 1
    if not isinstance(entry, Mapping):
        return 1
    following = entries[end] if end < len(entries) else None
    if entry.get("run_id") and entry.get("role") == "user":
        return 2 if isinstance(following, Mapping) and _is_answer_to(entry, following) else 1
    if entry.get("tool_calls"):
        while end < len(entries) and isinstance(entries[end], Mapping) and entries[end].get("role") == "tool":
            end += 1
    return end - at


def usable_entries(entries: Sequence[Any]) -> list[dict[str, Any]]:
    """The entries that a later run uses: complete turns, and messages with content and without a run id."""
    kept: list[dict[str, Any]] = []
    valid = [dict(entry) for entry in entries if isinstance(entry, Mapping) and entry.get("role") in ROLES]
    at = 0
    while at < len(valid):
        entry, following = valid[at], valid[at + 1] if at + 1 < len(valid) else {}
        at += 1
        if not entry.get("run_id"):
            kept += [entry] if _has_content(entry) else []
        elif entry["role"] == "user" and _is_answer_to(entry, following):
            at += 1
            kept += _usable_turn(entry, following)
    return kept


def _is_answer_to(question: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return entry.get("role") == "assistant" and entry.get("run_id") == question["run_id"]


def _usable_turn(question: dict[str, Any], answer: dict[str, Any]) -> list[dict[str, Any]]:
    if answer.get("is_error") or is_blank(answer.get("content")):
        return []
    tool_messages = _complete_tool_messages(answer.pop("tool_messages", ()), NESTING_OF_OLD)
    question["content"] = user_text(question.get("content") or "")
    return [question, answer | ({"tool_messages": tool_messages} if tool_messages else {})]


def _has_content(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("tool_calls")) or entry["role"] == "tool" or not is_blank(entry.get("content"))


def model_messages(entries: Sequence[Mapping[str, Any]], *, turns: int | None = None) -> list[FixedMessage]:
    """The messages of a transcript for a model. `turns`: only those of the newest `turns` questions.

    A summary of earlier turns is always among them.
    """
    questions = [
        at for at, entry in enumerate(entries) if entry["role"] == "user" and not entry.get("is_summary")
    ]
    if turns is not None and len(questions) > turns:
        earlier = entries[: questions[-turns]]
        before = (entry for entry in earlier if entry["role"] == "system" or entry.get("is_summary"))
        entries = [*before, *entries[questions[-turns] :]]
    return [message for entry in entries for message in _messages(entry)]


def _messages(entry: Mapping[str, Any]) -> Iterator[FixedMessage]:
    yield from map(FixedMessage, entry.get("tool_messages", ()))
    yield FixedMessage({"role": entry["role"], **{key: entry[key] for key in MODEL_FIELDS if key in entry}})


def _complete_tool_messages(messages: Any, nesting: int = MAX_NESTING) -> list[dict[str, Any]]:
    """The messages, if they are tool calls with all their results and can be stored; otherwise none."""
    try:
        plain = replaced([dict(message) for message in messages], nesting + ENVELOPE_LEVELS)
        if not plain:
            return []
        for shortened in (_without_bytes, _without_provider_fields):  # the fields are for their own turn only
            if size_of(plain) <= MAX_TOOL_MESSAGES_BYTES:
                break
            plain = [shortened(message) for message in plain]
        else:
            if size_of(plain) > MAX_TOOL_MESSAGES_BYTES:
                return []
        return plain if all(map(_is_tool_message, plain)) and repaired(plain) == plain else []
    except (TypeError, ValueError, AttributeError, RecursionError):  # a custom pattern may return anything
        return []


def _is_tool_message(message: Message) -> bool:
    """Whether a message may stand between question and answer.

    Also a text that was sent to the run, and the answer before it.
    """
    return message.get("role") in ("assistant", "tool", "user")


def _without_bytes(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a note in place of the bytes of images and files."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    blocks = [
        {"type": "text", "text": f"[{block['type']} left out: it is too large for later turns]"}
        if isinstance(block, Mapping) and block.get("type") in ("image", "file") and block.get("data")
        else block
        for block in content
    ]
    return {**message, "content": blocks}


def _without_provider_fields(message: Message) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key != "provider_fields"}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [
            {key: value for key, value in call.items() if key != "provider_fields"} for call in calls
        ]
    return kept
