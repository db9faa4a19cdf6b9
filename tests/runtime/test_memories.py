"""Every built-in memory in real runs: one suite over the registry. Then chains, and files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import MemoryRef
from openagents_worker.errors import PluginLoadError
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.runtime.plugins import make_plugin
from openagents_worker.store.sessions import aread_session
from tests.runtime import plugins
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for

CONFIGS: dict[str, dict[str, Any]] = {
    "buffer": {},
    "window_buffer": {"window_size": 3},
    "chain": {"memories": [{"type": "window_buffer"}, {"type": "markdown_memory"}]},
    "markdown_memory": {},
}
"""A config for each built-in memory, with which it needs nothing but a session."""
NOTE = {"category": "decisions", "rule": "Ship on Fridays.", "reason": "so"}
EACH = pytest.mark.parametrize("kind", CONFIGS)


def remembering(kind: str, *, gate: str | None = None, **ref: Any) -> dict[str, Any]:
    """An agent that notes something with a tool, and then charges. A gate stops it there."""
    charge = {"who": "x", **({"gate": gate} if gate else {})}
    return agent(
        llm=scripted(calls(("remember_preference", NOTE)), calls(("charge", charge)), {"text": "noted"}),
        memory={"type": kind, "config": CONFIGS.get(kind, {}), **ref},
        tools=[
            {"id": "remember_preference", "type": "remember_preference"},
            {"id": "charge", "impl": "tests.runtime.plugins.Charge"},
        ],
    )


async def state_of(p: Process) -> dict[str, Any]:
    return dict((await aread_session(p.store, "s1")).state)


def test_the_suite_has_every_memory() -> None:
    """A new memory gets a config here, or a test of its own with its package (`tests/extras`)."""
    assert {*CONFIGS, "zep"} == {*BUILTIN_MEMORIES}


@pytest.mark.parametrize(("kind", "says"), [("zep", "openagents-worker[zep]"), ("mem0", "of your own")])
def test_a_memory_that_cannot_work_here_is_refused_with_a_code(kind: str, says: str) -> None:
    """zep needs its package, and no version of mem0ai has the functions that the original calls."""
    with pytest.raises(PluginLoadError, match=kind) as refused:
        make_plugin("memory", MemoryRef(type=kind), BUILTIN_MEMORIES)
    assert says in str(refused.value.hint)


@EACH
def test_a_memory_keeps_to_the_contract(kind: str) -> None:
    """It is a plugin with checked options that the agents file can name."""
    memory = make_plugin("memory", MemoryRef(type=kind, config=CONFIGS[kind]), BUILTIN_MEMORIES)

    assert isinstance(memory, MemoryPlugin)
    assert isinstance(memory.external, bool)
    assert isinstance(memory.conversation_keys, frozenset)


@EACH
async def test_what_is_remembered_is_stored_with_the_end_of_the_run_or_not_at_all(
    redis_url: str, kind: str
) -> None:
    """A run that fails leaves the session as it was."""
    definition = remembering(kind)
    definition["llm"]["script"][-1] = {"error": "response"}
    async with process(redis_url, definition) as p:
        assert (await p.run("r1")).state == "failed"
        assert await state_of(p) == {}


@EACH
async def test_S01_what_memory_writes_survives_and_moves_with_the_session(redis_url: str, kind: str) -> None:
    """Another worker shows the next run what the first one has stored."""
    definition = remembering(kind)
    async with process(redis_url, definition, name="one") as one:
        await one.run("r1", input_text="first question")
        stored = await state_of(one)
        shown = await one.run("r2", input_text="second question")
    async with process(redis_url, definition, name="two") as two:
        await two.run("r3", input_text="third question")
        later = await state_of(two)

    assert shown.state == "completed"
    assert "memory_buffer" in stored or "markdown_memory" in stored
    if "memory_buffer" in stored:
        questions = [turn["input"] for turn in later["memory_buffer"]]
        assert questions == ["first question", "second question", "third question"]
    if "markdown_memory" in stored:
        assert later["markdown_memory"]["decisions"].count("Ship on Fridays.") == 3
        assert "_pending_memory_writes" not in later


@EACH
async def test_a_killed_worker_remembers_once(redis_url: str, kind: str) -> None:
    """Inject and write-back of the next worker change nothing that is stored already."""
    definition = remembering(kind, gate="charge-x")
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit("r1")
        executing = asyncio.create_task(one.execute("r1"))
        await await_for(lambda: any(e[:2] == ("begin", "charge") for e in plugins.LOG), "it charges")
        await crash(one, "r1", executing)
        plugins.GATES["charge-x"].set()
        await two.execute("r1")

        assert (await two.record("r1")).state == "completed"
        stored = json.dumps(await state_of(two))
        assert stored.count('"input": "hi"') == (1 if kind != "markdown_memory" else 0)
        kept = 0 if kind in ("buffer", "window_buffer") else 1
        assert stored.count("**Rule:** Ship on Fridays.") == kept
        names = [event["name"] for event in await two.events("r1")]
        members = 2 if kind == "chain" else 1
        assert names.count("memory.injected") == members
        assert names.count("memory.writeback_succeeded") == members


# --- chains ----------------------------------------------------------------------------------------------


class Noting(MemoryPlugin):
    """A memory with a store of its own: the log of the tests. Its name is in its config."""

    class Config(MemoryPlugin.Config):
        name: str
        fails: bool = False

    async def inject(self, context: Any) -> None:
        self._note("inject")
        context.memory_view[self.cfg.name] = [f"{self.cfg.name} of {context.run_id}"]
        context.state[self.cfg.name] = context.run_id

    async def writeback(self, context: Any) -> None:
        self._note("writeback")

    async def compact(self, context: Any) -> None:
        self._note("compact")

    async def retrieve(self, query: str, context: Any) -> list[str]:
        return [f"{self.cfg.name} {query}"]

    def _note(self, step: str) -> None:
        plugins.LOG.append(("memory", step, self.cfg.name))
        if self.cfg.fails:
            raise RuntimeError(f"{self.cfg.name} is not available")


def chain(*members: dict[str, Any], **ref: Any) -> dict[str, Any]:
    return {"type": "chain", "config": {"memories": list(members)}, **ref}


def noting(name: str, *, fails: bool = False, **ref: Any) -> dict[str, Any]:
    return {"impl": f"{__name__}.Noting", "config": {"name": name, "fails": fails}, **ref}


def noted() -> list[tuple[str, str]]:
    return [entry[1:] for entry in plugins.LOG if entry[0] == "memory"]


async def test_a_chain_calls_its_members_in_order_and_back(redis_url: str) -> None:
    """A chain may be a member of another one. Each call of an external member is recorded for itself."""
    memory = chain(noting("a"), chain(noting("b"), {"type": "window_buffer"}), noting("c"))
    async with process(redis_url, agent(memory=memory)) as p:
        await p.run("r1")

        assert noted() == [
            *(("inject", name) for name in "abc"),
            *(("writeback", name) for name in "cba"),
            *(("compact", name) for name in "cba"),
        ]
        records = [r for r in await p.journal("r1") if r["kind"] == "memory"]
        assert [record["name"] for record in records] == ["inject"] * 3 + ["writeback"] * 3 + ["compact"] * 3
        assert records[1]["outcome"] == {"ok": {"b": ["b of r1"]}}


@pytest.mark.parametrize("ends", ["inject", "writeback"])
async def test_a_chain_goes_on_where_a_worker_died(redis_url: str, ends: str) -> None:
    """The members that have been called are not called again."""
    definition = agent(memory=chain(noting("a"), noting("b"), noting("c")))
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        original = one.store.run_until
        await one.submit("r1")

        async def stops_behind_b(call: Any, until: Any) -> Any:
            if call.script.name == "commit" and noted()[-1:] == [(ends, "c" if ends == "inject" else "a")]:
                await asyncio.Event().wait()
            return await original(call, until)

        one.store.run_until = stops_behind_b  # type: ignore[method-assign]
        executing = asyncio.create_task(one.execute("r1"))
        last = (ends, "c" if ends == "inject" else "a")
        await await_for(lambda: last in noted(), "the last member is called")
        await crash(one, "r1", executing)
        await two.execute("r1")

        assert (await two.record("r1")).state == "completed"
        assert [noted().count((ends, name)) for name in "abc"].count(1) == 2
        assert noted().count(last) == 2


@pytest.mark.parametrize(
    ("of_member", "of_chain", "state"),
    [(None, "continue", "completed"), (None, "fail", "failed"), ("fail", "continue", "failed")],
)
async def test_a_member_that_fails_follows_its_own_rule_or_that_of_the_chain(
    redis_url: str, of_member: str | None, of_chain: str, state: str
) -> None:
    """The others do their work if the run continues."""
    bad = noting("bad", fails=True, **({"on_error": of_member} if of_member else {}))
    async with process(redis_url, agent(memory=chain(bad, noting("good"), on_error=of_chain))) as p:
        assert (await p.run("r1")).state == state

        assert ("writeback", "good") in noted() or state == "failed"
        assert "memory.inject_failed" in await p.event_names("r1")


class Endless:
    """A pattern whose output is larger than a run may store."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def execute(self) -> str:
        return "x" * 3_000_000


