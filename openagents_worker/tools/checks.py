"""Checks. The only place that decides where a value is held against a JSON Schema: on the loop, or apart.

Schemas come from requests and tools, values from models: either may be made to take for ever. What certainly
takes little is checked at once. Everything else goes to a process that can be killed, and that has a limit of
processor time and memory.
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
from openagents_worker.json_schema.mistakes import mistakes
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

MAX_STEPS_ON_LOOP = 5_000  # keywords looked at, at some 2 to 3 µs each: 15 ms
CHARS_OF_A_STEP = 64  # a long text costs as much as several values: it is measured, compared and copied
DEFAULT_CPU_S = 2.0  # a megabyte against a schema of usual size takes half of that
MEMORY_BYTES = 256 * 1024 * 1024  # address space of a check process; a fifth is Python and its modules
PROCESSES = 2  # one long check does not hold up the others
PATIENCE_FACTOR = 15  # of the processor time, in real time: the machine may be busy, the process stopped


def schema_of_output(schema: Any) -> Schema:
    """The schema of a run's answer. Raises `RequestInvalid` for one that is not accepted."""
    try:
        return read_schema(schema)
    except SchemaProblem as problem:
        raise RequestInvalid(
            f"output_type is not a JSON Schema that is accepted: {problem}",
            hint="a JSON Schema object (draft 2020-12), or a name that the deployment has registered",
        ) from problem


def schema_of_tool(schema: Any) -> Schema:
    """The schema of a tool's arguments. Raises `PluginConfigError` for one that is not accepted."""
    return _of_deployment(
        schema, "the schema of a tool's arguments", "schema() returns a JSON Schema object, draft 2020-12"
    )


def schema_of_registered_output(name: str, schema: Any) -> Schema:
    """The schema of a registered class. Raises `PluginConfigError` for one that is not accepted."""
    return _of_deployment(
        schema,
        f"the schema of the registered output {name!r}",
        f"change the class that has the name {name!r}",
    )


def _of_deployment(schema: Any, what: str, hint: str) -> Schema:
    try:
        return read_schema(schema)
    except SchemaProblem as problem:
        raise PluginConfigError(
            f"{what} is not a JSON Schema that is accepted: {problem}", hint=hint
        ) from problem


_FOLDER = str(Path(check_process.__file__).parents[2])
"""Where another process finds this library, also where an import hook has found it here."""


