"""Log lines about a run contain its id, so that one search finds all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import openagents_worker

ROOT = Path(openagents_worker.__file__).parent
FOLDERS = ("context", "llm", "memory", "patterns", "runtime", "tools")
METHODS = ("debug", "error", "exception", "info", "of_run", "warning", "write")
ABOUT_NO_RUN = {
    "context.tokenizer_not_loaded": "the start of a worker",
    "llm.certificates_unreadable": "a file that all runs of the process use",
    "llm.key_file_unreadable": "a file that all runs of the process use",
    "llm.key_read_again": "a file that all runs of the process use",
    **dict.fromkeys(
        (
            "mcp.connection_lost",
            "mcp.invalid_message",
            "mcp.invalid_messages_dropped",
            "mcp.list_cut",
            "mcp.not_closed",
            "mcp.server_stderr",
            "mcp.server_stderr_dropped",
            "mcp.tool_left_out",
            "mcp.tool_unknown",
            "mcp.tools_left_out",
        ),
        "a connection that all runs of the process use",
    ),
}


def lines_without_id() -> Iterator[tuple[str, str]]:
    """The event of each line that names no run, and its place."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                    f"log.{name}" for name in METHODS
                }:
                    fields = {keyword.arg for keyword in node.keywords}
                    if not fields & {"run_id", None}:  # None: `**ids`
                        event = next(each.value for each in node.args if isinstance(each, ast.Constant))
                        yield str(event), f"{file.relative_to(ROOT)}:{node.lineno}"


def test_every_line_of_the_code_that_executes_runs_names_the_run() -> None:
    """Also of a model client and of a tool. Exceptions are listed with their reason, and only those."""
    found = dict(lines_without_id())

    assert {event: place for event, place in found.items() if event not in ABOUT_NO_RUN} == {}
    assert ABOUT_NO_RUN.keys() <= found.keys()
