"""Reply scripts: the only place that parses a scripted model's replies and faults."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError
from openagents_worker.llm.base import FinishReason
from openagents_worker.suggest import did_you_mean

__all__ = [
    "ReplyScript",
    "ScriptedCall",
    "ScriptedFault",
    "ScriptedReply",
    "ScriptedUsage",
    "read_entry",
    "words",
]


_CONTENT = frozenset({"text", "tool_calls", "refusal"})
"""The fields of a reply; an entry has at least one of them, or `error`."""


class _ScriptModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScriptedUsage(_ScriptModel):
    """The token counts of a reply. None: estimated from the texts."""

    input_tokens: int | None = Field(default=None, ge=0)
    output_tokens: int | None = Field(default=None, ge=0)
    cached_tokens: int = Field(default=0, ge=0)


class ScriptedCall(_ScriptModel):
    """A tool call. `arguments` as text is sent as it is and need not be JSON. Without an `id`, one is
    assigned. To imitate a model's mistakes, the name or the id may be empty and the arguments may be any
    JSON value."""

    name: str | None
    arguments: JsonValue = Field(default_factory=dict)
    id: str | None = None


class ScriptedReply(_ScriptModel):
    """One reply: text, tool calls or both, or a refusal. `reasoning` precedes it."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ScriptedCall, ...] = ()
    usage: ScriptedUsage | None = None
    latency_ms: int | None = Field(default=None, ge=0)
    finish_reason: FinishReason | None = None
    """None: `tool_calls` or `stop`."""


class ScriptedFault(_ScriptModel):
    """A failure of the first `times` tries of a call. The next reply in the script belongs to that call."""

    error: str
    times: int = Field(default=1, ge=1)
    retry_after_ms: int | None = Field(default=None, ge=0)
    status: int | None = Field(default=None, ge=400, le=599)
    message: str | None = None
    latency_ms: int | None = Field(default=None, ge=0)


class ReplyScript:
    """The replies of a run's model calls in order, with the faults that precede each of them.

    >>> script = ReplyScript([{"error": "rate_limit"}, {"text": "hi"}], faults=("rate_limit",))
    >>> script.entry(0, 0).error, script.entry(0, 1).text, script.entry(1, 0)
    ('rate_limit', 'hi', None)
    """

    def __init__(self, entries: Sequence[Any], *, faults: Collection[str]) -> None:
        """Raises `PluginConfigError` that lists the indexes of all invalid entries."""
        self._turns: list[tuple[list[ScriptedFault], ScriptedReply | None]] = []
        faults_before: list[ScriptedFault] = []
        errors: dict[int, PluginConfigError] = {}
        for index, data in enumerate(entries):
            try:
                entry = read_entry(data, faults=faults, where=f"script[{index}]")
            except PluginConfigError as error:
                errors[index] = error
                continue
            if isinstance(entry, ScriptedFault):
                faults_before.append(entry)
            else:
                self._turns.append((faults_before, entry))
                faults_before = []
        self._turns.append((faults_before, None))
        if errors:
            raise _script_error(errors)

    def __len__(self) -> int:
        """The number of replies."""
        return len(self._turns) - 1

    def entry(self, turn: int, failed_tries: int) -> ScriptedReply | ScriptedFault | None:
        """The reply or fault for call `turn` (from 0) after `failed_tries`. None: the script has ended."""
        faults, reply = self._turns[min(turn, len(self))]
        for fault in faults:
            if failed_tries < fault.times:
                return fault
            failed_tries -= fault.times
        return reply


def read_entry(data: Any, *, faults: Collection[str], where: str) -> ScriptedReply | ScriptedFault:
    """Parse and check one entry. Raises `PluginConfigError`; its message begins with `where`."""
    if not isinstance(data, Mapping):
        raise _entry_error(where, f"an entry must be an object, not {type(data).__name__}")
    try:
        if "error" in data:
            fault = ScriptedFault.model_validate(dict(data))
            if fault.error in faults:
                return fault
            raise _entry_error(
                where,
                f"unknown error {fault.error!r}",
                did_you_mean(fault.error, sorted(faults), "known errors"),
            )
        if not _CONTENT.isdisjoint(data):
            return ScriptedReply.model_validate(dict(data))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise _entry_error(where, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    raise _entry_error(where, "it has neither 'text' nor 'tool_calls' nor 'error'")


def _script_error(errors: Mapping[int, PluginConfigError]) -> PluginConfigError:
    """One error for all invalid entries."""
    problems = [
        ConfigProblem(("script", index), error.message.removeprefix(f"script[{index}]: "), error.hint)
        for index, error in errors.items()
    ]
    message = "; ".join(error.message for error in errors.values())
    return PluginConfigError(message, hint=problems[0].hint, problems=problems)


def _entry_error(where: str, problem: str, hint: str | None = None) -> PluginConfigError:
    shapes = (
        'an entry is {"text": ...}, {"tool_calls": [{"name": ..., "arguments": {...}}]} or {"error": ...}'
    )
    return PluginConfigError(f"{where}: {problem}", hint=hint or shapes)


def words(text: str) -> list[str]:
    """Split a text into the pieces in which a scripted reply is streamed. Joined, they equal the text."""
    return re.findall(r"\s*\S+\s*|\s+", text)
