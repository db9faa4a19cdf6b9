"""The table of states: Python and the scripts use the same states, and no other code spells them."""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable

import pytest

from openagents_worker.models import RunState
from openagents_worker.store.states import STATES, states_in_lua

LUA = [
    path
    for folder in ("lua", "lua/lib")
    for path in resources.files("openagents_worker.store").joinpath(*folder.split("/")).iterdir()
    if path.name.endswith(".lua")
]


def test_every_state_is_in_the_table() -> None:
    """A new state needs a row before any script can be loaded."""
    assert set(STATES) == set(RunState)
    assert {state for state, facts in STATES.items() if facts.is_terminal} == {
        state for state in RunState if state.is_terminal
    }


def test_a_script_gets_the_states_and_the_sets_that_it_uses() -> None:
    """As text and as Lua tables; a script that uses no set does not create one in each call."""
    assert states_in_lua("if s == STATE.retrying then end") == "if s == 'retrying' then end"
    assert states_in_lua("return HAS_DUE[s]") == (
        "local HAS_DUE = {scheduled = true, retrying = true}\nreturn HAS_DUE[s]"
    )


def test_a_script_with_an_unknown_state_is_not_loaded() -> None:
    """In Lua it would be nil, and no run would ever be in it."""
    with pytest.raises(ValueError, match="quued"):
        states_in_lua("run.state == STATE.quued")


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.name)
def test_no_script_spells_a_state(path: Traversable) -> None:
    """Every state that is compared or written is from the table."""
    spelt = re.compile(rf"(?:state\b[^\n]{{0,6}}|'state', )'({'|'.join(RunState)})'")

    assert spelt.findall(path.read_text()) == []
