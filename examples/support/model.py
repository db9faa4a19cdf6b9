"""The scripted model of the example: if there is no API key, it looks orders up and refunds them."""

from __future__ import annotations

import re
from typing import Any

from examples.replies import call, question, results
from openagents_worker.testing.model_server import ModelServerRequest

NUMBER = re.compile(r"\b[A-Z]\d+\b")


def reply(request: ModelServerRequest) -> dict[str, Any]:
    """One reply: look the order up, pay it back if the customer asks for that, and say what came of it."""
    said = [str(m["content"]) for m in request.messages if m["role"] == "user"]
    numbers = NUMBER.findall(" ".join(said))
    if not numbers:
        return {"text": "Which order do you mean? Please send me its number."}
    if request.n == 0:
        return {"tool_calls": [call("find_order", number=numbers[-1])]}
    order = results(request, "find_order")[-1]
    if "error" in order:
        return {"text": f"I cannot help with this order: {order['message']}."}
    if request.n == 1 and "money back" in question(request):
        asked = {"number": order["number"], "cents": order["cents"], "reason": question(request)}
        return {"tool_calls": [call("refund", **asked)]}
    for paid in results(request, "refund"):
        if "error" in paid:
            return {"text": f"I could not pay the {order['item']} back: {paid['message']}."}
        return {"text": f"{paid['refunded_cents']} cents for the {order['item']} were paid back."}
    return {"text": f"Of your {order['item']}, {order['refunded_cents']} cents were paid back."}
