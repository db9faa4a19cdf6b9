"""Nodes in a replay: the only place through which replay by content learns where a call is made."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from openagents_worker.runtime.call_ids import Node, Nodes
from openagents_worker.runtime.prompts import PromptDigests
from openagents_worker.runtime.rules import OpenCall, Rules
from openagents_worker.runtime.unused_records import UnusedRecords

__all__ = ["RulesOfNodes"]


class RulesOfNodes(Rules):
    """The part of the rules that follows from the current task and the calls around it."""

    _unused: UnusedRecords

    def __init__(self) -> None:
        self._nodes = Nodes(self)
        self._prompts = PromptDigests()

    @abstractmethod
    def on_node_end(self, node: Node) -> None:
        """A task of the run is done."""

    def begin(self, part: str = "") -> None:
        self._nodes.begin(part)

    def end(self) -> None:
        """Forget the current task, which makes no more calls of the run."""
        self._nodes.end()

    def prompt(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        frame = self._nodes.current_frame()
        return self._prompts.digests_of(arguments, frame.node.prompts, frame.scope)

    def branch(self) -> str:
        return self._nodes.current_frame().node.path

    def place_of(self, call_id: str) -> OpenCall:
        call, scope = self._nodes.current_frame().enclosing(call_id)
        return OpenCall(call_id, call.kind, call.node, scope)

    def draw(self) -> str:
        return self._nodes.current_frame().draw()

    def next_position(self) -> int | None:
        return self._unused.next_position(self._nodes.current_frame().node.path)

    @property
    def has_unused(self) -> bool:
        return not self._unused.is_empty

    def tasks(self) -> Collection[asyncio.Task[Any]]:
        return self._nodes.tasks()

    def is_inside_a_call(self) -> bool:
        return bool(self._nodes.current_frame().outer)
