"""Schema checks: the only place that decides where a value is checked against a JSON Schema.

Schemas come from requests and tools, values from models. Either can be crafted so that a check never ends. A
check that is certainly short runs on the event loop. Every other check runs in a separate process that can be
killed and that has limits of CPU time and memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGPROF
from typing import Any, cast

from openagents_worker.errors import (
    CheckLimitExceeded,
    PluginConfigError,
    RequestInvalid,
    ToolUnavailableError,
)
from openagents_worker.json_schema import process as check_process
from openagents_worker.json_schema.mistakes import (
    is_certainly_valid,
    is_validator_loaded,
    load_validator,
    mistakes,
)
from openagents_worker.json_schema.process import OUT_OF_MEMORY
from openagents_worker.json_schema.rules import Schema, SchemaProblem, read_schema
from openagents_worker.tools.offload import DaemonThreads

__all__ = [
    "DEFAULT_CPU_S",
    "SchemaChecks",
    "schema_of_output",
    "schema_of_registered_output",
    "schema_of_tool",
]

MAX_STEPS_ON_LOOP = 5_000  # evaluated keywords; at 2 to 3 µs each, 15 ms at most
CHARS_PER_STEP = 64  # a long text costs as much as several values: it is measured, compared and copied
DEFAULT_CPU_S = 2.0  # checking 1 MB against a schema of usual size takes half of that
MEMORY_BYTES = 256 * 1024 * 1024  # address space of a check process; Python and its modules use a fifth
PROCESSES = 2  # so that one long check does not delay the others
WALL_TIME_FACTOR = 15  # wall-clock limit per second of CPU time: the machine may be busy


def schema_of_output(schema: Any) -> Schema:
    """Read the schema of a run's output. Raises `RequestInvalid` if it is not accepted."""
    try:
        return read_schema(schema)
    except SchemaProblem as problem:
        raise RequestInvalid(
            f"output_type is not a supported JSON Schema: {problem}",
            hint="use a JSON Schema object (draft 2020-12), or a name that the deployment has registered",
        ) from problem


def schema_of_tool(schema: Any) -> Schema:
    """Read the schema of a tool's arguments. Raises `PluginConfigError` if it is not accepted."""
    return _read_deployed_schema(
        schema,
        "the schema of a tool's arguments",
        "schema() must return a JSON Schema object, draft 2020-12",
    )


def schema_of_registered_output(name: str, schema: Any) -> Schema:
    """Read the schema of a registered output class. Raises `PluginConfigError` if it is not accepted."""
    return _read_deployed_schema(
        schema,
        f"the schema of the registered output {name!r}",
        f"change the class that has the name {name!r}",
    )


def _read_deployed_schema(schema: Any, what: str, hint: str) -> Schema:
    try:
        return read_schema(schema)
    except SchemaProblem as problem:
        raise PluginConfigError(f"{what} is not a supported JSON Schema: {problem}", hint=hint) from problem


_PACKAGE_FOLDER = str(Path(check_process.__file__).parents[2])
"""The folder from which a check process imports this library, even if an import hook found it here."""


