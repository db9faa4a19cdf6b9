"""Links, chains, groups, chords: what follows a run is called after its end, whatever lay between.

Each is told three times: of a run that goes well, of one that is retried, and of one whose worker is killed.
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
from tests.waiting import wait_for

TROUBLES = ("none", "retry", "lost")
RUNS = 13  # that meet it


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("canvas")) as shop:
        yield shop


class Told:
    """Everything submitted at once, so that one killed worker is enough for all of it."""

    def __init__(self, shop: Shop, trouble: str) -> None:
        self.shop, self.trouble = shop, trouble
        run, note, ask = shop.run_agent, self.note, self.ask
        self.linked: RunHandle[Any] = run.apply_async((ask(),), link=[note("link 1"), note("link 2")])
        self.failed: RunHandle[Any] = run.apply_async(
            (ask("fails"),), link=note("link of a failure"), link_error=note("link_error")
        )
        self.chained: AsyncResult = (run.s(ask()) | note("chain 1") | note("chain 2")).apply_async()
        self.runs: AsyncResult = chain(run.s(ask()), run.si(shop.request("ok"))).apply_async()
        self.asked: AsyncResult = (shop.app.tasks["product.ask"].s(f"{trouble} ok") | run.s()).apply_async()
        self.group: GroupResult = group(run.s(ask()) for _ in range(3)).apply_async()
        self.chord: AsyncResult = chord([run.s(ask()), run.s(ask())])(note("chord"))
        self.later: RunHandle[Any] = run.apply_async((ask(),), countdown=0.5, link=note("countdown"))
        become = shop.app.tasks["product.become_a_run"]
        self.replaced: AsyncResult = become.apply_async((f"{trouble} ok",), link=note("replaced"))
        at = datetime.now(UTC) + timedelta(seconds=0.5)
        self.in_time: RunHandle[Any] = run.apply_async((ask(),), eta=at, expires=60, link=note("eta"))
        if trouble == "lost":
            wait_for(lambda: self.asked_by() >= RUNS, "the model is asked by all", timeout=PATIENCE_S)
            shop.workers[-1].kill()
            shop.start_worker()

    def note(self, what: str) -> Any:
        return self.shop.note(f"{self.trouble} {what}")

    def ask(self, end: str = "ok") -> dict[str, Any]:
        return self.shop.request(f"{self.trouble} {end}")

    def asked_by(self) -> int:
        """How many runs with this trouble have asked the model."""
        asked = [line for line in self.shop.model.log if line["event"] == "received"]
        return len({line["key"] for line in asked if self.trouble in line["messages"][-1]["content"]})

    def of_a_chain(self, last: AsyncResult) -> Any:
        """What the last run of a chain gives; it is known only once the one before it is over."""
        return last.get(timeout=PATIENCE_S)

    def notes(self, what: str, count: int = 1) -> list[Any]:
        what = f"{self.trouble} {what}"
        wait_for(lambda: len(self.shop.notes(what)) >= count, f"{what} is called", timeout=PATIENCE_S)
        return self.shop.notes(what)


@pytest.fixture(scope="module", params=TROUBLES)
def told(request: pytest.FixtureRequest, shop: Shop) -> Told:
    return Told(shop, request.param)


def test_a_link_is_called_with_the_runs_id_and_how_it_ended(told: Told) -> None:
    """Each of them, once; the output is read by the id."""
    value = {"run_id": told.linked.id, "stop_reason": "completed"}

    assert told.notes("link 1") == told.notes("link 2") == [value]
    assert told.linked.record().state is RunState.COMPLETED


def test_a_failure_calls_link_error_alone(told: Told) -> None:
    """With the id of the run, once, and when it has really failed."""
    assert told.notes("link_error") == [told.failed.id]
    assert told.failed.record().state is RunState.FAILED
    assert told.shop.notes(f"{told.trouble} link of a failure") == []


def test_a_chain_goes_on_with_what_the_run_gives(told: Told) -> None:
    """Through the tasks behind it; the chain's result is an ordinary one."""
    value = told.chained.get(timeout=PATIENCE_S)

    assert value["stop_reason"] == "completed"
    assert told.notes("chain 1") == told.notes("chain 2") == [value]


def test_a_run_follows_a_run(told: Told) -> None:
    """`.si(request)` keeps its own request; it begins after the end of the one before."""
    second = told.of_a_chain(told.runs)

    first = told.shop.client.record(told.runs.parent.id)
    record = told.shop.client.record(told.runs.id)
    assert second["run_id"] == record.run_id
    assert first.ended_ms is not None
    assert record.created_ms is not None
    assert first.ended_ms <= record.created_ms


def test_a_run_without_a_request_takes_the_value_before(told: Told) -> None:
    """`run_agent.s()` behind a task that returns a request's fields."""
    told.of_a_chain(told.asked)

    record = told.shop.client.record(told.asked.id)
    assert record.request is not None
    assert record.request.input_text == f"{told.trouble} ok"


def test_a_group_of_runs_is_a_group_of_handles(told: Told) -> None:
    """`GroupResult` waits for all of them."""
    results = told.group.get(timeout=PATIENCE_S)

    assert [result["final_output"] for result in results] == ["done"] * 3
    assert told.group.successful()
    assert all(isinstance(handle, RunHandle) for handle in told.group)


def test_a_chord_is_called_once_when_all_of_its_runs_are_over(told: Told) -> None:
    """With what each of them gives, in their order."""
    values = told.chord.get(timeout=PATIENCE_S)

    assert [value["stop_reason"] for value in values] == ["completed"] * 2
    assert told.notes("chord") == [values]


def test_a_delayed_run_has_its_links_too(told: Told) -> None:
    """`countdown` makes no message before it is due; what is linked waits in the record."""
    assert told.notes("countdown") == [{"run_id": told.later.id, "stop_reason": "completed"}]


def test_a_run_takes_the_place_of_a_task(told: Told) -> None:
    """`self.replace(run_agent.si(request))`: it has the task's id, and what was linked to the task."""
    value = told.replaced.get(timeout=PATIENCE_S)

    assert value == {"run_id": told.replaced.id, "stop_reason": "completed"}
    assert told.notes("replaced") == [value]


def test_a_run_that_was_started_in_time_does_not_expire(told: Told) -> None:
    """`expires` is about its start; what comes after it may take its time."""
    assert told.notes("eta") == [{"run_id": told.in_time.id, "stop_reason": "completed"}]


def test_the_trouble_was_real(told: Told) -> None:
    """The run that goes well has one attempt; the others have two."""
    told.linked.wait(PATIENCE_S)

    assert told.linked.record().attempt == (1 if told.trouble == "none" else 2)
    assert told.linked.record().recoveries == (1 if told.trouble == "lost" else 0)
