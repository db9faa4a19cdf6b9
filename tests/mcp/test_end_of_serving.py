"""How `openagents-worker mcp` ends: with its client, at SIGTERM, and if the client no longer reads.

Redis and the command are real. No worker is needed: its agents are announced by hand.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from openagents_worker import Client
from openagents_worker.models import RunState
from tests.support.scripts import Hand
from tests.support.waiting import PATIENCE_S, wait_for

COMMAND = [sys.executable, "-m", "openagents_worker.cli", "mcp"]
PIPE_BYTES = 4096  # the smallest pipe: a list of so many tools does not fit into it
AGENTS = ("greeter", *(f"agent-{number}" for number in range(20)))
pytestmark = pytest.mark.fresh_process("how the interpreter ends")


class McpClient:
    """A client that reads only when it is told to."""

    def __init__(self, redis_url: str) -> None:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**env, "OPENAGENTS_REDIS_URL": redis_url},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ask(self, id_: int, method: str, **params: Any) -> None:
        message = {"jsonrpc": "2.0", "id": id_, "method": method, "params": params}
        self.stdin.write(json.dumps(message).encode() + b"\n")
        self.stdin.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.stdout.readline())
        return answer

    def stop_reading(self) -> None:
        """Returns when the pipe is full: the server is writing, and cannot go on."""
        fcntl.fcntl(self.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.ask(2, "tools/list")
        wait_for(lambda: self._unread() == PIPE_BYTES, "the pipe is full")

    def _unread(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self.stdout, termios.FIONREAD, count)
        return count[0]

    def end(self) -> tuple[int, str]:
        """The exit code of the server, and what it has printed."""
        code = self.process.wait(PATIENCE_S)
        assert self.process.stderr is not None
        return code, self.process.stderr.read().decode()


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        hand.register(*AGENTS)
        yield hand


@contextmanager
def connected(redis_url: str) -> Generator[McpClient]:
    client = McpClient(redis_url)
    try:
        client.ask(1, "ping")
        assert client.answer()["id"] == 1
        yield client
    finally:
        client.process.kill()
        with client.process:
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server(hand: Hand, redis_url: str, number: signal.Signals) -> None:
    """Although a thread waits for the next message. Nothing is printed about it."""
    with connected(redis_url) as client:
        client.process.send_signal(number)
        code, said = client.end()

    assert (code, said.splitlines()[1:]) == (0, [])


def test_a_signal_ends_the_server_of_a_client_that_stopped_reading(hand: Hand, redis_url: str) -> None:
    """Although a thread is writing. The exit code says that answers were lost."""
    with connected(redis_url) as client:
        client.stop_reading()
        client.process.send_signal(signal.SIGTERM)
        code, said = client.end()

    assert code == 1
    assert said.splitlines()[1:] == ["error: cannot write to standard output: the client has stopped reading"]


def test_the_end_of_stdin_ends_the_server_of_a_client_that_stopped_reading(
    hand: Hand, redis_url: str
) -> None:
    with connected(redis_url) as client:
        client.stop_reading()
        client.stdin.close()
        assert client.end()[0] == 1


@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_runs_go_on_if_the_client_ends(hand: Hand, redis_url: str, how: str) -> None:
    """Only a request that the client cancels cancels its run."""
    with connected(redis_url) as mcp, Client(redis_url) as client:
        arguments = {"input": "hi", "session": "s1"}
        mcp.ask(2, "tools/call", name="greeter", arguments=arguments, _meta={"progressToken": 1})
        assert mcp.answer()["params"]["message"] == "run.queued"
        if how == "stdin":
            mcp.stdin.close()
        else:
            mcp.process.send_signal(signal.SIGTERM)
        assert mcp.end()[0] == 0
        [record] = client.runs(session_id="s1")
        assert record.state is RunState.QUEUED
        client.cancel(record.run_id)
