"""The journal as a run reads it: the records of finished calls, in the order of their commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.runtime.call_ids import OuterCall
from openagents_worker.store.formats import (
    BY_CONTENT,
    BY_PLACE,
    PARSE_ERRORS,
    WRITTEN,
    can_read,
    other_format_error,
    translate_parse_errors,
)

__all__ = ["CHECK", "PREPARE", "Record", "check_record", "checks_of", "digest_of", "read_pages"]

PREPARE = "prepare"
CHECK = "check"
"""The kind of the record of a check of the run's output: it is no call, and nothing waits to be asked for."""


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one call. `outcome` is {"ok": value}, {"error": {...}} or {"cancelled": true}.

    `position` is its place in the journal; -1 for one that is still to be stored.
    """

    call: str
    kind: str
    name: str
    outcome: dict[str, Any]
    digest: str = ""
    """Of the arguments; in runs that are replayed by place, and in the record of the prepared start."""
    usage: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    life: int = 1
    node: str = ""
    outer: tuple[OuterCall, ...] = ()
    """The calls inside which it was made, the outermost first."""
    core: str = ""
    """The content of a model call without its instructions."""
    took_ms: int = 0
    model_calls: int = 0
    """How many calls of models were made inside it."""
    v: int = BY_CONTENT
    position: int = -1

    @property
    def is_cancelled(self) -> bool:
        return "cancelled" in self.outcome

    @property
    def scope(self) -> str:
        """The call inside which it was made; empty outside of all."""
        return self.outer[-1].id if self.outer else ""

    def to_json(self) -> str:
        data: dict[str, Any] = {"call": self.call, "v": self.v, "kind": self.kind, "name": self.name}
        if self.digest or self.v == BY_PLACE:
            data["digest"] = self.digest
        data["outcome"] = self.outcome
        if self.life > 1:
            data["life"] = self.life
        optional = _OPTIONAL if self.v == BY_PLACE else _OPTIONAL + _TO_BE_FOUND_BY
        data |= {k: v for k in optional if (v := getattr(self, k))}
        if self.outer and self.v != BY_PLACE:
            data["outer"] = [[outer.id, outer.kind, outer.node] for outer in self.outer]
        return dumps(data)

    @classmethod
    def from_json(cls, text: str, position: int = -1) -> Record:
        """The record that `to_json` wrote. Raises `OtherFormat`, or `RecordUnreadable` for anything else."""
        try:
            return cls._of(loads(text), position)
        except PARSE_ERRORS as error:
            with translate_parse_errors(WRITTEN):
                raise error from None

    @classmethod
    def _of(cls, data: dict[str, Any], position: int) -> Record:
        if not can_read(format_ := data["v"]):
            raise other_format_error(format_)
        if "outer" in data:
            data["outer"] = tuple(OuterCall(*outer) for outer in data["outer"])
        record = cls(**data, position=position)
        _check_shape(record)
        return record


def check_record(key: str, outcome: dict[str, Any], *, life: int) -> Record:
    """The record of a check of the run's output. An earlier version leaves what ends in `!` alone."""
    return Record(f"output:{key}!", CHECK, "output", outcome, digest=key, life=life)


def checks_of(records: Iterable[Record], life: int) -> dict[str, dict[str, Any]]:
    """What checks have given, by the digest of the output. One that ended an earlier life is made again."""
    return {
        record.digest: record.outcome
        for record in records
        if record.kind == CHECK and not (record.life < life and "error" in record.outcome)
    }


def _check_shape(record: Record) -> None:
    """Raises TypeError for a record that would be in the way of a replay; it runs for each record."""
    texts = (record.call, record.kind, record.name, record.digest, record.node, record.core)
    counts = (record.life, record.took_ms, record.model_calls)
    objects = (record.outcome, record.usage, record.state, record.outcome.get("error", _NOTHING))
    if not (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in counts)
        and all(type(value) is dict for value in objects)
        and type(record.artifacts) is list
        and all(type(number) in _OF_USAGE for number in record.usage.values())
        and all(type(change) is dict for change in record.state.values())
    ):
        raise TypeError("a field of a record is of another type than ours")


_NOTHING: dict[str, Any] = {}
_OF_USAGE = (int, float, dict)
_OPTIONAL = ("usage", "state", "artifacts")
_TO_BE_FOUND_BY = ("node", "core", "took_ms", "model_calls")


def digest_of(canonical: str) -> str:
    """A short digest of a value by its canonical JSON: the same whatever the order of its keys."""
    return sha256(canonical.encode()).hexdigest()[:24]


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
