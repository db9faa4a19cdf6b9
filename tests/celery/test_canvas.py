"""Links, chains, groups and chords: they are called after the end of a run, whatever faults it met.

Each is tested with a run without a fault, with a retried run, and with a run whose worker is killed.
"""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult, GroupResult

from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle
from tests.celery.shop import PATIENCE_S, Shop, open_shop
from tests.support.waiting import wait_for

FAULTS = ("none", "retry", "lost")
RUNS = 13  # runs of `Submitted` that meet the fault


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("canvas")) as shop:
        yield shop


class Submitted:
    """All submissions at once, so that one killed worker is enough for all of them."""

    def __init__(self, shop: Shop, fault: str) -> None:
        self.shop, self.fault = shop, fault
        run, note, ask = shop.run_agent, self.note, self.ask
        self.linked: RunHandle[Any] = run.apply_async((ask(),), link=[note("link 1"), note("link 2")])
        self.failed: RunHandle[Any] = run.apply_async(
            (ask("fails"),), link=note("link of a failure"), link_error=note("link_error")
        )
        self.chained: AsyncResult = (run.s(ask()) | note("chain 1") | note("chain 2")).apply_async()
        self.runs: AsyncResult = chain(run.s(ask()), run.si(shop.request("ok"))).apply_async()
        self.asked: AsyncResult = (shop.app.tasks["product.ask"].s(f"{fault} ok") | run.s()).apply_async()
        self.group: GroupResult = group(run.s(ask()) for _ in range(3)).apply_async()
        self.chord: AsyncResult = chord([run.s(ask()), run.s(ask())])(note("chord"))
        self.later: RunHandle[Any] = run.apply_async((ask(),), countdown=0.5, link=note("countdown"))
        become = shop.app.tasks["product.become_a_run"]
        self.replaced: AsyncResult = become.apply_async((f"{fault} ok",), link=note("replaced"))
        at = datetime.now(UTC) + timedelta(seconds=0.5)
        self.in_time: RunHandle[Any] = run.apply_async((ask(),), eta=at, expires=60, link=note("eta"))
        if fault == "lost":
            wait_for(
                lambda: self.count_asking_runs() >= RUNS, "all runs have called the model", timeout=PATIENCE_S
            )
            shop.workers[-1].kill()
            shop.start_worker()

    def note(self, what: str) -> Any:
        return self.shop.note(f"{self.fault} {what}")

    def ask(self, end: str = "ok") -> dict[str, Any]:
        return self.shop.request(f"{self.fault} {end}")

    def count_asking_runs(self) -> int:
        """The number of runs with this fault that have called the model."""
        asked = [line for line in self.shop.model.log if line["event"] == "received"]
        return len({line["key"] for line in asked if self.fault in line["messages"][-1]["content"]})

    def result_of_chain(self, last: AsyncResult) -> Any:
        """The result of the last run of a chain."""
        return last.get(timeout=PATIENCE_S)

    def notes(self, what: str, count: int = 1) -> list[Any]:
        what = f"{self.fault} {what}"
        wait_for(lambda: len(self.shop.notes(what)) >= count, f"{what} is called", timeout=PATIENCE_S)
        return self.shop.notes(what)


@pytest.fixture(scope="module", params=FAULTS)
def submitted(request: pytest.FixtureRequest, shop: Shop) -> Submitted:
    return Submitted(shop, request.param)


@pytest.mark.long
def test_a_link_is_called_with_the_runs_id_and_how_it_ended(submitted: Submitted) -> None:
    """Each link is called once; the output is read with the id."""
    value = {"run_id": submitted.linked.id, "stop_reason": "completed"}

    assert submitted.notes("link 1") == submitted.notes("link 2") == [value]
    assert submitted.linked.record().state is RunState.COMPLETED


def test_a_failure_calls_link_error_alone(submitted: Submitted) -> None:
    """Once, with the id of the run, after its final failure."""
    assert submitted.notes("link_error") == [submitted.failed.id]
    assert submitted.failed.record().state is RunState.FAILED
    assert submitted.shop.notes(f"{submitted.fault} link of a failure") == []


def test_a_chain_continues_with_the_value_of_the_run(submitted: Submitted) -> None:
    """Through its next tasks; the chain has an ordinary result."""
    value = submitted.chained.get(timeout=PATIENCE_S)

    assert value["stop_reason"] == "completed"
    assert submitted.notes("chain 1") == submitted.notes("chain 2") == [value]


def test_a_run_follows_a_run(submitted: Submitted) -> None:
    """`.si(request)` keeps its own request; it starts after the end of the previous run."""
    second = submitted.result_of_chain(submitted.runs)

    first = submitted.shop.client.record(submitted.runs.parent.id)
    record = submitted.shop.client.record(submitted.runs.id)
    assert second["run_id"] == record.run_id
    assert first.ended_ms is not None
    assert record.created_ms is not None
    assert first.ended_ms <= record.created_ms


def test_a_run_without_a_request_uses_the_previous_value(submitted: Submitted) -> None:
    """`run_agent.s()` after a task that returns the fields of a request."""
    submitted.result_of_chain(submitted.asked)

    record = submitted.shop.client.record(submitted.asked.id)
    assert record.request is not None
    assert record.request.input_text == f"{submitted.fault} ok"


def test_a_group_of_runs_is_a_group_of_handles(submitted: Submitted) -> None:
    """`GroupResult` waits for all of them."""
    results = submitted.group.get(timeout=PATIENCE_S)

    assert [result["final_output"] for result in results] == ["done"] * 3
    assert submitted.group.successful()
    assert all(isinstance(handle, RunHandle) for handle in submitted.group)


def test_a_chord_is_called_once_when_all_of_its_runs_are_over(submitted: Submitted) -> None:
    """With their values, in their order."""
    values = submitted.chord.get(timeout=PATIENCE_S)

    assert [value["stop_reason"] for value in values] == ["completed"] * 2
    assert submitted.notes("chord") == [values]


def test_a_delayed_run_has_its_links_too(submitted: Submitted) -> None:
    """`countdown` sends no message before the due time; the links are stored in the record."""
    assert submitted.notes("countdown") == [{"run_id": submitted.later.id, "stop_reason": "completed"}]


def test_a_run_replaces_a_task(submitted: Submitted) -> None:
    """`self.replace(run_agent.si(request))`: it has the id and the links of the task."""
    value = submitted.replaced.get(timeout=PATIENCE_S)

    assert value == {"run_id": submitted.replaced.id, "stop_reason": "completed"}
    assert submitted.notes("replaced") == [value]


def test_a_run_that_was_started_in_time_does_not_expire(submitted: Submitted) -> None:
    """`expires` limits only the start of a run."""
    assert submitted.notes("eta") == [{"run_id": submitted.in_time.id, "stop_reason": "completed"}]


def test_the_fault_has_happened(submitted: Submitted) -> None:
    """A run without a fault has one attempt; the others have two."""
    submitted.linked.wait(PATIENCE_S)

    assert submitted.linked.record().attempt == (1 if submitted.fault == "none" else 2)
    assert submitted.linked.record().recoveries == (1 if submitted.fault == "lost" else 0)
