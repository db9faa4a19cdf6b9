"""The contract of a memory: what a run gets from earlier runs of its session, and stores for later ones."""

from __future__ import annotations

from typing import Any, Protocol

from openagents_worker.agents.plugin import Plugin

__all__ = ["NOTED_BY", "PENDING_WRITES", "MemoryContext", "MemoryPlugin"]

PENDING_WRITES = "_pending_memory_writes"
"""The key of the state with what a run asks to remember: `{"category", "rule", "reason"}` in a list. The
write-back of a memory takes them. The tool `remember_preference` writes them."""
NOTED_BY = "noted_by"
"""The key of a note that the write-back of an earlier run of the session has not taken: the id of that run,
which may have stored it in part."""


class MemoryContext(Protocol):
    """The run, as a memory sees it. `state` is the session's state; it is stored when the run completes."""

    run_id: str
    agent_id: str
    session_id: str
    input_text: str
    state: dict[str, Any]
    memory_view: dict[str, Any]
    tool_results: list[dict[str, Any]]


class MemoryPlugin(Plugin):
    """Base class of memories. It is optional: a class with `inject` and `writeback` works too.

    `inject` fills `context.memory_view`, which is sent to the model. `writeback` is called after the pattern;
    the run's output is in `context.state["_runtime_last_output"]`.
    """

    external: bool = True
    """Whether the memory has a store of its own. If so, its calls are recorded and not repeated when a run
    resumes. A memory that uses only `context.state` sets False."""

    conversation_keys: frozenset[str] = frozenset()
    """Keys of the memory view that hold turns of the session. The model already gets these as messages."""
    shown_turns: int | None = None
    """The number of newest turns that are sent to the model. None: all turns of the context assembler."""

    async def inject(self, context: MemoryContext) -> None:
        """Fill `context.memory_view` before the pattern is executed."""

    async def writeback(self, context: MemoryContext) -> None:
        """Store what later runs of the session need. Called after the pattern has returned."""

    async def compact(self, context: MemoryContext) -> None:
        """Shorten the stored data. Called after `writeback`."""

    async def close(self) -> None:
        """Release connections and files. Called at the end of the attempt."""
