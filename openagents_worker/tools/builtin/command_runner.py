"""Running commands: the only place that starts a program for a tool.

The program runs under `supervisor.py`, a process that kills everything that the program has started: when it
has ended, at its timeout, when the call is cancelled, and when the worker dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from openagents_worker.errors import PermanentToolError, ToolError
from openagents_worker.tools.builtin import supervisor

__all__ = ["Command", "CommandOutcome", "run_command"]

STOP_PATIENCE_S = 2 * supervisor.KILL_PATIENCE_S
"""How long the supervisor may take to end. Usually it takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments. `env` is its whole environment; it gets no variable of the worker."""

    argv: Sequence[str]
    executable: str
    """The path of the program."""
    env: Mapping[str, str]
    cwd: str
    timeout_s: float
    max_bytes: int
    """How many bytes of stdout, and of stderr, are kept. The rest is dropped."""


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """How a command has ended. `exit_code` is the negative number of the signal that has killed it."""

    exit_code: int
    stdout: str
    stderr: str
    stdout_bytes: int
    stderr_bytes: int
    timed_out: bool


async def run_command(command: Command, tool_name: str) -> CommandOutcome:
    """Run a program to its end or its timeout. Afterwards no process is left that it has started.

    Raises `PermanentToolError` if it cannot be started. If the call is cancelled, its processes have ended
    when `CancelledError` is raised.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", supervisor.__file__,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={}, start_new_session=True,
    )  # fmt: skip
    try:
        output = await _exchange(process, {**asdict(command), "worker_pid": os.getpid()})
    finally:
        await _until_done(asyncio.create_task(_stop(process), name="stop command"))
    messages = [message for line in output.splitlines() if (message := _message(line)) is not None]
    outcome = messages[-1] if messages else {"pid": None}
    if "pid" in outcome:  # the last message is about the start
        _kill_group(outcome["pid"])
        raise ToolError("the process that supervised the command was killed", tool_name)
    if (problem := outcome.get("error")) is not None:
        raise PermanentToolError(f"{command.argv[0][:200]} cannot be started: {problem}", tool_name)
    return CommandOutcome(**outcome)


def _message(line: bytes) -> dict[str, Any] | None:
    """A line that the supervisor has printed; None if it was killed before its end."""
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return message


def _kill_group(pid: int | None) -> None:
    """Kill the process group of a command that has lost its supervisor. What has left the group survives."""
    if pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


async def _exchange(process: asyncio.subprocess.Process, request: dict[str, Any]) -> bytes:
    """Send the request, and return what the supervisor has printed until its end."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    with suppress(ConnectionError):  # it was killed; then it has printed nothing
        await process.stdin.drain()
    return await process.stdout.read()


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Close stdin, so that the supervisor kills what is left and ends, and wait for it."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _until_done(task: asyncio.Task[None]) -> None:
    """Wait for a short task, also while this one is cancelled; then the cancellation travels on."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
