"""Files: `read_file`, `write_file`, `list_files`, `delete_file`, `grep_files`.

With `root` set, every path is resolved inside it, links included, and what leads outside is refused. Whatever
lies at a path with a name that begins with a dot, or at one that a glob in `deny` matches, is not there for
them: it is not read, written, deleted, listed or searched, by whatever spelling or link it is asked for.

It is a fence for what a model asks, not a sandbox against another program that swaps folders for links
meanwhile. It goes by names: a hard link to a hidden file, under a name that is not hidden, is another file.
"""

from __future__ import annotations

import asyncio
import codecs
import fnmatch
import io
import json
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolError, ToolValidationError
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.builtin import search
from openagents_worker.tools.typed import TypedTool

__all__ = ["DeleteFile", "GrepFiles", "ListFiles", "ReadFile", "WriteFile"]

MAX_ENTRIES = 1000
MAX_PATH_CHARS = 4_096  # the longest path that Linux opens; a longer one takes seconds to be resolved
MAX_GLOB_CHARS = 1_000
MAX_MATCHES = 100
MAX_SEARCHED_BYTES = 5_000_000  # larger files are logs and data; a search through them helps no model
PIECE_BYTES = 65_536
READS = ToolExecutionSpec(concurrency_safe=True, side_effects="none", reads_files=True)
WRITES = ToolExecutionSpec(side_effects="files", writes_files=True)


class _FileTool(TypedTool):
    """What the file tools share: the fence around `root` and errors in the reader's words."""

    class Config(TypedTool.Config):
        root: str | None = Field(
            None,
            description="All paths are inside this folder, which is created if missing. None: no limit.",
        )
        allow_hidden: bool = Field(
            False, description="Whether files and folders whose names begin with a dot are visible."
        )
        deny: list[str] = Field(
            [],
            description="Globs of hidden files: `*.pem` anywhere, `config/secrets` below root.",
        )
        max_bytes: int = Field(
            200_000, ge=1, description="Largest number of bytes that one call reads or writes."
        )

    @property
    def root(self) -> Path:
        return Path(self.cfg.root or ".").resolve()

    @property
    def fence(self) -> search.AllowedPaths:
        return search.AllowedPaths(str(self.root), allow_hidden=self.cfg.allow_hidden, deny=self.cfg.deny)

    def _make_root(self) -> None:
        if self.cfg.root is not None:
            with suppress(OSError):  # whoever looks for something in it is told that it does not exist
                self.root.mkdir(parents=True, exist_ok=True)

    def resolved(self, path: str, *, follow: bool = True) -> Path:
        """The absolute place of a path that may be used; without `follow` a link stands for itself, not for
        its target. With `follow`, both the link and its target are looked at."""
        if len(path) > MAX_PATH_CHARS:
            raise ToolValidationError(
                f"path: it has {len(path):,} characters; {MAX_PATH_CHARS:,} are allowed", self.name
            )
        self._make_root()
        try:
            asked = self._asked(path)
            target = asked.resolve()
            named = asked.parent.resolve() / asked.name if asked.name not in ("", "..") else target
        except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, names too long, links in a circle
            raise ToolValidationError(f"path: {path[:200]!r} is no usable path: {error}", self.name) from None
        place = target if follow else named
        if self.cfg.root is not None and not place.is_relative_to(self.root):
            raise ToolValidationError(
                f"path: {path[:200]!r} is outside of root",
                self.name,
                hint="give a path relative to the root folder",
            )
        for seen in {named, place}:
            if (problem := self.fence.problem(str(seen))) is not None:
                raise _not_to_be_seen(path, problem, self.name)
        return place

    def _asked(self, path: str) -> Path:
        """Each path in one spelling, as the fence compares names; also as `list_files` has shown it."""
        asked = self.root / os.fsdecode(os.fsencode(path))
        shown_so = self.root / search.meant(path)
        return shown_so if not os.path.lexists(asked) and os.path.lexists(shown_so) else asked

    @contextmanager
    def told(self, path: str) -> Iterator[None]:
        """Turns what the system says of a path into an error a model can act on."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise PermanentToolError(f"{path} does not exist", self.name) from None
        except IsADirectoryError:
            raise PermanentToolError(
                f"{path} is a folder", self.name, hint="list_files shows what is in it"
            ) from None
        except PermissionError:
            raise PermanentToolError(f"{path}: permission denied", self.name) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ToolError(f"{path}: {reason}", self.name) from error

    def require_regular(self, file: BinaryIO, path: str) -> int:
        """The size of an open file; refuses pipes and devices, which may never end."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PermanentToolError(f"{path} is no regular file", self.name)
        return status.st_size


