"""Blocks. The only place that finds the fenced blocks of the pages and of the docstrings."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks_of_docstrings", "blocks_of_pages", "blocks_of_text", "pages"]

ROOT = Path(__file__).parents[2]
GENERATED = ("bench/results",)
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>[^\s`]*)(?P<rest>.*)$")
_DIRECTIVE = re.compile(r"<!-- test: (?P<words>.*?) -->")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `line` is that of its first line of content, from 1."""

    page: str
    line: int
    language: str
    text: str
    directive: dict[str, str] = field(default_factory=dict)
    """What the HTML comment before the block says; `test_blocks.py` explains the words."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def first_line(self) -> str:
        return next((line for line in self.text.splitlines() if line.strip()), "")


def pages() -> list[Path]:
    """Every page that a reader of the repository finds."""
    found = [
        path for place in ("", "docs/**/", "examples/**/", "config/**/") for path in ROOT.glob(f"{place}*.md")
    ]
    return sorted(page for page in found if not str(page.relative_to(ROOT)).startswith(GENERATED))


def blocks_of_pages() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks_of_text(_name(page), page.read_text())]


def blocks_of_docstrings() -> list[Block]:
    """The blocks in the docstrings of the library."""
    files = sorted((ROOT / "openagents_worker").rglob("*.py"))
    return [block for file in files for block in _blocks_of_module(file)]


def blocks_of_text(page: str, text: str) -> Iterator[Block]:
    """The blocks of a text in Markdown. An opened fence that is not closed is an error."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == opened["fence"]), None)
        if end is None:
            raise AssertionError(f"{page}:{number + 1}: this fence is not closed")
        content = textwrap.dedent("\n".join(lines[number + 1 : end]) + "\n")
        yield Block(page, number + 2, opened["language"], content, _directive(page, lines, number))
        number = end + 1


def _directive(page: str, lines: list[str], fence: int) -> dict[str, str]:
    """`<!-- test: prelude=shop run -->` on the line before the fence, or with one empty line between."""
    for line in lines[max(0, fence - 2) : fence][::-1]:
        if found := _DIRECTIVE.fullmatch(line.strip()):
            pairs = (word.partition("=") for word in found["words"].split())
            return {name: value for name, _, value in pairs}
        if line.strip():
            break
    return {}


def _blocks_of_module(file: Path) -> Iterator[Block]:
    source = file.read_text()
    if "```" not in source:
        return  # parsing every module would take seconds
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None or "```" not in text:
            continue
        first = node.body[0].lineno - 1
        for block in blocks_of_text(_name(file), text):
            yield Block(block.page, first + block.line, block.language, block.text, block.directive)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))
