"""Agents whose runs are shown on pages: a tool call, an approval, a failure, a streamed reply and others."""

from __future__ import annotations

import json
from typing import Any

from tests.support.deployment import agent, call

__all__ = ["AGENTS", "HOSTILE", "IMPORTS"]

IMPORTS = "tests.dashboard.shop_agents"
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>"
_TOOLS = {name: f"{IMPORTS}.{name}" for name in ("find_order", "refund", "charge_card", "send_parcel")}


def _scripted(agent_id: str, tool: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    llm = {"provider": "scripted", "script": list(replies), "pricing": {"input": 1.0, "output": 10.0}}
    return {**agent(agent_id, tools={tool: _TOOLS[tool]}, **fields), "llm": llm}


def _called(name: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [call(name, **arguments)]}


AGENTS = (
    _scripted(
        "orders",
        "find_order",
        _called("find_order", number="A17"),
        {"text": "Order A17 costs 1.20 EUR. It left the warehouse this morning."},
    ),
    _scripted(
        "refunds",
        "refund",
        _called("refund", number="A17", cents=120),
        {"text": "The refund of 1.20 EUR is on its way."},
    ),
    _scripted("cards", "charge_card", _called("charge_card", number="A17"), {"text": "Charged."}),
    _scripted(
        "parcels",
        "send_parcel",
        _called("send_parcel", number=HOSTILE),
        {"text": HOSTILE},
    ),
    _scripted("broken", "find_order", {"error": "response", "message": "the model server has no such model"}),
    _scripted(
        "thrifty",
        "find_order",
        *[_called("find_order", number="A17")] * 3,
        {"text": "Done within the budget."},
        limits={"max_tool_calls": 1, "on_breach": "pause"},
    ),
    agent("streams"),
)
"""Their inputs do not matter. `streams` asks the model server of the installation."""


def text_of(agents: Any = AGENTS) -> str:
    """The agents file."""
    return json.dumps({"version": "1.0", "agents": list(agents)})
