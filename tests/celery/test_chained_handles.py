"""Handles of runs in chains: what they say before, while and after what stands before the run is executed."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import StampingVisitor, chunks, xmap, xstarmap
from celery.exceptions import TimeoutError as CeleryTimeoutError

from openagents_worker.errors import RequestInvalid, RunFailed, RunNotFound
from openagents_worker.producer.handle import RunHandle
from tests.celery.shop import PATIENCE_S, Shop, open_shop
from tests.waiting import wait_for

SOON_S = 0.05


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    """Its worker is started by the first test, when all is submitted."""
    with open_shop(tmp_path_factory.mktemp("chains"), workers=0) as shop:
        yield shop


class Submitted:
    """Chains that were submitted while no worker was there."""

    def __init__(self, shop: Shop) -> None:
        ask, run, note = shop.app.tasks["product.ask"], shop.run_agent, shop.note
        fail = shop.app.tasks["product.fail"]
        self.behind_a_task: Any = chain(ask.s("ok"), run.s()).apply_async()
        self.between_tasks: Any = chain(ask.s("ok"), run.s(), note("between")).apply_async()
        self.behind_a_failure: Any = chain(fail.si("no"), run.si(shop.request("ok"))).apply_async()
        self.far_behind: Any = chain(
            fail.si("no"), ask.si("ok"), run.s(), run.si(shop.request("ok"))
        ).apply_async()
        self.behind_a_run: Any = chain(run.s(shop.request("fails")), run.si(shop.request("ok"))).apply_async()
        self.behind_a_group: Any = chord([ask.s("ok"), ask.s("ok")])(run.si(shop.request("ok")))


@pytest.fixture(scope="module")
def before(shop: Shop) -> dict[str, Any]:
    """What the handles say before anything is executed; then a worker is started."""
    submitted = Submitted(shop)
    handles = {name: handle for name, handle in vars(submitted).items() if isinstance(handle, RunHandle)}
    said = {name: looked(handle) for name, handle in handles.items()}
    middle = submitted.between_tasks.parent
    said["the run between tasks"] = looked(middle)
    said["waited"] = [waits(handle) for handle in (*handles.values(), submitted.between_tasks)]
    shop.start_worker()
    return {"submitted": submitted, "said": said}


def looked(handle: RunHandle[Any]) -> list[Any]:
    return [handle.state, handle.ready(), handle.successful(), handle.failed(), handle.result]


def waits(handle: Any) -> bool:
    """Whether `get` waits, also in another process to which the handle was sent."""
    sent = pickle.loads(pickle.dumps(handle))  # noqa: S301 - our own
    for each in (handle, sent):
        with pytest.raises(CeleryTimeoutError):
            each.get(timeout=SOON_S)
    return True


def test_a_run_behind_a_task_is_pending_and_waited_for(before: dict[str, Any]) -> None:
    """Nothing raises `RunNotFound`, whatever is asked."""
    said = before["said"]
    waited = said.pop("waited")

    assert set(map(str, said.values())) == {str(["PENDING", False, False, False, None])}
    assert all(waited)


def test_get_waits_for_the_task_before_the_run(before: dict[str, Any]) -> None:
    """Then for the run; and a task behind the run is waited for as with Celery's own."""
    submitted: Submitted = before["submitted"]

    assert submitted.behind_a_task.get(timeout=PATIENCE_S)["final_output"] == "done"
    assert submitted.behind_a_task.successful()
    assert submitted.between_tasks.get(timeout=PATIENCE_S)["stop_reason"] == "completed"
    assert submitted.behind_a_group.get(timeout=PATIENCE_S)["final_output"] == "done"


def test_get_raises_what_failed_before_the_run(before: dict[str, Any]) -> None:
    """However far before; the run is never submitted, and its handle stays PENDING, as with Celery's own."""
    submitted: Submitted = before["submitted"]

    for handle in (submitted.behind_a_failure, submitted.far_behind):
        with pytest.raises(ValueError, match="no"):
            handle.get(timeout=PATIENCE_S)
        assert looked(handle) == ["PENDING", False, False, False, None]
    with pytest.raises(RunFailed):
        submitted.behind_a_run.get(timeout=PATIENCE_S)
    assert looked(submitted.behind_a_run) == ["PENDING", False, False, False, None]


def test_a_run_that_is_gone_is_not_waited_for(shop: Shop, before: dict[str, Any]) -> None:
    """When what stands before it has succeeded, it has been submitted: its record has expired."""
    handle = chain(shop.app.tasks["product.ask"].s("ok"), shop.run_agent.s()).apply_async()
    handle.get(timeout=PATIENCE_S)
    wait_for(lambda: handle.parent.state == "SUCCESS", "the task's end is stored", timeout=PATIENCE_S)
    second = chain(shop.run_agent.s(shop.request("ok")), shop.run_agent.si(shop.request("ok"))).apply_async()
    second.get(timeout=PATIENCE_S)
    wait_for(lambda: not shop.is_untold(second.parent.id), "Celery is told", timeout=PATIENCE_S)

    for gone in (handle, second):
        wait_for(lambda gone=gone: not shop.is_untold(gone.id), "Celery is told", timeout=PATIENCE_S)
        shop.client.delete_session(gone.record().session_id)
        with pytest.raises(RunNotFound):
            gone.get(timeout=PATIENCE_S)
        with pytest.raises(RunNotFound):
            _ = gone.state


