"""Function patterns: the only place that makes a pattern of an async function.

```python
from openagents_worker import RunContext


async def researcher(context: RunContext) -> str:
    found = await context.call_tool("search", {"query": context.input_text})
    reply = await context.call_llm(f"Answer from these results: {found}")
    return reply.output_text
```
In the agents file: `"pattern": {"impl": "shop.agents.researcher"}`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import Field

from openagents_worker.agents.code_path import CodePath
from openagents_worker.patterns.base import PatternPlugin, RunContext
from openagents_worker.patterns.step_limits import step_limit

__all__ = ["FunctionPattern"]


class FunctionPattern(PatternPlugin):
    """An async function as a pattern: it is called with the context, and its result is the run's output."""

    class Config(PatternPlugin.Config):
        system_prompt: str | None = Field(
            None, description="The system message of `context.call_llm`. null: none."
        )

    def __init__(
        self, function: Callable[[RunContext], Awaitable[Any]], config: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config)
        self._function = function
        self.code_path = str(CodePath.of(function))
        """The name of the function in logs, in place of this class."""

    async def execute(self) -> Any:
        """Call the function. Each `call_llm` is a step: it has the system prompt and the limits of steps."""
        context: Any = self.context
        context.system_prompt = self.cfg.system_prompt
        context.max_llm_calls = step_limit(context, self.cfg.max_steps)
        context.step_timeout_ms = self.cfg.step_timeout_ms
        return await self._function(context)