class ReadFile(_FileTool):
    name = "read_file"
    description = (
        "Reads a text file, whole or some of its lines. Long files come truncated; read on with `offset`."
    )
    spec = READS

    class Params(TypedTool.Params):
        path: str = Field(min_length=1, description="The file.")
        offset: int = Field(0, ge=0, description="How many lines to skip first.")
        limit: int | None = Field(None, ge=1, description="How many lines to read at most.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._read, args)

    def _read(self, args: Params) -> dict[str, Any]:
        place = self.resolved(args.path)
        with self.told(args.path), open(place, "rb", opener=_never_waiting) as file:
            size = self.require_regular(file, args.path)
            _skip_lines(file, args.offset)
            content = file.read(self.cfg.max_bytes)
            rest = file.read(1)
        if args.limit is not None:
            lines = io.BytesIO(content).readlines()
            content, rest = b"".join(lines[: args.limit]), b"".join(lines[args.limit :]) or rest
        if b"\0" in content:
            raise PermanentToolError(f"{args.path} is no text file", self.name)
        # Cut in the middle of a character, the decoder keeps the piece to itself instead of a question mark.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(content, final=not rest)
        return {"path": args.path, "content": text, "bytes": size, "truncated": bool(rest)}


class WriteFile(_FileTool):
    name = "write_file"
    description = "Writes a text file, replacing it (`w`, all or nothing) or adding to its end (`a`)."
    spec = WRITES
    durable_idempotent = False

    class Params(TypedTool.Params):
        path: str = Field(min_length=1, description="The file; missing folders are made.")
        content: str = Field(description="The text to write.")
        mode: Literal["w", "a"] = Field("w", description="`w` replaces the file, `a` appends to it.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._write, args)

    def _write(self, args: Params) -> dict[str, Any]:
        content = args.content.encode("utf-8", errors="replace")
        if len(content) > self.cfg.max_bytes:
            raise ToolValidationError(
                f"content: {len(content):,} bytes, at most {self.cfg.max_bytes:,} are allowed",
                self.name,
                hint="write the beginning, then add the rest with mode 'a'",
            )
        place = self.resolved(args.path)
        with self.told(args.path):
            if place.exists() and not (place.is_file() or place.is_dir()):
                raise PermanentToolError(f"{args.path} is no regular file", self.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if args.mode == "w":
                _replace(place, content)
            else:
                with open(place, "ab", opener=_never_waiting) as file:
                    self.require_regular(file, args.path)
                    file.write(content)
        return {"path": args.path, "bytes": len(content)}


class ListFiles(_FileTool):
    name = "list_files"
    description = f"Lists files and folders, sorted by path, at most {MAX_ENTRIES}."
    spec = READS

    class Params(TypedTool.Params):
        path: str = Field(".", min_length=1, description="The folder.")
        pattern: str = Field(
            "*", description="A glob over names, for example `*.py`; with `/` over whole paths."
        )
        recursive: bool = Field(False, description="Whether to look into folders as well.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._list, args)

    def _list(self, args: Params) -> dict[str, Any]:
        if len(args.pattern) > MAX_GLOB_CHARS:
            raise ToolValidationError(
                f"pattern: it has {len(args.pattern):,} characters; {MAX_GLOB_CHARS:,} are allowed", self.name
            )
        top = self.resolved(args.path)
        with self.told(args.path):
            if not stat.S_ISDIR(top.stat().st_mode):
                raise PermanentToolError(f"{args.path} is no folder", self.name)
        found: list[dict[str, str]] = []
        fence = self.fence
        for entry in search.walk(top, fence) if args.recursive else _sorted_entries(top, fence):
            shown = search.shown(Path(entry.path).relative_to(top).as_posix())
            name = shown if "/" in args.pattern else search.shown(entry.name)
            if not fnmatch.fnmatchcase(name, args.pattern):
                continue
            if len(found) == MAX_ENTRIES:
                return {"path": args.path, "entries": _by_path(found), "truncated": True}
            found.append({"path": shown, "type": _type(entry)})
        return {"path": args.path, "entries": _by_path(found), "truncated": False}


class DeleteFile(_FileTool):
    name = "delete_file"
    description = "Deletes a file, or a folder with everything in it when `recursive` is true."
    spec = WRITES
    durable_idempotent = False

    class Params(TypedTool.Params):
        path: str = Field(min_length=1, description="The file or folder; of a link only the link is deleted.")
        recursive: bool = Field(False, description="Must be true to delete a folder.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._delete, args)

    def _delete(self, args: Params) -> dict[str, Any]:
        place = self.resolved(args.path, follow=False)
        if self.root.is_relative_to(place):
            raise ToolValidationError(f"path: {args.path!r} is the root folder or above it", self.name)
        with self.told(args.path):
            if not stat.S_ISDIR(place.lstat().st_mode):
                place.unlink()
            elif args.recursive:
                self._check_all_may_go(place, args.path)
                shutil.rmtree(place)
            else:
                raise PermanentToolError(
                    f"{args.path} is a folder", self.name, hint="set recursive to true to delete all of it"
                )
        return {"path": args.path, "deleted": True}

    def _check_all_may_go(self, folder: Path, path: str) -> None:
        """A folder does not take along what this tool may not see."""
        fence = self.fence
        for above, folders, files in os.walk(folder):
            for name in (*folders, *files):
                if (problem := fence.problem(f"{above}{os.sep}{name}")) is not None:
                    raise PermanentToolError(
                        f"{path} holds something that {problem}",
                        self.name,
                        hint="delete the files in it that list_files shows",
                    )


class GrepFiles(_FileTool):
    name = "grep_files"
    description = (
        f"Searches text files for a regular expression and gives the first {MAX_MATCHES} matching lines."
    )
    spec = READS

    class Config(_FileTool.Config):
        timeout_ms: int = Field(10_000, ge=1, description="Timeout of a search in milliseconds.")

    class Params(TypedTool.Params):
        pattern: str = Field(
            min_length=1, max_length=1000, description="A regular expression (Python's syntax)."
        )
        path: str = Field(
            ".", min_length=1, description="The file, or the folder to search with all below it."
        )
        case_sensitive: bool = Field(True, description="Whether upper and lower case differ.")
        file_type: str | None = Field(None, description="Only files with this ending, for example `py`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        top = await asyncio.to_thread(self.resolved, args.path)
        with self.told(args.path):
            await asyncio.to_thread(top.stat)
        query = {
            "pattern": args.pattern,
            "path": str(top),
            "case_sensitive": args.case_sensitive,
            "glob": f"*.{_literal(args.file_type.removeprefix('.'))}" if args.file_type else "*",
            "max_bytes": MAX_SEARCHED_BYTES,
            "max_matches": MAX_MATCHES,
            "fence": self.fence.to_json(),
        }
        answer = await self._search(query)
        if "error" in answer:
            raise ToolValidationError(f"pattern: {answer['error']}", self.name)
        return answer

    async def _search(self, query: dict[str, Any]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", search.__file__,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={},  # a secret of the worker has no business there
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.cfg.timeout_ms / 1000):
                output, _ = await process.communicate(json.dumps(query).encode())
        except TimeoutError:
            raise PermanentToolError(
                f"the search took longer than {self.cfg.timeout_ms} ms",
                self.name,
                hint="use a simpler pattern or search a smaller folder",
            ) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it ended in this very moment
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise ToolError(f"the search process ended with code {process.returncode}", self.name)
        answer: dict[str, Any] = json.loads(output)
        return answer


def _never_waiting(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe; a regular file does not notice."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _skip_lines(file: BinaryIO, count: int) -> None:
    while count:
        piece = file.readline(PIECE_BYTES)  # in pieces: a file may be one line of a gigabyte
        if not piece:
            return
        count -= piece.endswith(b"\n")


def _replace(place: Path, content: bytes) -> None:
    """Puts a file in place whole or not at all, on the disk before it has its name."""
    beside = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            if place.exists():
                shutil.copymode(place, beside)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def _sorted_entries(top: Path, fence: search.AllowedPaths) -> list[os.DirEntry[str]]:
    with os.scandir(top) as entries:
        seen = [entry for entry in entries if fence.problem(entry.path) is None]
    return sorted(seen, key=lambda entry: entry.name)


def _not_to_be_seen(path: str, problem: str, tool_name: str) -> ToolValidationError:
    return ToolValidationError(
        f"path: {path[:200]!r} {problem}",
        tool_name,
        hint="the agent's configuration keeps it from this tool; use other files",
    )


def _by_path(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(entries, key=lambda entry: entry["path"])


def _type(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir() else "file"


def _literal(text: str) -> str:
    """Text as a glob that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