@pytest.mark.parametrize("call", ["map", "starmap", "chunks"])
def test_calling_runs_inside_of_a_task_is_refused(shop: Shop, call: str) -> None:
    """Where it is written, with what to write instead."""
    arguments = ([[shop.request("ok")]], 2) if call == "chunks" else ([shop.request("ok")],)

    with pytest.raises(RequestInvalid, match=f"run_agent.{call}") as error:
        getattr(shop.run_agent, call)(*arguments)

    assert "group(run_agent.s(request)" in str(error.value)


@pytest.mark.parametrize("call", [xmap, xstarmap, chunks], ids=lambda call: str(call.__name__))
def test_celerys_own_signatures_that_call_runs_fail_with_one_line(
    shop: Shop, before: dict[str, Any], call: Any
) -> None:
    """Celery has no place where they could be refused before; no run is made, and the worker says why."""
    more = (2,) if call is chunks else ()
    items = [shop.request("ok")] if call is xmap else [[shop.request("ok")]]
    log, runs = shop.folder / "workers.log", len(list(shop.client.runs()))
    seen = len(log.read_text())

    result = call(shop.run_agent.s(), items, *more, app=shop.app).apply_async()
    with pytest.raises(RequestInvalid, match=r"of tasks.run_agent would call runs") as error:
        result.get(timeout=PATIENCE_S)

    assert "group(run_agent.s(request)" in str(error.value)
    assert len(list(shop.client.runs())) == runs
    wait_for(lambda: "would call runs" in log.read_text()[seen:], "it is logged", timeout=PATIENCE_S)
    said = log.read_text()[seen:].splitlines()
    assert len([line for line in said if "would call runs" in line]) == 1
    assert not [line for line in said if "Traceback" in line or "run.failed" in line]


def test_without_a_result_backend_a_run_behind_a_task_is_waited_for(tmp_path: Path) -> None:
    """Nobody knows then how the task ended; the run's own record is waited for."""
    with open_shop(tmp_path, results=False, workers=0) as shop:
        handle = chain(shop.app.tasks["product.ask"].s("ok"), shop.run_agent.s()).apply_async()
        states = looked(handle)
        shop.start_worker()

        assert states == ["PENDING", False, False, False, None]
        assert handle.get(timeout=PATIENCE_S)["final_output"] == "done"


def test_stamped_canvas_works(shop: Shop, before: dict[str, Any]) -> None:
    """A signature, a chain, a group, by value and by a visitor; what follows a run has its own stamps."""
    stamped = shop.run_agent.s(shop.request("retry ok"))
    stamped.stamp(team="blue")
    look = shop.app.tasks["product.stamps_of_this"]
    linked = chain(shop.run_agent.s(shop.request("retry ok")), look.s("chain"))
    linked.stamp(team="red")
    together = group(shop.run_agent.s(shop.request("ok")), shop.run_agent.s(shop.request("ok")))
    together.stamp(Numbers())
    counted = chord([shop.run_agent.s(shop.request("ok"))] * 2, look.s("chord"))
    counted.stamp(Numbers())

    results = [each.apply_async() for each in (stamped, linked, together, counted)]

    first, behind, outputs, body = (result.get(timeout=PATIENCE_S) for result in results)
    assert first["final_output"] == "done"
    assert behind == {"team": "red"}
    assert [output["final_output"] for output in outputs] == ["done"] * 2
    assert set(body) == {"number"}


def test_revoking_a_stamp_cancels_its_runs(shop: Shop, before: dict[str, Any]) -> None:
    """One that is executed, and one that comes later; runs with another value go on."""
    running, later, other = (shop.run_agent.s(shop.request(text)) for text in ("hangs", "ok", "ok"))
    for signature, batch in ((running, "b1"), (later, "b1"), (other, "b2")):
        signature.stamp(batch=batch)
    first = running.apply_async()
    shop.wait_asked(first)

    shop.app.control.revoke_by_stamped_headers({"batch": ["b1"]}, terminate=True)
    wait_for(lambda: first.state == "REVOKED", "the run is cancelled", timeout=PATIENCE_S)
    second, third = later.apply_async(), other.apply_async()

    with pytest.raises(RunFailed) as error:
        second.get(timeout=PATIENCE_S)
    assert error.value.code == "run.cancelled"
    assert third.get(timeout=PATIENCE_S)["final_output"] == "done"


class Numbers(StampingVisitor):
    """Stamps each signature with a number."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"number": next(self.numbers)}
