"""Entries in Markdown: the only place that knows the format of `markdown_memory`.

A section is a text with one block for each entry, the oldest first:

    ### 1f0c9a2b · 2026-05-16T10:00:00+00:00
    **Rule:** Answers are short.
    **Why:** The user said so.

Text between the blocks, which somebody may have written by hand, is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from openagents_worker.printable import printable

__all__ = ["MAX_TEXT_CHARS", "MemoryEntry", "added", "entries_in", "newest_within", "one_line", "without"]

MAX_TEXT_CHARS = 2_000  # of a rule, and of its reason
MAX_SECTION_CHARS = 1_000_000
"""A section is read as a whole by each run, so its oldest entries make room before it is larger."""
NO_REASON = "(no reason given)"
_HEADING = re.compile(r"### (?P<id>[\w-]+) · (?P<timestamp>[\dTZ:+\-.]+)[ \t]*")
_RULE, _WHY = "**Rule:** ", "**Why:** "


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """Something that is remembered. `timestamp` is ISO 8601, UTC."""

    id: str
    timestamp: str
    rule: str
    reason: str

    def as_view(self) -> dict[str, str]:
        """The entry as the memory view shows it."""
        return asdict(self)

    def to_markdown(self) -> str:
        return f"### {self.id} · {self.timestamp}\n{_RULE}{self.rule}\n{_WHY}{self.reason or NO_REASON}\n\n"

    @property
    def size(self) -> int:
        return len(self.rule) + len(self.reason)


def one_line(text: Any) -> str:
    """A text as it stands in a block: one line, not too long, without hidden characters.

    >>> one_line("short\\n### answers"), one_line("a\\x1b[2Jb")
    ('short ### answers', 'a\\\\x1b[2Jb')
    """
    return printable(" ".join(str(text).split()))[:MAX_TEXT_CHARS]


def entries_in(section: str) -> list[MemoryEntry]:
    """The entries of a section, the oldest first. Blocks that are not complete are left out."""
    return [entry for _, _, entry in _blocks(section)]


def added(section: str, entry: MemoryEntry, *, most: int) -> str:
    """The section with one more entry, and without the oldest ones if there are more than `most`, or if it
    would have more than `MAX_SECTION_CHARS`.

    Unchanged if it already has an entry with this id: an interrupted write is repeated.
    """
    blocks = _blocks(section)
    if any(known.id == entry.id for _, _, known in blocks):
        return section
    dropped = max(0, len(blocks) + 1 - most)
    too_many = len(section) + len(entry.to_markdown()) - MAX_SECTION_CHARS
    too_many -= sum(end - begin for begin, end, _ in blocks[:dropped])
    while too_many > 0 and dropped < len(blocks):
        begin, end, _ = blocks[dropped]
        too_many -= end - begin
        dropped += 1
    for begin, end, _ in reversed(blocks[:dropped]):
        section = section[:begin] + section[end:]
    if section and not section.endswith("\n"):
        section += "\n"
    return section + entry.to_markdown()


def without(section: str, entry_id: str) -> str:
    """The section without the entry with this id."""
    for begin, end, entry in reversed(_blocks(section)):
        if entry.id == entry_id:
            section = section[:begin] + section[end:]
    return section


def newest_within(entries: list[MemoryEntry], max_chars: int) -> list[MemoryEntry]:
    """The newest entries that have at most so many characters together, but at least one."""
    kept: list[MemoryEntry] = []
    for entry in reversed(entries):
        max_chars -= entry.size
        if max_chars < 0 and kept:
            break
        kept.append(entry)
    return kept[::-1]


def _blocks(section: str) -> list[tuple[int, int, MemoryEntry]]:
    """Begin, end and entry of each block."""
    lines = section.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    blocks = []
    for at, line in enumerate(lines):
        heading = _HEADING.fullmatch(line)
        rule, why = (*lines[at + 1 : at + 3], "", "")[:2]
        if heading and rule.startswith(_RULE) and why.startswith(_WHY):
            end = at + 3
            if end < len(lines) - 1 and not lines[end]:
                end += 1  # the empty line behind the block
            fields: Mapping[str, str] = heading.groupdict()
            entry = MemoryEntry(**fields, rule=rule[len(_RULE) :].strip(), reason=why[len(_WHY) :].strip())
            blocks.append((starts[at], min(starts[end], len(section)), entry))
    return blocks
