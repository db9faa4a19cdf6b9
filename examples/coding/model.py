"""The scripted model of the example: it answers if there is no API key, and knows one change."""

from __future__ import annotations

import re
from typing import Any

from examples.replies import call, results
from openagents_worker.testing.model_server import ModelServerRequest

CHANGED = 'def greet(name: str) -> str:\n    return f"Hello, {name}!"\n'


def reply(request: ModelServerRequest) -> dict[str, Any]:
    """One reply: look, change the file, look at the difference, add, commit, and say what came of it."""
    repository = re.findall(r"repository is (\S+);", str(request.messages[0]["content"]))[0]
    match request.n:
        case 0:
            looks = [call("git_status", repo_path=repository), call("read_file", path="greet.py")]
            return {"text": "I look at the project.", "tool_calls": looks}
        case 1:
            return {"tool_calls": [call("write_file", path="greet.py", content=CHANGED)]}
        case 2:
            return {"tool_calls": [call("git_diff_unstaged", repo_path=repository)]}
        case 3:
            return {"tool_calls": [call("git_add", repo_path=repository, files=["greet.py"])]}
        case 4:
            return {"tool_calls": [call("git_commit", repo_path=repository, message="Greet people by name")]}
    committed = results(request, "git_commit")[-1]
    if isinstance(committed, dict) and "error" in committed:
        return {"text": f"greet() takes a name now. It is not committed: {committed['message']}."}
    return {"text": "greet() takes a name now, and this is committed."}
