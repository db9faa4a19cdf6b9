"""Transcripts: the only place that says what a run leaves in its session, and what of it later runs see.

**A run leaves one whole turn, or nothing.** A turn is a question, the tool calls that answered it with their
results, and an answer.

| the run | what stays in the transcript |
|---|---|
| completed with an answer | the turn |
| completed without an answer (no text, or None) | nothing |
| failed, for whatever reason: refused by the provider, out of steps or money, wrong output … | nothing |
| was cancelled, or was poisoned | nothing |

Why nothing: what a provider has refused once (a content filter, too long) it refuses again, with every later
question of the session; after a question without an answer roles do not alternate; and a run that failed may
be resumed, which would ask its question twice. The same holds for the session's state and artifacts: a run
writes into its session when it completes. The run's own record keeps its input and its error.

A stored turn is two entries, both or neither: `{"role": "user", "content", "run_id", "agent_id"}` and
`{"role": "assistant", "content", "run_id", "agent_id", "stop_reason", "is_error": false}`, the second one
with `"tool_messages": [...]`, the messages between the two, where there are any.

What versions before this one have stored (an error's text as an answer, blank messages) is left out when a
session is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, NESTING_OF_OLD, dumps, replaced, size_of
from openagents_worker.llm.base import FixedMessage, Message
from openagents_worker.llm.conversation import is_blank, repaired, user_text

__all__ = ["healed", "shown", "turn"]

MAX_TOOL_MESSAGES_BYTES = 256 * 1024
"""What one turn's tool messages may have: every later run of the session reads them and pays for them."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
SHOWN = ("content", "tool_calls", "tool_call_id", "name")
"""What of an entry a model is shown besides its role."""


def turn(
    question: str, output: Any, ids: Mapping[str, str], *, stop_reason: str, tool_messages: Any = ()
) -> list[dict[str, Any]]:
    """The entries that a completed run leaves; none where it has no answer.

    Tool messages that are not whole, not JSON or too large are left out. Raises TypeError or ValueError for
    an output that is not JSON.
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
    if kept := _whole(tool_messages):
        entry["tool_messages"] = kept
    return [{"role": "user", "content": user_text(question), **ids}, entry]


def healed(entries: Sequence[Any]) -> list[dict[str, Any]]:
    """The entries that a later run may see: whole turns, and messages that are of no run and have text."""
    kept: list[dict[str, Any]] = []
    known = [dict(entry) for entry in entries if isinstance(entry, Mapping) and entry.get("role") in ROLES]
    at = 0
    while at < len(known):
        entry, following = known[at], known[at + 1] if at + 1 < len(known) else {}
        at += 1
        if not entry.get("run_id"):
            kept += [entry] if _says_something(entry) else []
        elif entry["role"] == "user" and _is_answer_to(entry, following):
            at += 1
            kept += _healed_turn(entry, following)
    return kept


def _is_answer_to(question: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return entry.get("role") == "assistant" and entry.get("run_id") == question["run_id"]


def _healed_turn(question: dict[str, Any], answer: dict[str, Any]) -> list[dict[str, Any]]:
    if answer.get("is_error") or is_blank(answer.get("content")):
        return []
    whole = _whole(answer.pop("tool_messages", ()), NESTING_OF_OLD)
    question["content"] = user_text(question.get("content") or "")
    return [question, answer | ({"tool_messages": whole} if whole else {})]


def _says_something(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("tool_calls")) or entry["role"] == "tool" or not is_blank(entry.get("content"))


def shown(entries: Sequence[Mapping[str, Any]], *, turns: int | None = None) -> list[FixedMessage]:
    """The messages of a transcript as a model is shown them; of the newest `turns` questions, where given."""
    questions = [at for at, entry in enumerate(entries) if entry["role"] == "user"]
    if turns is not None and len(questions) > turns:
        before = (entry for entry in entries[: questions[-turns]] if entry["role"] == "system")
        entries = [*before, *entries[questions[-turns] :]]
    return [message for entry in entries for message in _messages(entry)]


def _messages(entry: Mapping[str, Any]) -> Iterator[FixedMessage]:
    yield from map(FixedMessage, entry.get("tool_messages", ()))
    yield FixedMessage({"role": entry["role"], **{key: entry[key] for key in SHOWN if key in entry}})


def _whole(messages: Any, nesting: int = MAX_NESTING) -> list[dict[str, Any]]:
    """The messages, if they are calls with their results that can be stored and sent; else none."""
    try:
        plain = replaced([dict(message) for message in messages], nesting + ENVELOPE_LEVELS)
        if size_of(plain) > MAX_TOOL_MESSAGES_BYTES or not all(map(_is_of_a_tool, plain)):
            return []
        return plain if repaired(plain) == plain else []
    except (TypeError, ValueError, AttributeError, RecursionError):  # a pattern of one's own wrote them
        return []


def _is_of_a_tool(message: Message) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))
