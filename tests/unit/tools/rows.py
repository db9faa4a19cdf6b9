"""The table of the built-in tools: what each one declares, and arguments that it must accept and refuse.

`test_builtin.py` checks every tool of the registry against its row. A tool without a row fails there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROWS", "Row", "filled", "prepared"]

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One tool. `FOLDER` stands for a folder that `prepared` has filled, `SERVER` for the URL of a server,
    `SILENT` for one that never answers."""

    good: Arguments
    """Arguments of a call that succeeds."""
    bad: tuple[Arguments, ...]
    """Arguments that the schema or the tool refuses."""
    side_effects: str = "none"
    may_repeat: bool = True
    concurrency_safe: bool = True
    reads_files: bool = False
    writes_files: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    lasting: Arguments | None = None
    """Arguments of a call that lasts until it is cancelled. None: every call is short."""
    lasting_config: Mapping[str, Any] = field(default_factory=dict)
    """More `config` for that call."""


FOLDER, SERVER, SILENT = "FOLDER", "SERVER", "SILENT"
IN_FOLDER = {"root": FOLDER}
LONG = "a" * 20_000
OUTSIDE: tuple[Arguments, ...] = ({"path": "../x"}, {"path": "/etc/passwd"}, {"path": "\0"}, {"path": LONG})
TASK = {"agent_id": "a", "input_text": "Sum up."}
NO_TASK: tuple[Arguments, ...] = (
    {**TASK, "input_text": ""}, {**TASK, "input_text": LONG * 6}, {**TASK, "agent_id": "no id"},
    {"input_text": "Sum up."},
)  # fmt: skip
NO_URL = ({"url": ""}, {"url": "http://[::1"}, {"url": "http://a:99999/"}, {"url": LONG})


def _reads(good: Arguments, *bad: Arguments, **more: Any) -> Row:
    return Row(good, (*OUTSIDE, *bad), reads_files=True, config=IN_FOLDER, **more)


def _writes(good: Arguments, *bad: Arguments) -> Row:
    return Row(
        good, (*({**good, **wrong} for wrong in OUTSIDE), *bad), side_effects="files", may_repeat=False,
        concurrency_safe=False, writes_files=True, config=IN_FOLDER,
    )  # fmt: skip


def _searches() -> Row:
    bad = tuple({"pattern": "x", **wrong} for wrong in OUTSIDE)
    return _reads(
        {"pattern": "x"}, *bad, {"pattern": "("}, {"pattern": ""}, {"pattern": LONG},
        lasting={"pattern": "(a+)+$", "path": "many.txt"},
    )  # fmt: skip


