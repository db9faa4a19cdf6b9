"""The diary: a file, unknown to the system, to which the tools of tests write what they do.

Tests read it to see how often a tool was really executed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from openagents_worker.tools.base import ToolContext
from tests.support.json_lines import complete_lines

__all__ = ["DIARY", "note", "read"]

DIARY = "DIARY_FOLDER"
"""The environment variable with the folder of the diary."""


def note(what: str, context: ToolContext, **more: Any) -> None:
    """Add a line with the idempotency key of the call. Writes of several processes do not mix."""
    line = {"what": what, "key": context.idempotency_key, "at": time.time(), **more}
    with _file(Path(os.environ[DIARY])).open("a") as diary:
        diary.write(json.dumps(line) + "\n")


def read(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """The lines of one run, in the order in which they were written."""
    return [line for line in complete_lines(_file(folder)) if line["key"].startswith(f"{run_id}:")]


def _file(folder: Path) -> Path:
    return folder / "diary.jsonl"
