"""The scripted model of the example: it answers as the lead and as a researcher if there is no API key."""

from __future__ import annotations

import json
from typing import Any

from examples.replies import call, question, results
from examples.research.team import MERGE, SPLIT
from openagents_worker.testing.model_server import ModelServerRequest

PATTERNS = {
    "How is a dead worker noticed?": "connections? of a dead|dead worker",
    "What happens to a call that was interrupted?": "interrupted call",
    "Which worker continues a run?": "another worker",
    "What can be lost?": "last second",
}
"""The questions of the plan, and what a researcher searches for."""


def reply(request: ModelServerRequest) -> dict[str, Any]:
    """One reply: the plan, a search, an answer with its source, or the report."""
    asked = question(request)
    if SPLIT in asked:
        return {"text": json.dumps({"questions": list(PATTERNS)})}
    if MERGE in asked:
        notes, _ = json.JSONDecoder().raw_decode(asked, asked.index("[{"))
        return {"text": json.dumps(_report(notes))}
    if request.n == 0:
        return {"tool_calls": [call("grep_files", pattern=f"(?i){PATTERNS[asked]}", file_type="md")]}
    first = results(request, "grep_files")[-1]["matches"][0]
    return {"text": f"{first['text'].strip()} ({first['path']})"}


def _report(notes: list[dict[str, str]]) -> dict[str, Any]:
    findings = [{**note, "sources": [note["answer"].rpartition("(")[2].rstrip(")")]} for note in notes]
    return {"summary": f"The documents answer {len(notes)} questions about this.", "findings": findings}
