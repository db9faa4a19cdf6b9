"""The states of a run. The only place that says what is true of each, for Python and for the scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from openagents_worker.models import RunState

__all__ = ["STATES", "StateFacts", "states_as_text", "states_in_lua"]


@dataclass(frozen=True, slots=True)
class StateFacts:
    """What is true of every run in a state."""

    is_terminal: bool = False
    """It has ended; only `resume` begins another life of it."""
    has_due: bool = False
    """It waits for a time, which the record says, and stands in the list of what is due."""


STATES: Mapping[RunState, StateFacts] = {
    RunState.SCHEDULED: StateFacts(has_due=True),
    RunState.QUEUED: StateFacts(),
    RunState.WAITING_SESSION: StateFacts(),
    RunState.RUNNING: StateFacts(),
    RunState.RETRYING: StateFacts(has_due=True),
    RunState.COMPLETED: StateFacts(is_terminal=True),
    RunState.FAILED: StateFacts(is_terminal=True),
    RunState.CANCELLED: StateFacts(is_terminal=True),
}

_SETS: Mapping[str, Callable[[StateFacts], bool]] = {
    "TERMINAL": lambda facts: facts.is_terminal,
    "HAS_DUE": lambda facts: facts.has_due,
}


def states_in_lua(script: str) -> str:
    """The script with `STATE.queued` as the state's text, and with the sets that it uses: `TERMINAL[state]`,
    `HAS_DUE[state]`. Raises `ValueError` for a state that there is not.

    >>> states_in_lua("return STATE.queued")
    "return 'queued'"
    """
    used = [name for name in _SETS if re.search(rf"\b{name}\[", script)]
    return "\n".join([*(_set_in_lua(name) for name in used), states_as_text(script)])


def states_as_text(lua: str) -> str:
    """Lines of a script as they are loaded. Raises `ValueError` for a state that there is not."""
    return re.sub(r"\bSTATE\.(\w+)", lambda found: f"'{RunState(found[1]).value}'", lua)


def _set_in_lua(name: str) -> str:
    members = ", ".join(f"{state.value} = true" for state, facts in STATES.items() if _SETS[name](facts))
    return f"local {name} = {{{members}}}"
