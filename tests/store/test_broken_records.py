"""A key of the right type may have an invalid value: only its own run is affected."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.keys import Keys
from tests.store.test_wrong_types import whole_history
from tests.support.sampling import shares

keys = Keys("oa")

NONSENSE = [
    "",
    "x",
    "-1",
    "1.5",
    "1e400",
    "nan",
    "-inf",
    "9" * 30,
    "0x10",
    "{",
    "[]",
    "null",
    '{"a":1}',
    b"\xff\xfe",
]
FIELDS = [
    "state", "fence", "owner", "attempt", "life", "agent", "session", "queue", "cancel", "steps",
    "canvas", "tell", "expires", "retries", "recoveries", "stuck", "durable", "usage", "emit_no", "due",
    "uid", "started", "claimed", "cancel_reason", "format", "suspicion", "seq", "active_ms",
    "retries_in_all", "tellings", "request", "lists", "claimed_at", "resent", "left_mark", "left_since",
    "left_count", "digest", "last_error", "untold",
]  # fmt: skip
OTHERS = {
    "agents": ("hash", "a"),
    "fleet": ("hash", "w1"),
    "fleet_lag": ("hash", "w1"),
    "watched": ("hash", "w1"),
    "sent_again": ("hash", "q"),
}
OF_IDS = {
    "facts": ("r1", "tries:0.1"),
    "session": ("s1", "holder"),
    "session ordinal": ("s1", "ordinal"),
    "session version": ("s1", "version"),
    "session format": ("s1", "format"),
    "host": ("h1", ""),
    "host worker": ("h1", "w9"),
    "lease_end": ("w1", "carried"),
    "lease_end named": ("w1", "named"),
    "lease_end_runs": ("w1", "r1"),
    "gone": ("w1", "r1"),
    "gone by": ("w1", ""),
}


@pytest.fixture
def store(redis_url: str) -> Generator[Store]:
    store = Store(Cell(redis_url))
    yield store
    store.redis.flushall()
    store.close()


def runs_complete_with(store: Store, key: str, field: str, value: Any) -> None:
    """Runs complete if this field has this value before they start, and if it gets the value while they
    execute."""
    for moment in ("meanwhile", "before"):
        store.redis.flushall()
        if moment == "before":
            store.redis.hset(key, field, value)
        whole_history(store, "n1", lambda: store.redis.hset(key, field, value))


@pytest.mark.share(of=3)
@pytest.mark.parametrize(("field", "values"), shares(FIELDS, NONSENSE))
def test_an_invalid_field_of_a_record_does_not_affect_other_runs(
    store: Store, field: str, values: list[Any]
) -> None:
    """Neither a loop over many runs nor the end of another run fails."""
    for value in values:
        store.redis.flushall()
        whole_history(store, "n1", lambda value=value: store.redis.hset(keys("run", "r1"), field, value))


@pytest.mark.parametrize(("name", "values"), shares([*OTHERS, *OF_IDS], NONSENSE))
def test_an_invalid_field_outside_run_records_does_not_stop_a_run(
    store: Store, name: str, values: list[Any]
) -> None:
    """Information of workers, counters, and information about the end of a lease."""
    for value in values:
        if name in OTHERS:
            runs_complete_with(store, keys(name), OTHERS[name][1], value)
        else:
            id_, field = OF_IDS[name]
            runs_complete_with(store, keys(name.split()[0], id_), field, value)


LISTS = {
    "due": (), "sent": ("q",), "workers": (), "silent": (), "lost_leases": (), "index": ("all",),
    "indexes": (), "session_queue": ("s1",), "false_alarms": ("process",), "resend": ("q",), "served": (),
}  # fmt: skip
MEMBERS = ["", "no such run", "r1", "x" * 5000, b"\xff\xfe", "w1"]


@pytest.mark.share(of=3)
@pytest.mark.parametrize("name", LISTS)
def test_an_invalid_entry_of_a_sorted_set_does_not_hide_later_entries(store: Store, name: str) -> None:
    """Ids without a run, with scores before all others."""
    key = keys(name, *LISTS[name])
    for score in ("-inf", 1, "inf"):
        for member in MEMBERS:
            store.redis.flushall()
            store.redis.execute_command("ZADD", key, score, member)
            whole_history(store, "n1")
