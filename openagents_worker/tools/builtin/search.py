"""File search, as a program of its own: `python search.py` reads a query from stdin and prints the matches.

A pattern that a model wrote may take Python's `re` for ever, and it holds the interpreter while it does. In a
process of its own it can be killed, and no other run notices. It imports nothing but the standard library
and is started in isolated mode with an empty environment.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_VISITED = 100_000  # files and folders looked at, so that a search from / ends
MAX_LINE_CHARS = 500
BINARY_PROBE_BYTES = 8192


def walk(top: Path) -> Iterator[os.DirEntry[str]]:
    """All entries below a folder, names in order, parents first; links are named and never followed."""
    visited = 0
    folders = [str(top)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # not allowed to look, or gone meanwhile: as `grep -s` and `find` do
            continue
        for entry in found:
            visited += 1
            if visited > MAX_VISITED:
                return
            yield entry
        folders += [entry.path for entry in reversed(found) if entry.is_dir(follow_symlinks=False)]


def search(query: dict[str, Any]) -> dict[str, Any]:
    """`{"pattern", "path", "case_sensitive", "glob", "max_bytes", "max_matches"}` to matches or an error.

    Paths in the answer are relative to `path`, lines count from 1. Files over `max_bytes` and files with a
    NUL byte in their beginning are passed over and counted.
    """
    try:
        pattern = re.compile(query["pattern"], 0 if query["case_sensitive"] else re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        return {"error": f"no regular expression: {error}"}
    top = Path(query["path"])
    matches: list[dict[str, Any]] = []
    skipped = 0
    for path in _files(top, query["glob"]):
        text = _text(path, query["max_bytes"])
        if text is None:
            skipped += 1
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if pattern.search(line) is None:
                continue
            if len(matches) == query["max_matches"]:
                return {"matches": matches, "skipped": skipped, "truncated": True}
            shown = path.name if path == top else str(path.relative_to(top))
            matches.append({"path": shown, "line": number, "text": line.rstrip("\r")[:MAX_LINE_CHARS]})
    return {"matches": matches, "skipped": skipped, "truncated": False}


def _files(top: Path, glob: str) -> Iterator[Path]:
    if not top.is_dir():
        yield top
        return
    for entry in walk(top):
        if entry.is_file(follow_symlinks=False) and fnmatch.fnmatchcase(entry.name, glob):
            yield Path(entry.path)


def _text(path: Path, max_bytes: int) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            return None
        with path.open("rb") as file:
            content = file.read(max_bytes)
    except OSError:
        return None
    return None if b"\0" in content[:BINARY_PROBE_BYTES] else content.decode("utf-8", errors="replace")


if __name__ == "__main__":
    json.dump(search(json.load(sys.stdin)), sys.stdout)
