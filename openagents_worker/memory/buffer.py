"""Buffer memories: the only place that stores a session's turns in its state, all of them or the newest.

An entry is `{"input": str, "tool_results": [...], "output": ...}`, oldest first. Lists in the state are
replaced and never changed in place, so that comparing the state before and after finds the difference.

The entries are for code: patterns and tools read them in the memory view. The model gets the same turns as
messages from the session's transcript, but not more turns than the buffer keeps.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic import Field

from openagents_worker.errors import SessionError
from openagents_worker.memory.base import MemoryContext, MemoryPlugin

__all__ = ["BufferMemory", "WindowBufferMemory"]


class _TurnMemory(MemoryPlugin):
    """Base class of memories that keep the turns of the session in its state."""

    external = False

    class Config(MemoryPlugin.Config):
        state_key: str = Field(
            "memory_buffer", min_length=1, description="The key of the session's state where turns are kept."
        )
        view_key: str = Field(
            "history", min_length=1, description="The key of the memory view under which the model sees them."
        )

    @property
    def limit(self) -> int | None:
        """The number of entries that are kept. None: all."""
        raise NotImplementedError

    @property
    def conversation_keys(self) -> frozenset[str]:  # type: ignore[override]  # read only, and only here
        """The key of the memory view. Empty for a subclass with an `inject` of its own."""
        is_inherited = type(self).inject is _TurnMemory.inject
        return frozenset({self.cfg.view_key}) if is_inherited else frozenset()

    @property
    def shown_turns(self) -> int | None:  # type: ignore[override]
        return self.limit if self.conversation_keys else None

    async def inject(self, context: MemoryContext) -> None:
        context.memory_view[self.cfg.view_key] = copy.deepcopy(self._newest(self._entries(context)))

    async def writeback(self, context: MemoryContext) -> None:
        entry = {
            "input": context.input_text,
            "tool_results": copy.deepcopy(context.tool_results),
            "output": context.state.get("_runtime_last_output"),
        }
        context.state[self.cfg.state_key] = self._newest([*self._entries(context), entry])

    def _entries(self, context: MemoryContext) -> list[dict[str, Any]]:
        entries = context.state.get(self.cfg.state_key, [])
        if not isinstance(entries, list):
            raise SessionError(
                f"the session state has a {type(entries).__name__} under {self.cfg.state_key!r}, not a list",
                hint="other code uses this key; set another state_key in the memory's config",
                session_id=context.session_id,
            )
        return entries

    def _newest(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return entries if self.limit is None else entries[-self.limit :]


class BufferMemory(_TurnMemory):
    """Keeps every turn, or the newest `max_items`."""

    class Config(_TurnMemory.Config):
        max_items: int | None = Field(None, gt=0, description="Number of turns that are kept. null: all.")

    @property
    def limit(self) -> int | None:
        max_items: int | None = self.cfg.max_items
        return max_items


class WindowBufferMemory(_TurnMemory):
    """Keeps the newest `window_size` turns."""

    class Config(_TurnMemory.Config):
        window_size: int = Field(20, gt=0, description="Number of turns that are kept.")

    @property
    def limit(self) -> int | None:
        window_size: int = self.cfg.window_size
        return window_size
