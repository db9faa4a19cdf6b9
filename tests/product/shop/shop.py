"""A product: it answers customers with an agent that may refund an order."""

from __future__ import annotations

from openagents_worker import Agent, RunContext, RunHandle, RunRequest, run_agent, tool

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


def price_of(order: str) -> int:
    """Reads the price in cents from the shop's own database."""
    return 500 * len(order)


async def settle(context: RunContext) -> str:
    """A program that refunds a cheap order at once, and asks the model about any other."""
    cents = await context.step("price", price_of, context.input_text)
    if cents <= 1_500:
        return str(await context.call_tool("refund", {"order": context.input_text}))
    reply = await context.call_llm(f"May we refund {cents} cents?")
    return reply.output_text


SETTLER = Agent("settler", llm="mock", pattern=settle, tools=[refund])


def answer(customer: str, question: str) -> RunHandle[str]:
    """Begin to answer a customer; one conversation each."""
    return run_agent.delay(RunRequest(agent_id="support", session_id=customer, input_text=question))