ROWS: dict[str, Row] = {
    "builtin_search": Row({"query": "memory"}, ({"query": LONG}, {"query": "a", "limit": 0}, {"query": 1})),
    "calc": Row({"expression": "1+1"}, ({"expression": "9**9**9"}, {"expression": LONG})),
    "current_time": Row({}, ({"timezone": "Mars"}, {"timezone": LONG}, {"timezone": None})),
    "date_diff": Row(
        {"date1": "2024-01-01", "date2": "2024-01-02"},
        ({"date1": "x", "date2": "2024-01-01"}, {"date1": LONG, "date2": LONG}, {"date1": "2024-01-01"}),
    ),
    "date_parse": Row({"date": "2024-01-01"}, ({"date": "03/04/2024"}, {"date": LONG}, {"date": 1})),
    "delegate": Row(TASK, NO_TASK, side_effects="agent"),
    "delete_file": _writes({"path": "there.txt"}, {"path": "."}, {"path": "folder"}),
    "execute_command": Row(
        {"command": "echo x"},
        ({"command": ""}, {"command": "a\0b"}, {"command": "a", "timeout": 0}, {"command": LONG * 2},
         *({"command": "a", "cwd": path} for path in ("..", "/", "there.txt"))),
        side_effects="processes", may_repeat=False, concurrency_safe=False, config=IN_FOLDER,
        lasting={"command": "setsid sleep 600 & sleep 600"},
    ),
    "get_env": Row({"key": "PATH"}, ({"key": "OPENAI_API_KEY"}, {"key": "a=b"}, {"key": LONG}, {"key": ""})),
    "grep_files": _searches(),
    "host_lookup": Row({"url": "http://a.org"}, (*NO_URL, {"url": "http:///x"})),
    "http_request": Row(
        {"url": SERVER},
        ({"url": "file:///etc/passwd"}, {"url": LONG}, {"url": "http://169.254.169.254/"}),
        side_effects="network", may_repeat=False, concurrency_safe=False,
        config={"allow_hosts": ["127.0.0.1"]}, lasting={"url": SILENT},
    ),
    "json_parse": Row({"text": "[1]"}, ({"text": "{"}, {"text": "[" * 20_000}, {"text": "NaN"})),
    "list_files": _reads({"path": "."}, {"path": ".", "pattern": LONG}, {"path": "there.txt"}),
    "min_max": Row(
        {"numbers": [1, 2]},
        ({"numbers": []}, {"numbers": "a,b"}, {"numbers": [1], "action": "mode"}, {"numbers": "1e999"},
         {"numbers": [1e308, 1e308], "action": "sum"}),
    ),
    "percentage": Row({"value": 80, "percent": 15}, ({"value": 1e308, "percent": 1e10}, {"value": "x"})),
    "query_param": Row({"url": "http://a/?b=1", "key": "b"}, (*NO_URL, {"url": "http://a/", "action": "get"},
        {"url": "http://a/?" + "&".join(["a=1"] * 1_500), "action": "list"})),
    "random_choice": Row(
        {"choices": [1]}, ({"choices": []}, {"choices": [1], "count": 2}, {"choices": [1] * 20_000})
    ),
    "random_int": Row({}, ({"min": 2, "max": 1}, {"count": 101}, {"count": 0}, {"max": 2**53}, {"min": 1.5})),
    "random_string": Row({}, ({"length": 0}, {"length": 1_001}, {"charset": "emoji"})),
    "read_file": _reads({"path": "there.txt"}, {"path": "binary"}, {"path": "folder"}, {"path": ".hidden"}),
    "ripgrep": _searches(),
    "remember_preference": Row(
        {"rule": "Ship on Fridays.", "category": "decisions"},
        ({"rule": ""}, {"rule": " "}, {"rule": LONG}, {"rule": "x", "category": LONG},
         {"rule": "x", "reason": LONG}),
        side_effects="state", concurrency_safe=False,
    ),
    "save_artifact": Row(
        {"name": "a", "content": "b"}, ({"name": "", "content": "b"}, {"name": LONG, "content": "b"}),
        side_effects="state", concurrency_safe=False,
    ),
    "set_env": Row(
        {"key": "MODE", "value": "x"},
        ({"key": "a=b", "value": "x"}, {"key": "A", "value": "\0"}, {"key": "A", "value": "x" * 40_000}),
        side_effects="state", concurrency_safe=False,
    ),
    "shell_exec": Row(
        {"command": "echo x", "env": {"A": "b"}},
        ({"command": ""}, {"command": "'"}, {"command": []}, {"command": ["a"] * 2_000},
         {"command": LONG * 2}, {"command": "echo", "env": {"a=b": "c"}},
         {"command": "echo", "env": {"A": "\0"}},
         {"command": "echo", "env": {f"V{n}": "x" for n in range(200)}},
         *({"command": "echo", "cwd": path} for path in ("..", "/", "there.txt"))),
        side_effects="processes", may_repeat=False, concurrency_safe=False, config=IN_FOLDER,
        lasting={"command": "sleep 600"},
    ),
    "tavily_search": Row(
        {"query": "a"},
        ({"query": ""}, {"query": " "}, {"query": LONG}, {"query": "a", "max_results": 21},
         {"query": "a", "search_depth": "deep"}, {"query": "a", "include_domains": ["a"] * 200}),
        side_effects="network", config={"api_base": SERVER, "api_key_env": "PATH"},
        lasting={"query": "a"}, lasting_config={"api_base": SILENT},
    ),
    "text_transform": Row({"text": "a", "operation": "upper"}, ({"text": "a", "operation": "rot13"},)),
    "transfer": Row(TASK, NO_TASK, side_effects="agent", concurrency_safe=False),
    "url_build": Row(
        {"host": "a.org"},
        ({"host": "u@a.org"}, {"host": "a/b"}, {"host": "a:x"}, {"host": LONG}, {"host": "a", "path": LONG},
         {"host": "a", "scheme": "java script"}, {"host": "a", "query": {"a": "é" * 4_000}}),
    ),
    "url_parse": Row({"url": "http://a.org/"}, NO_URL),
    "uuid": Row({}, ({"version": 3}, {"count": 101})),
    "write_file": _writes({"path": "new.txt", "content": "x"}, {"path": "new.txt", "content": "x" * 300_000}),
}  # fmt: skip


def prepared(folder: Path) -> Path:
    """A folder with the files that the arguments name."""
    (folder / "folder").mkdir()
    (folder / "there.txt").write_text("x")
    (folder / ".hidden").write_text("x")
    (folder / "many.txt").write_text("a" * 50 + "b")
    (folder / "binary").write_bytes(b"\0")
    return folder


def filled(values: Mapping[str, Any], folder: Path, server: str = "") -> dict[str, Any]:
    """Arguments or a `config` with the folder and the URL."""
    real = {FOLDER: str(folder), SERVER: server, SILENT: f"{server}/silent"}
    return {
        name: real.get(value, value) if isinstance(value, str) else value for name, value in values.items()
    }
