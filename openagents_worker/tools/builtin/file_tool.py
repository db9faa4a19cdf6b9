"""The base of the file tools: the only place that decides which path a model's argument may name.

With `root` set, every path is resolved with its links, and a path outside of root is rejected. A file is
invisible if a name on its path begins with a dot, or if a glob in `deny` matches. The tools do not read,
write, delete, list or search invisible files, by no spelling of the path and through no link.

This restricts what a model requests. It is not a sandbox: it does not protect against another program that
replaces folders with links at the same time. It compares names: a hard link with a visible name to an
invisible file is visible.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolError, ToolValidationError
from openagents_worker.tools.base import ToolExecutionSpec
from openagents_worker.tools.builtin import search
from openagents_worker.tools.typed import TypedTool

__all__ = ["READS", "WRITES", "FileTool", "PathTool"]

MAX_PATH_CHARS = 4_096  # the longest path that Linux opens; resolving a longer one takes seconds
READS = ToolExecutionSpec(concurrency_safe=True, side_effects="none", reads_files=True)
WRITES = ToolExecutionSpec(side_effects="files", writes_files=True)


class PathTool(TypedTool):
    """Base of the tools with paths: checks them against `root`, and converts system errors to tool errors."""

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

    @property
    def limit(self) -> str | None:
        """The folder that no path may leave; None without a limit."""
        root: str | None = self.cfg.root
        return root

    @property
    def root(self) -> Path:
        return Path(self.limit or ".").resolve()

    @property
    def allowed_paths(self) -> search.AllowedPaths:
        return search.AllowedPaths(str(self.root), allow_hidden=self.cfg.allow_hidden, deny=self.cfg.deny)

    def _make_root(self) -> None:
        if self.limit is not None:
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
            if "\0" in path:
                raise ValueError("embedded null byte")
            absolute = self._absolute(path)
            is_entry = absolute.name not in ("", "..")
            unresolved = absolute.parent.resolve() / absolute.name if is_entry else absolute.resolve()
            place = absolute.resolve() if follow else unresolved
        except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, names too long, circular links
            raise ToolValidationError(
                f"path: {path[:200]!r} is not a usable path: {error}", self.name
            ) from None
        if self.limit is not None and not place.is_relative_to(self.root):
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
        """The path below root. A path that exists only in another spelling is that one: with the escapes of
        `list_files`, or in the other Unicode normalization (names from a Mac are decomposed)."""
        literal = self.root / os.fsdecode(os.fsencode(path))
        if os.path.lexists(literal):
            return literal
        others = search.unescape_path(path), *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
        return next((found for other in others if os.path.lexists(found := self.root / other)), literal)

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
        except FileExistsError:
            raise PermanentToolError(f"a part of {path} is a file", self.name) from None
        except PermissionError:
            raise PermanentToolError(f"{path}: permission denied", self.name) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ToolError(f"{path}: {reason}", self.name) from error

    def require_regular(self, file: BinaryIO, path: str) -> int:
        """The size of an open file. Raises `PermanentToolError` for pipes and devices: they may never end."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PermanentToolError(f"{path} is not a regular file", self.name)
        return status.st_size


class FileTool(PathTool):
    """Base of the file tools."""

    class Config(PathTool.Config):
        max_bytes: int = Field(
            200_000, ge=1, description="Largest number of bytes that one call reads or writes."
        )


def _access_error(path: str, problem: str, tool_name: str) -> ToolValidationError:
    return ToolValidationError(
        f"path: {path[:200]!r} {problem}",
        tool_name,
        hint="the agent's configuration keeps it from this tool; use other files",
    )
