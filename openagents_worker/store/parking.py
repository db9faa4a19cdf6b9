"""Parking: the only place that defines how the record of a parked run says what it waits for.

The field `waits` is a JSON list. Scripts read it, so it is not a payload and holds names and times only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.models import Waiting, WaitKind
from openagents_worker.store.states import parked_state

__all__ = ["Park", "Wait", "parse_waiting"]


REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait of a run that parks.

    `until_ms` is a time by the clock of Redis, in ms since 1970; 0: no time-out. `fact` is the name of the
    fact that ends the wait, such as `approval:pay:1`; if facts of this kind are numbered, it ends with a
    colon, such as `signal:payment:`. '' if only the time ends it. `needs_all`: the run continues when all of
    its waits of this kind that say so have their facts. `limit` is the limit of a budget that is used up.
    """

    kind: WaitKind
    name: str = ""
    call_id: str = ""
    until_ms: int = 0
    fact: str = ""
    needs_all: bool = False
    limit: float = 0

    def to_json(self) -> dict[str, Any]:
        """The entry of the field `waits`. Values that are empty are left out."""
        fields: dict[str, Any] = {
            "kind": self.kind.value,
            "name": self.name,
            "call_id": self.call_id,
            "until_ms": self.until_ms,
            "fact": self.fact,
            "needs_all": self.needs_all,
            "limit": self.limit,
        }
        return {key: value for key, value in fields.items() if value}


@dataclass(frozen=True, slots=True)
class Park:
    """How an attempt parks its run: what the run waits for.

    `facts_seen` is the number of the newest fact that the attempt has read: if there is a newer one, the run
    is not parked but continues at once.
    """

    waits: Sequence[Wait]
    facts_seen: int
    limit: str = ""
    """The limit of the fleet in whose queue the run waits."""
    tenant: str = ""
    """The tenant of the run, for its turn in this queue."""

    @property
    def state(self) -> str:
        return parked_state(wait.kind for wait in self.waits).value

    @property
    def waits_text(self) -> str:
        """The field `waits` of the record."""
        return dumps([wait.to_json() for wait in self.waits])

    @property
    def event_payload(self) -> str:
        """The payload of the event `run.waiting`."""
        waiting = [
            each.model_dump(mode="json", exclude_defaults=True) for each in parse_waiting(self.waits_text)
        ]
        due_at = _iso_text(self.due_ms) if self.due_ms else None
        return dumps({"waiting": waiting, "due_at": due_at})

    @property
    def due_ms(self) -> int:
        """The earliest time-out, ms since 1970; 0 if there is none."""
        return min((wait.until_ms for wait in self.waits if wait.until_ms), default=0)

    @property
    def reason(self) -> str:
        """What the run waits for, for people: `waiting for signal payment until 2026-03-01T12:00:00.000Z`."""
        waited = ", ".join(dict.fromkeys(map(str, parse_waiting(self.waits_text))))
        waited = waited if len(waited) <= REASON_CHARS else f"{waited[:REASON_CHARS]}…"
        return f"waiting for {waited}{f' until {_iso_text(self.due_ms)}' if self.due_ms else ''}"


def _iso_text(at_ms: int) -> str:
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_waiting(text: str) -> tuple[Waiting, ...]:
    """What a parked run waits for. Raises `ValueError` or `TypeError` for a text that is not such a list."""
    return tuple(_parse_entries(loads(text) if text else []))


def _parse_entries(entries: Iterable[Any]) -> Iterable[Waiting]:
    for entry in entries:
        until_ms = entry.get("until_ms")
        yield Waiting.model_validate(
            {**entry, "until": None if until_ms is None else datetime.fromtimestamp(until_ms / 1000, UTC)}
        )