class SchemaChecks:
    """The checks of a worker process. Processes for them are started when they are first needed."""

    def __init__(self, *, cpu_s: float = DEFAULT_CPU_S, processes: int = PROCESSES) -> None:
        self._cpu_s = cpu_s
        self._threads = DaemonThreads(processes, name="openagents-check")
        self._lock = threading.Lock()
        self._idle: list[_CheckProcess] = []
        self._busy: set[_CheckProcess] = set()
        self._work: set[Future[Any]] = set()
        self._closed = False

    async def mistakes(self, schema: Schema, value: Any, part: str) -> str | None:
        """What is wrong with a value, in words for the model; None when it fits. `part` is what a field is
        called.

        Raises `CheckLimitExceeded`, and `ToolUnavailableError` where no process can be started.
        """
        if schema.steps is not None:
            allowed = MAX_STEPS_ON_LOOP // schema.steps
            if _is_smaller(value, allowed):
                with suppress(RecursionError):  # whoever calls is deep in Python's stack: a process is not
                    return mistakes(schema.text, value, part)
        work = self._threads.submit(self._apart, schema, value, part)
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        return await asyncio.wrap_future(work)

    async def aclose(self) -> None:
        """Take no more work, and end the processes; a check that still runs is lost."""
        with self._lock:
            self._closed = True
            idle, busy = self._idle[:], list(self._busy)
            self._idle.clear()
        for process in (*idle, *busy):
            process.kill()
        running = [asyncio.wrap_future(work) for work in list(self._work)]
        await asyncio.gather(*running, return_exceptions=True)
        for process in idle:
            await asyncio.to_thread(process.end)
        self._threads.shutdown()

    # --- in a thread -------------------------------------------------------------------------------------

    def _apart(self, schema: Schema, value: Any, part: str) -> str | None:
        try:
            question = json.dumps({"schema": schema.text, "value": value, "part": part}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return f"it is not JSON: {error}"[:300]
        answer = self._answer(question) or self._answer(question)  # once more, should somebody have ended it
        if answer is None:
            raise self._exceeded("its process was ended twice")
        if (over := answer.get("over")) is not None:
            raise self._exceeded(f"the limit of {over}" if over in ("memory", "nesting") else over)
        return cast("str | None", answer["problem"])

    def _answer(self, question: bytes) -> dict[str, Any] | None:
        """What a process answers; None where it has ended without an answer."""
        process = self._take()
        try:
            answer = process.ask(question, timeout_s=self._cpu_s * PATIENCE_FACTOR)
        except TimeoutError:
            raise self._exceeded(f"{self._cpu_s * PATIENCE_FACTOR:g} s") from None
        finally:
            self._put_back(process)
        if answer is None and process.ended_by == -SIGPROF:
            raise self._exceeded(f"{self._cpu_s:g} s of processor time")
        if answer is None and process.ended_by == OUT_OF_MEMORY:
            raise self._exceeded("the limit of memory")
        if answer is None and (process.ended_by or 0) > 0:
            raise ToolUnavailableError(
                f"the process that checks values has ended with code {process.ended_by}"
            )
        return answer

    def _exceeded(self, limit: str) -> CheckLimitExceeded:
        return CheckLimitExceeded(
            f"the check against the JSON Schema was given up: {limit}",
            hint="use a simpler schema (no nested repetition in a pattern, fewer alternatives), or a shorter "
            "value, or set a larger OPENAGENTS_CHECK_CPU_S",
        )

    def _take(self) -> _CheckProcess:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = _CheckProcess(self._cpu_s)
        with self._lock:
            if not self._closed:
                self._busy.add(process)
                return process
        process.end()
        raise ToolUnavailableError("the worker ends, and with it the process that checks values")

    def _put_back(self, process: _CheckProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.ended_by is None and not self._closed:
                self._idle.append(process)
                return
        process.end()


class _CheckProcess:
    """One check process, and the pipes to it. It is used by one thread at a time."""

    def __init__(self, cpu_s: float) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own program, by this interpreter
                [sys.executable, "-I", "-S", str(Path(check_process.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={},  # a secret of the worker has no business there
            )
        except OSError as error:
            raise ToolUnavailableError(
                f"the process that checks values cannot be started: {error}"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._unsent = json.dumps(
            {
                "path": [*(path or "." for path in sys.path), _FOLDER],
                "cpu_s": cpu_s,
                "memory_bytes": MEMORY_BYTES,
            }
        ).encode()
        self._unsent += b"\n"

    @property
    def ended_by(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.returncode

    def ask(self, question: bytes, *, timeout_s: float) -> dict[str, Any] | None:
        """The answer to one question; None where the process ends instead. Raises TimeoutError."""
        exchange = _CheckExchange(self._stdin.fileno(), self._stdout.fileno(), time.monotonic() + timeout_s)
        question, self._unsent = self._unsent + question, b""
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
        """End the process; the thread that waits for its answer sees it."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def end(self) -> None:
        """End the process, where it has not ended, wait until it has, and close the pipes."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()


@dataclass(frozen=True, slots=True)
class _CheckExchange:
    """One question and its answer over two pipes, neither of which is waited for beyond the deadline."""

    to: int
    back: int
    deadline_s: float

    def answer(self, question: bytes) -> bytes | None:
        """The line that comes back; None where the other side ends first. Raises TimeoutError."""
        with suppress(BrokenPipeError):
            self._send(question)
            received = b""
            while not received.endswith(b"\n"):
                self._wait(self.back, select.POLLIN)
                piece = os.read(self.back, 65_536)
                if not piece:
                    return None
                received += piece
            return received
        return None

    def _send(self, question: bytes) -> None:
        os.set_blocking(self.to, False)
        rest = memoryview(question)
        while rest:
            self._wait(self.to, select.POLLOUT)
            with suppress(BlockingIOError):
                rest = rest[os.write(self.to, rest) :]

    def _wait(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        rest_s = self.deadline_s - time.monotonic()
        if rest_s <= 0 or not poll.poll(rest_s * 1000):
            raise TimeoutError


def _is_smaller(value: Any, steps: int) -> bool:
    """Whether the value has at most so many values in it, where long texts count as several."""
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        count += 1
        if isinstance(each, str):
            count += len(each) // CHARS_OF_A_STEP
        elif isinstance(each, dict):
            count += sum(len(name) // CHARS_OF_A_STEP for name in each if isinstance(name, str))
            if len(each) <= steps:
                waiting.extend(each.values())
            else:
                return False
        elif isinstance(each, list | tuple):
            if len(each) > steps:
                return False
            waiting.extend(each)
        if count > steps:
            return False
    return True
