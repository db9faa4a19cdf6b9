"""Scripts: the only place that reads what a scripted model is to say, and when it is to fail."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError
from openagents_worker.suggest import nearest

__all__ = [
    "ReplyScript",
    "ScriptedCall",
    "ScriptedFault",
    "ScriptedReply",
    "ScriptedUsage",
    "read_entry",
    "words",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScriptedUsage(_Part):
    """What the reply is said to have used; None: estimated from the texts."""

    input_tokens: int | None = Field(default=None, ge=0)
    output_tokens: int | None = Field(default=None, ge=0)
    cached_tokens: int = Field(default=0, ge=0)


class ScriptedCall(_Part):
    """A tool call. `arguments` as text is what the model wrote, so that it may be no JSON; without `id` it
    gets one. Models also leave the name or the id empty, and write arguments that are not an object."""

    name: str | None
    arguments: JsonValue = Field(default_factory=dict)
    id: str | None = None


class ScriptedReply(_Part):
    """One reply: text, tool calls or both."""

    text: str = ""
    tool_calls: tuple[ScriptedCall, ...] = ()
    usage: ScriptedUsage | None = None
    latency_ms: int | None = Field(default=None, ge=0)


class ScriptedFault(_Part):
    """A failure that the first `times` tries of the call meet whose reply follows in the script."""

    error: str
    times: int = Field(default=1, ge=1)
    retry_after_ms: int | None = Field(default=None, ge=0)
    status: int | None = Field(default=None, ge=400, le=599)
    message: str | None = None
    latency_ms: int | None = Field(default=None, ge=0)


class ReplyScript:
    """Replies in the order of a run's model calls, with the faults before each.

    >>> script = ReplyScript([{"error": "rate_limit"}, {"text": "hi"}], faults=("rate_limit",))
    >>> script.entry(0, 0).error, script.entry(0, 1).text, script.entry(1, 0)
    ('rate_limit', 'hi', None)
    """

    def __init__(self, entries: Sequence[Any], *, faults: Collection[str]) -> None:
        """Raises `PluginConfigError`, which names the indexes of the entries that cannot be used."""
        self._turns: list[tuple[list[ScriptedFault], ScriptedReply | None]] = []
        waiting: list[ScriptedFault] = []
        wrong: dict[int, PluginConfigError] = {}
        for index, data in enumerate(entries):
            try:
                entry = read_entry(data, faults=faults, where=f"script[{index}]")
            except PluginConfigError as error:
                wrong[index] = error
                continue
            if isinstance(entry, ScriptedFault):
                waiting.append(entry)
            else:
                self._turns.append((waiting, entry))
                waiting = []
        self._turns.append((waiting, None))
        if wrong:
            raise _unusable_script(wrong)

    def __len__(self) -> int:
        """How many replies there are."""
        return len(self._turns) - 1

    def entry(self, turn: int, failed_tries: int) -> ScriptedReply | ScriptedFault | None:
        """What the `turn`-th call (from 0) meets after so many failed tries; None: the script is over."""
        faults, reply = self._turns[min(turn, len(self))]
        for fault in faults:
            if failed_tries < fault.times:
                return fault
            failed_tries -= fault.times
        return reply


def read_entry(data: Any, *, faults: Collection[str], where: str) -> ScriptedReply | ScriptedFault:
    """One entry, checked. Raises `PluginConfigError` that says `where` the problem is."""
    if not isinstance(data, Mapping):
        raise _unusable(where, f"an entry is an object, not {type(data).__name__}")
    try:
        if "error" in data:
            fault = ScriptedFault.model_validate(dict(data))
            if fault.error in faults:
                return fault
            raise _unusable(where, f"unknown error {fault.error!r}", _near(fault.error, sorted(faults)))
        if "text" in data or "tool_calls" in data:
            return ScriptedReply.model_validate(dict(data))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise _unusable(where, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    raise _unusable(where, "it has neither 'text' nor 'tool_calls' nor 'error'")


def _unusable_script(wrong: Mapping[int, PluginConfigError]) -> PluginConfigError:
    """One error for all entries that cannot be used."""
    problems = [
        ConfigProblem(("script", index), error.message.removeprefix(f"script[{index}]: "), error.hint)
        for index, error in wrong.items()
    ]
    message = "; ".join(error.message for error in wrong.values())
    return PluginConfigError(message, hint=problems[0].hint, problems=problems)


def _unusable(where: str, problem: str, hint: str | None = None) -> PluginConfigError:
    shapes = (
        'an entry is {"text": ...}, {"tool_calls": [{"name": ..., "arguments": {...}}]} or {"error": ...}'
    )
    return PluginConfigError(f"{where}: {problem}", hint=hint or shapes)


def _near(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known errors: {', '.join(known)}"


def words(text: str) -> list[str]:
    """The pieces in which a scripted reply is streamed; joined they are the text."""
    return re.findall(r"\s*\S+\s*|\s+", text)
