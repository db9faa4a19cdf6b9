"""A product: it answers customers with an agent that may refund an order."""

from __future__ import annotations

from openagents_worker import RunHandle, RunRequest, run_agent, tool

AGENT = {"id": "support", "tools": [{"id": "refund", "impl": "shop.refund"}]}

refunded: list[str] = []


@tool
async def refund(order: str) -> str:
    """Pays an order back.

    Args:
        order: The order, as printed on the invoice.
    """
    refunded.append(order)
    return f"{order} is paid back"


def answer(customer: str, question: str) -> RunHandle[str]:
    """Begin to answer a customer; one conversation each."""
    return run_agent.delay(RunRequest(agent_id="support", session_id=customer, input_text=question))
