"""`markdown_memory`: the only place that stores what a tool or a pattern asks to remember, as Markdown.

By default the sections are a part of the session's state: they survive every worker, move with the session,
and are written by the end of the run. With `store: directory` they are files. Such a directory must be shared
by all workers, and serves all sessions.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, StringConstraints

from openagents_worker.errors import SessionError
from openagents_worker.memory.base import NOTED_BY, PENDING_WRITES, MemoryContext, MemoryPlugin
from openagents_worker.memory.entries import MemoryEntry, added, entries_in, newest_within, one_line, without

__all__ = ["MarkdownMemory"]

STATE_KEY = "markdown_memory"
DEFAULT_SECTION = "user_feedback"
DEFAULT_DIR = "~/.config/openagents/memory"
INDEX = "MEMORY.md"
MAX_FOUND = 20
MAX_FILE_BYTES = 4 * 1024 * 1024
LOCK_TIMEOUT_S = 10.0
LOCK_POLL_S = 0.02

Sections = Mapping[str, str]
"""Texts by the name of their section."""
SectionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ -]{0,63}$")]


class MarkdownMemory(MemoryPlugin):
    """Remembers rules with their reasons, in sections. The tool `remember_preference` adds to them.

    `capture`, `forget`, `list_entries` and `retrieve` are for code. Without a directory, they need the
    context of a run.
    """

    class Config(MemoryPlugin.Config):
        store: Literal["session", "directory"] = Field(
            "session",
            description="Where the sections are: in the state of the session, or in files in memory_dir.",
        )
        memory_dir: str = Field(
            DEFAULT_DIR,
            min_length=1,
            description="The directory of the files, shared by all workers. Only used with store: directory.",
        )
        max_chars_per_section: int = Field(
            2_000, ge=1, description="Characters of a section that a run sees: its newest entries."
        )
        max_entries_per_section: int = Field(
            1_000,
            ge=1,
            le=10_000,
            description="Number of entries that a section keeps, the newest. Fewer if it would have more "
            "than 1,000,000 characters.",
        )
        sections: list[SectionName] = Field(
            ["user_goals", "user_feedback", "decisions", "references"],
            min_length=1,
            max_length=50,
            description="The sections. An entry for another one goes to user_feedback, or to the first one.",
        )

    @property
    def external(self) -> bool:  # type: ignore[override]  # read only, and only here
        """Whether the sections are files."""
        return bool(self.cfg.store == "directory")

    # --- for the runtime ---------------------------------------------------------------------------------

    async def inject(self, context: MemoryContext) -> None:
        texts = await self._read(context)
        for section in self.cfg.sections:
            newest = newest_within(entries_in(texts.get(section, "")), self.cfg.max_chars_per_section)
            context.memory_view[section] = [entry.as_view() for entry in newest]

    async def writeback(self, context: MemoryContext) -> None:
        pending = context.state.get(PENDING_WRITES) or []
        if not isinstance(pending, list):
            raise _not_usable(PENDING_WRITES, pending, "a list", context)
        if not pending:
            return
        now = _now()
        entries = [
            (self._section_of(each.get("category")), _entry(each, now, _seed(each, context.run_id, at)))
            for at, each in enumerate(pending)
            if isinstance(each, Mapping) and one_line(each.get("rule", ""))
        ]
        await self._change(context, lambda texts: self._added(texts, entries))
        context.state.pop(PENDING_WRITES, None)

    async def retrieve(self, query: str, context: MemoryContext | None = None) -> list[dict[str, str]]:
        """The entries that contain a text, at most 20, with their section."""
        texts, wanted = await self._read(context), query.lower()
        found = [
            {**entry.as_view(), "section": section}
            for section in self.cfg.sections
            for entry in entries_in(texts.get(section, ""))
            if wanted in entry.rule.lower() or wanted in entry.reason.lower()
        ]
        return found[:MAX_FOUND]

    # --- for the application -----------------------------------------------------------------------------

    def capture(self, category: str, rule: str, reason: str, context: MemoryContext | None = None) -> str:
        """Add an entry; returns its id."""
        fields = {"rule": rule, "reason": reason}
        entry = _entry(fields, _now(), uuid.uuid4().hex)
        self._change_now(context, lambda texts: self._added(texts, [(self._section_of(category), entry)]))
        return entry.id

    def forget(self, entry_id: str, context: MemoryContext | None = None) -> bool:
        """Remove an entry. False if there is none with this id."""
        before: list[Sections] = []

        def remove(texts: Sections) -> Sections:
            before.append(texts)
            return {section: without(text, entry_id) for section, text in texts.items()}

        after = self._change_now(context, remove)
        return after != before[0]

    def list_entries(self, section: str, context: MemoryContext | None = None) -> list[dict[str, str]]:
        """All entries of a section, the oldest first."""
        return [entry.as_view() for entry in entries_in(self._read_now(context).get(section, ""))]

    # --- where the sections are --------------------------------------------------------------------------

    def _section_of(self, category: Any) -> str:
        sections: list[str] = self.cfg.sections
        if category in sections:
            return str(category)
        return DEFAULT_SECTION if DEFAULT_SECTION in sections else sections[0]

    def _added(self, texts: Sections, entries: list[tuple[str, MemoryEntry]]) -> Sections:
        after = dict(texts)
        for section, entry in entries:
            after[section] = added(after.get(section, ""), entry, most=self.cfg.max_entries_per_section)
        return after

    async def _read(self, context: MemoryContext | None) -> Sections:
        """The sections. Files are read in a thread."""
        if self.external:
            return await asyncio.to_thread(self._read_now, context)
        return self._read_now(context)

    async def _change(self, context: MemoryContext | None, change: Callable[[Sections], Sections]) -> None:
        if self.external:
            await asyncio.to_thread(self._change_now, context, change)
        else:
            self._change_now(context, change)

    def _read_now(self, context: MemoryContext | None) -> Sections:
        return self._files().read() if self.external else _sections_in(context)

    def _change_now(self, context: MemoryContext | None, change: Callable[[Sections], Sections]) -> Sections:
        """Replace the sections. Nobody else changes them meanwhile."""
        if self.external:
            return self._files().change(change)
        after = dict(change(_sections_in(context)))
        assert context is not None  # `_sections_in` has raised
        context.state[STATE_KEY] = after
        return after

    def _files(self) -> _Directory:
        return _Directory(Path(self.cfg.memory_dir).expanduser(), self.cfg.sections)


def _sections_in(context: MemoryContext | None) -> Sections:
    """The sections in the state of a session. Raises `SessionError` if other code uses the key."""
    if context is None:
        raise SessionError(
            "the memory is kept in the state of a session, and there is no run",
            hint="pass the context of a run, or set store to directory",
        )
    texts = context.state.get(STATE_KEY, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _not_usable(STATE_KEY, texts, "an object of texts", context)
    return texts


def _not_usable(key: str, found: Any, wanted: str, context: MemoryContext) -> SessionError:
    return SessionError(
        f"the session state has a {type(found).__name__} under {key!r}; it must be {wanted}",
        hint="other code uses this key",
        session_id=context.session_id,
    )


def _entry(fields: Mapping[str, Any], now: str, seed: str) -> MemoryEntry:
    """An entry. Its id follows from `seed` and text, so that a repeated write-back adds it once."""
    rule, reason = one_line(fields.get("rule", "")), one_line(fields.get("reason") or "")
    digest = hashlib.blake2b(f"{seed}\0{rule}".encode(errors="surrogatepass"), digest_size=4)
    return MemoryEntry(digest.hexdigest(), now, rule, reason)


def _seed(note: Mapping[str, Any], run_id: str, at: int) -> str:
    """What distinguishes a note from equal ones: the run that has noted it, and its place in the list. Notes
    that an earlier run has left are in front of those of this run, in their places."""
    return f"{note.get(NOTED_BY, run_id)} {at}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Directory:
    """Sections as files: one for each, and an index. One process at a time changes them."""

    def __init__(self, path: Path, sections: list[str]) -> None:
        self._path = path
        self._sections = sections

    def read(self) -> Sections:
        return {name: text for name in self._sections if (text := self._text(name))}

    def change(self, change: Callable[[Sections], Sections]) -> Sections:
        """Replace the files that `change` changes, while no other process can write. Returns all sections."""
        with self._locked():
            before = self.read()
            after = change(before)
            for name, text in after.items():
                if text != before.get(name, ""):
                    self._replace(f"{name}.md", text)
            self._replace(INDEX, self._index(after))
        return after

    def _text(self, name: str) -> str:
        """The text of a section. Raises `SessionError` if its file is too large: a part of it must not
        replace the whole."""
        path = self._path / f"{name}.md"
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return ""
        if len(content) > MAX_FILE_BYTES:
            raise SessionError(
                f"{path} has more than {MAX_FILE_BYTES:,} bytes", hint="shorten what was written by hand"
            )
        return content.decode(errors="replace").replace("\r\n", "\n")

    def _index(self, texts: Sections) -> str:
        lines = [f"- [{n}]({n}.md) — {len(entries_in(texts.get(n, '')))} entries" for n in self._sections]
        return "\n".join(["# Memory Index\n", *lines, ""])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Raises `SessionError` if another process does not let go: it may be stopped."""
        self._path.mkdir(parents=True, exist_ok=True)
        ends_at = time.monotonic() + LOCK_TIMEOUT_S
        with (self._path / ".lock").open("a") as lock:
            while not _has_locked(lock):
                if time.monotonic() >= ends_at:
                    raise SessionError(
                        f"another process has been writing to {self._path} for {LOCK_TIMEOUT_S:g} s",
                        hint="look for a process that is stopped or hangs, and has the file .lock open",
                    )
                time.sleep(LOCK_POLL_S)
            yield

    def _replace(self, name: str, text: str) -> None:
        """Write a file so that a reader sees the old text or the new one. Only the owner of the lock writes,
        so what a killed process has left is overwritten."""
        temporary = self._path / f".{name}.new"
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path / name)


def _has_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
