"""File search, as a program of its own: `python search.py` reads a query from stdin and prints the matches.

A pattern that a model wrote may take Python's `re` for ever, and it holds the interpreter while it does. In a
process of its own it can be killed, and no other run notices. It imports nothing but the standard library
and is started in isolated mode with an empty environment. Which files a tool may see is decided here, as the
search, too, needs to know it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_VISITED = 100_000  # files and folders looked at, so that a search from / ends
MAX_LINE_CHARS = 500
BINARY_PROBE_BYTES = 8192


class AllowedPaths:
    """Which paths the file tools may see: no name that begins with a dot, and none that a glob denies.

    A glob without `/` is compared with every name on the path (`*.pem`, `node_modules`), one with `/` with
    the path from the root and with each folder on it (`config/secrets`, `**/secrets`). Case and Unicode form
    make no difference: a file system may find `Keys` under the name `keys`.

    >>> AllowedPaths("/work", deny=["keys/*"]).problem("/work/Keys/a.pem")
    "is denied by 'keys/*'"
    >>> AllowedPaths("/work").problem("/work/.git/config"), AllowedPaths("/work").problem("/work/a.txt")
    ('is hidden', None)
    """

    def __init__(self, root: str, *, allow_hidden: bool = False, deny: Sequence[str] = ()) -> None:
        """`root` is resolved; of a path outside of it, where that is allowed, all names are looked at."""
        self.root = root
        self.allow_hidden = allow_hidden
        self.deny = tuple(deny)
        self._globs = [(glob, each) for each in self.deny for glob in _globs(each)]

    def problem(self, path: str) -> str | None:
        """Why a tool may not touch this path, which is resolved; None where it may."""
        names = _names(path, self.root)
        if not self.allow_hidden and any(name.startswith(".") for name in names):
            return "is hidden"
        folders = ["/".join(names[: count + 1]) for count in range(len(names))]
        for glob, written in self._globs:
            if any(fnmatch.fnmatchcase(part, glob) for part in (folders if "/" in glob else names)):
                return f"is denied by {written!r}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {"root": self.root, "allow_hidden": self.allow_hidden, "deny": list(self.deny)}


def _names(path: str, root: str) -> list[str]:
    """The names on a path from the root on; all of them for one outside of it."""
    within = path == root or path.startswith(root.rstrip(os.sep) + os.sep)
    parts = Path(path[len(root) :] if within else path).parts
    return [_folded(name) for name in parts if name != os.sep]


def _globs(written: str) -> Iterator[str]:
    """The globs that a written one stands for: `**/x` is also an `x` at the top."""
    glob = _folded(written).removeprefix("./").strip("/")
    yield glob
    while glob.startswith("**/"):
        glob = glob.removeprefix("**/")
        yield glob


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")


def shown(path: str) -> str:
    """A path as text that can be stored and sent: a byte of a name that is not UTF-8 becomes `\\xff`.

    >>> shown("caf\\udce9.txt")
    'caf\\\\xe9.txt'
    """
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def meant(path: str) -> str:
    """The path that `shown` has shown so; for one with no such byte the path itself."""
    bytes_again = _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)), path)
    return os.fsdecode(os.fsencode(bytes_again))  # bytes that are UTF-8 after all have one way to be written


def walk(top: Path, fence: AllowedPaths) -> Iterator[os.DirEntry[str]]:
    """All entries below a folder that may be seen, names in order, parents first; links are named and never
    followed."""
    visited = 0
    folders = [str(top)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                seen = [entry for entry in entries if fence.problem(entry.path) is None]
        except OSError:  # not allowed to look, or gone meanwhile: as `grep -s` and `find` do
            continue
        found = sorted(seen, key=lambda entry: entry.name)
        for entry in found:
            visited += 1
            if visited > MAX_VISITED:
                return
            yield entry
        folders += [entry.path for entry in reversed(found) if entry.is_dir(follow_symlinks=False)]


def search(query: dict[str, Any]) -> dict[str, Any]:
    """`{"pattern", "path", "case_sensitive", "glob", "max_bytes", "max_matches", "fence"}` to matches or an
    error.

    Paths in the answer are relative to `path`, lines count from 1. Files over `max_bytes` and files with a
    NUL byte in their beginning are passed over and counted.
    """
    try:
        pattern = re.compile(query["pattern"], 0 if query["case_sensitive"] else re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        return {"error": f"no regular expression: {error}"}
    top, fence = Path(query["path"]), AllowedPaths(**query["fence"])
    matches: list[dict[str, Any]] = []
    skipped = 0
    for path in _files(top, query["glob"], fence):
        text = _text(path, query["max_bytes"])
        if text is None:
            skipped += 1
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if pattern.search(line) is None:
                continue
            if len(matches) == query["max_matches"]:
                return {"matches": matches, "skipped": skipped, "truncated": True}
            name = path.name if path == top else str(path.relative_to(top))
            matches.append({"path": shown(name), "line": number, "text": line.rstrip("\r")[:MAX_LINE_CHARS]})
    return {"matches": matches, "skipped": skipped, "truncated": False}


def _files(top: Path, glob: str, fence: AllowedPaths) -> Iterator[Path]:
    if not top.is_dir():
        yield top
        return
    for entry in walk(top, fence):
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
