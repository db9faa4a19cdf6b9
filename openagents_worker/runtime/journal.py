"""The journal: the only place that knows the format of its records, which hold the outcomes of calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.models import RunUsage
from openagents_worker.quick_init import quick_init
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

__all__ = [
    "CHECK",
    "NOT_CALLS",
    "PREPARE",
    "SPENT",
    "Record",
    "check_record",
    "checks_of",
    "digest_of",
    "read_pages",
    "spent_by_children",
    "spent_record",
]

PREPARE = "prepare"
CHECK = "check"
"""The kind of a record that holds the result of an output check. It is not a call and is not replayed."""
SPENT = "spent"
"""The kind of a record with the usage of a child that the program has given up. It is not a call either."""
NOT_CALLS = frozenset({CHECK, SPENT})


@quick_init
@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one call. `outcome` is {"ok": value}, {"error": {...}} or {"cancelled": true}.

    `position` is the index in the journal; -1 if it is not stored yet.
    """

    call: str
    kind: str
    name: str
    outcome: dict[str, Any]
    digest: str = ""
    """Digest of the arguments. Only in runs that are replayed by place, checkpoint 0 and output checks."""
    usage: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    life: int = 1
    node: str = ""
    outer: tuple[OuterCall, ...] = ()
    """The enclosing calls, the outermost first."""
    core: str = ""
    """Content digest of a model call without its instructions."""
    took_ms: int = 0
    model_calls: int = 0
    """Number of model calls made inside this call."""
    v: int = BY_CONTENT
    position: int = -1

    @property
    def is_cancelled(self) -> bool:
        return "cancelled" in self.outcome

    @property
    def scope(self) -> str:
        """The id of the innermost enclosing call; empty if there is none."""
        return self.outer[-1].id if self.outer else ""

    def to_json(self) -> str:
        data: dict[str, Any] = {"call": self.call, "v": self.v, "kind": self.kind, "name": self.name}
        if self.digest or self.v == BY_PLACE:
            data["digest"] = self.digest
        data["outcome"] = self.outcome
        if self.life > 1:
            data["life"] = self.life
        optional = _OPTIONAL if self.v == BY_PLACE else _OPTIONAL_BY_CONTENT
        data |= {k: v for k in optional if (v := getattr(self, k))}
        if self.outer and self.v != BY_PLACE:
            data["outer"] = [[outer.id, outer.kind, outer.node] for outer in self.outer]
        return dumps(data)

    @classmethod
    def from_json(cls, text: str, position: int = -1) -> Record:
        """Parse the text of `to_json`. Raises `OtherFormat` for another format, else `RecordUnreadable`."""
        try:
            return cls._from_fields(loads(text), position)
        except PARSE_ERRORS as error:
            with translate_parse_errors(WRITTEN):
                raise error from None

    @classmethod
    def _from_fields(cls, data: dict[str, Any], position: int) -> Record:
        if not can_read(format_ := data["v"]):
            raise other_format_error(format_)
        if "outer" in data:
            data["outer"] = tuple(OuterCall(*outer) for outer in data["outer"])
        record = cls(**data, position=position)
        _check_shape(record)
        return record


def check_record(key: str, outcome: dict[str, Any], *, life: int) -> Record:
    """The record of an output check. Its id ends with `!`: earlier versions ignore such records."""
    return Record(f"output:{key}!", CHECK, "output", outcome, digest=key, life=life)


def checks_of(records: Iterable[Record], life: int) -> dict[str, dict[str, Any]]:
    """The results of output checks, by digest of the output. Errors of earlier lives are left out."""
    return {
        record.digest: record.outcome
        for record in records
        if record.kind == CHECK and not (record.life < life and "error" in record.outcome)
    }


def spent_record(call: str, child_id: str, usage: dict[str, Any], *, life: int) -> Record:
    """The record of what the child of this call has used. Earlier versions ignore it, as they do a check."""
    return Record(f"{call}:{SPENT}!", SPENT, child_id, {"ok": child_id}, usage=usage, life=life)


def spent_by_children(records: Iterable[Record]) -> dict[str, RunUsage]:
    """What is recorded of the usage of children that the program has given up, by their ids."""
    spent: dict[str, RunUsage] = {}
    for record in records:
        if record.kind == SPENT:
            child_id, usage = record.name, RunUsage(**record.usage)
            spent[child_id] = spent[child_id].plus(usage) if child_id in spent else usage
    return spent


def _check_shape(record: Record) -> None:
    """Raises TypeError if a field has a wrong type. Called for each record, so it must be fast."""
    texts = (record.call, record.kind, record.name, record.digest, record.node, record.core)
    counts = (record.life, record.took_ms, record.model_calls)
    objects = (record.outcome, record.usage, record.state, record.outcome.get("error", _EMPTY))
    if not (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in counts)
        and all(type(value) is dict for value in objects)
        and type(record.artifacts) is list
        and all(type(number) in _USAGE_TYPES for number in record.usage.values())
        and all(type(change) is dict for change in record.state.values())
    ):
        raise TypeError("a field of the record has a wrong type")


_EMPTY: dict[str, Any] = {}
_USAGE_TYPES = (int, float, dict)
_OPTIONAL = ("usage", "state", "artifacts")
_OPTIONAL_BY_CONTENT = (*_OPTIONAL, "node", "core", "took_ms", "model_calls")


def digest_of(canonical: str) -> str:
    """A short digest of canonical JSON, which has sorted keys."""
    return sha256(canonical.encode()).hexdigest()[:24]


async def read_pages(
    page_from: Callable[[int], Awaitable[Sequence[str]]], first: Sequence[str], length: int
) -> AsyncIterator[str]:
    """All records of a run in order. `first` came with the claim; `page_from(position)` reads the others."""
    count, page = len(first), first
    for text in first:
        yield text
    while count < length and (page := await page_from(count)):
        count += len(page)
        for text in page:
            yield text
