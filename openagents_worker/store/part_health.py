"""The health of background parts: the only place that defines what a worker stores about its own parts.

A worker stores it with each heartbeat, and only parts that have a problem. It expires with the lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from openagents_worker.jsontext import dumps, loads

__all__ = ["DATA_LOST", "PartHealth", "PartProblem", "PartState", "parse_parts", "parts_json"]

DATA_LOST = "redis.data_lost"
"""The code of the heartbeat of a worker that has noticed that Redis lost its data."""
MAX_PARTS = 20
MAX_CHARS = 100  # of the name of a part, and of a code
MAX_AGE_MS = 10 * 365 * 24 * 3_600_000


class PartState(StrEnum):
    """Why a worker reports a part."""

    FAILING = "failing"  # its last round has failed
    LATE = "late"  # its next round is overdue
    RECOVERED = "recovered"  # it works again; a round has failed in the last minutes


@dataclass(frozen=True, slots=True)
class PartProblem:
    """A part with a problem, as its worker sees it.

    `age_s` is the time since its first failed round in a row, since its last round (late), or since its last
    error (recovered). `code` is that of the last error: an error code, or the name of an exception class.
    """

    part: str
    state: PartState
    age_s: float
    failures: int
    code: str


@dataclass(frozen=True, slots=True)
class PartHealth:
    """A background part of a worker that fails, is late, or has failed in the last ten minutes.

    `since`: its first failed round in a row, its last round (late), or its last error (recovered). `failures`
    counts failed rounds in a row. `code` is that of the last error: an error code, or the name of an
    exception class. A newer worker may report a `state` that is not in `PartState`.
    """

    part: str
    state: str
    since: datetime
    failures: int
    code: str | None

    @property
    def is_problem(self) -> bool:
        """Whether the part does not work now."""
        return self.state != PartState.RECOVERED


def parts_json(problems: Iterable[PartProblem]) -> str:
    """What the script `renew` stores: a JSON list, '' if there is no problem."""
    rows = [
        {
            "part": one.part[:MAX_CHARS],
            "state": one.state.value,
            "age_ms": round(one.age_s * 1000),
            "failures": one.failures,
            "code": one.code[:MAX_CHARS],
        }
        for one in problems
    ]
    return dumps(rows[:MAX_PARTS]) if rows else ""


def parse_parts(text: Any) -> tuple[PartHealth, ...]:
    """The stored parts. Anything that is not valid is left out, so that the worker is shown."""
    try:
        stored = loads(text) if isinstance(text, str) else {}
        at_ms, rows = stored["at"], stored["parts"]
        return tuple(_part_health(row, at_ms) for row in rows[:MAX_PARTS])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
        return ()


def _part_health(row: Mapping[str, Any], at_ms: int) -> PartHealth:
    age_ms = min(max(int(row["age_ms"]), 0), MAX_AGE_MS)
    return PartHealth(
        part=str(row["part"])[:MAX_CHARS],
        state=str(row["state"])[:MAX_CHARS],
        since=datetime.fromtimestamp((int(at_ms) - age_ms) / 1000, UTC),
        failures=int(row.get("failures") or 0),
        code=str(row["code"])[:MAX_CHARS] if row.get("code") else None,
    )
