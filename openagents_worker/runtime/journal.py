"""The journal as a run reads it: records of finished calls, answered by call key, each once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from openagents_worker.models import dumps
from openagents_worker.store.formats import WRITTEN, is_read, other_format

__all__ = ["PREPARE", "Journal", "Record", "digest_of", "read_pages"]

PREPARE = "prepare"


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one call. `outcome` is {"ok": value}, {"error": {...}} or {"cancelled": true}."""

    call: str
    kind: str
    name: str
    digest: str
    outcome: dict[str, Any]
    usage: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    life: int = 1

    def to_json(self) -> str:
        data: dict[str, Any] = {"call": self.call, "v": WRITTEN, "kind": self.kind, "name": self.name}
        data |= {"digest": self.digest, "outcome": self.outcome}
        if self.life > 1:
            data["life"] = self.life
        data |= {k: v for k in ("usage", "state", "artifacts") if (v := getattr(self, k))}
        return dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that `to_json` wrote. Raises `OtherFormat`."""
        data = json.loads(text)
        if not is_read(format_ := data.pop("v")):
            raise other_format(format_)
        return cls(**data)


def digest_of(*parts: Any) -> str:
    """A short digest of JSON values, the same for the same values whatever the order of their keys."""
    text = "\0".join(dumps(_sorted(part)) for part in parts)
    return sha256(text.encode()).hexdigest()[:24]


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


class Journal:
    """Records by call key. A record is dropped once it is read: a long journal shrinks as it is replayed."""

    def __init__(self, records: Iterable[str] = (), *, life: int = 1) -> None:
        self._records: dict[str, Record] = {}
        self._inside: dict[str, list[str]] = {}
        self._last_errors: list[Record] = []
        self._life = life
        self.length = 0
        for text in records:
            self.load(text)

    def load(self, text: str) -> None:
        record = Record.from_json(text)
        self._records[record.call] = record
        self.length += 1
        for outer in _outer_calls(record.call):
            self._inside.setdefault(outer, []).append(record.call)
        self._last_errors = [*self._last_errors, record] if "error" in record.outcome else []

    def reopen(self) -> None:
        """What ended an earlier life is no answer in this one: its last records, if errors, are open again.

        An error that something followed was survived, and stays as it is. A call that is made again is
        recorded again; the later record counts.
        """
        for record in self._last_errors:
            if record.life < self._life and self._records.get(record.call) is record:
                del self._records[record.call]

    @property
    def is_read(self) -> bool:
        """Whether every record has been answered: from here on everything is new."""
        return not self._records

    def take(self, call: str) -> Record | None:
        """The record of that call; those of calls made inside it count as read with it."""
        record = self._records.pop(call, None)
        if record is not None:
            for nested in self._inside.pop(call, ()):
                self._records.pop(nested, None)
        return record

    def has(self, call: str) -> bool:
        return call in self._records

    def unread(self) -> list[str]:
        return [f"{record.kind} {record.name} at {key}" for key, record in self._records.items()]


def _outer_calls(call: str) -> list[str]:
    """The calls inside which this one was made: `3>.1>.2` was made inside `3>.1` and `3`."""
    return [call[:at] for at, char in enumerate(call) if char == ">"]


async def read_pages(
    page_from: Callable[[int], Awaitable[Sequence[str]]], first: Sequence[str], length: int
) -> AsyncIterator[str]:
    """All records of a run in order: first those that came with the claim, then pages from a position on."""
    count, page = len(first), first
    for text in first:
        yield text
    while count < length and (page := await page_from(count)):
        count += len(page)
        for text in page:
            yield text
