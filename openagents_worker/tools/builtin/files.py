"""Files: `read_file`, `write_file`, `list_files`, `delete_file`."""

from __future__ import annotations

import asyncio
import codecs
import fnmatch
import io
import os
import shutil
import stat
import unicodedata
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolValidationError
from openagents_worker.tools.base import Reconciled, ToolContext
from openagents_worker.tools.builtin import search
from openagents_worker.tools.builtin.file_tool import READS, WRITES, FileTool
from openagents_worker.tools.typed import TypedTool

__all__ = ["DeleteFile", "ListFiles", "ReadFile", "WriteFile"]

MAX_ENTRIES = 1000
MAX_GLOB_CHARS = 1_000
PIECE_BYTES = 65_536


class ReadFile(FileTool):
    name = "read_file"
    description = (
        "Reads a text file, whole or some of its lines. Long files come truncated; read on with `offset`. "
        "With `invalid_bytes`, the file is not UTF-8: each U+FFFD stands for bytes that writing would lose."
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
            raise PermanentToolError(f"{args.path} is not a text file", self.name)
        # If the text was cut inside a character, the incremental decoder omits the incomplete character.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(content, final=not rest)
        answer = {"path": args.path, "content": text, "bytes": size, "truncated": bool(rest)}
        whole = content.removesuffix(decoder.getstate()[0])
        if (invalid := len(whole) - len(whole.decode("utf-8", "ignore").encode())) > 0:
            answer["invalid_bytes"] = invalid
        return answer


class WriteFile(FileTool):
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

    async def reconcile(
        self, params: dict[str, Any], idempotency_key: str, context: ToolContext | None
    ) -> Reconciled:
        """Writing the whole file again is harmless. Whether a text was appended cannot be said."""
        return Reconciled.not_done() if params.get("mode", "w") == "w" else Reconciled.unknown()

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
                raise PermanentToolError(f"{args.path} is not a regular file", self.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if args.mode == "w":
                _replace_file(place, content)
            else:
                with open(place, "ab", opener=_open_nonblocking) as file:
                    self.require_regular(file, args.path)
                    file.write(content)
        return {"path": args.path, "bytes": len(content)}


class ListFiles(FileTool):
    name = "list_files"
    description = f"Lists files and folders, sorted by path, at most {MAX_ENTRIES}."
    spec = READS

    class Params(TypedTool.Params):
        path: str = Field(".", min_length=1, description="The folder.")
        pattern: str = Field(
            "*",
            description="A glob over names, for example `*.py`. With `/` it is over whole paths, in which "
            "`**/` stands for any folders: `src/*.py`, `src/**/*.py`.",
        )
        recursive: bool = Field(
            False, description="Whether to look into folders as well. A glob with `/` always does."
        )

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
                raise PermanentToolError(f"{args.path} is not a folder", self.name)
        found: list[dict[str, str]] = []
        pattern = unicodedata.normalize("NFC", args.pattern).removeprefix("./")
        is_of_paths = "/" in pattern
        walk = search.Walk(top, self.allowed_paths)
        for entry in walk if args.recursive or is_of_paths else _sorted_entries(top, self.allowed_paths):
            shown = search.escape_path(Path(entry.path).relative_to(top).as_posix())
            name = shown if is_of_paths else search.escape_path(entry.name)
            if not _matches(unicodedata.normalize("NFC", name).split("/"), pattern.split("/")):
                continue
            if len(found) == MAX_ENTRIES:
                return {"path": args.path, "entries": _by_path(found), "truncated": True}
            found.append({"path": shown, "type": _entry_type(entry)})
        return {"path": args.path, "entries": _by_path(found), "truncated": walk.is_cut}


class DeleteFile(FileTool):
    name = "delete_file"
    description = "Deletes a file, or a folder with everything in it when `recursive` is true."
    spec = WRITES
    durable_idempotent = False

    class Params(TypedTool.Params):
        path: str = Field(min_length=1, description="The file or folder; of a link only the link is deleted.")
        recursive: bool = Field(False, description="Must be true to delete a folder.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._delete, args)

    async def reconcile(
        self, params: dict[str, Any], idempotency_key: str, context: ToolContext | None
    ) -> Reconciled:
        """What is not there any more was deleted."""
        place = self.resolved(params["path"], follow=False)
        if await asyncio.to_thread(os.path.lexists, place):
            return Reconciled.not_done()
        return Reconciled.done({"path": params["path"], "deleted": True})

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


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether the globs stand for these names: `**` for any number of folders, any other one for one name.

    >>> _matches(["src", "a", "b.py"], ["src", "**", "*.py"]), _matches(["src", "a", "b.py"], ["src", "*.py"])
    (True, False)
    """
    counts = {0}  # of how many names the globs so far may stand for
    for position, glob in enumerate(globs):
        if glob != "**":
            left = {count for count in counts if count < len(names)}
            counts = {count + 1 for count in left if fnmatch.fnmatchcase(names[count], glob)}
        elif counts:
            is_last = position == len(globs) - 1  # then it stands for a name at least
            counts = set(range(min(counts) + is_last, len(names) + 1))
    return len(names) in counts


def _by_path(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(entries, key=lambda entry: entry["path"])


def _entry_type(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir() else "file"
