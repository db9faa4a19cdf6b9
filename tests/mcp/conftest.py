"""A server with faults for each test, and what it has done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import mcp_server
from tests.support.json_lines import complete_lines
from tests.support.runner import agent
from tests.support.waiting import wait_for

PYTHON = [sys.executable, "-I", "-S"]
PROGRAM = [*PYTHON, mcp_server.__file__]
SSE_PROGRAM = str(Path(mcp_server.__file__).with_name("mcp_sse_server.py"))


class FaultyServer:
    """The server of a test. Each connection over stdio starts a process of it."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "mcp.jsonl"
        self.log.touch()
        self.url: str | None = None

    @property
    def over_stdio(self) -> dict[str, Any]:
        return {"command": PROGRAM[0], "args": [*PROGRAM[1:], str(self.log)]}

    def happened(self, what: str) -> list[dict[str, Any]]:
        entries = complete_lines(self.log)
        return [entry for entry in entries if entry["what"] == what]

    def called(self) -> list[str]:
        return [entry["tool"] for entry in self.happened("call")]

    def go(self) -> None:
        """Let the tool `slow` end."""
        Path(f"{self.log}.go").touch()

    def tool(self, **config: Any) -> dict[str, Any]:
        server = config.pop("server", {})
        place = {"url": self.url} if self.url else self.over_stdio
        return {"id": "srv", "type": "mcp", "config": {"server": {**place, **server}, **config}}

    def agent(self, *calls: tuple[str, dict[str, Any]], tools: Any = None, **config: Any) -> dict[str, Any]:
        """An agent whose pattern makes these calls, one after the other."""
        ref = {key: config.pop(key) for key in ("approval", "timeout_ms", "on_interrupted") if key in config}
        pattern = {"impl": "tests.mcp.patterns.Calls", "config": {"calls": [list(call) for call in calls]}}
        return agent(tools=tools or [{**self.tool(**config), **ref}], pattern=pattern)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    faulty = FaultyServer(tmp_path)
    yield faulty
    faulty.go()
    for pid in {entry["pid"] for entry in faulty.happened("start")}:
        assert not is_alive(pid), "a process of a server is left"


@pytest.fixture
def http_server(tmp_path: Path) -> Iterator[FaultyServer]:
    with serving_http(tmp_path) as faulty:
        yield faulty


@pytest.fixture
def sse_server(tmp_path: Path) -> Iterator[FaultyServer]:
    with serving_http(tmp_path, SSE_PROGRAM, "sse") as faulty:
        yield faulty


@contextmanager
def serving_http(
    folder: Path, program: str = mcp_server.__file__, path: str = "mcp"
) -> Iterator[FaultyServer]:
    faulty = FaultyServer(folder)
    command = [*PYTHON, program, str(faulty.log), "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: faulty.happened("listening"), "the server listens")
        [listening] = faulty.happened("listening")
        faulty.url = f"http://127.0.0.1:{listening['port']}/{path}"
        yield faulty
    finally:
        process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
