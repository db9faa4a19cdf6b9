"""Replay: which recorded call answers which call. The only place that knows the rules.

A recorded call is answered by what it asks. Its own node's records go first; another node's record is taken
only when that node cannot come for it any more; answers are handed out in the order in which they were
recorded. Whoever contradicts what is recorded executes nothing.
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
from openagents_worker.runtime.rules import REMEMBER, Question, ReplayContradiction, Rules
from openagents_worker.runtime.turns import Turns, resolve
from openagents_worker.store.formats import BY_CONTENT

__all__ = ["ReplayByContent"]

QUIET_S = 5.0  # a run in which nothing has moved for so long waits for nobody who is still to come
SLACK_S = 0.02  # a call whose answer came at once is still given a moment

CORE_DIGITS = 12  # a prompt's core is only asked for where its content is not found

OWN_KINDS = frozenset({"now"})
"""Kinds of calls whose arguments say nothing: no other node's record ever answers them."""
MODEL_KINDS = frozenset({"model", "http"})
"""Kinds of calls whose arguments are a prompt, which may hold what is not recorded: a date, a template."""


@dataclass(slots=True, eq=False)
class _ContentQuestion(Question):
    """A call at its entry, with the frame in which it is made."""

    frame: Frame
    takes_over: str = ""
    """The id of a begun call whose node cannot come for it any more."""

    @property
    def node(self) -> Node:
        return self.frame.node


@dataclass(slots=True, eq=False)
class _OpenCall:
    """A call that was begun and has no record of its own, but something of it is stored."""

    id: str
    kind: str
    node: str
    scope: str
    is_begun: bool = True
    """False for one that ended badly in an earlier life: it is made again where it is asked for, and nothing
    asks for it where the program goes another way now."""


ALONE = "alone"


