"""Handles of runs in chains: their state before, while and after the previous tasks are executed."""

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
from tests.support.waiting import wait_for

SOON_S = 0.05


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    """Its worker is started by the first test, after all submissions."""
    with open_shop(tmp_path_factory.mktemp("chains"), workers=0) as shop:
        yield shop


class Submitted:
    """Chains that were submitted without a worker."""

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
    """The states of the handles before anything is executed; then a worker is started."""
    submitted = Submitted(shop)
    handles = {name: handle for name, handle in vars(submitted).items() if isinstance(handle, RunHandle)}
    states = {name: state_of(handle) for name, handle in handles.items()}
    middle = submitted.between_tasks.parent
    states["the run between tasks"] = state_of(middle)
    states["waited"] = [does_get_wait(handle) for handle in (*handles.values(), submitted.between_tasks)]
    shop.start_worker()
    return {"submitted": submitted, "states": states}


def state_of(handle: RunHandle[Any]) -> list[Any]:
    return [handle.state, handle.ready(), handle.successful(), handle.failed(), handle.result]


def does_get_wait(handle: Any) -> bool:
    """Whether `get` waits, also for a pickled handle in another process."""
    sent = pickle.loads(pickle.dumps(handle))  # noqa: S301 - pickled here
    for each in (handle, sent):
        with pytest.raises(CeleryTimeoutError):
            each.get(timeout=SOON_S)
    return True


def test_a_run_behind_a_task_is_pending_and_waited_for(before: dict[str, Any]) -> None:
    """No method raises `RunNotFound`."""
    states = before["states"]
    waited = states.pop("waited")

    assert set(map(str, states.values())) == {str(["PENDING", False, False, False, None])}
    assert all(waited)


def test_get_waits_for_the_task_before_the_run(before: dict[str, Any]) -> None:
    """Then for the run; a task after the run is waited for as in Celery's chains."""
    submitted: Submitted = before["submitted"]

    assert submitted.behind_a_task.get(timeout=PATIENCE_S)["final_output"] == "done"
    assert submitted.behind_a_task.successful()
    assert submitted.between_tasks.get(timeout=PATIENCE_S)["stop_reason"] == "completed"
    assert submitted.behind_a_group.get(timeout=PATIENCE_S)["final_output"] == "done"


def test_get_raises_the_failure_of_a_previous_task(before: dict[str, Any]) -> None:
    """At any distance; the run is never submitted, and its handle stays PENDING, as in Celery's chains."""
    submitted: Submitted = before["submitted"]

    for handle in (submitted.behind_a_failure, submitted.far_behind):
        with pytest.raises(ValueError, match="no"):
            handle.get(timeout=PATIENCE_S)
        assert state_of(handle) == ["PENDING", False, False, False, None]
    with pytest.raises(RunFailed):
        submitted.behind_a_run.get(timeout=PATIENCE_S)
    assert state_of(submitted.behind_a_run) == ["PENDING", False, False, False, None]


def test_get_raises_for_a_run_whose_record_has_expired(shop: Shop, before: dict[str, Any]) -> None:
    """If the previous task has succeeded, the run was submitted, so its record must have expired."""
    handle = chain(shop.app.tasks["product.ask"].s("ok"), shop.run_agent.s()).apply_async()
    handle.get(timeout=PATIENCE_S)
    wait_for(lambda: handle.parent.state == "SUCCESS", "the task's end is stored", timeout=PATIENCE_S)
    second = chain(shop.run_agent.s(shop.request("ok")), shop.run_agent.si(shop.request("ok"))).apply_async()
    second.get(timeout=PATIENCE_S)
    wait_for(
        lambda: not shop.is_completion_pending(second.parent.id), "Celery is notified", timeout=PATIENCE_S
    )

    for gone in (handle, second):
        wait_for(
            lambda gone=gone: not shop.is_completion_pending(gone.id),
            "Celery is notified",
            timeout=PATIENCE_S,
        )
        shop.client.delete_session(gone.record().session_id)
        with pytest.raises(RunNotFound):
            gone.get(timeout=PATIENCE_S)
        with pytest.raises(RunNotFound):
            _ = gone.state


@pytest.mark.parametrize("call", ["map", "starmap", "chunks"])
def test_calling_runs_inside_of_a_task_is_refused(shop: Shop, call: str) -> None:
    """At the call, with a hint."""
    arguments = ([[shop.request("ok")]], 2) if call == "chunks" else ([shop.request("ok")],)

    with pytest.raises(RequestInvalid, match=f"run_agent.{call}") as error:
        getattr(shop.run_agent, call)(*arguments)

    assert "group(run_agent.s(request)" in str(error.value)


@pytest.mark.parametrize("call", [xmap, xstarmap, chunks], ids=lambda call: str(call.__name__))
def test_celerys_own_signatures_that_call_runs_fail_with_one_line(
    shop: Shop, before: dict[str, Any], call: Any
) -> None:
    """Celery offers no hook to refuse them earlier; no run is created, and the worker logs the reason."""
    more = (2,) if call is chunks else ()
    items = [shop.request("ok")] if call is xmap else [[shop.request("ok")]]
    log, runs = shop.folder / "workers.log", len(list(shop.client.runs()))
    seen = len(log.read_text())

    result = call(shop.run_agent.s(), items, *more, app=shop.app).apply_async()
    with pytest.raises(RequestInvalid, match=r"of tasks.run_agent is not supported") as error:
        result.get(timeout=PATIENCE_S)

    assert "group(run_agent.s(request)" in str(error.value)
    assert len(list(shop.client.runs())) == runs
    wait_for(lambda: "would call runs" in log.read_text()[seen:], "it is logged", timeout=PATIENCE_S)
    lines = log.read_text()[seen:].splitlines()
    assert len([line for line in lines if "would call runs" in line]) == 1
    assert not [line for line in lines if "Traceback" in line or "run.failed" in line]


def test_without_a_result_backend_a_run_behind_a_task_is_waited_for(tmp_path: Path) -> None:
    """The end of the task is unknown then, so `get` waits for the record of the run."""
    with open_shop(tmp_path, results=False, workers=0) as shop:
        handle = chain(shop.app.tasks["product.ask"].s("ok"), shop.run_agent.s()).apply_async()
        states = state_of(handle)
        shop.start_worker()

        assert states == ["PENDING", False, False, False, None]
        assert handle.get(timeout=PATIENCE_S)["final_output"] == "done"


def test_stamped_canvas_works(shop: Shop, before: dict[str, Any]) -> None:
    """A signature, a chain and a group, stamped by value and by a visitor; links of a run have their own
    stamps."""
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


@pytest.mark.long
def test_revoking_a_stamp_cancels_its_runs(shop: Shop, before: dict[str, Any]) -> None:
    """A run that is executed and a later one; runs with another value continue."""
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
    """Stamp each signature with a number."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"number": next(self.numbers)}
