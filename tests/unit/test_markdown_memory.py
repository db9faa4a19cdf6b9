"""`markdown_memory`: rules with their reasons, as Markdown, in the session or in a directory."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.errors import PluginConfigError, SessionError, ToolValidationError
from openagents_worker.memory import base, entries, markdown
from openagents_worker.memory.entries import MemoryEntry, added, entries_in, one_line, without
from openagents_worker.memory.markdown import MarkdownMemory
from openagents_worker.tools.builtin import BUILTIN_TOOLS, remember
from tests.unit.run_fakes import FakeRun

NOTE = {"category": "decisions", "rule": "Ship on Fridays.", "reason": "The team said so."}


def memory(tmp_path: Path, store: str, **config: Any) -> MarkdownMemory:
    return MarkdownMemory({"store": store, "memory_dir": str(tmp_path / "memory"), **config})


STORES = pytest.mark.parametrize("store", ["session", "directory"])


@STORES
async def test_what_a_run_notes_is_shown_to_the_next_one(tmp_path: Path, store: str) -> None:
    """The write-back takes the notes; the view has the entries of each section."""
    state: dict[str, Any] = {}
    first = FakeRun(state=state)
    await BUILTIN_TOOLS["remember_preference"]().invoke(NOTE, first)
    await memory(tmp_path, store).writeback(first)
    second = FakeRun(state=state, run_id="r2")
    await memory(tmp_path, store).inject(second)

    (entry,) = second.memory_view["decisions"]
    assert (entry["rule"], entry["reason"]) == ("Ship on Fridays.", "The team said so.")
    assert [second.memory_view[name] for name in ("user_goals", "user_feedback", "references")] == [[]] * 3
    assert base.PENDING_WRITES not in state
    assert ("markdown_memory" in state) is (store == "session")


@STORES
async def test_a_repeated_write_back_adds_nothing(tmp_path: Path, store: str) -> None:
    """A worker died before the write-back was recorded. The next one writes the same entry."""
    state: dict[str, Any] = {}
    for _ in range(2):
        run = FakeRun(state=state)
        state[base.PENDING_WRITES] = [NOTE, {**NOTE, "rule": "Eat."}]
        await memory(tmp_path, store).writeback(run)
    await memory(tmp_path, store).inject(run)

    assert [entry["rule"] for entry in run.memory_view["decisions"]] == ["Ship on Fridays.", "Eat."]


@STORES
async def test_an_entry_can_be_captured_listed_found_and_forgotten(tmp_path: Path, store: str) -> None:
    """For applications. Without a directory, they pass the context of a run."""
    run, kept = FakeRun(), memory(tmp_path, store)

    first = kept.capture("user_goals", "Learn French.", "", run)
    second = kept.capture("something else", "Short answers.", "They are busy.", run)

    assert [entry["id"] for entry in kept.list_entries("user_goals", run)] == [first]
    assert [entry["section"] for entry in await kept.retrieve("BUSY", run)] == ["user_feedback"]
    assert (kept.forget(second, run), kept.forget(second, run)) == (True, False)
    assert kept.list_entries("user_feedback", run) == []
    assert kept.list_entries("user_goals", run)[0]["reason"] == "(no reason given)"


@STORES
async def test_a_run_sees_the_newest_entries_and_a_section_keeps_so_many(tmp_path: Path, store: str) -> None:
    """The view is limited by characters, what is kept by entries."""
    run = FakeRun()
    kept = memory(tmp_path, store, max_chars_per_section=120, max_entries_per_section=5)
    for number in range(8):
        kept.capture("decisions", f"rule {number} {'x' * 20}", "y" * 20, run)

    await kept.inject(run)

    assert [e["rule"][:6] for e in run.memory_view["decisions"]] == ["rule 6", "rule 7"]
    assert [e["rule"][:6] for e in kept.list_entries("decisions", run)] == [f"rule {n}" for n in range(3, 8)]


def test_files_are_readable_by_people_and_keep_what_people_write(tmp_path: Path) -> None:
    """One file for each section and an index."""
    kept = memory(tmp_path, "directory")
    kept.capture("decisions", "Ship on Fridays.", "The team said so.")
    section = tmp_path / "memory" / "decisions.md"
    section.write_text("# Our decisions\n\n" + section.read_text() + "And a remark.")

    kept.capture("decisions", "Eat.", "")

    text = section.read_text()
    assert text.startswith("# Our decisions\n\n### ")
    assert "And a remark.\n### " in text
    assert [entry["rule"] for entry in kept.list_entries("decisions")] == ["Ship on Fridays.", "Eat."]
    assert "- [decisions](decisions.md) — 2 entries" in (tmp_path / "memory" / "MEMORY.md").read_text()


def test_several_writers_of_a_directory_lose_nothing(tmp_path: Path) -> None:
    """One at a time changes the files."""

    def write(worker: int) -> None:
        for number in range(10):
            memory(tmp_path, "directory").capture("decisions", f"{worker} {number}", "")

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert len(memory(tmp_path, "directory").list_entries("decisions")) == 40


def test_a_file_that_is_too_large_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it would replace the whole, without the newest entries."""
    monkeypatch.setattr(markdown, "MAX_FILE_BYTES", 1_000)
    kept = memory(tmp_path, "directory")
    kept.capture("decisions", "Eat.", "")
    section = tmp_path / "memory" / "decisions.md"
    section.write_text(text := "é" * 600 + "\n" + section.read_text())

    with pytest.raises(SessionError, match=r"decisions\.md has more than 1,000 bytes"):
        kept.capture("decisions", "Sleep.", "")
    assert section.read_text() == text


