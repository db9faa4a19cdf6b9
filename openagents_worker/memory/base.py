"""The contract of a memory: what a run remembers of earlier ones and leaves to later ones."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from openagents_worker.agents.problems import checked_config

__all__ = ["MemoryContext", "MemoryPlugin"]


class MemoryContext(Protocol):
    """What a memory sees of a run. `state` is the session's; it is stored when the run completes."""

    run_id: str
    agent_id: str
    session_id: str
    input_text: str
    state: dict[str, Any]
    memory_view: dict[str, Any]
    tool_results: list[dict[str, Any]]


class MemoryPlugin:
    """Base of a memory; optional, a class with `inject` and `writeback` will do.

    `inject` fills `context.memory_view`, which reaches the model; `writeback` runs after the pattern, with
    the answer under `context.state["_runtime_last_output"]`.
    """

    external: bool = True
    """Whether it has a store of its own. Its calls are recorded then, and not repeated when a run resumes;
    a memory that lives in `context.state` alone sets False."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.cfg: Any = checked_config(self.Config, self.config, type(self).__name__)

    async def inject(self, context: MemoryContext) -> None: ...

    async def writeback(self, context: MemoryContext) -> None: ...

    async def compact(self, context: MemoryContext) -> None: ...

    async def close(self) -> None: ...
