"""Replay by place: the rules for runs that began under the previous version. Removed one release later.

A call is found by its place in the program: its branch, and its number there (see `place.py`). Branches must
make their first calls in the same order in every attempt.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.place import PlaceIds
from openagents_worker.runtime.rules import REMEMBER, CallQuery, OpenCall, ReplayContradiction, Rules
from openagents_worker.store.formats import BY_PLACE

__all__ = ["ReplayByPlace"]


@dataclass(slots=True, eq=False)
class _PlaceQuery(CallQuery):
    call_id: str


class ReplayByPlace(Rules):
    """Finds records by place id. A record is dropped once it is used."""

    format = BY_PLACE

    def __init__(
        self,
        records: Iterable[Record],
        *,
        life: int,
        latch: Latch,
        tries: Mapping[str, int],
        begun: Iterable[OpenCall] = (),
    ) -> None:
        """`begun` is not needed: the place of a call is its id."""
        self._latch = latch
        self._tries = tries
        self._place_ids = PlaceIds()
        self._entered: Counter[str] = Counter()
        self._prompts = _PromptDigest()
        self._records: dict[str, Record] = {}
        self._inside_call: dict[str, list[str]] = {}
        last_errors: list[Record] = []
        for record in records:
            self._records[record.call] = record
            for outer in _outer_calls(record.call):
                self._inside_call.setdefault(outer, []).append(record.call)
            last_errors = [*last_errors, record] if "error" in record.outcome else []
        for record in last_errors:
            if record.life < life and self._records.get(record.call) is record:
                del self._records[record.call]

    def begin(self, part: str = "") -> None:
        self._place_ids.begin(part)

    def end(self) -> None:
        """Forget the current task, which makes no more calls of the run."""
        self._place_ids.end()

    def prompt(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        return self._prompts.of(arguments["messages"]), ""

    def enter(self, kind: str, name: str, digest: str, core: str = "") -> _PlaceQuery:
        call_id = self._place_ids.enter()
        self._entered[kind] += 1
        return _PlaceQuery(kind, name, digest, "", self._place_ids.branch(), self._entered[kind] - 1, call_id)

    async def find(self, query: _PlaceQuery) -> Record | None:
        record = self._take(query.call_id)
        if record is None:
            return None
        same_call = (record.kind, record.name) == (query.kind, query.name)
        if same_call and (record.digest == query.content or query.kind == "model"):
            return record
        raise ReplayContradiction(
            f"at call {record.call} the journal holds {record.kind} {record.name}, "
            f"the program makes the call {query.kind} {query.name}"
            + (" with other arguments" if same_call else "")
        )

    async def wait_for_turn(self, query: _PlaceQuery, record: Record) -> bool:
        if self._records.pop(f"{record.call}!", None) is not None or record.is_cancelled:
            await self._latch.wait()  # the pattern had cancelled this call: wait until it does so again
        return True

    async def after_stored(self, took_ms: int) -> None:
        """Does not wait: the order of outcomes is not replayed."""

    def records_inside(self, record: Record) -> Sequence[Record]:
        return ()

    def assign_id(self, query: _PlaceQuery, again: Record | None = None) -> str:
        return query.call_id

    def inside(self, query: _PlaceQuery, call_id: str) -> AbstractContextManager[Any]:
        return self._place_ids.inside(call_id)

    def identity(self, query: _PlaceQuery) -> dict[str, Any]:
        return {"digest": query.content}

    def tries_fact(self, query: _PlaceQuery, call_id: str, requests: int = 1) -> str:
        return call_id

    def failed_tries(self, query: _PlaceQuery, call_id: str) -> int:
        return self._tries.get(call_id, 0)

    def requests_sent(self, query: _PlaceQuery, call_id: str) -> int:
        return self.failed_tries(query, call_id)

    async def unused_records(self, part: str) -> list[str]:
        return [
            f"{record.kind} {record.name} at {key}"
            for key, record in self._records.items()
            if part == REMEMBER or not key.startswith(f"{REMEMBER}.")
        ]

    def call_begins(self) -> None:
        """Not needed: no call waits for the end of other calls."""

    def call_ended(self) -> None:
        """Not needed: no call waits for the end of other calls."""

    def place_of(self, call_id: str) -> OpenCall:
        return OpenCall(call_id, "", self.branch(), "", is_begun=False)

    def draw(self) -> str:
        return self._place_ids.enter()

    def tasks(self) -> Collection[asyncio.Task[Any]]:
        return ()

    def branch(self) -> str:
        return self._place_ids.branch()

    def is_inside_a_call(self) -> bool:
        return ">" in self._place_ids.branch()

    def next_kind(self) -> str:
        return "unknown"  # a call that is made only sometimes would change the places of the others

    def next_name(self, *, recorded: bool = False) -> str:
        return "unknown"

    @property
    def is_replay_over(self) -> bool:
        return not self._records

    @property
    def has_unused(self) -> bool:
        return bool(self._records)

    def _take(self, call: str) -> Record | None:
        """Remove a record and the records of calls inside it. It answers a call now."""
        record = self._records.pop(call, None)
        if record is not None:
            for nested in self._inside_call.pop(call, ()):
                self._records.pop(nested, None)
        return record


def _outer_calls(call: str) -> list[str]:
    """The enclosing calls of a call: `3>.1>.2` was made inside `3>.1` and `3`."""
    return [call[:at] for at, char in enumerate(call) if char == ">"]


class _PromptDigest:
    """Digests of prompts. Only new messages are hashed: a conversation is not hashed again in each step.

    A prompt continues an earlier one if its first and last known messages are the same objects.
    """

    def __init__(self) -> None:
        self._known: dict[int, _HashedPrompt] = {}

    def of(self, messages: list[dict[str, Any]]) -> str:
        if not messages:
            return sha256().hexdigest()[:24]
        known = self._known.get(id(messages[0]))
        if known is None or not known.is_continued_by(messages):
            known = self._known[id(messages[0])] = _HashedPrompt(messages[0])
        known.add_new(messages)
        return known.chain.hexdigest()[:24]


class _HashedPrompt:
    def __init__(self, first: dict[str, Any]) -> None:
        self.first = self.last = first
        self.count = 0
        self.chain = sha256()

    def is_continued_by(self, messages: list[dict[str, Any]]) -> bool:
        return (
            self.first is messages[0]
            and len(messages) >= self.count
            and messages[self.count - 1] is self.last
        )

    def add_new(self, messages: list[dict[str, Any]]) -> None:
        for message in messages[self.count :]:
            self.chain.update(dumps({key: message[key] for key in sorted(message)}).encode())
        self.count, self.last = len(messages), messages[-1]
