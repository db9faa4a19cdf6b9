"""Plugins that call models and tools from every hook of a run."""

from __future__ import annotations

from typing import Any

from openagents_worker.context.base import ContextAssemblerPlugin, ContextAssemblyResult
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolPlugin
from tests.runtime.plugins import GATES, LOG

AFTER = "after"
"""The gate at which the code waits once its call has been answered."""


async def ask(context: Any, kind: str) -> str:
    """Make a call of a model or a tool, then wait."""
    if kind == "model":
        reply = await context.llm_client.generate(messages=[{"role": "user", "content": "aside"}])
        answer = reply.output_text
    else:
        answer = str(await context.tools["charge"].invoke({"who": "aside", "gate": "aside"}))
    LOG.append(("asked", answer))
    await GATES[AFTER].wait()
    return answer


class AskingMemory(MemoryPlugin):
    """Makes calls in one of its methods, as an external memory or as one in the session state."""

    class Config(MemoryPlugin.Config):
        where: str
        kind: str
        external: bool

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.external = self.cfg.external

    async def _at(self, verb: str, context: Any) -> None:
        LOG.append(("verb", verb))
        if self.cfg.where == verb:
            answer = await ask(context, self.cfg.kind)
            context.state["remembered"] = answer
            context.memory_view["remembered"] = answer

    async def inject(self, context: Any) -> None:
        await self._at("inject", context)

    async def writeback(self, context: Any) -> None:
        await self._at("writeback", context)

    async def compact(self, context: Any) -> None:
        await self._at("compact", context)


class AskingAssembler(ContextAssemblerPlugin):
    """Makes calls while it compacts or assembles the context."""

    class Config(ContextAssemblerPlugin.Config):
        where: str
        kind: str

    context: Any = None

    async def compact(self, **given: Any) -> None:
        if self.cfg.where == "context.compact":
            given["session_state"]["summary"] = await ask(self.context, self.cfg.kind)

    async def assemble(self, **given: Any) -> ContextAssemblyResult:
        if self.cfg.where == "assemble":
            await ask(self.context, self.cfg.kind)
        return ContextAssemblyResult(transcript=await given["session_manager"].load_messages("s1"))


class AskingTool(ToolPlugin):
    """Makes calls inside its own call."""

    name = "asking"
    description = "Asks."

    class Config(ToolPlugin.Config):
        kind: str

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("begin", "asking"))
        answer = await ask(context, self.cfg.kind)
        context.state["told"] = answer
        return answer


class AskingPattern(PatternPlugin):
    """Makes calls itself or through its tool, then returns the model's reply."""

    class Config(PatternPlugin.Config):
        where: str
        kind: str

    async def execute(self) -> str:
        if self.cfg.where == "pattern":
            await ask(self.context, self.cfg.kind)
        if self.cfg.where == "tool":
            await self.context.tools["asking"].invoke({}, self.context)
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": "answer"}])
        text: str = reply.output_text
        return text
