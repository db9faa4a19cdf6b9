"""Chains: the only place that combines memories.

The runtime calls the members one by one (`runtime.memory_calls`), so each call of an external member is
recorded for itself, and a member that fails does not keep the others from their work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from openagents_worker.agents import MemoryRef
from openagents_worker.memory.base import MemoryContext, MemoryPlugin

__all__ = ["ChainMemory", "ChainMember", "members_of"]

MAX_MEMBERS = 20


@dataclass(frozen=True, slots=True)
class ChainMember:
    """A memory of a chain. `fails_run`: whether the run fails if this memory does."""

    memory: Any
    fails_run: bool


class ChainMemory(MemoryPlugin):
    """Several memories: `inject` in their order, `writeback` and `compact` in the reverse order.

    `members` is set by the runtime, which creates them. A member with an `on_error` of its own does not
    follow that of the chain.
    """

    members: Sequence[ChainMember] = ()

    class Config(MemoryPlugin.Config):
        memories: list[MemoryRef] = Field(
            min_length=1,
            max_length=MAX_MEMBERS,
            description="The memories, as in the field memory of an agent. A chain may be one of them.",
        )

    @property
    def external(self) -> bool:  # type: ignore[override]  # read only, and only here
        """Whether a member has a store of its own."""
        return any(bool(getattr(each.memory, "external", True)) for each in self.members)

    @property
    def conversation_keys(self) -> frozenset[str]:  # type: ignore[override]
        """The keys of the memory view under which members keep turns."""
        keys = (frozenset(getattr(each.memory, "conversation_keys", ())) for each in self.members)
        return frozenset().union(*keys)

    @property
    def shown_turns(self) -> int | None:  # type: ignore[override]
        """The most turns that a member keeps. None: all, or no member keeps turns."""
        keepers = [each.memory for each in self.members if getattr(each.memory, "conversation_keys", ())]
        shown = [getattr(memory, "shown_turns", None) for memory in keepers]
        return None if not shown or None in shown else max(number for number in shown if number is not None)

    async def inject(self, context: MemoryContext) -> None:
        for member in self.members:
            await member.memory.inject(context)

    async def writeback(self, context: MemoryContext) -> None:
        for member in reversed(self.members):
            await member.memory.writeback(context)

    async def compact(self, context: MemoryContext) -> None:
        for member in reversed(self.members):
            if hasattr(member.memory, "compact"):
                await member.memory.compact(context)

    async def retrieve(self, query: str, context: MemoryContext) -> list[Any]:
        """What the members find, in their order. Members without `retrieve` find nothing."""
        found: list[Any] = []
        for member in self.members:
            if hasattr(member.memory, "retrieve"):
                found += await member.memory.retrieve(query, context) or ()
        return found


def members_of(memory: Any, fails_run: bool) -> Iterator[ChainMember]:
    """The memories that are called, in order: the memory itself, or the members of a chain."""
    if not isinstance(memory, ChainMemory):
        yield ChainMember(memory, fails_run)
        return
    for member in memory.members:
        yield from members_of(member.memory, member.fails_run)
