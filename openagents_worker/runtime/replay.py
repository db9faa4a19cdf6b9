"""Replay by content: the only place that decides which record answers which call. See docs/replay.md.

A recorded call is identified by its content. The records of its own node are used first. A record of another
node is used only if that node cannot ask for it any more. Outcomes are returned in the order in which they
were recorded. If a call contradicts the journal, nothing is executed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from openagents_worker.runtime.call_ids import (
    Frame,
    Node,
    Nodes,
    OuterCall,
    content_digest,
    content_of,
    name_of,
)
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.prompts import PromptDigests
from openagents_worker.runtime.rules import REMEMBER, CallQuery, ReplayContradiction, Rules
from openagents_worker.runtime.turns import OutcomeOrder, resolve
from openagents_worker.store.formats import BY_CONTENT

__all__ = ["ReplayByContent"]

QUIET_S = 5.0  # after so long without progress, a call no longer waits for other nodes
SLACK_S = 0.02  # added to the recorded duration of a call that replay waits for

CORE_DIGITS = 12  # a shorter digest is enough: the core is only used if the content is not found

OWN_KINDS = frozenset({"now"})
"""Kinds of calls without meaningful arguments. A record of another node never answers them."""
MODEL_KINDS = frozenset({"model", "http"})
"""Kinds of calls whose argument is a prompt. It can contain data that is not recorded, such as a date."""


@dataclass(slots=True, eq=False)
class _ContentQuery(CallQuery):
    """A call that begins, with the frame in which it is made."""

    frame: Frame
    takes_over: str = ""
    """The id of an unfinished call of another node that this call continues."""

    @property
    def node(self) -> Node:
        return self.frame.node


@dataclass(slots=True, eq=False)
class _OpenCall:
    """An unfinished call of an earlier attempt: calls inside it are recorded, but not its outcome."""

    id: str
    kind: str
    node: str
    scope: str
    is_begun: bool = True
    """False for a call that failed in an earlier life. It is made again if the program makes it; it is not a
    contradiction if the program does not."""


ALONE = "alone"


class ReplayByContent(Rules):
    """The records of earlier attempts of a run, and which of them this attempt has used."""

    format = BY_CONTENT

    def __init__(
        self, records: Iterable[Record], *, life: int, latch: Latch, tries: Mapping[str, int]
    ) -> None:
        self._latch = latch
        self._loop = asyncio.get_running_loop()
        self._nodes = Nodes(self._on_node_end)
        self._prompts = PromptDigests()
        self._unused: dict[str, Record] = {}
        self._by_key: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
        self._inside_call: dict[str, list[Record]] = defaultdict(list)
        self._cancelled_after_record: set[str] = set()
        self._open_calls: dict[str, dict[str, _OpenCall]] = defaultdict(dict)
        self._tries_facts: dict[str, list[str]] = defaultdict(list)
        self._tries = dict(tries)
        self._ids = _CallIdNumbering()
        self._ended_nodes: set[str] = set()
        self._abandoned_nodes: set[str] = set()
        self._last_progress_s = self._loop.time()
        self._in_flight = 0
        self._waiting: dict[Hashable, list[asyncio.Future[None]]] = defaultdict(list)
        self._order = OutcomeOrder(self._loop, ())
        self._load(records, life)
        latch.is_set.add_done_callback(lambda _: self._wake_all())

    # --- loading -----------------------------------------------------------------------------------------

    def _load(self, records: Iterable[Record], life: int) -> None:
        """Sort the records of earlier attempts: to be replayed, inside other calls, or to be made again."""
        stored: dict[str, Record] = {}
        for record in records:
            if record.call.endswith("!"):
                self._cancelled_after_record.add(record.call[:-1])
                continue
            if record.call in stored:  # a later record of a call replaces an earlier one
                del stored[record.call]
                self._cancelled_after_record.discard(record.call)
            stored[record.call] = record
        reopened = _reopened_calls(stored.values(), life)
        ended = stored.keys() - reopened
        positions = []
        for call, record in stored.items():
            self._ids.mark_used(call)
            self._open_outer_calls(record, stored.keys())
            enclosing = [outer.id for outer in record.outer if outer.id in ended]
            if call in reopened:
                self._add_open(_OpenCall(call, record.kind, record.node, record.scope, is_begun=False))
            elif enclosing:  # replayed together with the call in which it was made
                for outer in enclosing:
                    self._inside_call[outer].append(record)
            else:
                self._add(record)
                if not self._was_cancelled(record):
                    positions.append(record.position)
        self._load_tries(ended)
        self._order = OutcomeOrder(self._loop, positions)

    def _open_outer_calls(self, record: Record, stored: Collection[str]) -> None:
        """Add the enclosing calls without a record: they were in progress when their attempt ended."""
        scope = ""
        for outer in record.outer:
            if outer.id not in stored:
                self._ids.mark_used(outer.id)
                self._add_open(_OpenCall(outer.id, outer.kind, outer.node, scope))
            scope = outer.id

    def _load_tries(self, ended: Collection[str]) -> None:
        """Index the retry counts of calls that have no final record."""
        for fact in self._tries:
            call, kind, node = _parse_tries(fact)
            if kind and call not in ended:
                self._tries_facts[f"{kind}\n{node}\n{name_of(call)}"].append(fact)
                self._tries_facts[call].append(fact)

    def _add(self, record: Record) -> None:
        self._unused[record.call] = record
        for key in _keys(record):
            self._by_key[key][record.call] = record

    def _add_open(self, call: _OpenCall) -> None:
        self._open_calls[content_of(call.id)].setdefault(call.id, call)

    # --- entering ----------------------------------------------------------------------------------------

    def begin(self, part: str = "") -> None:
        self._nodes.begin(part)

    def end(self) -> None:
        self._nodes.end()

    def prompt(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        frame = self._nodes.current_frame()
        return self._prompts.digests_of(arguments, frame.node.prompts, frame.scope)

    def enter(self, kind: str, name: str, digest: str, core: str = "") -> _ContentQuery:
        frame = self._nodes.current_frame()
        scope = frame.scope
        ordinal = frame.model_calls
        if kind in MODEL_KINDS:
            frame.model_calls += 1
        self._note_progress()
        content = content_digest(scope, kind, name, digest)
        core_content = content_digest(scope, kind, name, core)[:CORE_DIGITS] if core else ""
        return _ContentQuery(kind, name, content, core_content, frame.node.path, ordinal, frame)

    def branch(self) -> str:
        return self._nodes.current_frame().node.path

    def is_inside_a_call(self) -> bool:
        return bool(self._nodes.current_frame().outer)

    @property
    def is_replayed(self) -> bool:
        return not any(not self._was_cancelled(record) for record in self._unused.values())

    # --- answering ---------------------------------------------------------------------------------------

    async def find(self, query: _ContentQuery) -> Record | None:
        """The record that answers the call; None if the call must be made.

        Waits while another node may still ask for the record. Raises `ReplayContradiction`.
        """
        if not self._unused and not self._open_calls:
            return None
        for level, digest in (("content", query.content), ("core", query.core)):
            if not digest:
                continue
            own = _first_value(self._by_key.get((level, digest, query.branch)))
            if own is not None:
                return self._take(own)
            if query.kind in OWN_KINDS:
                return None
            if level == "content" and self._open_call_of_node(query) is not None:
                return None
            other = await self._find_of_other_node((level, digest), query)
            if other is not None:
                return other
        await self._take_over_begun_call(query)
        return await self._find_changed_or_contradict(query)

    async def _find_of_other_node(self, key: tuple[str, str], query: _ContentQuery) -> Record | None:
        """A record of another node. Waits until that node cannot ask for it any more."""
        if key in self._by_key and self._by_key[key] and self._next_unused_of_node(query) is not None:
            self._mark_diverged(query.node)
        while (record := self._first_record(key)) is not None:
            if not self._is_available(record, query):
                keys = [("taken", record.call), ("node", record.node), ALONE]
                waited = record

                def is_settled(waited: Record = waited) -> bool:
                    return waited.call not in self._unused or self._is_available(waited, query)

                if not await self._wait_until(is_settled, keys):
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

            def is_settled(waited: _OpenCall = waited) -> bool:
                return not self._is_open(waited.id) or self._is_available(waited, query)

            keys = [("taken", begun.id), ("node", begun.node), ALONE]
            if not await self._wait_until(is_settled, keys):
                if self._latch.reason is not None:
                    return
                self._abandoned_nodes.add(begun.node)
            if self._is_open(begun.id):
                query.takes_over = begun.id
                return

    def _first_begun_call(self, query: _ContentQuery) -> _OpenCall | None:
        """The first unfinished call with this content of another node."""
        calls = self._open_calls.get(query.content)
        if not calls or self._open_call_of_node(query) is not None:
            return None
        return next((call for call in calls.values() if call.is_begun), None)

    def _first_record(self, key: tuple[str, str]) -> Record | None:
        """The first record under a key; cancelled ones come last."""
        found = self._by_key.get(key)
        if not found:
            return None
        return next((record for record in found.values() if not record.is_cancelled), _first_value(found))

    def _is_available(self, record: Record | _OpenCall, query: _ContentQuery) -> bool:
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
                return call_id not in self._unused and not self._is_open(call_id)

            keys = [("taken", call_id), ALONE]
            await self._wait_until(lambda: is_taken() or self._nodes.is_alone(query.node), keys)
            if is_taken() or self._latch.reason is not None:
                return None
        raise ReplayContradiction(
            f"the program makes the call {query.kind} {query.name} in {query.branch or 'the pattern'}, "
            f"where the journal holds {_described(own)}"
        )

    def _next_unused_of_node(self, query: _ContentQuery) -> Record | _OpenCall | None:
        """The first unused record of this node and scope that was not cancelled, or its first open call."""
        scope = query.frame.scope
        records = self._by_key.get(("node", query.branch, scope), {})
        record = next((each for each in records.values() if not each.is_cancelled), None)
        if record is not None or not self._open_calls:
            return record
        for calls in self._open_calls.values():
            for call in calls.values():
                if call.is_begun and call.node == query.branch and call.scope == scope:
                    return call
        return None

    def _open_call_of_node(self, query: _ContentQuery) -> _OpenCall | None:
        """The unfinished call with this content that the query's own node began."""
        calls = self._open_calls.get(query.content)
        if not calls:
            return None
        return next((call for call in calls.values() if call.node == query.branch), None)

    def _is_open(self, call_id: str) -> bool:
        return call_id in self._open_calls.get(content_of(call_id), {})

    def _may_stay_unused(self, call_id: str) -> bool:
        """Whether the call failed in an earlier life. Then it and the calls inside it need not be made."""
        call = self._open_calls.get(content_of(call_id), {}).get(call_id) if call_id else None
        return call is not None and not call.is_begun

    def _mark_diverged(self, node: Node) -> None:
        """Note that a node made another call than recorded: others may use its records."""
        if not node.has_diverged:
            node.has_diverged = True
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))

    def _take(self, record: Record) -> Record:
        """Remove a record from the unused ones. It answers a call now."""
        del self._unused[record.call]
        for key in _keys(record):
            del self._by_key[key][record.call]
            if not self._by_key[key]:
                del self._by_key[key]
        self._wake(("taken", record.call))
        return record

    def records_inside(self, record: Record) -> Sequence[Record]:
        return self._inside_call.pop(record.call, ())

    def _reopen_inside(self, record: Record) -> None:
        """A cancelled call is made again. Calls recorded inside it now answer calls inside it."""
        depth = len(record.outer) + 1
        for inner in self._inside_call.pop(record.call, ()):
            if not any(outer.id in self._inside_call for outer in inner.outer[depth:]):
                self._add(inner)

    # --- order of outcomes -------------------------------------------------------------------------------

    async def wait_for_turn(self, query: _ContentQuery, record: Record) -> bool:
        """Wait for the turn of the record. Returns False if the call must be made again.

        A call that the program had cancelled waits until it is cancelled again.
        """
        self._note_progress()
        if self._was_cancelled(record):
            await self._wait_until(lambda: False, (), at_most_s=record.took_ms / 1000 + QUIET_S)
            if record.is_cancelled and self._latch.reason is None:
                self._reopen_inside(record)
                return False
            return True
        query.frame.model_calls += record.model_calls
        alone = self._nodes.is_alone(query.node)
        await self._order.wait_for(record.position, self._bound_s(record.took_ms), settle=not alone)
        self._note_progress()
        return True

    async def after_stored(self, took_ms: int) -> None:
        """Wait until the recorded outcomes were returned: a new outcome comes after them."""
        self._note_progress()
        if not self._order.are_over:
            await self._order.wait_for_all(self._bound_s(took_ms))

    def _bound_s(self, took_ms: int) -> float:
        """How long other calls may wait for a call that took so long when it was made."""
        return min(took_ms / 1000 + SLACK_S, QUIET_S)

    def _was_cancelled(self, record: Record) -> bool:
        """Whether the program saw a cancellation of this call, with or without a recorded outcome."""
        return record.is_cancelled or record.call in self._cancelled_after_record

    # --- making ------------------------------------------------------------------------------------------

    def assign_id(self, query: _ContentQuery, again: Record | None = None) -> str:
        if again is not None:
            return again.call
        call = self._open_call_for(query)
        if call is not None:
            calls = self._open_calls[query.content]
            del calls[call.id]
            if not calls:
                del self._open_calls[query.content]
            self._wake(("taken", call.id))
            return call.id
        return self._ids.next_id(query.name, query.content)

    def _open_call_for(self, query: _ContentQuery) -> _OpenCall | None:
        """The open call that this call continues: of its own node, of another node, or of an earlier life."""
        if not self._open_calls:
            return None
        calls = self._open_calls.get(query.content, {})
        own = self._open_call_of_node(query) or calls.get(query.takes_over)
        return own or next((call for call in calls.values() if not call.is_begun), None)

    def inside(self, query: _ContentQuery, call_id: str) -> AbstractContextManager[Frame]:
        outer = OuterCall(call_id, query.kind, query.branch)
        return self._nodes.inside(query.frame, outer)

    def call_begins(self) -> None:
        self._in_flight += 1
        self._note_progress()

    def call_ended(self) -> None:
        self._in_flight -= 1
        self._note_progress()

    def tries_fact(self, query: _ContentQuery, call_id: str) -> str:
        return f"{call_id}\n{query.kind}\n{query.branch}"

    def failed_tries(self, query: _ContentQuery, call_id: str) -> int:
        """How often this call was retried later. A model call with a new prompt inherits the count."""
        if not self._tries_facts:
            return 0
        facts = self._tries_facts.get(call_id)
        if facts is None and query.kind in MODEL_KINDS:
            facts = self._tries_facts.get(f"{query.kind}\n{query.branch}\n{query.name}")
        return sum(self._tries[fact] for fact in facts or ())

    def identity(self, query: _ContentQuery) -> dict[str, Any]:
        return {
            "node": query.branch,
            "outer": query.frame.outer,
            "core": query.core,
        }

    # --- the end -----------------------------------------------------------------------------------------

    async def unused_records(self, part: str) -> list[str]:
        """The recorded calls that the program has not made. Waits while other tasks may still make them."""

        if not self._unused and not self._open_calls:
            return []

        def left() -> list[str]:
            unused = [
                f"{record.kind} {record.name} ({record.call})"
                for record in self._unused.values()
                if not self._was_cancelled(record)
                and _belongs_to(record.node, part)
                and not any(self._may_stay_unused(outer.id) for outer in record.outer)
            ]
            opened = [
                f"{call.kind} {name_of(call.id)} ({call.id})"
                for calls in self._open_calls.values()
                for call in calls.values()
                if call.is_begun and _belongs_to(call.node, part) and not self._may_stay_unused(call.scope)
            ]
            return unused + opened

        root = self._nodes.current_frame().node
        if left() and not self._nodes.is_alone(root):
            await self._wait_until(
                lambda: not left() or self._nodes.is_alone(root), [ALONE], check_on_progress=True
            )
        return left()

    # --- waiting -----------------------------------------------------------------------------------------

    def _note_progress(self) -> None:
        """Note the time of this progress. It only matters while records are unused."""
        if self._unused or self._open_calls:
            self._last_progress_s = self._loop.time()

    async def _wait_until(
        self,
        condition: Callable[[], bool],
        keys: Sequence[Hashable],
        *,
        at_most_s: float | None = None,
        check_on_progress: bool = False,
    ) -> bool:
        """Wait for a condition. False if the run is latched or makes no progress, or after `at_most_s`.

        The condition is checked when one of `keys` is woken; with `check_on_progress`, when any key is.
        """
        began_s = self._loop.time()
        if check_on_progress:
            keys = [*keys, "any"]
        while not condition():
            now_s = self._loop.time()
            left_s = QUIET_S if self._in_flight else self._last_progress_s + QUIET_S - now_s
            if at_most_s is not None:
                left_s = min(left_s, began_s + at_most_s - now_s)
            if left_s <= 1e-6 or self._latch.reason is not None:
                return False
            await self._wait_for(keys, left_s)
        return True

    async def _wait_for(self, keys: Sequence[Hashable], at_most_s: float) -> None:
        """Wait until one of the keys is woken, at most `at_most_s` seconds."""
        waiting: asyncio.Future[None] = self._loop.create_future()
        for key in (*keys, "latch"):
            self._waiting[key].append(waiting)
        timer = self._loop.call_later(at_most_s, resolve, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            for key in (*keys, "latch"):
                futures = self._waiting.get(key)
                if futures is not None:
                    if waiting in futures:
                        futures.remove(waiting)
                    if not futures:
                        del self._waiting[key]

    def _wake(self, key: Hashable) -> None:
        """Wake the calls that wait for this key."""
        self._note_progress()
        for each in (key, "any"):
            for waiting in self._waiting.get(each, ()):
                resolve(waiting)

    def _wake_all(self) -> None:
        for futures in self._waiting.values():
            for waiting in futures:
                resolve(waiting)
        self._order.give_up()

    def _on_node_end(self, node: Node) -> None:
        """A task of the run is done: wake the calls that wait for its node."""
        if self._unused or self._open_calls:
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))
            if len(self._nodes.living) <= 1:
                self._wake(ALONE)


