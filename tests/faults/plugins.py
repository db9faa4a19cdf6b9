"""Tools and patterns for workers that are killed. All their actions are written to a log outside the process.

A mark is a file that names a moment of a run. The process that reaches the moment removes the file and kills
itself with SIGKILL, so each mark kills exactly one process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from openagents_worker import Reconciled, tool
from openagents_worker.errors import PermanentToolError, ToolRateLimitError
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from tests.support.json_lines import complete_lines

__all__ = [
    "Batch",
    "Block",
    "Branches",
    "Catching",
    "Greedy",
    "Hold",
    "Impatient",
    "Limited",
    "Pay",
    "PayInFunction",
    "Receiving",
    "Refused",
    "Segfault",
    "Settle",
    "Step",
    "Stubborn",
    "hold_in_thread",
    "hold_the_interpreter",
    "linger",
    "note",
    "take_mark",
]


def note(log: Path, **entry: Any) -> None:
    """Append one line to the log in one write, so that lines of several processes do not mix."""
    line = json.dumps({**entry, "pid": os.getpid(), "at": time.time()}) + "\n"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def take_mark(marks: Path, name: str) -> bool:
    """Remove the mark; returns whether it existed."""
    try:
        (marks / name).unlink()
    except FileNotFoundError:
        return False
    return True


class Step:
    """Logs its begin, waits `ms`, logs its end. `n` is its name in the log and in marks."""

    name = "step"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self._log, self._marks = Path(os.environ["FAULTS_LOG"]), Path(os.environ["FAULTS_MARKS"])

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "description": "A step.", "parameters": {"type": "object"}}

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec()

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        self._reached("begin", params, context)
        await asyncio.sleep(params.get("ms", 0) / 1000)
        result = self._outcome(params, context)
        self._reached("end", params, context)
        context.state["done"] = [*context.state.get("done", []), params["n"]]
        return result

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        return {"done": params["n"]}

    def _reached(self, moment: str, params: dict[str, Any], context: Any) -> None:
        note(
            self._log,
            event=moment,
            tool=self.name,
            n=params["n"],
            **{"cents": params["cents"]} if "cents" in params else {},
            run=context.run_id,
            session=context.session_id,
            key=context.idempotency_key,
        )
        marks = [f"{run_id}.{params['n']}.{moment}" for run_id in (context.run_id, "any")]
        if any(take_mark(self._marks, mark) for mark in marks):
            os.kill(os.getpid(), signal.SIGKILL)


class Refused(Step):
    """Always fails."""

    name = "refused"

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        self._reached("end", params, context)
        raise PermanentToolError("refused", self.name)


class Pay(Step):
    """Has an effect that must not happen twice: it logs `paid` between its begin and its end."""

    name = "pay"
    durable_idempotent = False

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        self._reached("paid", params, context)
        return {"paid": params["n"], "cents": params.get("cents")}


class PayInFunction(Pay):
    """Pays in a recorded function of its own."""

    name = "pay_in_function"
    durable_idempotent = True

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        pay = context.recorded(super().invoke, name="payment", idempotent=False)
        return await pay(params, context)


class Settle(Pay):
    """Finds out by its key whether an interrupted payment was made."""

    name = "settle"

    async def reconcile(self, params: dict[str, Any], idempotency_key: str, context: Any) -> Reconciled:
        entries = complete_lines(self._log)
        if any(e["event"] == "paid" and e["key"] == idempotency_key for e in entries):
            return Reconciled.done({"paid": params["n"], "cents": params.get("cents")})
        return Reconciled.not_done()


class Limited(Step):
    """Fails the first `times` tries with a rate limit and a retry-after."""

    name = "limited"

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        entries = complete_lines(self._log)
        tries = sum(e["event"] == "begin" and e["key"] == context.idempotency_key for e in entries)
        if tries <= params["times"]:
            self._reached("limited", params, context)
            raise ToolRateLimitError("slow down", self.name, retry_after_ms=params["retry_after_ms"])
        return super()._outcome(params, context)


class Segfault(Step):
    """Crashes its process every time."""

    name = "segfault"

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        return ctypes.string_at(0)


class Block(Step):
    """Blocks the event loop of its process for ten minutes every time."""

    name = "block"

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        time.sleep(600)


def hold_the_interpreter(how: str) -> None:
    """One call in C that holds the GIL, for ever or for a while."""
    match how.split():
        case ["regex"]:
            re.match("^(a+)+$", "a" * 40 + "b")
        case ["power"]:
            ten = 10
            ten ** (ten**9) % 7
        case ["sleep", seconds]:
            ctypes.PyDLL(None).sleep(int(seconds))
        case ["multiply", bits]:
            number = (1 << int(bits)) - 1
            _ = number * number
        case _:
            raise ValueError(how)


class Hold(Step):
    """Holds the GIL on the event loop."""

    name = "hold"

    def _outcome(self, params: dict[str, Any], context: Any) -> Any:
        hold_the_interpreter(params["how"])
        return "held"


@tool
def hold_in_thread(how: str, context: ToolContext) -> str:
    """Hold the GIL in a thread."""
    note(Path(os.environ["FAULTS_LOG"]), event="begin", tool="hold_in_thread", run=context.run_id)
    hold_the_interpreter(how)
    return "held"


@tool
def linger(n: int, context: ToolContext) -> str:
    """Block its thread for ten minutes if its mark exists."""
    note(Path(os.environ["FAULTS_LOG"]), event="begin", tool="linger", n=n, run=context.run_id)
    if take_mark(Path(os.environ["FAULTS_MARKS"]), f"{context.run_id}.{n}.linger"):
        note(Path(os.environ["FAULTS_LOG"]), event="lingers", tool="linger", n=n, run=context.run_id)
        time.sleep(600)
    return "stayed"


# --- patterns --------------------------------------------------------------------------------------------


class _Pattern:
    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def step(self, n: str, ms: int = 0, tool: str = "step") -> Any:
        return await self.context.tools[tool].invoke({"n": n, "ms": ms})

    async def ask(self, text: str) -> str:
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": text}])
        return str(reply.output_text)


class Branches(_Pattern):
    """Three concurrent branches; each calls a tool, the model, and a tool again."""

    async def execute(self) -> Any:
        async def branch(name: str, ms: int) -> list[Any]:
            return [
                await self.step(f"{name}1", ms),
                await self.ask(f"{name}2"),
                await self.step(f"{name}3", ms),
            ]

        return await asyncio.gather(branch("a", 10), branch("b", 25), branch("c", 40))


class Batch(_Pattern):
    """Three calls as one batch, one of which fails, then one more call."""

    async def execute(self) -> Any:
        requests = [("step", {"n": "a1"}), ("refused", {"n": "b1"}), ("step", {"n": "c1"})]
        results = await self.context.call_tool_batch(requests)
        shown = [type(each).__name__ if isinstance(each, Exception) else each for each in results]
        return [*shown, await self.step("d1"), await self.ask("d2")]


class Greedy(_Pattern):
    """Calls a tool, then holds the GIL outside any recorded call."""

    async def execute(self) -> Any:
        await self.step("a1")
        note(Path(os.environ["FAULTS_LOG"]), event="begin", tool="greedy", run=self.context.run_id)
        hold_the_interpreter(self.context.input_text)
        return "held"


class Catching(_Pattern):
    """Catches the error of a tool and continues."""

    async def execute(self) -> Any:
        done = [await self.step("a1")]
        try:
            await self.step("a2", tool="refused")
        except Exception as error:
            done.append(type(error).__name__)
        return [*done, await self.step("a3"), await self.ask("a4")]


class Impatient(_Pattern):
    """Cancels a slow call after a time-out and continues."""

    async def execute(self) -> Any:
        done: list[Any] = [await self.step("a1")]
        try:
            await asyncio.wait_for(self.step("x2", ms=60_000), 0.3)
        except TimeoutError:
            done.append("too slow")
        return [*done, await self.step("a3"), await self.ask("a4")]


class Stubborn(_Pattern):
    """Converts every exception of its branches into a value."""

    async def execute(self) -> Any:
        found = await asyncio.gather(
            self.step("a1", 10),
            self.step("b1", 20, tool="refused"),
            self.step("c1", 30),
            return_exceptions=True,
        )
        return [*(type(each).__name__ for each in found), await self.step("d2"), await self.ask("d3")]


class Receiving(_Pattern):
    """Receives as many values as its input says, with a step after each."""

    async def execute(self) -> Any:
        received = []
        for number in range(int(self.context.input_text)):
            received.append(await self.context.receive("value"))
            await self.step(f"a{number}")
        return received
