"""Files: `read_file`, `write_file`, `list_files`, `delete_file`, `grep_files`.

With `root` set, every path is resolved with its links, and a path outside of root is rejected. A file is
invisible if a name on its path begins with a dot, or if a glob in `deny` matches. The tools do not read,
write, delete, list or search invisible files, by no spelling of the path and through no link.

This restricts what a model requests. It is not a sandbox: it does not protect against another program that
replaces folders with links at the same time. It compares names: a hard link with a visible name to an
invisible file is visible.
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
MAX_PATH_CHARS = 4_096  # the longest path that Linux opens; resolving a longer one takes seconds
MAX_GLOB_CHARS = 1_000
MAX_MATCHES = 100
MAX_SEARCHED_BYTES = 5_000_000  # per file; larger files are logs and data, in which matches are not useful
PIECE_BYTES = 65_536
READS = ToolExecutionSpec(concurrency_safe=True, side_effects="none", reads_files=True)
WRITES = ToolExecutionSpec(side_effects="files", writes_files=True)


class _FileTool(TypedTool):
    """Base of the file tools: checks paths against `root`, and converts system errors to tool errors."""

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
    def allowed_paths(self) -> search.AllowedPaths:
        return search.AllowedPaths(str(self.root), allow_hidden=self.cfg.allow_hidden, deny=self.cfg.deny)

    def _make_root(self) -> None:
        if self.cfg.root is not None:
            with suppress(OSError):  # the call itself then reports that the path does not exist
                self.root.mkdir(parents=True, exist_ok=True)

    def resolved(self, path: str, *, follow: bool = True) -> Path:
        """The absolute path, if the tool may use it; otherwise raises `ToolValidationError`.

        With `follow`, links are resolved, and both the link and its target are checked. Without `follow`, a
        link at the end of the path is not resolved.
        """
        if len(path) > MAX_PATH_CHARS:
            raise ToolValidationError(
                f"path: it has {len(path):,} characters; {MAX_PATH_CHARS:,} are allowed", self.name
            )
        self._make_root()
        try:
            absolute = self._absolute(path)
            target = absolute.resolve()
            is_entry = absolute.name not in ("", "..")
            unresolved = absolute.parent.resolve() / absolute.name if is_entry else target
        except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, names too long, circular links
            raise ToolValidationError(f"path: {path[:200]!r} is no usable path: {error}", self.name) from None
        place = target if follow else unresolved
        if self.cfg.root is not None and not place.is_relative_to(self.root):
            raise ToolValidationError(
                f"path: {path[:200]!r} is outside of root",
                self.name,
                hint="give a path relative to the root folder",
            )
        for checked in {unresolved, place}:
            if (problem := self.allowed_paths.problem(str(checked))) is not None:
                raise _access_error(path, problem, self.name)
        return place

    def _absolute(self, path: str) -> Path:
        """The path below root. A path that exists only with the escapes of `list_files` is unescaped."""
        literal = self.root / os.fsdecode(os.fsencode(path))
        unescaped = self.root / search.unescape_path(path)
        return unescaped if not os.path.lexists(literal) and os.path.lexists(unescaped) else literal

    @contextmanager
    def errors_for_model(self, path: str) -> Iterator[None]:
        """Converts an error of the operating system to a tool error on which a model can act."""
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
        """The size of an open file. Raises `PermanentToolError` for pipes and devices: they may never end."""
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
        with self.errors_for_model(args.path), open(place, "rb", opener=_open_nonblocking) as file:
            size = self.require_regular(file, args.path)
            _skip_lines(file, args.offset)
            content = file.read(self.cfg.max_bytes)
            rest = file.read(1)
        if args.limit is not None:
            lines = io.BytesIO(content).readlines()
            content, rest = b"".join(lines[: args.limit]), b"".join(lines[args.limit :]) or rest
        if b"\0" in content:
            raise PermanentToolError(f"{args.path} is no text file", self.name)
        # If the text was cut inside a character, the incremental decoder omits the incomplete character.
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
        with self.errors_for_model(args.path):
            if place.exists() and not (place.is_file() or place.is_dir()):
                raise PermanentToolError(f"{args.path} is no regular file", self.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if args.mode == "w":
                _replace_file(place, content)
            else:
                with open(place, "ab", opener=_open_nonblocking) as file:
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
        with self.errors_for_model(args.path):
            if not stat.S_ISDIR(top.stat().st_mode):
                raise PermanentToolError(f"{args.path} is no folder", self.name)
        found: list[dict[str, str]] = []
        allowed_paths = self.allowed_paths
        for entry in (
            search.walk(top, allowed_paths) if args.recursive else _sorted_entries(top, allowed_paths)
        ):
            shown = search.escape_path(Path(entry.path).relative_to(top).as_posix())
            name = shown if "/" in args.pattern else search.escape_path(entry.name)
            if not fnmatch.fnmatchcase(name, args.pattern):
                continue
            if len(found) == MAX_ENTRIES:
                return {"path": args.path, "entries": _by_path(found), "truncated": True}
            found.append({"path": shown, "type": _entry_type(entry)})
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
        with self.errors_for_model(args.path):
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
        """Raise `PermanentToolError` if the folder contains invisible files: they must not be deleted."""
        allowed_paths = self.allowed_paths
        for above, folders, files in os.walk(folder):
            for name in (*folders, *files):
                if (problem := allowed_paths.problem(f"{above}{os.sep}{name}")) is not None:
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
        with self.errors_for_model(args.path):
            await asyncio.to_thread(top.stat)
        query = {
            "pattern": args.pattern,
            "path": str(top),
            "case_sensitive": args.case_sensitive,
            "glob": f"*.{_escape_glob(args.file_type.removeprefix('.'))}" if args.file_type else "*",
            "max_bytes": MAX_SEARCHED_BYTES,
            "max_matches": MAX_MATCHES,
            "allowed_paths": self.allowed_paths.to_json(),
        }
        answer = await self._search(query)
        if "error" in answer:
            raise ToolValidationError(f"pattern: {answer['error']}", self.name)
        return answer

    async def _search(self, query: dict[str, Any]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", search.__file__,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={},  # the process must not get the worker's secrets
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
                with suppress(ProcessLookupError):  # it has just ended
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise ToolError(f"the search process ended with code {process.returncode}", self.name)
        answer: dict[str, Any] = json.loads(output)
        return answer


def _open_nonblocking(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a pipe. For regular files it changes nothing."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _skip_lines(file: BinaryIO, count: int) -> None:
    while count:
        piece = file.readline(PIECE_BYTES)  # in pieces: one line may have a gigabyte
        if not piece:
            return
        count -= piece.endswith(b"\n")


def _replace_file(place: Path, content: bytes) -> None:
    """Replace a file atomically: write and fsync a temporary file in the same folder, then rename it."""
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if place.exists():
                shutil.copymode(place, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _sorted_entries(top: Path, allowed_paths: search.AllowedPaths) -> list[os.DirEntry[str]]:
    with os.scandir(top) as entries:
        visible = [entry for entry in entries if allowed_paths.problem(entry.path) is None]
    return sorted(visible, key=lambda entry: entry.name)


def _access_error(path: str, problem: str, tool_name: str) -> ToolValidationError:
    return ToolValidationError(
        f"path: {path[:200]!r} {problem}",
        tool_name,
        hint="the agent's configuration keeps it from this tool; use other files",
    )


def _by_path(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(entries, key=lambda entry: entry["path"])


def _entry_type(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir() else "file"


def _escape_glob(text: str) -> str:
    """A glob that matches only this text."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
