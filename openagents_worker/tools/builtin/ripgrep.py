"""Searching in files with ripgrep: `ripgrep` is `grep_files` with the program `rg`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openagents_worker.tools.builtin import search
from openagents_worker.tools.builtin.command_runner import Command, run_command
from openagents_worker.tools.builtin.grep import MAX_MATCHES, MAX_SEARCHED_BYTES, GrepFiles

__all__ = ["Ripgrep"]

MAX_OUTPUT_BYTES = 4 * MAX_SEARCHED_BYTES  # the matches before this are enough, unless lines have megabytes


class Ripgrep(GrepFiles):
    """Searches with `rg` if it is installed, and as `grep_files` does otherwise. The results are the same.

    `rg` skips what it need not read. But the rules which files are visible are those of the file tools: a
    match in another file is dropped. A pattern that only Python understands is searched by Python.
    """

    name = "ripgrep"

    async def _search(self, query: dict[str, Any]) -> dict[str, Any]:
        program = await asyncio.to_thread(shutil.which, "rg")
        if program is None:
            return await super()._search(query)
        command = Command(
            argv=[program, *_options(query, self.allowed_paths), "--", query["path"]],
            executable=program,
            env={},
            cwd="/",
            timeout_s=self.cfg.timeout_ms / 1000,
            max_bytes=MAX_OUTPUT_BYTES,
        )
        outcome = await run_command(command, self.name)
        messages = [
            message for line in outcome.stdout.splitlines() if (message := _message(line)) is not None
        ]
        answer = _answer(messages, Path(query["path"]), self.allowed_paths)
        is_cut = outcome.stdout_bytes > MAX_OUTPUT_BYTES
        if answer["truncated"] or is_cut:
            return {**answer, "truncated": True}
        if outcome.timed_out:
            raise self.too_long()
        if not any(message["type"] == "summary" for message in messages):
            return await super()._search(query)  # it did not accept the pattern
        return answer


def _options(query: dict[str, Any], allowed_paths: search.AllowedPaths) -> Iterator[str]:
    """The options of `rg`. The pattern cannot be taken for an option: `--pre=program` would execute it."""
    yield from ("--json", "--no-config", "--no-ignore", "--no-messages", "--sort=path")
    yield f"--max-filesize={query['max_bytes']}"
    if not query["case_sensitive"]:
        yield "--ignore-case"
    if not search.names_cr(query["pattern"]):
        yield "--crlf"
    if allowed_paths.allow_hidden:
        yield "--hidden"
    if query["glob"] != "*":
        yield f"--glob={query['glob']}"
    yield from (f"--iglob=!{glob}" for glob in allowed_paths.deny if "/" not in glob)
    yield f"--regexp={query['pattern']}"


def _message(line: str) -> dict[str, Any] | None:
    """A line of the output; None for one that was cut."""
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return message


def _answer(messages: list[dict[str, Any]], top: Path, allowed_paths: search.AllowedPaths) -> dict[str, Any]:
    """The matches of all visible text files, in the form of `search.search`."""
    matches: list[dict[str, Any]] = []
    of_file: list[dict[str, Any]] = []
    skipped = 0
    for message in messages:
        data = message["data"]
        if message["type"] == "match":
            of_file.append(data)
        elif message["type"] == "end":
            path = os.fsdecode(_bytes_of(data["path"]))
            if data["binary_offset"] is not None:
                skipped += 1
            elif allowed_paths.problem(path) is None:
                matches += (_match(each, Path(path), top) for each in of_file)
            of_file = []
    return {"matches": matches[:MAX_MATCHES], "skipped": skipped, "truncated": len(matches) > MAX_MATCHES}


def _match(data: dict[str, Any], path: Path, top: Path) -> dict[str, Any]:
    name = path.name if path == top else str(path.relative_to(top))
    content = _bytes_of(data["lines"])
    span = next(((each["start"], each["end"]) for each in data["submatches"]), (0, 0))
    start, end = (len(content[:offset].decode("utf-8", "replace")) for offset in span)
    line = content.decode("utf-8", "replace").rstrip("\r\n")
    return {
        "path": search.escape_path(name),
        "line": data["line_number"],
        "text": search.shown_part(line, start, end),
    }


def _bytes_of(text: dict[str, str]) -> bytes:
    """A text of the output: it is base64 if it is not UTF-8."""
    return base64.b64decode(text["bytes"]) if "bytes" in text else text["text"].encode()
