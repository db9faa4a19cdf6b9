"""Somebody says "later": the run is put aside, goes on when it may, on whatever worker lives then."""

from __future__ import annotations

import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from openagents_worker.models import RunState
from tests.faults.conftest import MakeWorld
from tests.faults.world import World, table
from tests.waiting import wait_for

RETRY_AFTER_MS = 2_000
STEPS = [("step", {"n": 0}), ("step", {"n": 1})]


def _of_task(heard: list[dict[str, Any]], run_id: str) -> list[str]:
    told = [event for event in heard if event.get("uuid") == run_id]
    return [event["type"] for event in sorted(told, key=lambda event: event["timestamp"])]


@pytest.mark.parametrize("who", ["model", "tool"])
def test_a_run_that_is_told_to_come_back_later_does_so_on_any_worker(make_world: MakeWorld, who: str) -> None:
    """A retryable error puts a run aside until retry-after; then it goes on elsewhere and repeats nothing.

    One wait() lasts through it all.
    """
    world = make_world(workers=2).start()
    world.restarts = False
    limited = ("limited", {"n": 2, "times": 1, "retry_after_ms": RETRY_AFTER_MS})
    steps = [*STEPS, limited] if who == "tool" else STEPS
    limit = {"turn": 2, "times": 1, "retry_after_ms": RETRY_AFTER_MS} if who == "model" else None
    world.submit("plain", [*STEPS, ("step", {"n": 2})] if who == "tool" else STEPS)
    plain = world.wait("plain")

    with world.celery_events() as heard, ThreadPoolExecutor(1) as waiter:
        handle = world.submit("limited", steps, limit=limit)
        waiting = waiter.submit(handle.wait, 60)
        wait_for(lambda: world.record("limited").state is RunState.RETRYING, "the run is put aside")
        assert handle.state == "RETRY"
        first = world.live_workers()[world.entries("limited")[-1]["pid"]]
        first.signal(signal.SIGTERM)
        wait_for(lambda: not first.alive, "the worker that had the run has gone")
        result = waiting.result(60)
        wait_for(lambda: "task-succeeded" in _of_task(heard, "limited"), "Celery's event of the end is heard")

    paused_s = _pause_of(world, who)
    calls = Counter(world.calls("limited"))
    pids = list(dict.fromkeys(entry["pid"] for entry in world.entries("limited"))) if who == "tool" else []
    retried = next(
        event for event in heard if event.get("uuid") == "limited" and event["type"] == "task-retried"
    )
    told = [name for name in _of_task(heard, "limited") if name not in ("task-sent", "task-received")]
    table(
        f"A {who} that says 429, retry after {RETRY_AFTER_MS} ms",
        [
            {
                "asked again after s": round(paused_s, 2),
                "calls": len(calls),
                "begun": calls.total(),
                "Celery": " ".join(told),
            }
        ],
    )
    assert paused_s * 1000 >= RETRY_AFTER_MS
    assert sorted(calls.values()) == [1] * (len(calls) - 1) + [2], "only what was refused is asked again"
    assert who == "model" or len(pids) == 2, "another worker went on"
    assert result.final_output == f"done after {len(steps)}"
    assert _paid(result) == _paid(plain)
    assert told == ["task-started", "task-retried", "task-started", "task-succeeded"]
    assert "rate_limit" in retried["exception"]
    names = [event.name for event in world.assert_told_once("limited")]
    assert [name for name in names if "resume" in name] == ["run.resume_attempted", "run.resume_succeeded"]


def _pause_of(world: World, who: str) -> float:
    """Seconds between the refusal and the next try, by the clock of whoever refused."""
    if who == "tool":
        entries = [entry for entry in world.entries("limited") if entry["tool"] == "limited"]
        refused = next(entry["at"] for entry in entries if entry["event"] == "limited")
        return float([entry["at"] for entry in entries if entry["event"] == "begin"][1] - refused)
    log = world.model.log
    refused = next(entry for entry in log if entry.get("status") == 429)
    asked = next(entry for entry in log if entry["event"] == "received" and entry["id"] == refused["id"])
    return float(world.asked_with(asked["key"])[1]["at"] - refused["at"])


def _paid(result: Any) -> dict[str, Any]:
    usage: dict[str, Any] = result.usage.model_dump(include={"llm_calls", "tool_calls"})
    return usage


def test_a_run_that_is_always_told_to_come_back_later_gives_up(make_world: MakeWorld) -> None:
    """After max_resume_attempts the run says run.resume_exhausted and fails with the error that it met."""
    world = make_world(workers=1).start()

    handle = world.submit(
        "exhausted",
        STEPS,
        limit={"turn": 1, "times": 99, "retry_after_ms": 50},
        budget={"max_resume_attempts": 2},
    )
    result = handle.wait(60)

    names = [event.name for event in world.assert_told_once("exhausted", "run.failed")]
    assert names.count("run.resume_exhausted") == 1
    assert names.index("run.resume_exhausted") < names.index("run.failed")
    assert result.error_details is not None
    assert result.error_details.code == "llm.rate_limit"
    assert sorted(Counter(world.calls("exhausted")).values()) == [1, 1, 3], "asked once and twice again"


def test_a_worker_that_is_told_to_stop_hands_its_runs_over_at_once(make_world: MakeWorld) -> None:
    """SIGTERM: at their next commit runs go on elsewhere, long before a lease is over, and repeat nothing."""
    world = make_world(workers=2, lease_ms=20_000).start()
    world.restarts = False
    run_ids = [f"handed-{number}" for number in range(20)]
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 200}) for n in range(8)])
    wait_for(
        lambda: len({e["run"] for e in world.entries() if e["n"] == 1}) == len(run_ids), "all are at work"
    )
    world.model_answers.clear()
    asking = wait_for(lambda: _all_ask(world, run_ids), "each run waits for the model, or is over")
    owners = {run_id: world.owner(run_id) for run_id in asking}
    leaving = max(owners.values(), key=list(owners.values()).count)
    its_runs = [run_id for run_id, owner in owners.items() if owner is leaving]

    leaving.signal(signal.SIGTERM)
    told = time.time()
    wait_for(lambda: leaving.name in world.said("Warm shutdown"), "it has heard it")
    world.model_answers.set()
    wait_for(lambda: not leaving.alive, "it has gone")
    for run_id in run_ids:
        assert world.wait(run_id).final_output == "done after 8"

    taken = [
        next(e["at"] for e in world.entries(run_id) if e["pid"] != leaving.process.pid) - told
        for run_id in its_runs
    ]
    calls = [call for run_id in run_ids for call in world.calls(run_id)]
    table(
        f"SIGTERM, with a lease of {world.lease_s:g} s",
        [
            {
                "runs handed over": len(taken),
                "the last one goes on after s": round(max(taken), 2),
                "calls again": len(calls) - len(set(calls)),
            }
        ],
    )
    assert len(calls) == len(set(calls))
    for run_id in its_runs:
        names = [event.name for event in world.assert_told_once(run_id)]
        assert "run.handed_over" in names
        assert "run.recovered" not in names, "nobody has waited for the end of a lease"


def _all_ask(world: World, run_ids: list[str]) -> list[str]:
    """The runs that wait for the model; none while others have something else to do."""
    log = list(world.model.log)
    answered = {entry["id"] for entry in log if entry["event"] == "answered"}
    waiting = [entry for entry in log if entry["event"] == "received" and entry["id"] not in answered]
    asking = {str(entry["key"]).partition(":")[0] for entry in waiting}
    others = [run_id for run_id in run_ids if run_id not in asking]
    return sorted(asking) if all(world.record(run_id).state.is_terminal for run_id in others) else []