class ReplayByContent(Rules):
    """The records of a run's earlier attempts, and what this attempt has asked of them so far."""

    format = BY_CONTENT

    def __init__(
        self, records: Iterable[Record], *, life: int, latch: Latch, tries: Mapping[str, int]
    ) -> None:
        self._latch = latch
        self._loop = asyncio.get_running_loop()
        self._nodes = Nodes(self._on_node_end)
        self._prompts = PromptDigests()
        self._unread: dict[str, Record] = {}
        self._by: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
        self._inside: dict[str, list[Record]] = defaultdict(list)
        self._told_cancelled: set[str] = set()
        self._open: dict[str, dict[str, _OpenCall]] = defaultdict(dict)
        self._tried: dict[str, list[str]] = defaultdict(list)
        self._tries = dict(tries)
        self._ids = _Ids()
        self._ended_nodes: set[str] = set()
        self._given_up: set[str] = set()
        self._moved_s = self._loop.time()
        self._in_flight = 0
        self._waiting: dict[Hashable, list[asyncio.Future[None]]] = defaultdict(list)
        self._turns = Turns(self._loop, ())
        self._load(records, life)
        latch.is_set.add_done_callback(lambda _: self._wake_all())

    # --- loading -----------------------------------------------------------------------------------------

    def _load(self, records: Iterable[Record], life: int) -> None:
        stored: dict[str, Record] = {}
        for record in records:
            if record.call.endswith("!"):
                self._told_cancelled.add(record.call[:-1])
                continue
            if record.call in stored:  # a later record of a call takes the place of an earlier one
                del stored[record.call]
                self._told_cancelled.discard(record.call)
            stored[record.call] = record
        reopened = _reopened(stored.values(), life)
        ended = stored.keys() - reopened
        undelivered = []
        for call, record in stored.items():
            self._ids.take(call)
            self._open_outer_calls(record, stored.keys())
            enclosing = [outer.id for outer in record.outer if outer.id in ended]
            if call in reopened:
                self._add_open(_OpenCall(call, record.kind, record.node, record.scope, is_begun=False))
            elif enclosing:  # read together with the call that it was made in
                for outer in enclosing:
                    self._inside[outer].append(record)
            else:
                self._add(record)
                if not self._is_told_cancelled(record):
                    undelivered.append(record.position)
        self._load_tries(ended)
        self._turns = Turns(self._loop, undelivered)

    def _open_outer_calls(self, record: Record, stored: Collection[str]) -> None:
        scope = ""
        for outer in record.outer:
            if outer.id not in stored:
                self._ids.take(outer.id)
                self._add_open(_OpenCall(outer.id, outer.kind, outer.node, scope))
            scope = outer.id

    def _load_tries(self, ended: Collection[str]) -> None:
        for fact in self._tries:
            call, kind, node = _parse_tries(fact)
            if kind and call not in ended:
                self._tried[f"{kind}\n{node}\n{name_of(call)}"].append(fact)
                self._tried[call].append(fact)

    def _add(self, record: Record) -> None:
        self._unread[record.call] = record
        for key in _keys(record):
            self._by[key][record.call] = record

    def _add_open(self, call: _OpenCall) -> None:
        self._open[content_of(call.id)].setdefault(call.id, call)

    # --- entering ----------------------------------------------------------------------------------------

    def begin(self, part: str = "") -> None:
        self._nodes.begin(part)

    def end(self) -> None:
        self._nodes.end()

    def prompt(self, given: Mapping[str, Any]) -> tuple[str, str]:
        frame = self._nodes.here()
        return self._prompts.of(given, frame.node.prompts, frame.scope)

    def enter(self, kind: str, name: str, digest: str, core: str = "") -> _ContentQuestion:
        frame = self._nodes.here()
        scope = frame.scope
        ordinal = frame.model_calls
        if kind in MODEL_KINDS:
            frame.model_calls += 1
        self._moved()
        content = content_digest(scope, kind, name, digest)
        core_content = content_digest(scope, kind, name, core)[:CORE_DIGITS] if core else ""
        return _ContentQuestion(kind, name, content, core_content, frame.node.path, ordinal, frame)

    def branch(self) -> str:
        return self._nodes.here().node.path

    def is_inside_a_call(self) -> bool:
        return bool(self._nodes.here().outer)

    @property
    def is_replayed(self) -> bool:
        return not any(not self._is_told_cancelled(record) for record in self._unread.values())

    # --- answering ---------------------------------------------------------------------------------------

    async def find(self, question: _ContentQuestion) -> Record | None:
        """The record that answers the call; None when it is to be made.

        Waits while another node may still come for the record. Raises `ReplayContradiction`.
        """
        if not self._unread and not self._open:
            return None
        for level, digest in (("content", question.content), ("core", question.core)):
            if not digest:
                continue
            own = _first(self._by.get((level, digest, question.branch)))
            if own is not None:
                return self._take(own)
            if question.kind in OWN_KINDS:
                return None
            if level == "content" and self._own_open(question) is not None:
                return None
            other = await self._another_nodes((level, digest), question)
            if other is not None:
                return other
        await self._wait_for_begun(question)
        return await self._changed_or_contradicted(question)

    async def _another_nodes(self, key: tuple[str, str], question: _ContentQuestion) -> Record | None:
        """Another node's record, once that node cannot come for it any more."""
        if key in self._by and self._by[key] and self._next_own(question) is not None:
            self._set_adrift(question.node)
        while (record := self._first_other(key)) is not None:
            if not self._is_free(record, question):
                keys = [("taken", record.call), ("node", record.node), ALONE]
                waited = record

                def is_settled(waited: Record = waited) -> bool:
                    return waited.call not in self._unread or self._is_free(waited, question)

                if not await self._until(is_settled, keys):
                    if self._latch.reason is not None:
                        return None
                    self._given_up.add(record.node)
            if record.call in self._unread:
                return self._take(record)
        return None

    async def _wait_for_begun(self, question: _ContentQuestion) -> None:
        """A call of this content that another node has begun is taken over once that node cannot come."""
        while (begun := self._first_begun(question)) is not None:
            waited = begun

            def is_settled(waited: _OpenCall = waited) -> bool:
                return not self._is_open(waited.id) or self._is_free(waited, question)

            keys = [("taken", begun.id), ("node", begun.node), ALONE]
            if not await self._until(is_settled, keys):
                if self._latch.reason is not None:
                    return
                self._given_up.add(begun.node)
            if self._is_open(begun.id):
                question.takes_over = begun.id
                return

    def _first_begun(self, question: _ContentQuestion) -> _OpenCall | None:
        calls = self._open.get(question.content)
        if not calls or self._own_open(question) is not None:
            return None
        return next((call for call in calls.values() if call.is_begun), None)

    def _first_other(self, key: tuple[str, str]) -> Record | None:
        """Those that were cancelled come last."""
        found = self._by.get(key)
        if not found:
            return None
        return next((record for record in found.values() if not record.is_cancelled), _first(found))

    def _is_free(self, record: Record | _OpenCall, question: _ContentQuestion) -> bool:
        """Whether the node that made it cannot come for it any more."""
        return (
            record.node == question.branch
            or record.node in self._given_up
            or record.node in self._ended_nodes
            or self._nodes.is_alone(question.node)
        )

    async def _changed_or_contradicted(self, question: _ContentQuestion) -> Record | None:
        own = self._next_own(question)
        if own is None or self._open_for(question) is not None:
            return None
        alone = self._nodes.is_alone(question.node)
        if (
            alone
            and isinstance(own, Record)
            and question.kind == own.kind
            and own.kind in MODEL_KINDS
            and question.name == own.name
        ):
            return self._take(own)
        if question.node.adrift:
            return None
        self._set_adrift(question.node)
        if not alone:
            call_id = own.call if isinstance(own, Record) else own.id

            def is_taken() -> bool:
                return call_id not in self._unread and not self._is_open(call_id)

            keys = [("taken", call_id), ALONE]
            await self._until(lambda: is_taken() or self._nodes.is_alone(question.node), keys)
            if is_taken() or self._latch.reason is not None:
                return None
        raise ReplayContradiction(
            f"the program asks for {question.kind} {question.name} at {question.branch or 'the pattern'}, "
            f"where the journal holds {_described(own)}"
        )

    def _next_own(self, question: _ContentQuestion) -> Record | _OpenCall | None:
        """The node's first unread record in this scope that was not cancelled, or its first open call."""
        scope = question.frame.scope
        records = self._by.get(("node", question.branch, scope), {})
        record = next((each for each in records.values() if not each.is_cancelled), None)
        if record is not None or not self._open:
            return record
        for calls in self._open.values():
            for call in calls.values():
                if call.is_begun and call.node == question.branch and call.scope == scope:
                    return call
        return None

    def _own_open(self, question: _ContentQuestion) -> _OpenCall | None:
        calls = self._open.get(question.content)
        if not calls:
            return None
        return next((call for call in calls.values() if call.node == question.branch), None)

    def _is_open(self, call_id: str) -> bool:
        return call_id in self._open.get(content_of(call_id), {})

    def _is_forgiven(self, call_id: str) -> bool:
        """Whether nobody needs to ask for the call, nor for what is inside: it failed in an earlier life."""
        call = self._open.get(content_of(call_id), {}).get(call_id) if call_id else None
        return call is not None and not call.is_begun

    def _set_adrift(self, node: Node) -> None:
        if not node.adrift:
            node.adrift = True
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))

    def _take(self, record: Record) -> Record:
        del self._unread[record.call]
        for key in _keys(record):
            del self._by[key][record.call]
            if not self._by[key]:
                del self._by[key]
        self._wake(("taken", record.call))
        return record

    def records_inside(self, record: Record) -> Sequence[Record]:
        return self._inside.pop(record.call, ())

    def _reopen_inside(self, record: Record) -> None:
        """A call is made again that was cancelled: what was recorded inside it answers inside it."""
        depth = len(record.outer) + 1
        for inner in self._inside.pop(record.call, ()):
            if not any(outer.id in self._inside for outer in inner.outer[depth:]):
                self._add(inner)

    # --- handing out -------------------------------------------------------------------------------------

    async def wait_for_turn(self, question: _ContentQuestion, record: Record) -> bool:
        """Wait until it is the record's turn; False when the call is to be made again.

        A call that the program cancelled waits to be cancelled again.
        """
        self._moved()
        if self._is_told_cancelled(record):
            await self._until(lambda: False, (), at_most_s=record.took_ms / 1000 + QUIET_S)
            if record.is_cancelled and self._latch.reason is None:
                self._reopen_inside(record)
                return False
            return True
        question.frame.model_calls += record.model_calls
        alone = self._nodes.is_alone(question.node)
        await self._turns.of(record.position, self._bound_s(record.took_ms), settle=not alone)
        self._moved()
        return True

    async def after_stored(self, took_ms: int) -> None:
        """A new answer, too, is given after those that were recorded before it."""
        self._moved()
        if not self._turns.are_over:
            await self._turns.after_all(self._bound_s(took_ms))

    def _bound_s(self, took_ms: int) -> float:
        return min(took_ms / 1000 + SLACK_S, QUIET_S)

    def _is_told_cancelled(self, record: Record) -> bool:
        return record.is_cancelled or record.call in self._told_cancelled

    # --- making ------------------------------------------------------------------------------------------

    def claim_id(self, question: _ContentQuestion, again: Record | None = None) -> str:
        if again is not None:
            return again.call
        call = self._open_for(question)
        if call is not None:
            calls = self._open[question.content]
            del calls[call.id]
            if not calls:
                del self._open[question.content]
            self._wake(("taken", call.id))
            return call.id
        return self._ids.new(question.name, question.content)

    def _open_for(self, question: _ContentQuestion) -> _OpenCall | None:
        """The open call that this one is: its node's own, one it takes over, or one of an earlier life."""
        if not self._open:
            return None
        calls = self._open.get(question.content, {})
        own = self._own_open(question) or calls.get(question.takes_over)
        return own or next((call for call in calls.values() if not call.is_begun), None)

    def inside(self, question: _ContentQuestion, call_id: str) -> AbstractContextManager[Frame]:
        outer = OuterCall(call_id, question.kind, question.branch)
        return self._nodes.inside(question.frame, outer)

    def call_begins(self) -> None:
        self._in_flight += 1
        self._moved()

    def call_ended(self) -> None:
        self._in_flight -= 1
        self._moved()

    def tries_fact(self, question: _ContentQuestion, call_id: str) -> str:
        return f"{call_id}\n{question.kind}\n{question.branch}"

    def failed_tries(self, question: _ContentQuestion, call_id: str) -> int:
        """How often this call has failed and was put off; for another prompt than before, the old one's."""
        if not self._tried:
            return 0
        facts = self._tried.get(call_id)
        if facts is None and question.kind in MODEL_KINDS:
            facts = self._tried.get(f"{question.kind}\n{question.branch}\n{question.name}")
        return sum(self._tries[fact] for fact in facts or ())

    def identity(self, question: _ContentQuestion) -> dict[str, Any]:
        return {
            "node": question.branch,
            "outer": question.frame.outer,
            "core": question.core,
        }

    # --- the end -----------------------------------------------------------------------------------------

    async def unused_records(self, part: str) -> list[str]:
        """What the program has not asked for although it is recorded; tasks that live on may still do so."""

        def left() -> list[str]:
            unread = [
                f"{record.kind} {record.name} ({record.call})"
                for record in self._unread.values()
                if not self._is_told_cancelled(record)
                and _is_of(record.node, part)
                and not any(self._is_forgiven(outer.id) for outer in record.outer)
            ]
            opened = [
                f"{call.kind} {name_of(call.id)} ({call.id})"
                for calls in self._open.values()
                for call in calls.values()
                if call.is_begun and _is_of(call.node, part) and not self._is_forgiven(call.scope)
            ]
            return unread + opened

        root = self._nodes.here().node
        if left() and not self._nodes.is_alone(root):
            await self._until(lambda: not left() or self._nodes.is_alone(root), [ALONE], look_again=True)
        return left()

    # --- waiting -----------------------------------------------------------------------------------------

    def _moved(self) -> None:
        """Something of the run has moved; of interest while a record may still be asked for."""
        if self._unread or self._open:
            self._moved_s = self._loop.time()

    async def _until(
        self,
        is_true: Callable[[], bool],
        keys: Sequence[Hashable],
        *,
        at_most_s: float | None = None,
        look_again: bool = False,
    ) -> bool:
        """Whether it became true; False when the run is quiet, latched, or `at_most_s` is over.

        It is looked at again when one of `keys` is woken, and with `look_again` whenever a record is taken.
        """
        began_s = self._loop.time()
        if look_again:
            keys = [*keys, "any"]
        while not is_true():
            now_s = self._loop.time()
            left_s = QUIET_S if self._in_flight else self._moved_s + QUIET_S - now_s
            if at_most_s is not None:
                left_s = min(left_s, began_s + at_most_s - now_s)
            if left_s <= 1e-6 or self._latch.reason is not None:
                return False
            await self._wait_for(keys, left_s)
        return True

    async def _wait_for(self, keys: Sequence[Hashable], at_most_s: float) -> None:
        waiting: asyncio.Future[None] = self._loop.create_future()
        for key in (*keys, "latch"):
            self._waiting[key].append(waiting)
        timer = self._loop.call_later(at_most_s, resolve, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            for key in (*keys, "latch"):
                among = self._waiting.get(key)
                if among is not None:
                    if waiting in among:
                        among.remove(waiting)
                    if not among:
                        del self._waiting[key]

    def _wake(self, key: Hashable) -> None:
        self._moved()
        for each in (key, "any"):
            for waiting in self._waiting.get(each, ()):
                resolve(waiting)

    def _wake_all(self) -> None:
        for among in self._waiting.values():
            for waiting in among:
                resolve(waiting)
        self._turns.give_up()

    def _on_node_end(self, node: Node) -> None:
        if self._unread or self._open:
            self._ended_nodes.add(node.path)
            self._wake(("node", node.path))
            if len(self._nodes.living) <= 1:
                self._wake(ALONE)


class _Ids:
    """Which numbers the calls of each content have; a number is given once."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._beyond: dict[str, set[int]] = {}

    def take(self, call_id: str) -> None:
        """This id is used: by a record, or by a call that is open."""
        parts = call_id.rsplit(":", 2)
        if len(parts) == 3:
            self._add(parts[1], int(parts[2]))

    def new(self, name: str, content: str) -> str:
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
    """Under which a record is looked up."""
    content = content_of(record.call)
    yield ("content", content)
    yield ("content", content, record.node)
    if record.core:
        yield ("core", record.core)
        yield ("core", record.core, record.node)
    yield ("node", record.node, record.scope)


def _first(records: Mapping[str, Record] | None) -> Record | None:
    return next(iter(records.values()), None) if records else None


def _reopened(records: Iterable[Record], life: int) -> set[str]:
    """What ended an earlier life is no answer in this one: errors and cancellations after which neither their
    node nor a parent of it recorded anything. What something followed was survived, and stays as it is."""
    went_on: set[str] = set()
    reopened: set[str] = set()
    for record in reversed(list(records)):
        ended_badly = "error" in record.outcome or record.is_cancelled
        if (
            record.life < life
            and ended_badly
            and not any(path in went_on for path in _with_parents(record.node))
        ):
            reopened.add(record.call)
        else:
            went_on.add(record.node)
    return reopened


def _with_parents(path: str) -> Iterator[str]:
    yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _is_of(node: str, part: str) -> bool:
    """Whether a node belongs to the pattern's own part, or to what comes after it as well."""
    return part == REMEMBER or not (node == REMEMBER or node.startswith(f"{REMEMBER}/"))


def _parse_tries(fact: str) -> tuple[str, str, str]:
    call, _, rest = fact.partition("\n")
    kind, _, node = rest.partition("\n")
    return call, kind, node


def _described(call: Record | _OpenCall) -> str:
    if isinstance(call, Record):
        return f"{call.kind} {call.name} ({call.call})"
    return f"{call.kind} {name_of(call.id)} ({call.id}), which was begun"
