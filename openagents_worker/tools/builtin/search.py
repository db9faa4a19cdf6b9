"""File search in a separate process, and the rules which files a tool may see.

`python search.py` reads a query from stdin and prints the matches. A pattern that a model wrote may keep
Python's `re` busy forever, and `re` holds the GIL meanwhile. A separate process can be killed without
affecting other runs. It imports only the standard library, and is started in isolated mode with an empty
environment. The rules are in this module because the process needs them too.
"""

from __future__ import annotations

import codecs
import ctypes
import fnmatch
import json
import os
import re
import signal
import stat
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_VISITED = 100_000  # files and folders per search, so that a search from / ends
MAX_LINE_CHARS = 500
CHARS_BEFORE_MATCH = 100
MAX_ANY_FOLDERS = 4  # `**/` in one glob; in one with more, each stands for one folder at least
BINARY_PROBE_BYTES = 8192
PR_SET_PDEATHSIG = 1  # of prctl(2)


class AllowedPaths:
    """The paths that the file tools may see: no name that begins with a dot, and none that a glob denies.

    A glob without `/` is compared with every name on the path (`*.pem`, `node_modules`). A glob with `/` is
    compared with the path from the root and with each folder on it (`config/secrets`, `**/secrets`). Case and
    Unicode normalization are ignored, because a file system may find `Keys` under the name `keys`.

    >>> AllowedPaths("/work", deny=["keys/*"]).problem("/work/Keys/a.pem")
    "is denied by 'keys/*'"
    >>> paths = AllowedPaths("/work")
    >>> paths.problem("/work/.git/config"), paths.problem("/work/a.txt")
    ('is hidden', None)
    """

    def __init__(self, root: str, *, allow_hidden: bool = False, deny: Sequence[str] = ()) -> None:
        """`root` is a resolved path. For a path outside of it, all names from `/` on are checked."""
        self.root = root
        self.allow_hidden = allow_hidden
        self.deny = tuple(deny)
        self._globs = [(glob, each) for each in self.deny for glob in _globs(each)]

    def problem(self, path: str) -> str | None:
        """Why a tool may not access this resolved path; None if it may."""
        names = _names(path, self.root)
        if not self.allow_hidden and any(name.startswith(".") for name in names):
            return "is hidden"
        folders = ["/".join(names[: count + 1]) for count in range(len(names))]
        for glob, configured in self._globs:
            if any(fnmatch.fnmatchcase(part, glob) for part in (folders if "/" in glob else names)):
                return f"is denied by {configured!r}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {"root": self.root, "allow_hidden": self.allow_hidden, "deny": list(self.deny)}


def _names(path: str, root: str) -> list[str]:
    """The names on a path below the root; all names of a path outside of it."""
    within = path == root or path.startswith(root.rstrip(os.sep) + os.sep)
    parts = Path(path[len(root) :] if within else path).parts
    return [_normalized(name) for name in parts if name != os.sep]


def _globs(configured: str) -> Iterator[str]:
    return globs_of(_normalized(configured).removeprefix("./").strip("/"))


def globs_of(glob: str) -> Iterator[str]:
    """The globs for `fnmatch` that a glob stands for: `**/` also stands for no folder at all.

    >>> list(globs_of("src/**/*.py"))
    ['src/**/*.py', 'src/*.py']
    """
    before, stars, after = glob.partition("**/")
    if not stars or glob.count(stars) > MAX_ANY_FOLDERS:
        yield glob
        return
    for rest in globs_of(after):
        yield before + stars + rest
        yield before + rest


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")


def escape_path(path: str) -> str:
    """A path as text that can be stored and sent. Bytes that are not UTF-8 are escaped, for example `\\xff`.

    >>> escape_path("caf\\udce9.txt")
    'caf\\\\xe9.txt'
    """
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def unescape_path(path: str) -> str:
    """The inverse of `escape_path`: unescape bytes that are not UTF-8."""
    unescaped = _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)), path)
    return os.fsdecode(os.fsencode(unescaped))  # normalizes escaped bytes that are valid UTF-8 together


