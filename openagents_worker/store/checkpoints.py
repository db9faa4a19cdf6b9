"""Checkpoints: the only place that reads the journal of a run for a process that does not execute the run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from openagents_worker.jsontext import loads
from openagents_worker.models import ErrorDetails, RunRecord, RunUsage
from openagents_worker.store.client import AsyncStore, Store
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import NEWEST_BYTES
from openagents_worker.store.plan import Emit, Plan
from openagents_worker.store.records import record_plan
from openagents_worker.store.scripts import PAGE_BYTES, page

__all__ = ["Checkpoint", "acheckpoints", "checkpoints", "newest_checkpoints"]

WINDOW = 8  # checkpoints: read from the end, since the last ones matter most


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The complete outcome of one recorded call. A run continues from its last checkpoint.

    `call` identifies the call, as in events (`call`, `call_id`). `kind` is `prepare`, `model`, `tool`,
    `memory`, `check` for a check of the run's output, or `spent` for the usage of a child that the pattern
    has given up. `value` is plain JSON. It is None if the call failed (see `error`) or if the pattern
    cancelled it.
    """

    checkpoint_id: str
    position: int
    call: str
    kind: str
    name: str
    value: Any
    error: ErrorDetails | None
    cancelled: bool
    usage: RunUsage

    @classmethod
    def of(cls, run_id: str, position: int, text: str) -> Checkpoint:
        """Parse a journal record. Raises `OtherFormat` if another version of the library wrote it in a format
        that this version cannot read, `RecordUnreadable` if it is not a record."""
        with translate_parse_errors(WRITTEN, run_id=run_id):
            data = loads(text)
            format_ = int(data.get("v", 0))
        with translate_parse_errors(format_, run_id=run_id):
            outcome = data["outcome"]
            return cls(
                checkpoint_id=f"{run_id}:step:{position}",
                position=position,
                call=data["call"],
                kind=data["kind"],
                name=data["name"],
                value=outcome.get("ok"),
                error=ErrorDetails.model_validate(outcome["error"]) if "error" in outcome else None,
                cancelled=bool(outcome.get("cancelled")),
                usage=RunUsage.model_validate(data.get("usage", {})),
            )


def checkpoints(store: Store, run_id: str) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a run in the order of their commits, read in pages. Raises `RunNotFound`."""
    return store.stream(_checkpoints(store.keys, run_id))


def acheckpoints(store: AsyncStore, run_id: str) -> AsyncGenerator[Checkpoint]:
    """As `checkpoints`, for asyncio."""
    return store.stream(_checkpoints(store.keys, run_id))


def newest_checkpoints(keys: Keys, run: RunRecord, newest: int) -> Plan[list[Checkpoint]]:
    """A plan that returns the last checkpoints of a run, at most `newest`, in the order of their commits.

    Fewer if they are large: it stops when it has read `NEWEST_BYTES`.
    """
    found, size, end = list[Checkpoint](), 0, run.steps
    while size < NEWEST_BYTES and len(found) < newest and end > 0:
        begin = max(0, end - WINDOW, run.steps - newest)
        texts: list[str] = []
        while begin + len(texts) < end:
            more = yield page(run_id=run.run_id, position=begin + len(texts), page_bytes=PAGE_BYTES)
            if not more:
                return found  # it was deleted in the meantime
            texts += more
        texts = texts[: end - begin]
        found = [Checkpoint.of(run.run_id, begin + at, text) for at, text in enumerate(texts)] + found
        size += sum(map(len, texts))
        end = begin
    return found


def _checkpoints(keys: Keys, run_id: str) -> Plan[None]:
    yield from record_plan(keys, run_id)
    position = 0
    while texts := (yield page(run_id=run_id, position=position, page_bytes=PAGE_BYTES)):
        yield Emit(Checkpoint.of(run_id, position + at, text) for at, text in enumerate(texts))
        position += len(texts)
