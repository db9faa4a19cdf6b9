"""User plugins that fail in their own frames, with secrets in their messages."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from openagents_worker import tool
from openagents_worker.errors import ModelRetryError, PermanentToolError, RetryableToolError
from openagents_worker.llm.base import LLMResponse
from openagents_worker.memory.base import MemoryContext, MemoryPlugin
from openagents_worker.patterns.base import PatternPlugin

SECRET = "hunter2secret"
PRICES = {"A17": 300}


def price_of(order: str) -> int:
    try:
        return PRICES[order]
    except KeyError as error:
        raise ValueError(f"no price at redis://:{SECRET}@shop/0") from error


class OddError(Exception):
    """Cannot be pickled: its constructor takes other arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@tool
async def price(order: str) -> int:
    """Prices an order."""
    return price_of(order)


@tool
def price_in_thread(order: str) -> int:
    """Prices an order, in a thread."""
    return price_of(order)


@tool(cpu_bound=True)
def price_in_process(order: str) -> int:
    """Prices an order, in another process."""
    return price_of(order)


@tool(cpu_bound=True)
def odd_in_process(order: str) -> int:
    """Raises an error in another process that cannot be pickled."""
    raise OddError("odd", order)


@tool
async def refuses(order: str) -> int:
    """Raises a custom coded error."""
    raise PermanentToolError(f"{order} is closed")


@tool
async def asks_again(order: str) -> int:
    """Asks the model for other arguments."""
    raise ModelRetryError(f"{order} is no order")


@tool
async def busy(order: str) -> int:
    """Raises a retryable error."""
    raise RetryableToolError("the shop is busy")


@tool
async def large(order: str) -> int:
    """Fails with a message of a megabyte."""
    raise ValueError("x" * 1_000_000)


@tool
async def huge(order: str) -> int:
    """Fails with a message that is larger than the limit of a record."""
    raise ValueError("x" * 3_000_000)


@tool
async def refuses_at_length(order: str) -> int:
    """Raises a coded error whose message is larger than the limit of a record."""
    raise PermanentToolError("x" * 3_000_000)


class CallsAndRaises(PatternPlugin):
    """Calls its tool and raises the tool's error, or another error from it."""

    class Config(PatternPlugin.Config):
        tool: str = "price"
        wraps: bool = False

    async def execute(self) -> Any:
        try:
            return await self.context.tools[self.cfg.tool].invoke({"order": "B2"}, self.context)
        except Exception as error:
            if self.cfg.wraps:
                raise RuntimeError("the order cannot be carried out") from error
            raise


WAITING: list[str] = []
GATE = asyncio.Event()


def close_gate() -> None:
    """Closes the gate before each test. A gate belongs to an event loop."""
    global GATE
    GATE = asyncio.Event()
    WAITING.clear()


class WaitsAndRaises(CallsAndRaises):
    """Like `CallsAndRaises`, but raises the tool's error only once the gate is open."""

    async def execute(self) -> Any:
        try:
            return await super().execute()
        finally:
            WAITING.append(self.context.run_id)
            await GATE.wait()


class Broken(PatternPlugin):
    """Fails itself."""

    async def execute(self) -> Any:
        return price_of("B2")


class Amnesia(MemoryPlugin):
    """A memory whose store is never available."""

    async def inject(self, context: MemoryContext) -> None:
        price_of("memory")

    async def writeback(self, context: MemoryContext) -> None:
        price_of("memory")


class Model:
    """A custom model client."""

    provider_name = "own"
    model_id = "own"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pid = os.getpid()

    async def generate(self, **_: Any) -> LLMResponse:
        price_of("model")
        raise AssertionError("it has raised")

    def count_tokens(self, text: str) -> int:
        return len(text)

    async def aclose(self) -> None:
        return
