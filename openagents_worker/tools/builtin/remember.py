"""`remember_preference`: the tool with which a model asks the memory to keep something."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.typed import TypedTool

__all__ = ["RememberPreference"]

PENDING_WRITES = "_pending_memory_writes"
"""The key of the state from which a memory takes what it shall keep (`memory.base`)."""
MAX_TEXT_CHARS = 2_000
MAX_PENDING = 100


class RememberPreference(TypedTool):
    name = "remember_preference"
    description = (
        "Remembers a preference, a goal or a decision of the user for later conversations. "
        "It is stored when this conversation turn is completed."
    )
    spec = ToolExecutionSpec(side_effects="state")  # one call after another: each appends to the same list

    class Params(TypedTool.Params):
        rule: str = Field(
            min_length=1, max_length=MAX_TEXT_CHARS, description="What to remember, as one sentence."
        )
        category: str = Field(
            "user_feedback",
            max_length=64,
            description="The section of the memory: user_goals, user_feedback, decisions or references.",
        )
        reason: str = Field("", max_length=MAX_TEXT_CHARS, description="Why it matters, or who said it.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if context is None:
            raise ToolValidationError("there is no run whose memory could keep it", self.name)
        rule = args.rule.strip()
        if not rule:
            raise ToolValidationError("rule: is blank", self.name)
        pending = context.state.setdefault(PENDING_WRITES, [])
        if len(pending) >= MAX_PENDING:
            raise ToolValidationError(f"a run remembers at most {MAX_PENDING} things", self.name)
        pending.append({"category": args.category, "rule": rule, "reason": args.reason.strip()})
        return {"queued": True, "count": len(pending)}
