"""States of a run: the only place that defines their properties, for Python and for the scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from openagents_worker.models import RunState

__all__ = ["STATES", "StateFacts", "states_as_text", "states_in_lua"]


@dataclass(frozen=True, slots=True)
class StateFacts:
    """The properties of a state."""

    is_terminal: bool = False
    """The run has ended. Only `resume` starts another life of it."""
    has_due: bool = False
    """The run waits for a time. The record has it (field `due`), and the run is a member of the key `due`."""


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
    """Replace `STATE.queued` by its text, and define the sets that the script uses (`TERMINAL`, `HAS_DUE`).

    Raises `ValueError` for the name of a state that does not exist.

    >>> states_in_lua("return STATE.queued")
    "return 'queued'"
    """
    used = [name for name in _SETS if re.search(rf"\b{name}\[", script)]
    return "\n".join([*(_set_in_lua(name) for name in used), states_as_text(script)])


def states_as_text(lua: str) -> str:
    """Replace `STATE.queued` by `'queued'`. Raises `ValueError` for a state that does not exist."""
    return re.sub(r"\bSTATE\.(\w+)", lambda found: f"'{RunState(found[1]).value}'", lua)


def _set_in_lua(name: str) -> str:
    members = ", ".join(f"{state.value} = true" for state, facts in STATES.items() if _SETS[name](facts))
    return f"local {name} = {{{members}}}"
