"""Retry-after: the run is suspended, and continues at the due time on any live worker."""

from __future__ import annotations

import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from openagents_worker.models import RunState
from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for

RETRY_AFTER_MS = 2_000
STEPS = [("step", {"n": 0}), ("step", {"n": 1})]


def _of_task(received: list[dict[str, Any]], run_id: str) -> list[str]:
    kinds = [event for event in received if event.get("uuid") == run_id]
    return [event["type"] for event in sorted(kinds, key=lambda event: event["timestamp"])]


@pytest.mark.long
@pytest.mark.parametrize("source", ["model", "tool"])
def test_a_run_with_a_retry_after_continues_on_any_worker(make_world: MakeWorld, source: str) -> None:
    """A retryable error suspends a run until retry-after; then it continues on another worker, and repeats no
    call.

    One wait() lasts until the end.
    """
    world = make_world(workers=2).start()
    world.restarts = False
    limited = ("limited", {"n": 2, "times": 1, "retry_after_ms": RETRY_AFTER_MS})
    steps = [*STEPS, limited] if source == "tool" else STEPS
    limit = {"turn": 2, "times": 1, "retry_after_ms": RETRY_AFTER_MS} if source == "model" else None
    world.submit("plain", [*STEPS, ("step", {"n": 2})] if source == "tool" else STEPS)
    plain = world.wait("plain")

    with world.celery_events() as received, ThreadPoolExecutor(1) as waiter:
        handle = world.submit("limited", steps, limit=limit)
        waiting = waiter.submit(handle.wait, 60)
        wait_for(lambda: world.record("limited").state is RunState.RETRYING, "the run is suspended")
        assert handle.state == "RETRY"
        first = world.live_workers()[world.entries("limited")[-1]["pid"]]
        first.signal(signal.SIGTERM)
        wait_for(lambda: not first.alive, "the worker of the run has ended")
        result = waiting.result(60)
        wait_for(
            lambda: "task-succeeded" in _of_task(received, "limited"),
            "Celery's event of the end was received",
        )

    paused_s = _pause_of(world, source)
    calls = Counter(world.calls("limited"))
    pids = list(dict.fromkeys(entry["pid"] for entry in world.entries("limited"))) if source == "tool" else []
    retried = next(
        event for event in received if event.get("uuid") == "limited" and event["type"] == "task-retried"
    )
    kinds = [name for name in _of_task(received, "limited") if name not in ("task-sent", "task-received")]
    table(
        f"A {source} that replies 429, retry after {RETRY_AFTER_MS} ms",
        [
            {
                "asked again after s": round(paused_s, 2),
                "calls": len(calls),
                "begun": calls.total(),
                "Celery": " ".join(kinds),
            }
        ],
    )
    assert paused_s * 1000 >= RETRY_AFTER_MS
    assert sorted(calls.values()) == [1] * (len(calls) - 1) + [2], "only the refused call is repeated"
    assert source == "model" or len(pids) == 2, "another worker continued"
    assert result.final_output == f"done after {len(steps)}"
    assert _paid(result) == _paid(plain)
    assert kinds == ["task-started", "task-retried", "task-started", "task-succeeded"]
    assert "rate_limit" in retried["exception"]
    names = [event.name for event in world.assert_complete_events("limited")]
    assert [name for name in names if "resume" in name] == ["run.resume_attempted", "run.resume_succeeded"]


def _pause_of(world: World, source: str) -> float:
    """Seconds between the refusal and the next try, by the clock of the refusing side."""
    if source == "tool":
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


def test_a_run_fails_after_max_resume_attempts(make_world: MakeWorld) -> None:
    """The run emits run.resume_exhausted and fails with its last error."""
    world = make_world(workers=1).start()

    handle = world.submit(
        "exhausted",
        STEPS,
        limit={"turn": 1, "times": 99, "retry_after_ms": 50},
        budget={"max_resume_attempts": 2},
    )
    result = handle.wait(60)

    names = [event.name for event in world.assert_complete_events("exhausted", "run.failed")]
    assert names.count("run.resume_exhausted") == 1
    assert names.index("run.resume_exhausted") < names.index("run.failed")
    assert result.error_details is not None
    assert result.error_details.code == "llm.rate_limit"
    assert sorted(Counter(world.calls("exhausted")).values()) == [1, 1, 3], "one call and two repetitions"


def test_a_stopping_worker_hands_its_runs_over_at_once(make_world: MakeWorld) -> None:
    """SIGTERM: at their next commit runs continue on other workers, long before a lease expires, without
    repetition."""
    world = make_world(workers=2, lease_ms=20_000).start()
    world.restarts = False
    run_ids = [f"handed-{number}" for number in range(20)]
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 200}) for n in range(8)])
    wait_for(
        lambda: len({e["run"] for e in world.entries() if e["n"] == 1}) == len(run_ids),
        "all runs are executed",
    )
    world.model_answers.clear()
    asking = wait_for(
        lambda: _runs_that_wait_for_the_model(world, run_ids), "each run waits for the model, or has ended"
    )
    behind = [run_id for run_id in asking if world.entries(run_id)[-1]["n"] < 7]  # others get their answer
    owners = {run_id: world.owner(run_id) for run_id in behind}
    leaving = max(owners.values(), key=list(owners.values()).count)
    its_runs = [run_id for run_id, owner in owners.items() if owner is leaving]

    leaving.signal(signal.SIGTERM)
    signalled_at = time.time()
    wait_for(lambda: leaving.name in world.log_lines("worker.draining"), "it hands its runs over")
    world.model_answers.set()
    wait_for(lambda: not leaving.alive, "the worker has ended")
    for run_id in run_ids:
        assert world.wait(run_id).final_output == "done after 8"

    taken = [
        next(e["at"] for e in world.entries(run_id) if e["pid"] != leaving.process.pid) - signalled_at
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
        names = [event.name for event in world.assert_complete_events(run_id)]
        assert "run.handed_over" in names
        assert "run.recovered" not in names, "no worker has waited for the end of a lease"


def _runs_that_wait_for_the_model(world: World, run_ids: list[str]) -> list[str]:
    """The runs that wait for the model; empty while another run is neither waiting nor ended."""
    log = list(world.model.log)
    answered = {entry["id"] for entry in log if entry["event"] == "answered"}
    waiting = [entry for entry in log if entry["event"] == "received" and entry["id"] not in answered]
    asking = {str(entry["key"]).partition(":")[0] for entry in waiting}
    others = [run_id for run_id in run_ids if run_id not in asking]
    return sorted(asking) if all(world.record(run_id).state.is_terminal for run_id in others) else []
