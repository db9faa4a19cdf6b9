"""Limits of the fleet: the only place that reads for which of them runs wait."""

from __future__ import annotations

from dataclasses import dataclass

from openagents_worker.store.client import Plan
from openagents_worker.store.index_pages import for_each_id
from openagents_worker.store.keys import Keys
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.row_reads import ReadBy, RowRead, read_each

__all__ = ["LimitInfo", "read_limits"]

MOST_SHOWN = 1_000


@dataclass(frozen=True, slots=True)
class LimitInfo:
    """A limit of the fleet for which runs wait. `waiting` is their number, `in_use` that of the requests in
    flight or reserved."""

    name: str
    waiting: int
    in_use: int


def read_limits(keys: Keys, read_by: ReadBy = ReadBy.COMMANDS) -> Plan[tuple[LimitInfo, ...]]:
    """A plan that returns the limits for which runs wait, the first thousand of them, by name."""
    ((answer,),) = yield from for_each_id([keys("limits")], lambda r, key: r.zrange(key, 0, MOST_SHOWN - 1))
    names = sorted(default_if_wrong_type(answer, []))
    counts = RowRead(
        "limit",
        (
            lambda r, name: r.zcard(keys("limit_queue", name)),
            lambda r, name: r.zcard(keys("limit_calls", name)),
        ),
    )
    rows = yield from read_each(counts, names, read_by)
    return tuple(
        LimitInfo(name, *(default_if_wrong_type(number, 0) for number in row))
        for name, row in zip(names, rows, strict=True)
    )