async def test_a_memory_with_its_own_store_never_gets_an_output_that_cannot_be_stored(redis_url: str) -> None:
    """The run fails, and a failed run leaves no turn: neither in its session nor elsewhere."""
    endless = agent(memory=noting("a"), pattern={"impl": f"{__name__}.Endless"})
    async with process(redis_url, endless) as p:
        record = await p.run("r1")

    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == "step.too_large"
    assert noted() == [("inject", "a")]


async def test_each_member_of_a_chain_gets_what_the_run_notes(redis_url: str, tmp_path: Path) -> None:
    """The first member that stores the notes takes them from the state; the others get them too."""
    in_files = {"type": "markdown_memory", "config": {"store": "directory", "memory_dir": str(tmp_path)}}
    definition = remembering("chain", config={"memories": [{"type": "markdown_memory"}, in_files]})
    async with process(redis_url, definition) as p:
        assert (await p.run("r1")).state == "completed"
        state = await state_of(p)

    assert "Ship on Fridays." in state["markdown_memory"]["decisions"]
    assert "Ship on Fridays." in (tmp_path / "decisions.md").read_text()
    assert "_pending_memory_writes" not in state


async def test_a_chain_shows_the_turns_of_its_members_as_messages(redis_url: str) -> None:
    """The model gets as many turns as the member keeps, and the entries of the others as text."""
    definition = agent(
        pattern={"impl": f"{__name__}.Looking"},
        memory=chain({"type": "window_buffer", "config": {"window_size": 2}}, noting("b")),
    )
    async with process(redis_url, definition) as p:
        looked = (await p.run("r1")).result

    assert looked is not None
    assert looked.final_output == {"shown": 2, "keys": ["history"], "view": ["b", "history"]}


