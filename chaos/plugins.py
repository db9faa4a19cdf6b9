"""The tools and patterns of a chaos run, executed by its workers."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import httpx

from openagents_worker import tool
from openagents_worker.errors import RetryableToolError, ToolRateLimitError
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolContext

__all__ = ["Branches", "charge"]

_client: httpx.AsyncClient | None = None


@tool
async def charge(n: str, ms: int, context: ToolContext, asked: int = 0, limits: int = 0) -> dict[str, Any]:
    """Has one side effect outside, and takes `ms`.

    `asked` is the serial number of the model's reply that asks for this call. The first `limits` executions
    end with a rate limit.
    """
    global _client
    begun = time.monotonic()
    _client = _client or httpx.AsyncClient(timeout=60)
    key = context.idempotency_key
    entry = {"key": key, "run": context.run_id, "n": n, "begun": begun, "limits": limits}
    try:
        answer = (await _client.post(os.environ["CHAOS_EFFECTS_URL"], json=entry)).json()
    except httpx.TransportError as error:
        raise RetryableToolError(f"the outside world did not answer: {error!r}", "charge") from error
    if block_s := answer.get("block_s"):
        time.sleep(block_s)  # noqa: ASYNC251 - the fault: the event loop is blocked
    await asyncio.sleep(ms / 1000)
    if answer.get("limited"):
        raise ToolRateLimitError("slow down", "charge", retry_after_ms=400)
    return {"serial": answer["serial"]}


class Branches(PatternPlugin):
    """Three concurrent branches; each has an effect, asks the model, and has another effect."""

    async def execute(self) -> Any:
        return await asyncio.gather(
            *(self._branch(name, ms) for name, ms in zip("abc", (10, 60, 150), strict=True))
        )

    async def _branch(self, name: str, ms: int) -> list[Any]:
        charge = self.context.tools["charge"]
        first = await charge.invoke({"n": f"{name}1", "ms": ms})
        reply = await self.context.llm_client.generate(
            messages=[{"role": "user", "content": f"branch {name}"}]
        )
        last = await charge.invoke({"n": f"{name}2", "ms": ms})
        return [first, reply.output_text, last]
