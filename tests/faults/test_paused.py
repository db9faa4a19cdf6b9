"""A worker is paused for three leases and continues: other workers have its runs, and it changes no key."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import Worker, World, table
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

READERS: dict[str, Callable[[Any, str], Any]] = {
    "hash": lambda redis, key: redis.hgetall(key),
    "list": lambda redis, key: redis.lrange(key, 0, -1),
    "set": lambda redis, key: redis.smembers(key),
    "stream": lambda redis, key: redis.xrange(key),
    "zset": lambda redis, key: redis.zrange(key, 0, -1, withscores=True),
}


def _read_all_keys(world: World, run_ids: Sequence[str]) -> dict[str, Any]:
    """All keys of these runs and their sessions, with their contents."""
    redis = world.client.store.redis
    keys = [key for run_id in run_ids for key in redis.scan_iter(f"oa:*{run_id}*", count=1000)]
    return {key: READERS[str(redis.type(key))](redis, key) for key in sorted(keys)}


def _pause_one(world: World, round_no: int, runs: int) -> dict[str, object]:
    run_ids = [f"run-{round_no}-{number}." for number in range(runs)]
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 150}) for n in range(4)], latency_ms=100)
    victim, its_runs = _busy_worker(world, run_ids)
    incarnation = next(i for i in world.incarnations() if i.startswith(f"{victim.name}@"))

    victim.signal(signal.SIGSTOP)
    stopped_ms = _redis_ms(world)
    for run_id in run_ids:
        world.wait(run_id, 60)
    three_leases_on_ms = stopped_ms + 3 * world.lease_s * 1000
    wait_for(lambda: _redis_ms(world) > three_leases_on_ms, "three leases have passed")
    before, asked_before = _read_all_keys(world, run_ids), len(world.model.log)
    victim.signal(signal.SIGCONT)
    wait_for(lambda: _has_new_incarnation(world, victim, incarnation), f"{victim.name} has a new lease")

    _wait_until_it_executes_a_run(world, victim, f"after-{round_no}")
    after = _read_all_keys(world, run_ids)
    for run_id in run_ids:
        events = world.assert_complete_events(run_id)
        assert len(world.client.session(f"session-of-{run_id}").transcript) == 2
        last = [event.worker for event in events][-1]
        assert run_id not in its_runs or last != incarnation, "another worker has ended it"
    return {
        "round": round_no,
        "runs of the paused worker": len(its_runs),
        "keys compared": len(before),
        "stale writes": sum(before.get(key) != after.get(key) for key in before | after),
        "model asked": asked_before,
        "new runs on it": 1,
    }


def _busy_worker(world: World, run_ids: Sequence[str]) -> tuple[Worker, list[str]]:
    """Wait for a worker with at least a sixth of the runs inside a tool; returns it and those runs."""

    def in_tools() -> tuple[int, list[str]] | None:
        by_run: dict[str, int] = {}
        for entry in world.entries():
            if entry["run"] in run_ids:
                by_run[entry["run"]] = entry["pid"] if entry["event"] == "begin" and entry["n"] >= 1 else 0
        pids = [pid for pid in by_run.values() if pid]
        pid = max(pids, key=pids.count, default=0)
        runs = [run_id for run_id, its_pid in by_run.items() if its_pid == pid]
        return (pid, runs) if pid and len(runs) * 6 >= len(run_ids) else None

    found = wait_for(in_tools, "a worker has many runs inside a step")
    assert found is not None
    return world.live_workers()[found[0]], found[1]


def _redis_ms(world: World) -> float:
    """The time by the clock that decides when a lease expires, in ms."""
    seconds, micros = world.client.store.redis.time()
    return float(seconds * 1000 + micros / 1000)


def _has_new_incarnation(world: World, worker: Worker, old: str) -> bool:
    mine = [incarnation for incarnation in world.incarnations() if incarnation.startswith(f"{worker.name}@")]
    return bool(mine) and old not in mine


def _wait_until_it_executes_a_run(world: World, worker: Worker, name: str) -> None:
    """Submit runs until the worker has executed one."""
    for number in range(50):
        world.submit(f"{name}-{number}", [("step", {"n": 0, "ms": 20})])
        world.wait(f"{name}-{number}")
        if world.entries(f"{name}-{number}")[0]["pid"] == worker.process.pid:
            return
    raise AssertionError(f"{worker.name} has executed none of 50 runs since it continued")


def _check(world: World, rounds: int, runs: int) -> None:
    rows = [_pause_one(world, round_no, runs) for round_no in range(rounds)]
    table(f"SIGSTOP for three leases of {world.lease_s:g} s, then SIGCONT", rows)
    assert all(row["stale writes"] == 0 for row in rows)
    assert all(row["keys compared"] > runs for row in rows), "several keys of each run"


def test_a_worker_that_was_paused_writes_nothing(make_world: MakeWorld) -> None:
    """After a pause of three leases other workers have its runs: it changes no key, and executes new runs."""
    world = make_world(workers=2).start()

    _check(world, rounds=1, runs=20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_is_paused_again_and_again(make_world: MakeWorld) -> None:
    """Ten pauses with fifty runs each."""
    world = make_world(workers=2).start()

    _check(world, rounds=10, runs=50)
