"""The scripted model of the demo: a function that reads the results of tools and decides what to call next.

It is used if there is no API key. A local server offers it in the wire format of OpenAI, so the worker uses
it like a provider.
"""

from __future__ import annotations

from typing import Any

from examples.replies import call, results
from openagents_worker.testing.model_server import ModelServerRequest

DOCUMENTS = ("faults.md", "replay.md", "streaming.md")


def reply(request: ModelServerRequest) -> dict[str, Any]:
    """List files, read three in parallel, calculate and search, add the figures, save the report, answer."""
    match request.n:
        case 0:
            return {
                "text": "I will list the documents.",
                "tool_calls": [call("list_files", path=".", pattern="*")],
            }
        case 1:
            names = [
                entry["path"]
                for entry in results(request, "list_files")[-1]["entries"]
                if entry["type"] == "file"
            ]
            chosen = [name for name in DOCUMENTS if name in names] or names[:3]
            return {
                "text": f"There are {len(names)} documents. I will read {', '.join(chosen)}.",
                "tool_calls": [call("read_file", path=name) for name in chosen],
            }
        case 2:
            words = _words(request)
            return {
                "text": "Now I count the words and search for guarantees.",
                "tool_calls": [
                    call("calc", expression=" + ".join(map(str, words.values()))),
                    call("grep_files", pattern="(?i)guarantee"),
                ],
            }
        case 3:
            return {
                "text": "I add the figures to the ledger.",
                "tool_calls": [
                    call("ledger", name=name, value=count) for name, count in _figures(request).items()
                ],
            }
        case 4:
            return {
                "tool_calls": [
                    call("save_artifact", name="report", content=_report(request), kind="markdown")
                ]
            }
        case _:
            return {"text": f"The report is saved.\n\n{_report(request)}"}


def _words(request: ModelServerRequest) -> dict[str, int]:
    return {read["path"]: len(read["content"].split()) for read in results(request, "read_file")}


def _figures(request: ModelServerRequest) -> dict[str, float]:
    found = len(results(request, "grep_files")[-1]["matches"])
    return {
        **_words(request),
        "all words": results(request, "calc")[-1]["result"],
        "lines with a guarantee": found,
    }


def _report(request: ModelServerRequest) -> str:
    rows = "\n".join(f"| {name} | {value:,} |" for name, value in _figures(request).items())
    return f"# Documents\n\n| what | figure |\n|---|---|\n{rows}\n"
