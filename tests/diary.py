"""The diary: a file outside of the system in which tools write down what they do. Tests count there.

Not the system says how often a tool ran, the diary does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from openagents_worker.tools.base import ToolContext

__all__ = ["DIARY", "note", "read"]

DIARY = "DIARY_FOLDER"
"""The environment variable that tells tools in which folder it lies."""


def note(what: str, context: ToolContext, **more: Any) -> None:
    """A line under the call's idempotency key; whole, whoever else writes at the same time."""
    line = {"what": what, "key": context.idempotency_key, "at": time.time(), **more}
    with _file(Path(os.environ[DIARY])).open("a") as diary:
        diary.write(json.dumps(line) + "\n")


def read(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """The lines of one run, in the order in which they were written."""
    file = _file(folder)
    written = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last one is being written
    return [line for line in lines if line["key"].startswith(f"{run_id}:")]


def _file(folder: Path) -> Path:
    return folder / "diary.jsonl"
