"""Replay by place: the rules under which runs were begun by the version before. They go one release later.

A call is found by where in the program it stands: its branch and its count there (`place.py`). Branches must
make their first calls in the same order in every attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.place import Places
from openagents_worker.runtime.rules import REMEMBER, Question, ReplayContradiction, Rules
from openagents_worker.store.formats import BY_PLACE

__all__ = ["ReplayByPlace"]


@dataclass(slots=True, eq=False)
class _PlaceQuestion(Question):
    key: str


class ReplayByPlace(Rules):
    """Records by call key. A record is dropped once it is read."""

    format = BY_PLACE

    def __init__(
        self, records: Iterable[Record], *, life: int, latch: Latch, tries: Mapping[str, int]
    ) -> None:
        self._latch = latch
        self._tries = tries
        self._places = Places()
        self._entered: Counter[str] = Counter()
        self._prompts = _PromptDigest()
        self._records: dict[str, Record] = {}
        self._inside: dict[str, list[str]] = {}
        last_errors: list[Record] = []
        for record in records:
            self._records[record.call] = record
            for outer in _outer_calls(record.call):
                self._inside.setdefault(outer, []).append(record.call)
            last_errors = [*last_errors, record] if "error" in record.outcome else []
        for record in last_errors:
            if record.life < life and self._records.get(record.call) is record:
                del self._records[record.call]

    def begin(self, part: str = "") -> None:
        self._places.begin(part)

    def end(self) -> None:
        self._places.end()

    def prompt(self, given: Mapping[str, Any]) -> tuple[str, str]:
        return self._prompts.of(given["messages"]), ""

    def enter(self, kind: str, name: str, digest: str, core: str = "") -> _PlaceQuestion:
        key = self._places.enter()
        self._entered[kind] += 1
        return _PlaceQuestion(kind, name, digest, "", self._places.branch(), self._entered[kind] - 1, key)

    async def find(self, question: _PlaceQuestion) -> Record | None:
        record = self._take(question.key)
        if record is None:
            return None
        same_call = (record.kind, record.name) == (question.kind, question.name)
        if same_call and (record.digest == question.content or question.kind == "model"):
            return record
        raise ReplayContradiction(
            f"at call {record.call} the journal holds {record.kind} {record.name}, "
            f"the program asks for {question.kind} {question.name}"
            + (" with other arguments" if same_call else "")
        )

    async def wait_for_turn(self, question: _PlaceQuestion, record: Record) -> bool:
        if self._records.pop(f"{record.call}!", None) is not None or record.is_cancelled:
            await self._latch.wait()  # the pattern cancelled this call then, and will again
        return True

    async def after_stored(self, took_ms: int) -> None:
        """In the order in which they were stored, as they come."""

    def records_inside(self, record: Record) -> Sequence[Record]:
        return ()

    def claim_id(self, question: _PlaceQuestion, again: Record | None = None) -> str:
        return question.key

    def inside(self, question: _PlaceQuestion, call_id: str) -> AbstractContextManager[Any]:
        return self._places.inside(call_id)

    def identity(self, question: _PlaceQuestion) -> dict[str, Any]:
        return {"digest": question.content}

    def tries_fact(self, question: _PlaceQuestion, call_id: str) -> str:
        return call_id

    def failed_tries(self, question: _PlaceQuestion, call_id: str) -> int:
        return self._tries.get(call_id, 0)

    async def unused_records(self, part: str) -> list[str]:
        return [
            f"{record.kind} {record.name} at {key}"
            for key, record in self._records.items()
            if part == REMEMBER or not key.startswith(f"{REMEMBER}.")
        ]

    def call_begins(self) -> None:
        """Nobody waits for calls to end."""

    def call_ended(self) -> None:
        """Nobody waits for calls to end."""

    def branch(self) -> str:
        return self._places.branch()

    def is_inside_a_call(self) -> bool:
        return ">" in self._places.branch()

    @property
    def is_replayed(self) -> bool:
        return not self._records

    def _take(self, call: str) -> Record | None:
        record = self._records.pop(call, None)
        if record is not None:
            for nested in self._inside.pop(call, ()):
                self._records.pop(nested, None)
        return record


def _outer_calls(call: str) -> list[str]:
    """The calls inside which this one was made: `3>.1>.2` was made inside `3>.1` and `3`."""
    return [call[:at] for at, char in enumerate(call) if char == ">"]


class _PromptDigest:
    """A digest of each prompt that costs only what is new in it: a conversation is hashed once, not per step.

    A prompt whose first and last known messages are the same objects as before is taken as continued.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Hashed] = {}

    def of(self, messages: list[dict[str, Any]]) -> str:
        if not messages:
            return sha256().hexdigest()[:24]
        known = self._known.get(id(messages[0]))
        if known is None or not known.begins(messages):
            known = self._known[id(messages[0])] = _Hashed(messages[0])
        known.go_on(messages)
        return known.chain.hexdigest()[:24]


class _Hashed:
    def __init__(self, first: dict[str, Any]) -> None:
        self.first = self.last = first
        self.count = 0
        self.chain = sha256()

    def begins(self, messages: list[dict[str, Any]]) -> bool:
        return (
            self.first is messages[0]
            and len(messages) >= self.count
            and messages[self.count - 1] is self.last
        )

    def go_on(self, messages: list[dict[str, Any]]) -> None:
        for message in messages[self.count :]:
            self.chain.update(dumps({key: message[key] for key in sorted(message)}).encode())
        self.count, self.last = len(messages), messages[-1]
