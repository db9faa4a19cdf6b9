"""A pattern and a tool that show with which definition of their agent a run goes on."""

from __future__ import annotations

from typing import Any

from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolPlugin
from tests.runtime.plugins import FAILURES

__all__ = ["Later", "Shown"]


class Later(ToolPlugin):
    """A tool that fails in the first attempt, so that a later one goes on with the run."""

    name, description = "later", "Fails at first."

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        if FAILURES.get("later"):
            raise FAILURES["later"].pop(0)
        return "done"


class Shown(PatternPlugin):
    """Calls `later`, and returns what it sees of its definition."""

    class Config(PatternPlugin.Config):
        system_prompt: str | None = None
        url: str | None = None

    async def execute(self) -> Any:
        await self.context.tools["later"].invoke({})
        reply = await self.context.call_llm("Who are you?")
        return {
            "prompt": self.cfg.system_prompt,
            "url": self.cfg.url,
            "steps": self.cfg.max_steps,
            "tools": sorted(self.context.tools),
            "model": reply.output_text,
            "most_calls": self.context.run_request.budget and self.context.run_request.budget.max_tool_calls,
        }
