"""The demo's model when no key is there: a function that reads what the tools said and decides what to do.

It is served over HTTP in OpenAI's wire format; nothing else in the demo knows that it is no provider.
"""

from __future__ import annotations

import json
from typing import Any

from openagents_worker.testing.model_server import ModelRequest

WANTED = ("faults.md", "replay.md", "streaming.md")


def reply(asked: ModelRequest) -> dict[str, Any]:
    """List, read three side by side, search and compute, note each figure, save the report, answer."""
    match asked.n:
        case 0:
            return {
                "text": "I will see which documents there are.",
                "tool_calls": [_call("list_files", path=".", pattern="*")],
            }
        case 1:
            names = [
                entry["path"]
                for entry in _said(asked, "list_files")[-1]["entries"]
                if entry["type"] == "file"
            ]
            chosen = [name for name in WANTED if name in names] or names[:3]
            return {
                "text": f"There are {len(names)} documents. I will read {', '.join(chosen)}.",
                "tool_calls": [_call("read_file", path=name) for name in chosen],
            }
        case 2:
            words = _words(asked)
            return {
                "text": "Now I count, and look for what is promised.",
                "tool_calls": [
                    _call("calc", expression=" + ".join(map(str, words.values()))),
                    _call("grep_files", pattern="(?i)promise"),
                ],
            }
        case 3:
            return {
                "text": "I note the figures.",
                "tool_calls": [
                    _call("ledger", name=name, value=count) for name, count in _figures(asked).items()
                ],
            }
        case 4:
            return {
                "tool_calls": [_call("save_artifact", name="report", content=_report(asked), kind="markdown")]
            }
        case _:
            return {"text": f"The report is saved.\n\n{_report(asked)}"}


def _call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def _said(asked: ModelRequest, tool: str) -> list[Any]:
    """What that tool has answered in this run, oldest first. Earlier runs of the session come before it."""
    roles = [message["role"] for message in asked.messages]
    said = asked.messages[len(roles) - roles[::-1].index("user") :]
    called = {
        call["id"]: call["function"]["name"] for message in said for call in message.get("tool_calls") or ()
    }
    return [
        json.loads(message["content"])
        for message in said
        if message["role"] == "tool" and called.get(message["tool_call_id"]) == tool
    ]


def _words(asked: ModelRequest) -> dict[str, int]:
    return {read["path"]: len(read["content"].split()) for read in _said(asked, "read_file")}


def _figures(asked: ModelRequest) -> dict[str, float]:
    found = len(_said(asked, "grep_files")[-1]["matches"])
    return {**_words(asked), "all words": _said(asked, "calc")[-1]["result"], "lines with a promise": found}


def _report(asked: ModelRequest) -> str:
    rows = "\n".join(f"| {name} | {value:,} |" for name, value in _figures(asked).items())
    return f"# Documents\n\n| what | figure |\n|---|---|\n{rows}\n"
