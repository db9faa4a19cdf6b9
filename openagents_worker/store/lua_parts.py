"""Lua parts: the only place that finds out which functions of its libraries a script uses.

A script contains only these. Redis creates every function of a script again in each call, so the others would
cost time in each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

__all__ = ["LuaPart", "reachable_parts", "without_unused"]

_START = re.compile(r"\n(?=(?!end$)\S)", re.MULTILINE)
_NAMES = re.compile(r"local (?:function )?(\w+(?:, \w+)*)")
_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'")
_WORD = re.compile(r"(?<![^.]\.)\b[A-Za-z_]\w*")  # not the name of a field: `run.queue`


@dataclass(frozen=True, slots=True)
class LuaPart:
    """A definition or a statement at the top level of a script.

    It ends before the next unindented line. The comments above a definition belong to it.
    """

    text: str
    code: str
    """The text without its comments."""
    defines: frozenset[str]
    """The names that it defines, if it does nothing else: a local function, or a constant."""
    uses: frozenset[str]
    """The words in it that may be such names."""


def reachable_parts(lua: str) -> list[LuaPart]:
    """The parts of a script in their order, without the definitions that no other part needs."""
    parts = _split(lua)
    needed: set[str] = set()
    kept: list[LuaPart] = []
    for part in reversed(parts):  # Lua knows a local name only below its definition
        if not part.defines or part.defines & needed:
            kept.append(part)
            needed |= part.uses
    return kept[::-1]


def without_unused(lua: str) -> str:
    """The script without the definitions that it does not need."""
    return "\n".join(part.text for part in reachable_parts(lua))


def _split(lua: str) -> list[LuaPart]:
    parts: list[LuaPart] = []
    comments = ""
    for text in _START.split(lua):
        if text.startswith("--") or not text.strip():
            comments += f"{text}\n"
        else:
            parts.append(_read(comments + text))
            comments = ""
    return parts


@cache  # most parts are functions of libraries, which many scripts include
def _read(text: str) -> LuaPart:
    code = "\n".join(line for each in text.splitlines() if (line := each.partition("--")[0].rstrip()))
    names = _NAMES.match(code)
    is_definition = names is not None and (code.startswith("local function ") or "(" not in code)
    words = frozenset(_WORD.findall(_TEXT.sub("''", code)))
    return LuaPart(
        text, code, frozenset(names[1].split(", ")) if names and is_definition else frozenset(), words
    )