class SchemaChecks:
    """Checks values against schemas for a worker process. Check processes are started at first use."""

    def __init__(self, *, cpu_s: float = DEFAULT_CPU_S, processes: int = PROCESSES) -> None:
        self._cpu_s = cpu_s
        self._threads = DaemonThreads(processes, name="openagents-check")
        self._lock = threading.Lock()
        self._idle: list[_CheckProcess] = []
        self._busy: set[_CheckProcess] = set()
        self._pending: set[Future[Any]] = set()
        self._closed = False

    async def mistakes(self, schema: Schema, value: Any, part: str) -> str | None:
        """What is wrong with a value, as a text for the model; None if it is valid. `part` is the word for a
        field in that text.

        Raises `CheckLimitExceeded`, and `ToolUnavailableError` if no process can be started.
        """
        if schema.steps is not None:
            allowed = MAX_STEPS_ON_LOOP // schema.steps
            if _has_at_most(value, allowed):
                with suppress(RecursionError):  # the caller's stack is deep; a process has a fresh one
                    if is_certainly_valid(schema.text, value):
                        return None
                    if not is_validator_loaded():
                        await asyncio.to_thread(load_validator)
                    return mistakes(schema.text, value, part)
        check = self._threads.submit(self._check_in_process, schema, value, part)
        self._pending.add(check)
        check.add_done_callback(self._pending.discard)
        return await asyncio.wrap_future(check)

    async def aclose(self) -> None:
        """Accept no more checks, and end the processes. A check that still runs is lost."""
        with self._lock:
            self._closed = True
            idle, busy = self._idle[:], list(self._busy)
            self._idle.clear()
        for process in (*idle, *busy):
            process.kill()
        running = [asyncio.wrap_future(check) for check in list(self._pending)]
        await asyncio.gather(*running, return_exceptions=True)
        for process in idle:
            await asyncio.to_thread(process.end)
        self._threads.shutdown()

    # --- in a thread -------------------------------------------------------------------------------------

    def _check_in_process(self, schema: Schema, value: Any, part: str) -> str | None:
        """Check a value in a check process, and wait for the answer. Runs in a thread."""
        try:
            question = json.dumps({"schema": schema.text, "value": value, "part": part}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return f"it is not JSON: {error}"[:300]
        # The second try is for a process that was killed from outside.
        answer = self._ask_process(question) or self._ask_process(question)
        if answer is None:
            raise self._limit_error("its process was ended twice")
        if (over := answer.get("over")) is not None:
            raise self._limit_error(f"the limit of {over}" if over in ("memory", "nesting") else over)
        return cast("str | None", answer["problem"])

    def _ask_process(self, question: bytes) -> dict[str, Any] | None:
        """Ask a check process; None if it ended without an answer."""
        process = self._acquire_process()
        try:
            answer = process.ask(question, timeout_s=self._cpu_s * WALL_TIME_FACTOR)
        except TimeoutError:
            raise self._limit_error(f"{self._cpu_s * WALL_TIME_FACTOR:g} s") from None
        finally:
            self._release_process(process)
        if answer is None and process.ended_by == -SIGPROF:
            raise self._limit_error(f"{self._cpu_s:g} s of processor time")
        if answer is None and process.ended_by == OUT_OF_MEMORY:
            raise self._limit_error("the limit of memory")
        if answer is None and (process.ended_by or 0) > 0:
            raise ToolUnavailableError(
                f"the process that checks values has ended with code {process.ended_by}"
            )
        return answer

    def _limit_error(self, limit: str) -> CheckLimitExceeded:
        return CheckLimitExceeded(
            f"the check against the JSON Schema was given up: {limit}",
            hint="use a simpler schema (no nested repetition in a pattern, fewer alternatives), or a shorter "
            "value, or set a larger OPENAGENTS_CHECK_CPU_S",
        )

    def _acquire_process(self) -> _CheckProcess:
        """An idle process, or a new one. Raises `ToolUnavailableError` after `aclose`."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = _CheckProcess(self._cpu_s)
        with self._lock:
            if not self._closed:
                self._busy.add(process)
                return process
        process.end()
        raise ToolUnavailableError("the worker is shutting down; values cannot be checked any more")

    def _release_process(self, process: _CheckProcess) -> None:
        """Make the process idle again, or end it if it has ended or `aclose` was called."""
        with self._lock:
            self._busy.discard(process)
            if process.ended_by is None and not self._closed:
                self._idle.append(process)
                return
        process.end()


class _CheckProcess:
    """A check process and the pipes to it. Only one thread at a time may use it."""

    def __init__(self, cpu_s: float) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed program, run by this interpreter
                [sys.executable, "-I", "-S", str(Path(check_process.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={},  # the process must not get the worker's secrets
            )
        except OSError as error:
            raise ToolUnavailableError(
                f"the process that checks values cannot be started: {error}"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._unsent_options = json.dumps(
            {
                "path": [*(path or "." for path in sys.path), _PACKAGE_FOLDER],
                "cpu_s": cpu_s,
                "memory_bytes": MEMORY_BYTES,
            }
        ).encode()
        self._unsent_options += b"\n"

    @property
    def ended_by(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.returncode

    def ask(self, question: bytes, *, timeout_s: float) -> dict[str, Any] | None:
        """The answer to one question; None if the process ends instead. Raises TimeoutError."""
        exchange = _CheckExchange(self._stdin.fileno(), self._stdout.fileno(), time.monotonic() + timeout_s)
        question, self._unsent_options = self._unsent_options + question, b""
        try:
            line = exchange.answer(question)
        except TimeoutError:
            self.end()
            raise
        if line is None:
            self.end()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """Kill the process. The thread that waits for its answer gets None."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def end(self) -> None:
        """Kill the process if it runs, wait for its end, and close the pipes."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()


@dataclass(frozen=True, slots=True)
class _CheckExchange:
    """Sends one question and reads its answer over two pipes, before a deadline on the monotonic clock."""

    write_fd: int
    read_fd: int
    deadline_s: float

    def answer(self, question: bytes) -> bytes | None:
        """The line that is read; None if the other side ends first. Raises TimeoutError."""
        with suppress(BrokenPipeError):
            self._send(question)
            received = b""
            while not received.endswith(b"\n"):
                self._wait(self.read_fd, select.POLLIN)
                piece = os.read(self.read_fd, 65_536)
                if not piece:
                    return None
                received += piece
            return received
        return None

    def _send(self, question: bytes) -> None:
        os.set_blocking(self.write_fd, False)
        rest = memoryview(question)
        while rest:
            self._wait(self.write_fd, select.POLLOUT)
            with suppress(BlockingIOError):
                rest = rest[os.write(self.write_fd, rest) :]

    def _wait(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        rest_s = self.deadline_s - time.monotonic()
        if rest_s <= 0 or not poll.poll(rest_s * 1000):
            raise TimeoutError


def _has_at_most(value: Any, steps: int) -> bool:
    """Whether a value contains at most `steps` values. `CHARS_PER_STEP` characters count as one value."""
    unvisited, count = [value], 0
    while unvisited:
        each = unvisited.pop()
        count += 1
        if isinstance(each, str):
            count += len(each) // CHARS_PER_STEP
        elif isinstance(each, dict):
            count += sum(len(name) // CHARS_PER_STEP for name in each if isinstance(name, str))
            if len(each) <= steps:
                unvisited.extend(each.values())
            else:
                return False
        elif isinstance(each, list | tuple):
            if len(each) > steps:
                return False
            unvisited.extend(each)
        if count > steps:
            return False
    return True
