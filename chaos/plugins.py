"""The tools and patterns of a chaos run, executed by its workers."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import httpx

from openagents_worker import Reconciled, tool
from openagents_worker.errors import RetryableToolError, ToolRateLimitError
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolContext

__all__ = [
    "BEGUN",
    "Branches",
    "Mailbox",
    "charge",
    "collect",
    "pay",
    "refund",
    "refund_or_deny",
    "refund_or_fail",
    "refund_or_pay",
    "settle",
]

WAIT_IN_VAIN_S = 1.2  # longer than a second, so that the run parks

BEGUN = "begun-"
"""The API key of a call of the model: this, and when the call began, by the monotonic clock of the worker."""

_client: httpx.AsyncClient | None = None


def _outside() -> httpx.AsyncClient:
    global _client
    _client = _client or httpx.AsyncClient(timeout=60)
    return _client


async def _report(context: ToolContext, **entry: Any) -> dict[str, Any]:
    """Have one side effect outside; returns what the outside world answers."""
    entry |= {"key": context.idempotency_key, "run": context.run_id}
    answer: dict[str, Any] = (await _outside().post(os.environ["CHAOS_EFFECTS_URL"], json=entry)).json()
    if block_s := answer.get("block_s"):
        time.sleep(block_s)  # noqa: ASYNC251 - the fault: the event loop is blocked
    return answer


@tool
async def charge(n: str, ms: int, context: ToolContext, asked: int = 0, limits: int = 0) -> dict[str, Any]:
    """Has one side effect outside, and takes `ms`.

    `asked` is the serial number of the model's reply that asks for this call. The first `limits` executions
    end with a rate limit.
    """
    begun = time.monotonic()
    try:
        answer = await _report(context, n=n, begun=begun, limits=limits)
    except httpx.TransportError as error:
        raise RetryableToolError(f"the outside world did not answer: {error!r}", "charge") from error
    await asyncio.sleep(ms / 1000)
    if answer.get("limited"):
        raise ToolRateLimitError("slow down", "charge", retry_after_ms=400)
    return {"serial": answer["serial"]}


async def _pay(n: str, cents: int, ms: int, context: ToolContext, asked: int = 0) -> dict[str, Any]:
    """Pays once, and takes `ms`. `n` is the name of the payment in its run."""
    begun = time.monotonic()
    answer = await _report(context, n=n, cents=cents, begun=begun)
    await asyncio.sleep(ms / 1000)
    return {"serial": answer["serial"], "cents": cents}


async def _find(params: dict[str, Any], idempotency_key: str, context: ToolContext | None) -> Reconciled:
    """Asks the outside world whether it has got this payment."""
    found = await _outside().get(os.environ["CHAOS_EFFECTS_URL"], params={"key": idempotency_key})
    return Reconciled.not_done() if found.status_code == 404 else Reconciled.done(found.json())


pay = tool(name="pay", durable_idempotent=False)(_pay)
settle = tool(name="settle", durable_idempotent=False, reconcile=_find)(_pay)
refund = tool(name="refund", durable_idempotent=False, approval="always")(_pay)
refund_or_deny = tool(name="refund_or_deny", durable_idempotent=False, approval="always")(_pay)
refund_or_pay = tool(name="refund_or_pay", durable_idempotent=False, approval="always", reconcile=_find)(_pay)
refund_or_fail = tool(name="refund_or_fail", durable_idempotent=False, approval="always")(_pay)


@tool
async def collect(n: str, context: ToolContext, asked: int = 0) -> dict[str, Any]:
    """Waits for a value that is sent to the run."""
    return {"mail": await context.receive("mail")}


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


class Mailbox(PatternPlugin):
    """Receives values, has an effect after each, and may sleep before each or wait in vain at the end."""

    async def execute(self) -> Any:
        script = json.loads(self.context.input_text)
        charge = self.context.tools["charge"]
        received = []
        for number in range(script["values"]):
            if script["sleep_s"]:
                await self.context.sleep(script["sleep_s"])
            received.append(await self.context.receive("mail"))
            await charge.invoke({"n": f"m{number}", "ms": 0})
        if script["in_vain"]:
            received.append(await self.context.receive("nothing", timeout=WAIT_IN_VAIN_S, default="none"))
        return {"received": received}
