"""The product of docs/testing.md, as a module `shop` beside its test."""

import sys
import types

from openagents_worker import RunRequest, run_agent, tool

shop = sys.modules.setdefault("shop", types.ModuleType("shop"))
shop.refunded = []


@tool
async def refund(order: str) -> str:
    """Pays an order back."""
    shop.refunded.append(order)
    return f"{order} is paid back"


def answer(customer, question):
    return run_agent.delay(RunRequest(agent_id="support", session_id=customer, input_text=question))


shop.refund = refund
shop.answer = answer
