"""Searching in files: `grep_files`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from typing import Any

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolError, ToolValidationError
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.builtin import search
from openagents_worker.tools.builtin.file_tool import READS, FileTool
from openagents_worker.tools.typed import TypedTool, with_own_limit

__all__ = ["GrepFiles"]

MAX_MATCHES = 100
MAX_SEARCHED_BYTES = 5_000_000  # per file; larger files are logs and data, in which matches are not useful


class GrepFiles(FileTool):
    name = "grep_files"
    description = (
        f"Searches text files for a regular expression and gives the first {MAX_MATCHES} matching lines."
    )
    spec = READS

    class Config(FileTool.Config):
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

    def execution_spec(self) -> ToolExecutionSpec:
        return with_own_limit(self.spec, self.cfg.timeout_ms)

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        top = await asyncio.to_thread(self.resolved, args.path)
        with self.errors_for_model(args.path):
            await asyncio.to_thread(top.stat)
        query = {
            "pattern": args.pattern,
            "path": str(top),
            "case_sensitive": args.case_sensitive,
            "glob": _glob_of_type(args.file_type or ""),
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
                output, _ = await process.communicate(
                    json.dumps({**query, "parent_pid": os.getpid()}).encode()
                )
        except TimeoutError:
            raise self.too_long() from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise ToolError(f"the search process ended with code {process.returncode}", self.name)
        answer: dict[str, Any] = json.loads(output)
        return answer

    def too_long(self) -> PermanentToolError:
        return PermanentToolError(
            f"the search took longer than {self.cfg.timeout_ms} ms",
            self.name,
            hint="use a simpler pattern or search a smaller folder",
        )


def _glob_of_type(file_type: str) -> str:
    """The glob for a file type, which a model may also write as `.py` or `*.py`."""
    ending = file_type.lstrip("*.")
    return f"*.{_escape_glob(ending)}" if ending else "*"


def _escape_glob(text: str) -> str:
    """A glob that matches only this text."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
