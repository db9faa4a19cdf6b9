"""What tests read from a page, and the agents whose runs they show. The runs are real."""

from __future__ import annotations

import re
from html import unescape

from tests.support.runner import Process, agent, calls, scripted

__all__ = ["ASKS", "CHARGE", "FAILS", "LOOK", "USES", "asking", "ids_of", "words_of"]

LOOK = {"id": "look", "impl": "tests.runtime.plugins.Look"}
CHARGE = {"id": "charge", "impl": "tests.runtime.plugins.Charge"}
FAILS = agent("fails", llm=scripted({"error": "response", "message": "no such model"}))
USES = agent("uses", llm=scripted(calls(("look", {"who": "ann"})), {"text": "It is ann."}), tools=[LOOK])
ASKS = agent(
    "asks",
    llm=scripted(calls(("charge", {"who": "ann"})), {"text": "charged"}),
    tools=[{**CHARGE, "approval": "always"}],
)


def ids_of(page: str) -> list[str]:
    """The ids of the runs of a list."""
    return re.findall(r'class="oa-run-link" href="/run/([^"]+)"', page)


def words_of(page: str) -> str:
    """The text of a page on one line."""
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


async def asking(worker: Process) -> str:
    """A run that waits for an approval; returns the id of the call."""
    await worker.submit(agent_id="asks")
    await worker.execute()
    return (await worker.record()).waiting[0].call_id
