"""Replay by content: the only place that decides which record answers which call. See docs/replay.md.

A recorded call is identified by its content. The records of its own node are used first. A record of another
node is used only if that node cannot ask for it any more. Outcomes are returned in the order in which they
were recorded. If a call contradicts the journal, nothing is executed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from openagents_worker.runtime.call_ids import (
    CallIdNumbering,
    Frame,
    Node,
    OuterCall,
    content_digest,
    content_of,
    name_of,
)
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.replay_loading import sort_records
from openagents_worker.runtime.replay_nodes import RulesOfNodes
from openagents_worker.runtime.replay_waits import QUIET_S, ReplayWaits
from openagents_worker.runtime.retry_counts import RetryCounts
from openagents_worker.runtime.rules import (
    EXTEND,
    MODEL_KINDS,
    STEER,
    CallQuery,
    OpenCall,
    ReplayContradiction,
)
from openagents_worker.runtime.turns import OutcomeOrder
from openagents_worker.runtime.unused_records import UnusedRecords, described
from openagents_worker.store.formats import BY_CONTENT

__all__ = ["ReplayByContent"]

SLACK_S = 0.02  # added to the recorded duration of a call that replay waits for

CORE_DIGITS = 12  # a shorter digest is enough: the core is only used if the content is not found

OWN_KINDS = frozenset({"now", STEER, EXTEND})
"""Kinds of calls without meaningful arguments. A record of another node never answers them."""


@dataclass(slots=True, eq=False)
class _ContentQuery(CallQuery):
    """A call that begins, with the frame in which it is made."""

    frame: Frame
    takes_over: str = ""
    """The id of an unfinished call of another node that this call continues."""
    begun_as: str = ""
    """The id of an interrupted call with effects and other arguments, in whose place this call is made."""

    @property
    def node(self) -> Node:
        return self.frame.node


ALONE = "alone"
"""The key of a wait until the node is the only living one."""


class ReplayByContent(RulesOfNodes):
    """The records of earlier attempts of a run, and which of them this attempt has used."""

    format = BY_CONTENT

    def __init__(
        self,
        records: Iterable[Record],
        *,
        life: int,
        latch: Latch,
        tries: Mapping[str, int],
        begun: Iterable[OpenCall] = (),
    ) -> None:
        """`begun` are unfinished calls of which facts are stored."""
        self._latch = latch
        self._loop = asyncio.get_running_loop()
        super().__init__()
        self._ids = CallIdNumbering()
        self._ended_nodes: set[str] = set()
        self._abandoned_nodes: set[str] = set()
        self._waits = ReplayWaits(self._loop, latch)
        loaded = sort_records(records, life, begun)
        self._unused = UnusedRecords(loaded)
        for call_id in loaded.used_ids:
            self._ids.mark_used(call_id)
        self._retry_counts = RetryCounts(tries, loaded.ended)
        positions = [each.position for each in loaded.replayed if not self._unused.was_cancelled(each)]
        self._order = OutcomeOrder(self._loop, positions)
        latch.is_set.add_done_callback(lambda _: self._wake_all())

    # --- entering ----------------------------------------------------------------------------------------

    def enter(self, kind: str, name: str, digest: str, core: str = "") -> _ContentQuery:
        frame = self._nodes.current_frame()
        scope = frame.scope
        ordinal = frame.model_calls
        if kind in MODEL_KINDS:
            frame.model_calls += 1
        if not self._unused.is_empty:
            self._waits.note_progress()
        content = content_digest(scope, kind, name, digest)
        core_content = content_digest(scope, kind, name, core)[:CORE_DIGITS] if core else ""
        return _ContentQuery(kind, name, content, core_content, frame.node.path, ordinal, frame)

    def next_kind(self) -> str | None:
        following = self._following()
        return None if following is None else following.kind

    def next_name(self, *, recorded: bool = False) -> str | None:
        following = self._following()
        if isinstance(following, Record):
            return following.name
        return None if following is None or recorded else name_of(following.id)

    def _following(self) -> Record | OpenCall | None:
        """The next recorded or begun call of the current task."""
        frame = self._nodes.current_frame()
        return None if self._unused.is_empty else self._unused.next_of_node(frame.node.path, frame.scope)

    @property
    def is_replay_over(self) -> bool:
        return self._unused.is_empty or self._unused.are_only_cancelled

    # --- answering ---------------------------------------------------------------------------------------

    async def find(self, query: _ContentQuery) -> Record | None:
        """The record that answers the call; None if the call must be made.

        Waits while another node may still ask for the record. Raises `ReplayContradiction`.
        """
        if self._unused.is_empty:
            return None
        for level, digest in (("content", query.content), ("core", query.core)):
            if not digest:
                continue
            own = self._unused.first_of_node(level, digest, query.branch)
            if own is not None:
                return self._take(own)
            if query.kind in OWN_KINDS:
                return None
            if level == "content" and self._unused.open_call_of_node(query.content, query.branch) is not None:
                return None
            other = await self._find_of_other_node((level, digest), query)
            if other is not None:
                return other
        await self._take_over_begun_call(query)
        return await self._find_changed_or_contradict(query)

    async def _find_of_other_node(self, key: tuple[str, str], query: _ContentQuery) -> Record | None:
        """A record of another node. Waits until that node cannot ask for it any more."""
        if self._unused.first(key) is not None and self._next_unused_of_node(query) is not None:
            self._mark_diverged(query.node)
        while (record := self._unused.first(key)) is not None:
            if not self._is_available(record, query):
                keys = [("taken", record.call), ("node", record.node), ALONE]
                waited = record

                def is_settled(waited: Record = waited) -> bool:
                    return waited.call not in self._unused or self._is_available(waited, query)

                if not await self._waits.until(is_settled, keys):
                    if self._latch.reason is not None:
                        return None
                    self._abandoned_nodes.add(record.node)
            if record.call in self._unused:
                return self._take(record)
        return None

    async def _take_over_begun_call(self, query: _ContentQuery) -> None:
        """Continue an unfinished call of another node. Waits until that node cannot ask for it any more."""
        while (begun := self._first_begun_call(query)) is not None:
            waited = begun

            def is_settled(waited: OpenCall = waited) -> bool:
                return not self._unused.is_open(waited.id) or self._is_available(waited, query)

            keys = [("taken", begun.id), ("node", begun.node), ALONE]
            if not await self._waits.until(is_settled, keys):
                if self._latch.reason is not None:
                    return
                self._abandoned_nodes.add(begun.node)
            if self._unused.is_open(begun.id):
                query.takes_over = begun.id
                return

    def _first_begun_call(self, query: _ContentQuery) -> OpenCall | None:
        """The first unfinished call with this content of another node."""
        calls = self._unused.open_calls(query.content)
        if not calls or self._unused.open_call_of_node(query.content, query.branch) is not None:
            return None
        return next((call for call in calls.values() if call.is_begun), None)

    def _is_available(self, record: Record | OpenCall, query: _ContentQuery) -> bool:
        """Whether the node of the record is the own node, or cannot ask for the record any more."""
        return (
            record.node == query.branch
            or record.node in self._abandoned_nodes
            or record.node in self._ended_nodes
            or self._nodes.is_alone(query.node)
        )

    async def _find_changed_or_contradict(self, query: _ContentQuery) -> Record | None:
        """The next record of the node if only its prompt changed. Raises `ReplayContradiction`."""
        own = self._next_unused_of_node(query)
        if own is None or self._open_call_for(query) is not None:
            return None
        alone = self._nodes.is_alone(query.node)
        if (
            alone
            and isinstance(own, Record)
            and query.kind == own.kind
            and own.kind in MODEL_KINDS
            and query.name == own.name
        ):
            return self._take(own)
        if query.node.has_diverged:
            return None
        self._mark_diverged(query.node)
        if not alone:
            call_id = own.call if isinstance(own, Record) else own.id

            def is_taken() -> bool:
                return call_id not in self._unused and not self._unused.is_open(call_id)

            keys = [("taken", call_id), ALONE]
            await self._waits.until(lambda: is_taken() or self._nodes.is_alone(query.node), keys)
            if is_taken() or self._latch.reason is not None:
                return None
        if isinstance(own, OpenCall) and _is_begun_with_other_arguments(own, query):
            query.begun_as = own.id
            return None
        raise ReplayContradiction(
            f"the program makes the call {query.kind} {query.name} in {query.branch or 'the pattern'}, "
            f"where the journal holds {described(own)}"
        )

    def _next_unused_of_node(self, query: _ContentQuery) -> Record | OpenCall | None:
        """The first unused record of this node and scope that was not cancelled, or its first open call."""
        return self._unused.next_of_node(query.branch, query.frame.scope)

    def _mark_diverged(self, node: Node) -> None:
        """Note that a node made another call than recorded: others may use its records."""
        if not node.has_diverged:
            node.has_diverged = True
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))

    def _take(self, record: Record) -> Record:
        """Remove a record from the unused ones. It answers a call now."""
        self._unused.remove(record)
        self._wake(("taken", record.call))
        return record

    def records_inside(self, record: Record) -> Sequence[Record]:
        return self._unused.take_inside(record)

    # --- order of outcomes -------------------------------------------------------------------------------

    async def wait_for_turn(self, query: _ContentQuery, record: Record) -> bool:
        """Wait for the turn of the record. Returns False if the call must be made again.

        A call that the program had cancelled waits until it is cancelled again.
        """
        self._note_progress()
        if self._unused.was_cancelled(record):
            await self._waits.until(lambda: False, (), at_most_s=record.took_ms / 1000 + QUIET_S)
            if record.is_cancelled and self._latch.reason is None:
                self._unused.reopen_inside(record)
                return False
            return True
        query.frame.model_calls += record.model_calls
        alone = self._nodes.is_alone(query.node)
        await self._order.wait_for(record.position, self._bound_s(record.took_ms), settle=not alone)
        self._note_progress()
        return True

    async def after_stored(self, took_ms: int) -> None:
        """Wait until the recorded outcomes were returned: a new outcome comes after them."""
        if not self._unused.is_empty:
            self._waits.note_progress()
        if not self._order.are_over:
            await self._order.wait_for_all(self._bound_s(took_ms))

    def _bound_s(self, took_ms: int) -> float:
        """How long other calls may wait for a call that took so long when it was made."""
        return min(took_ms / 1000 + SLACK_S, QUIET_S)

    # --- making ------------------------------------------------------------------------------------------

    def assign_id(self, query: _ContentQuery, again: Record | None = None) -> str:
        if again is not None:
            return again.call
        call = self._open_call_for(query)
        if call is not None:
            self._unused.remove_open(call)
            self._wake(("taken", call.id))
            return call.id
        if query.begun_as and self._unused.is_open(query.begun_as):
            self._unused.remove_open(self._unused.open_calls(content_of(query.begun_as))[query.begun_as])
            self._wake(("taken", query.begun_as))
        return self._ids.next_id(query.name, query.content)

    def begun_as(self, query: _ContentQuery, call_id: str) -> str:
        return query.begun_as or call_id

    def _open_call_for(self, query: _ContentQuery) -> OpenCall | None:
        """The open call that this call continues: of its own node, of another node, or of an earlier life."""
        calls = self._unused.open_calls(query.content)
        if not calls:
            return None
        own = self._unused.open_call_of_node(query.content, query.branch) or calls.get(query.takes_over)
        return own or next((call for call in calls.values() if not call.is_begun), None)

    def inside(self, query: _ContentQuery, call_id: str) -> AbstractContextManager[Frame]:
        outer = OuterCall(call_id, query.kind, query.branch)
        return self._nodes.inside(query.frame, outer)

    def call_begins(self) -> None:
        self._waits.in_flight += 1
        if not self._unused.is_empty:
            self._waits.note_progress()

    def call_ended(self) -> None:
        self._waits.in_flight -= 1
        if not self._unused.is_empty:
            self._waits.note_progress()

    def tries_fact(self, query: _ContentQuery, call_id: str, requests: int = 1) -> str:
        return self._retry_counts.name(query, call_id, requests)

    def failed_tries(self, query: _ContentQuery, call_id: str) -> int:
        return self._retry_counts.failed_tries(query, call_id)

    def requests_sent(self, query: _ContentQuery, call_id: str) -> int:
        return self._retry_counts.requests_sent(query, call_id)

    def identity(self, query: _ContentQuery) -> dict[str, Any]:
        return {
            "node": query.branch,
            "outer": query.frame.outer,
            "core": query.core,
        }

    # --- the end -----------------------------------------------------------------------------------------

    async def unused_records(self, part: str) -> list[str]:
        """The recorded calls that the program has not made. Waits while other tasks may still make them."""

        def left() -> list[str]:
            return [] if self._unused.is_empty else self._unused.described(part)

        root = self._nodes.current_frame().node
        if self._unused.is_empty:
            return []
        if left() and not self._nodes.is_alone(root):
            await self._waits.until(
                lambda: not left() or self._nodes.is_alone(root), [ALONE], check_on_progress=True
            )
        return left()

    # --- progress ----------------------------------------------------------------------------------------

    def _note_progress(self) -> None:
        """Note the time of this progress. It only matters while records are unused."""
        if not self._unused.is_empty:
            self._waits.note_progress()

    def _wake(self, key: Hashable) -> None:
        """Wake the calls that wait for this key."""
        self._note_progress()
        self._waits.wake(key)

    def _wake_all(self) -> None:
        self._waits.wake_all()
        self._order.give_up()

    def on_node_end(self, node: Node) -> None:
        """A task of the run is done: wake the calls that wait for its node."""
        if not self._unused.is_empty:
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))
            if len(self._nodes.living) <= 1:
                self._wake(ALONE)


def _is_begun_with_other_arguments(call: OpenCall, query: _ContentQuery) -> bool:
    """Whether the call with effects was begun in this place of the program, with other arguments."""
    return call.has_intent and call.kind == query.kind and name_of(call.id) == query.name
