"""Buffer memories: what a session's next run is told of the last ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker.errors import PluginConfigError, SessionError
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.memory.buffer import BufferMemory, WindowBufferMemory
from tests.unit.run_fakes import FakeRun


async def turn(memory: Any, state: dict[str, Any], text: str, output: str) -> dict[str, Any]:
    """One run of the session: the view it was given. The state is what it leaves."""
    run = FakeRun(input_text=text, state=state)
    await memory.inject(run)
    run.state["_runtime_last_output"] = output
    await memory.writeback(run)
    return run.memory_view


async def test_the_next_run_is_shown_what_the_last_one_was_asked_and_answered() -> None:
    """`buffer` keeps input, tool results and output of every run, and shows them as `history`."""
    memory, state = BufferMemory(), {}
    run = FakeRun(input_text="2+2?", state=state, tool_results=[{"tool_id": "calc", "result": 4}])
    run.state["_runtime_last_output"] = "four"
    await memory.writeback(run)

    view = await turn(memory, state, "and 3+3?", "six")

    kept = {"input": "2+2?", "tool_results": [{"tool_id": "calc", "result": 4}], "output": "four"}
    assert view == {"history": [kept]}
    assert [entry["input"] for entry in state["memory_buffer"]] == ["2+2?", "and 3+3?"]


async def test_the_first_run_of_a_session_is_shown_an_empty_history() -> None:
    """The view has its key from the start, so that a prompt template never misses it."""
    assert await turn(BufferMemory(), {}, "hi", "hello") == {"history": []}


async def test_the_keys_in_state_and_view_can_be_chosen() -> None:
    """Two memories live in one session under different keys."""
    state: dict[str, Any] = {}
    memory = BufferMemory({"state_key": "facts", "view_key": "known"})

    await turn(memory, state, "a", "b")

    assert list(await turn(memory, state, "c", "d")) == ["known"]
    assert len(state["facts"]) == 2


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 5), st.integers(0, 12))
def test_a_window_keeps_exactly_its_newest_turns(window: int, turns: int) -> None:
    """`window_buffer` and `buffer` with `max_items` hold and show the newest turns, oldest first."""
    for memory in (WindowBufferMemory({"window_size": window}), BufferMemory({"max_items": window})):
        state: dict[str, Any] = {}
        for n in range(turns):
            view = asyncio.run(turn(memory, state, str(n), ""))
            assert [e["input"] for e in view["history"]] == [str(i) for i in range(max(0, n - window), n)]
        assert len(state.get("memory_buffer", [])) == min(turns, window)


async def test_stored_turns_are_never_changed_in_place() -> None:
    """A write-back makes a new list: what was stored before still compares as it was."""
    memory, state = BufferMemory(), {}
    await turn(memory, state, "a", "b")
    before = state["memory_buffer"]

    view = await turn(memory, state, "c", "d")
    view["history"][0]["input"] = "changed by a pattern"

    assert before == [{"input": "a", "tool_results": [], "output": "b"}]
    assert state["memory_buffer"][0]["input"] == "a"


@pytest.mark.parametrize("kind", ["buffer", "window_buffer"])
def test_a_buffer_has_no_store_of_its_own(kind: str) -> None:
    """Its turns live in the session's state, so the runtime need not record what it does."""
    assert BUILTIN_MEMORIES[kind]().external is False


async def test_a_state_key_that_something_else_uses_is_a_coded_error() -> None:
    """The memory does not overwrite what it has not written."""
    with pytest.raises(SessionError, match="memory_buffer") as caught:
        await BufferMemory().inject(FakeRun(state={"memory_buffer": "mine"}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("buffer", {"max_items": 0}),
        ("window_buffer", {"window_size": 0}),
        ("window_buffer", {"max_items": 3}),
        ("buffer", {"state_key": ""}),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_at_load(kind: str, config: dict[str, Any]) -> None:
    """Sizes are positive and every setting is known."""
    with pytest.raises(PluginConfigError):
        BUILTIN_MEMORIES[kind](config)