class Walk:
    """All visible entries below a folder, sorted by name, parents first. Links are listed, not followed.

    It ends after `MAX_VISITED` entries. Then `is_cut` is true.
    """

    def __init__(self, top: Path, allowed_paths: AllowedPaths) -> None:
        self.is_cut = False
        self._top = top
        self._allowed_paths = allowed_paths

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        visited = 0
        folders = [str(self._top)]
        while folders:
            found = sorted(self._entries(folders.pop()), key=lambda entry: entry.name)
            for entry in found:
                visited += 1
                if visited > MAX_VISITED:
                    self.is_cut = True
                    return
                yield entry
            folders += [entry.path for entry in reversed(found) if entry.is_dir(follow_symlinks=False)]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if self._allowed_paths.problem(entry.path) is None]
        except OSError:  # not readable, or deleted meanwhile: skipped, as `grep -s` does
            return []


def search(query: dict[str, Any]) -> dict[str, Any]:
    """Execute a query with the fields `pattern`, `path`, `case_sensitive`, `glob`, `max_bytes`, `max_matches`
    and `allowed_paths`.

    Returns `{"matches", "skipped", "truncated"}`, or `{"error"}` for an invalid pattern. Paths in matches are
    relative to `path`, lines count from 1. Files larger than `max_bytes` and files with a NUL byte near their
    beginning are skipped and counted. `truncated`: there are more matches, or more files than are searched.

    A line ends with `\\n` or `\\r\\n`. A pattern that names `\\r` finds it at the end of a line.
    """
    try:
        pattern = re.compile(query["pattern"], 0 if query["case_sensitive"] else re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        return {"error": f"no regular expression: {error}"}
    top, allowed_paths = Path(query["path"]), AllowedPaths(**query["allowed_paths"])
    ending = "" if names_cr(query["pattern"]) else "\r"
    matches: list[dict[str, Any]] = []
    skipped = 0
    walk = Walk(top, allowed_paths)
    for path in _searched_files(walk, top, query["glob"]):
        text = _read_text(path, query["max_bytes"])
        if text is None:
            skipped += 1
            continue
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
            if (found := pattern.search(line.removesuffix(ending))) is None:
                continue
            if len(matches) == query["max_matches"]:
                return {"matches": matches, "skipped": skipped, "truncated": True}
            name = path.name if path == top else str(path.relative_to(top))
            shown = shown_part(line.rstrip("\r"), *found.span())
            matches.append({"path": escape_path(name), "line": number, "text": shown})
    return {"matches": matches, "skipped": skipped, "truncated": walk.is_cut}


def shown_part(line: str, start: int, end: int) -> str:
    """What is shown of a line: its beginning, or the part around a match that is not in its beginning."""
    if end <= MAX_LINE_CHARS or start <= CHARS_BEFORE_MATCH:
        return line[:MAX_LINE_CHARS]
    begin = start - CHARS_BEFORE_MATCH
    return "\u2026" + line[begin : begin + MAX_LINE_CHARS - 1]


_NAMES_CR = re.compile(r"(?<!\\)(?:\\\\)*\\r|\r")


def names_cr(pattern: str) -> bool:
    """Whether a regular expression names the carriage return, which otherwise belongs to the end of a line.

    >>> names_cr(r";\\r$"), names_cr(r"C:\\\\run$")
    (True, False)
    """
    return _NAMES_CR.search(pattern) is not None


def _searched_files(walk: Walk, top: Path, glob: str) -> Iterator[Path]:
    if not top.is_dir():
        yield top
        return
    for entry in walk:
        if entry.is_file(follow_symlinks=False) and fnmatch.fnmatchcase(entry.name, glob):
            yield Path(entry.path)


def _read_text(path: Path, max_bytes: int) -> str | None:
    """The text of a file; None if it is skipped: not regular, too large, binary or unreadable."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            return None
        with path.open("rb") as file:
            content = file.read(max_bytes)
    except OSError:
        return None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # `rg` reads such a file, too
        return content.decode("utf-16", errors="replace")
    return None if b"\0" in content[:BINARY_PROBE_BYTES] else content.decode("utf-8-sig", errors="replace")


def _end_with_parent() -> None:
    """End this process when its parent dies: the worker cannot kill it then. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    _end_with_parent()
    asked = json.load(sys.stdin)
    if os.getppid() == asked.pop("parent_pid"):  # otherwise the worker had died before the line above
        json.dump(search(asked), sys.stdout)
