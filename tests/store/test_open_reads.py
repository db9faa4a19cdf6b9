"""Open reads: a key without a size limit is never read with one command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import openagents_worker
from tests.docs.blocks import ROOT

PACKAGE = Path(openagents_worker.__file__).parent
WHOLE = "HGETALL|HKEYS|HVALS|SMEMBERS|SUNION|SINTER|SDIFF|SORT|KEYS"
RANGES = "ZREVRANGEBYSCORE|ZRANGEBYSCORE|ZREVRANGEBYLEX|ZRANGEBYLEX|ZREVRANGE|ZRANGE|LRANGE|XREVRANGE|XRANGE"
LUA = re.compile(rf"redis\.p?call\('({WHOLE}|{RANGES}|SCAN|HSCAN|SSCAN|ZSCAN)',")
PYTHON = re.compile(
    rf"\b(?:r|redis|client|pipe|pipeline)\.({WHOLE}|{RANGES}|[HSZ]?SCAN(?:_ITER)?)\(", re.IGNORECASE
)
ONE_PAGE = {"BYSCORE": ("'LIMIT'", "num="), "XR": ("'COUNT'", "count"), "SCAN": ("count=", "'COUNT'")}
KINDS = {
    ("store/lua/claim.lua", "keys.state"): ["session_state"],
    ("store/lua/claim.lua", "keys.facts"): ["facts"],
    ("store/lua/lib/deaths.lua", "key"): ["workers", "lost_leases"],
    ("store/sessions.py", "key"): ["session_state"],
}
"""The kinds of key that a variable stands for where one is read whole."""


def _arguments(text: str, begin: int) -> str:
    """The text in the parentheses that begin here."""
    depth = 1
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    raise AssertionError("a parenthesis is not closed")


def _is_open(command: str, arguments: str) -> bool:
    """Whether the command reads the whole key, whatever its size."""
    bounds = next((words for part, words in ONE_PAGE.items() if part in command), None)
    if bounds is not None:
        return not any(word in arguments for word in bounds)
    if command in WHOLE.split("|"):
        return True
    return bool(re.search(r"\b0,\s*-1\b", arguments))


def _open_reads() -> Iterator[tuple[str, str, str]]:
    """Kind of key, file and command of each open read."""
    for path in sorted([*PACKAGE.rglob("*.lua"), *PACKAGE.rglob("*.py")]):
        text, name = path.read_text("utf-8"), path.relative_to(PACKAGE).as_posix()
        text = text.replace("'('", "'<'")  # the exclusive end of a range
        if path.suffix == ".py":
            text = re.sub(r"`[^`\n]*`", "", text)  # an example in a docstring
        for found in (LUA if path.suffix == ".lua" else PYTHON).finditer(text):
            command, arguments = found[1].upper(), _arguments(text, found.end())
            if _is_open(command, arguments):
                yield from ((kind, name, command) for kind in _kinds(name, arguments))


def _kinds(name: str, arguments: str) -> list[str]:
    said = re.match(r"""\s*(?:k\.(\w+)\(|[\w.]*\bkeys\("(\w+)")""", arguments)
    if said:
        return [said[1] or said[2]]
    variable = re.match(r"\s*([\w.]+)", arguments)
    return KINDS.get((name, variable[1] if variable else ""), [f"an unknown key: {arguments[:60]}"])


def test_every_open_read_is_in_the_table_of_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit of its size. Everything else is read in pages; an entry that is not needed is
    deleted."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from door_limits import OPEN_READS

    listed = {(kind, *read) for kind, (_, reads) in OPEN_READS.items() for read in reads}

    assert sorted(set(_open_reads())) == sorted(listed)


def test_an_open_read_is_recognised() -> None:
    """In each form in which a command reads everything, but not if it reads a page."""
    everything = [
        ("HGETALL", "k.x()"),
        ("ZRANGE", "key, 0, -1"),
        ("LRANGE", "key, 0, -1, more"),
        ("ZRANGEBYSCORE", "key, '-inf', '+inf'"),
        ("XRANGE", "key, '-', '+'"),
        ("SCAN", "0, match=pattern"),
    ]
    pages = [
        ("ZRANGE", "key, -1, -1"),
        ("ZRANGE", "key, 0, limit - 1"),
        ("LRANGE", "key, -LOOK_AT, -1"),
        ("ZRANGEBYSCORE", "key, '-inf', '+inf', 'LIMIT', 0, 1"),
        ("XREVRANGE", "key, '+', '-', 'COUNT', 1"),
        ("SCAN", "at, count=SCAN_COUNT"),
    ]

    assert [each for each in everything if not _is_open(*each)] == []
    assert [each for each in pages if _is_open(*each)] == []
