"""Held turns in an attempt: the only place that shows a run what shared children have left with parents.

A shared child writes nothing to the session when it ends: its parent holds its turn (`store.held_turns`).
A run sees what the runs above it hold, from its start on. It gets the changes of the session state by its own
children together with their results, so the records of these calls have them, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.state import Overlay
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.held_turns import (
    HELD,
    HeldRange,
    HeldTurn,
    load_held_turns,
    ranges_of,
    state_after,
)
from openagents_worker.store.scripts import Claimed
from openagents_worker.store.sessions import SessionStore

__all__ = ["RunHeldTurns"]


class RunHeldTurns:
    """What one run and the runs above it hold, as of the claim.

    It does not change during an attempt: a shared child works only while its parent is parked.
    """

    def __init__(self, claimed: Claimed, store: FencedStore) -> None:
        held = ranges_of(claimed.held)
        above = [each for each in held if each.run_id != store.run_id]
        self.above = tuple(each for each in above if each.begin < each.end)
        """The turns that the runs above this one hold, and that are not in the session: the oldest first."""
        # A run that was interrupted has written these turns, but not the changes of the state.
        self._state_above = [replace(each, begin=0) for each in above]
        own = next((each for each in held if each.run_id == store.run_id), None)
        self._own = HeldRange(store.run_id, 0, own.end if own is not None else 0)
        self._merged: list[HeldRange] = []
        """The turns whose changes the state of the run has. A result that is too large for its record leaves
        a gap: the turns behind it may have been taken at the same time."""
        self._taken = 0
        """Up to which position results were taken, with those that are being recorded."""
        self._inherited: dict[str, int] = {}
        """In a fork: by call, up to which position its state has the changes of children of its source."""
        self._store = store
        self._loaded: dict[HeldRange, list[HeldTurn]] = {}
        self._own_turns: Sequence[HeldTurn] | None = None

    # --- the session at the start ------------------------------------------------------------------------

    async def load(self, ranges: Iterable[HeldRange]) -> list[HeldTurn]:
        """The turns in these ranges. Raises `RecordUnreadable`."""
        turns: list[HeldTurn] = []
        for held in ranges:
            if held not in self._loaded:
                self._loaded[held] = await load_held_turns(self._store, held)
            turns += self._loaded[held]
        return turns

    async def session_state(self, claimed: Claimed, sessions: SessionStore) -> Mapping[str, str]:
        """The state of the session with which this attempt starts: values as JSON, by key."""
        texts: Mapping[str, str] | None = claimed.session_state  # None if it is too large for the claim
        if texts is None:
            texts = await sessions.load_state_texts(self._store.session_id)
        return state_after(await self.load(self._state_above), texts) if self._state_above else texts

    # --- the children of the run -------------------------------------------------------------------------

    def has_records(self, records: Sequence[Record]) -> None:
        """These records will be replayed: the state of the run gets the changes that they have."""
        if not self._own.end:
            return
        not_seen = {record.call.removesuffix("!") for record in records if record.kind == "cancelled"}
        for record in records:
            if record.kind == "delegate" and record.call not in not_seen:
                held = self._range_in(record.outcome.get("ok"))
                if held is not None and held.run_id != self._own.run_id:
                    self._inherited[record.call] = held.end
                self._has_range(held)

    def has_result(self, value: Any) -> None:
        """The program has got this recorded value of a delegation."""
        self._has_range(self._range_in(value))

    def _range_in(self, value: Any) -> HeldRange | None:
        if not self._own.end or not isinstance(value, Mapping) or HELD not in value:
            return None
        with translate_parse_errors(WRITTEN, run_id=self._own.run_id):
            [held] = ranges_of(value[HELD])
        return held

    def _has_range(self, held: HeldRange | None) -> None:
        if held is not None and held.run_id == self._own.run_id:
            self._merged.append(held)
            self._taken = max(self._taken, held.end)

    @property
    def _merged_to(self) -> int:
        """Up to which position the state has all changes."""
        position = 0
        for held in sorted(self._merged, key=lambda held: held.begin):
            if held.begin <= position:
                position = max(position, held.end)
        return position

    def _has_changes_of(self, turn: HeldTurn) -> bool:
        return any(held.begin < turn.end <= held.end for held in self._merged)

    async def take(self, call_id: str, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The changes by the child of this call, and by those before it, that the run has not got yet.

        Returns what is added to the recorded value of the call, and the changes of the state of the run in
        the form of a record. Both are empty if nothing is new.
        """
        turns = await self._turns()
        end = next((turn.end for turn in turns if turn.call == call_id), 0)
        if end <= self._taken:
            return {}, {}
        taken = HeldRange(self._own.run_id, self._taken, end)
        self._taken = end
        overlay = Overlay(state)
        with translate_parse_errors(WRITTEN, run_id=taken.run_id):
            for turn in turns:
                if taken.begin < turn.end <= taken.end:
                    _apply(turn, overlay)
        return {HELD: [taken.run_id, taken.begin, taken.end]}, overlay.changes()

    async def _turns(self) -> Sequence[HeldTurn]:
        """The turns that the run holds. They are read once, without those whose changes it has already.

        A fork holds copies of turns of its source, at the same positions. An earlier version made none.
        """
        if self._own_turns is None:
            new = HeldRange(self._own.run_id, self._merged_to, self._own.end)
            turns = await self.load([new]) if new.begin < new.end else []
            copied = [turn.end for turn in turns if self._inherited.get(turn.call) == turn.end]
            self._own_turns = [
                turn for turn in turns if turn.end > max(copied, default=0) and not self._has_changes_of(turn)
            ]
        return self._own_turns

    async def take_rest(self, before: Mapping[str, str], state: MutableMapping[str, Any]) -> None:
        """At the end: make the changes of children whose results the run has not got in its state.

        Keys that the run has changed itself keep their values. `before` is the state at the start.
        """
        if self._merged_to >= self._own.end:
            return
        with translate_parse_errors(WRITTEN, run_id=self._own.run_id):
            rest = [turn for turn in await self._turns() if not self._has_changes_of(turn)]
            changed = {key for turn in rest for key in turn.changes if not _is_unchanged(key, before, state)}
            for turn in rest:
                _apply(turn, state, but=changed)


def _apply(turn: HeldTurn, state: MutableMapping[str, Any], but: Collection[str] = ()) -> None:
    for key, text in turn.changes.items():
        if key in but:
            continue
        if text is None:
            state.pop(key, None)
        else:
            state[key] = loads(text)


def _is_unchanged(key: str, before: Mapping[str, str], state: Mapping[str, Any]) -> bool:
    if key not in state or key not in before:
        return key not in state and key not in before
    try:
        return dumps(state[key]) == before[key]
    except (TypeError, ValueError, RecursionError):  # the end of the run reports it
        return False