class _CallIdNumbering:
    """Assigns call ids. The calls with the same content are numbered; each number is used once."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._beyond: dict[str, set[int]] = {}

    def mark_used(self, call_id: str) -> None:
        """Mark an id as used, by a record or by an open call."""
        parts = call_id.rsplit(":", 2)
        if len(parts) == 3:
            self._add(parts[1], int(parts[2]))

    def next_id(self, name: str, content: str) -> str:
        number = self._taken.get(content, 0) + 1
        self._add(content, number)
        return f"{name}:{content}:{number}"

    def _add(self, content: str, number: int) -> None:
        taken = self._taken.get(content, 0)
        if number != taken + 1:
            if number > taken:
                self._beyond.setdefault(content, set()).add(number)
            return
        beyond = self._beyond.get(content)
        while beyond and number + 1 in beyond:
            number += 1
            beyond.discard(number)
        self._taken[content] = number


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    """The keys under which a record can be found."""
    content = content_of(record.call)
    yield ("content", content)
    yield ("content", content, record.node)
    if record.core:
        yield ("core", record.core)
        yield ("core", record.core, record.node)
    yield ("node", record.node, record.scope)


def _first_value(records: Mapping[str, Record] | None) -> Record | None:
    return next(iter(records.values()), None) if records else None


def _reopened_calls(records: Iterable[Record], life: int) -> set[str]:
    """The ids of the calls that ended an earlier life. They are made again in this life.

    These are errors and cancellations after which neither their node nor one of its parents recorded
    anything. If something followed, the program had handled the error, and it is replayed.
    """
    went_on: set[str] = set()
    reopened: set[str] = set()
    for record in reversed(list(records)):
        ended_badly = "error" in record.outcome or record.is_cancelled
        if (
            record.life < life
            and ended_badly
            and not any(path in went_on for path in _path_and_parents(record.node))
        ):
            reopened.add(record.call)
        else:
            went_on.add(record.node)
    return reopened


def _path_and_parents(path: str) -> Iterator[str]:
    yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _belongs_to(node: str, part: str) -> bool:
    """Whether a node belongs to `part` or to an earlier part of the run."""
    return part == REMEMBER or not (node == REMEMBER or node.startswith(f"{REMEMBER}/"))


def _parse_tries(fact: str) -> tuple[str, str, str]:
    """Split the name of a retry count into call id, kind and node."""
    call, _, rest = fact.partition("\n")
    kind, _, node = rest.partition("\n")
    return call, kind, node


def _described(call: Record | _OpenCall) -> str:
    if isinstance(call, Record):
        return f"{call.kind} {call.name} ({call.call})"
    return f"{call.kind} {name_of(call.id)} ({call.id}), which was begun"
