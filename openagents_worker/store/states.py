"""States of a run: the only place that defines their properties, for Python and for the scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from openagents_worker.models import RunState, WaitKind

__all__ = [
    "PARKED_STATES",
    "STATES",
    "StateFacts",
    "parked_state",
    "states_as_text",
    "states_in_lua",
    "with_state_sets",
]


@dataclass(frozen=True, slots=True)
class StateFacts:
    """The properties of a state."""

    is_terminal: bool = False
    """The run has ended. Only `resume` starts another life of it."""
    has_due: bool = False
    """The run waits for a time. The record has it (field `due`), and the run is a member of the key `due`."""
    is_parked: bool = False
    """The run waits for facts (field `waits` of its record). If it continues without them at some time, the
    record has that time (field `due`), and the run is a member of the key `timeouts`."""


STATES: Mapping[RunState, StateFacts] = {
    RunState.SCHEDULED: StateFacts(has_due=True),
    RunState.QUEUED: StateFacts(),
    RunState.WAITING_SESSION: StateFacts(),
    RunState.RUNNING: StateFacts(),
    RunState.RETRYING: StateFacts(has_due=True),
    RunState.AWAITING_APPROVAL: StateFacts(is_parked=True),
    RunState.WAITING_CHILD: StateFacts(is_parked=True),
    RunState.WAITING: StateFacts(is_parked=True),
    RunState.PAUSED: StateFacts(is_parked=True),
    RunState.COMPLETED: StateFacts(is_terminal=True),
    RunState.FAILED: StateFacts(is_terminal=True),
    RunState.CANCELLED: StateFacts(is_terminal=True),
}

_SETS: Mapping[str, Callable[[StateFacts], bool]] = {
    "TERMINAL": lambda facts: facts.is_terminal,
    "HAS_DUE": lambda facts: facts.has_due,
    "PARKED": lambda facts: facts.is_parked,
}

PARKED_STATES: Mapping[WaitKind, RunState] = {
    WaitKind.OUTCOME: RunState.PAUSED,
    WaitKind.BUDGET: RunState.PAUSED,
    WaitKind.APPROVAL: RunState.AWAITING_APPROVAL,
    WaitKind.CHILD: RunState.WAITING_CHILD,
    WaitKind.SIGNAL: RunState.WAITING,
    WaitKind.TIMER: RunState.WAITING,
    WaitKind.LIMIT: RunState.WAITING,
    WaitKind.JOB: RunState.WAITING,
}
"""The state of a run that is parked for this kind. A run that waits for several kinds has the first state:
what a person must decide comes first."""


def parked_state(kinds: Iterable[WaitKind]) -> RunState:
    """The state of a run that is parked and waits for these kinds. Raises `ValueError` without a kind."""
    return PARKED_STATES[min(kinds, key=list(PARKED_STATES).index)]


def states_in_lua(script: str) -> str:
    """Replace `STATE.queued` by its text, and define the sets that the script uses, such as `TERMINAL`.

    Raises `ValueError` for the name of a state that does not exist.

    >>> states_in_lua("return STATE.queued")
    "return 'queued'"
    """
    return with_state_sets(states_as_text(script))


def with_state_sets(script: str) -> str:
    """The script after the definitions of the sets that it uses, such as `TERMINAL`."""
    used = [name for name in _SETS if f"{name}[" in script and re.search(rf"\b{name}\[", script)]
    return "\n".join([*map(_set_in_lua, used), script])


def states_as_text(lua: str) -> str:
    """Replace `STATE.queued` by `'queued'`. Raises `ValueError` for a state that does not exist."""
    return re.sub(r"\bSTATE\.(\w+)", lambda found: f"'{RunState(found[1]).value}'", lua)


def _set_in_lua(name: str) -> str:
    members = ", ".join(f"{state.value} = true" for state, facts in STATES.items() if _SETS[name](facts))
    return f"local {name} = {{{members}}}"
