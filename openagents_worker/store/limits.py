"""Limits of the fleet: the only place that reads for which of them runs wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.store.client import Plan
from openagents_worker.store.keys import Keys
from openagents_worker.store.redis_errors import default_if_wrong_type

__all__ = ["LimitInfo", "read_limits"]

MOST_SHOWN = 1_000


@dataclass(frozen=True, slots=True)
class LimitInfo:
    """A limit of the fleet for which runs wait. `waiting` is their number, `in_use` that of the requests in
    flight or reserved."""

    name: str
    waiting: int
    in_use: int


def read_limits(keys: Keys) -> Plan[tuple[LimitInfo, ...]]:
    """A plan that returns the limits for which runs wait, the first thousand of them, by name."""
    answer = yield lambda client: _together(client, lambda p: p.zrange(keys("limits"), 0, MOST_SHOWN - 1))
    names = sorted(default_if_wrong_type(answer[0], []))

    def counts(pipeline: Any) -> None:
        for name in names:
            pipeline.zcard(keys("limit_queue", name))
            pipeline.zcard(keys("limit_calls", name))

    found = yield lambda client: _together(client, counts)
    numbers = [default_if_wrong_type(number, 0) for number in found]
    return tuple(map(LimitInfo, names, numbers[::2], numbers[1::2]))


def _together(client: Any, ask: Any) -> Sequence[Any]:
    pipeline = client.pipeline(transaction=False)
    ask(pipeline)
    answers: Sequence[Any] = pipeline.execute(raise_on_error=False)
    return answers