class Looking:
    """A pattern that returns how the memory shows its turns."""

    context: Any

    def __init__(self, config: dict[str, Any]) -> None: ...

    async def execute(self) -> Any:
        context = self.context
        return {
            "shown": context.shown_turns,
            "keys": sorted(context.conversation_keys),
            "view": sorted(context.memory_view),
        }


# --- files -----------------------------------------------------------------------------------------------


async def test_files_are_written_once_though_the_worker_dies_before_it_can_say_so(
    redis_url: str, tmp_path: Path
) -> None:
    """The write-back is repeated, because it is not recorded yet. It adds nothing."""
    config = {"store": "directory", "memory_dir": str(tmp_path)}
    definition = remembering("markdown_memory", config=config)
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        original = one.store.run_until
        await one.submit("r1")

        async def stops_at_the_write_back(call: Any, until: Any) -> Any:
            if call.script.name == "commit" and '"name":"writeback"' in str(call.args):
                await asyncio.Event().wait()
            return await original(call, until)

        one.store.run_until = stops_at_the_write_back  # type: ignore[method-assign]
        executing = asyncio.create_task(one.execute("r1"))
        section = tmp_path / "decisions.md"
        await await_for(section.exists, "the file is written")
        await crash(one, "r1", executing)
        await two.execute("r1")

        assert (await two.record("r1")).state == "completed"
        assert section.read_text().count("**Rule:** Ship on Fridays.") == 1
        assert await state_of(two) == {"charged": ["x"], "last": "x"}


async def test_notes_of_a_write_back_that_failed_half_way_are_added_once(
    redis_url: str, tmp_path: Path
) -> None:
    """One file was written and another could not be. The next run of the session gets all notes, and adds
    what is missing."""
    config = {"store": "directory", "memory_dir": str(tmp_path)}
    goal = {"category": "user_goals", "rule": "Learn French.", "reason": "so"}
    script = [calls(("remember_preference", NOTE), ("remember_preference", goal)), {"text": "noted"}]
    definition = remembering("markdown_memory", config=config, on_error="continue")
    definition["llm"]["script"] = script
    in_the_way = tmp_path / ".user_goals.md.new"
    async with process(redis_url, definition) as p:
        in_the_way.mkdir()
        assert (await p.run("r1")).state == "completed"
        names = await p.event_names("r1")
        left = (await state_of(p))["_pending_memory_writes"]
        in_the_way.rmdir()
        assert (await p.run("r2")).state == "completed"

        assert "memory.writeback_failed" in names
        assert [note["rule"] for note in left] == ["Ship on Fridays.", "Learn French."]
        for note in (NOTE, goal):
            text = (tmp_path / f"{note['category']}.md").read_text()
            assert text.count(f"**Rule:** {note['rule']}") == 2, "one of each run"
        assert "_pending_memory_writes" not in await state_of(p)