def test_a_process_that_is_stopped_while_it_writes_does_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get an error after some time."""
    monkeypatch.setattr(markdown, "LOCK_TIMEOUT_S", 0.05)
    kept = memory(tmp_path, "directory")
    kept.capture("decisions", "Eat.", "")
    with (tmp_path / "memory" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SessionError, match="another process"):
            kept.capture("decisions", "Sleep.", "")
    kept.capture("decisions", "Sleep.", "")
    assert len(kept.list_entries("decisions")) == 2


def test_what_a_killed_writer_has_left_is_no_part_of_the_memory(tmp_path: Path) -> None:
    """And it does not stay: the next writer overwrites it."""
    kept = memory(tmp_path, "directory")
    kept.capture("decisions", "Eat.", "")
    before = sorted(path.name for path in (tmp_path / "memory").iterdir())
    (tmp_path / "memory" / ".decisions.md.new").write_text("### half")

    kept.capture("decisions", "Sleep.", "")

    assert [entry["rule"] for entry in kept.list_entries("decisions")] == ["Eat.", "Sleep."]
    assert sorted(path.name for path in (tmp_path / "memory").iterdir()) == before


@STORES
async def test_what_is_remembered_has_no_hidden_characters(tmp_path: Path, store: str) -> None:
    """A terminal that shows the file would execute them, and people would not see what models read."""
    run = FakeRun(
        state={base.PENDING_WRITES: [{**NOTE, "rule": "a\x1b]52;c;eA==\x07b\u202ec\U000e0041\ud800"}]}
    )
    kept = memory(tmp_path, store)
    await kept.writeback(run)

    (entry,) = kept.list_entries("decisions", run)
    assert entry["rule"] == "a\\x1b]52;c;eA==\\x07b\\u202ec\\U000e0041\\ud800"


def test_a_section_has_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its oldest entries make room, and what people have written stays."""
    monkeypatch.setattr(entries, "MAX_SECTION_CHARS", 1_000)
    section = "by hand\n"
    for number in range(40):
        entry = MemoryEntry(f"id{number}", "2026-05-16T10:00:00+00:00", f"rule {number}", "y" * 20)
        section = added(section, entry, most=100)

        assert len(section) <= 1_000
        assert section.startswith("by hand\n")
    kept = [entry.rule for entry in entries_in(section)]
    assert kept == [f"rule {number}" for number in range(40 - len(kept), 40)]
    assert len(kept) > 8


@pytest.mark.parametrize(
    ("state", "names"),
    [({"markdown_memory": ["mine"]}, "markdown_memory"), ({base.PENDING_WRITES: "x"}, base.PENDING_WRITES)],
)
async def test_a_state_key_that_something_else_uses_is_a_coded_error(
    state: dict[str, Any], names: str
) -> None:
    """The memory does not overwrite what it has not written."""
    use = MarkdownMemory().inject if names == "markdown_memory" else MarkdownMemory().writeback
    with pytest.raises(SessionError, match=names):
        await use(FakeRun(state=state))


def test_without_a_run_there_is_no_session(tmp_path: Path) -> None:
    """The error says which store works without one."""
    with pytest.raises(SessionError) as caught:
        memory(tmp_path, "session").capture("decisions", "Eat.", "")
    assert "directory" in str(caught.value.hint)


@pytest.mark.parametrize(
    "config", [{"sections": []}, {"sections": ["../escape"]}, {"store": "disk"}, {"max_chars_per_section": 0}]
)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any]) -> None:
    """A section is the name of a file, so it has no path."""
    with pytest.raises(PluginConfigError):
        MarkdownMemory(config)


# --- the text --------------------------------------------------------------------------------------------

LINES = st.text(min_size=1, max_size=60).filter(lambda text: bool(one_line(text)))


@given(st.lists(st.tuples(LINES, st.text(max_size=60)), max_size=12))
def test_whatever_is_remembered_is_read_again(notes: list[tuple[str, str]]) -> None:
    """A text that looks like a heading or a field changes nothing."""
    section = "by hand\n"
    for number, (rule, reason) in enumerate(notes):
        entry = MemoryEntry(f"id{number}", "2026-05-16T10:00:00+00:00", one_line(rule), one_line(reason))
        section = added(section, entry, most=100)

    assert [entry.rule for entry in entries_in(section)] == [one_line(rule).strip() for rule, _ in notes]
    for number in range(len(notes)):
        section = without(section, f"id{number}")
    assert section == "by hand\n"


# --- the tool --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"rule": " "}, {"rule": "x" * 2_001}, {"rule": "x", "other": 1}])
async def test_a_model_cannot_remember_nothing_or_too_much(params: dict[str, Any]) -> None:
    """The error tells the model what is wrong."""
    with pytest.raises(ToolValidationError):
        await BUILTIN_TOOLS["remember_preference"]().invoke(params, FakeRun())


async def test_a_run_remembers_a_limited_number_of_things() -> None:
    """A model in a loop does not fill the session."""
    run, tool = FakeRun(), BUILTIN_TOOLS["remember_preference"]()
    for number in range(remember.MAX_PENDING):
        assert await tool.invoke({"rule": str(number)}, run) == {"queued": True, "count": number + 1}

    with pytest.raises(ToolValidationError, match="100"):
        await tool.invoke({"rule": "one more"}, run)


def test_tool_and_memory_mean_the_same_key() -> None:
    """They do not import each other."""
    assert remember.PENDING_WRITES == base.PENDING_WRITES
