"""Cancellation: a run in any state, cancelled by any means of Celery, ends as REVOKED."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
from celery import chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult, GroupResult

from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle
from openagents_worker.store.scripts import CancelAnswer
from tests.celery.shop import PATIENCE_S, Shop, ask, open_shop
from tests.support.waiting import wait_for

Cancel = Callable[[Shop, RunHandle[Any]], object]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("cancel")) as shop:
        yield shop


@pytest.fixture(scope="module")
def flower(shop: Shop) -> str:
    return shop.start_flower()


def is_in(handle: RunHandle[Any], state: RunState) -> None:
    wait_for(lambda: handle.record().state is state, f"the run is {state}", timeout=PATIENCE_S)


def scheduled(shop: Shop) -> RunHandle[Any]:
    return shop.run_agent.apply_async((shop.request("ok"),), countdown=60)


def queued(shop: Shop) -> RunHandle[Any]:
    """No worker consumes its queue."""
    return shop.run_agent.apply_async((shop.request("ok"),), queue="unread")


def waiting(shop: Shop) -> RunHandle[Any]:
    """A run that waits behind a hanging run of its session."""
    request = shop.request("hangs")
    shop.wait_asked(shop.run_agent.delay(request))
    return shop.run_agent.delay(shop.request("ok", session_id=request["session_id"]))


def in_a_model_call(shop: Shop) -> RunHandle[Any]:
    handle = shop.run_agent.delay(shop.request("hangs"))
    shop.wait_asked(handle)
    return handle


def in_a_tool(shop: Shop) -> RunHandle[Any]:
    handle = shop.run_agent.delay(shop.request("lingers"))
    called = (event for event in handle.events() if event.name == "tool.called")
    assert next(called).payload["tool_id"] == "linger"
    return handle


def retrying(shop: Shop) -> RunHandle[Any]:
    handle = shop.run_agent.delay(shop.request("later ok"))
    is_in(handle, RunState.RETRYING)
    return handle


def by_handle(shop: Shop, handle: RunHandle[Any]) -> None:
    assert handle.cancel("enough") in (CancelAnswer.CANCELLED, CancelAnswer.REQUESTED)


def by_revoke(shop: Shop, handle: RunHandle[Any]) -> None:
    AsyncResult(handle.id, app=shop.app).revoke(terminate=True)


def by_group(shop: Shop, handle: RunHandle[Any]) -> None:
    GroupResult("g", [handle], app=shop.app).revoke(terminate=True)


STATES = [scheduled, queued, waiting, in_a_model_call, in_a_tool, retrying]


@pytest.mark.parametrize("cancel", [by_handle, by_revoke, by_group], ids=lambda way: way.__name__)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.defect("E04")
def test_a_run_can_be_cancelled_in_every_state(
    shop: Shop, state: Callable[[Shop], RunHandle[Any]], cancel: Cancel
) -> None:
    """Also a run without a worker; its session continues with the next run."""
    handle = state(shop)

    cancel(shop, handle)

    result = handle.wait(PATIENCE_S)
    assert result.stop_reason == "cancelled"
    assert (handle.state, handle.record().state) == ("REVOKED", RunState.CANCELLED)


@pytest.mark.share(of=2)
@pytest.mark.parametrize("fault", ["retry", "lost"])
def test_a_run_can_be_cancelled_after_a_fault_in_every_way(shop: Shop, fault: str) -> None:
    """Also a run that was retried, or whose worker was killed: its second attempt is cancelled too."""
    single = {way: shop.run_agent.delay(shop.request(f"{fault} hangs")) for way in (by_handle, by_revoke)}
    runs = group(shop.run_agent.s(shop.request(f"{fault} hangs")) for _ in range(2)).apply_async()
    handles = [*single.values(), *runs]
    if fault == "lost":
        for handle in handles:
            shop.wait_asked(handle)
        shop.workers[-1].kill()
        shop.start_worker()
    for handle in handles:
        shop.wait_asked(handle, times=2)

    for way, handle in single.items():
        way(shop, handle)
    runs.revoke(terminate=True)

    for handle in handles:
        assert handle.wait(PATIENCE_S).stop_reason == "cancelled"
        record = handle.record()
        assert (record.attempt, record.recoveries) == (2, 1 if fault == "lost" else 0)
        assert handle.state == "REVOKED"


def test_a_run_whose_worker_was_killed_is_cancelled(shop: Shop) -> None:
    """No worker has reclaimed it yet; the worker that reclaims it ends it without a model call."""
    handle = in_a_model_call(shop)
    shop.workers[-1].kill()

    assert handle.cancel("enough") is CancelAnswer.REQUESTED
    shop.start_worker()

    result = handle.wait(PATIENCE_S)
    assert result.stop_reason == "cancelled"
    assert sum(line["event"] == "received" for line in shop.asked(handle.id)) == 1


@pytest.mark.parametrize("state", [scheduled, waiting, retrying], ids=lambda state: state.__name__)
def test_flowers_terminate_cancels_a_waiting_run(
    shop: Shop, flower: str, state: Callable[[Shop], RunHandle[Any]]
) -> None:
    """No worker has it, and Flower may not show it: the cancellation is written to its record."""
    handle = state(shop)
    if state is retrying:  # its record has the state slightly before Celery's event
        wait_for(lambda: state_in_flower(flower, handle) == "RETRY", "Flower shows RETRY", timeout=PATIENCE_S)

    ask(f"{flower}/api/task/revoke/{handle.id}?terminate=true", post=True)

    assert handle.wait(PATIENCE_S).stop_reason == "cancelled"
    wait_for(lambda: state_in_flower(flower, handle) == "REVOKED", "Flower shows REVOKED", timeout=PATIENCE_S)


def test_flowers_terminate_cancels(shop: Shop, flower: str) -> None:
    """Its button sends `revoke` with `terminate`; the task then shows REVOKED."""
    handle = in_a_model_call(shop)
    wait_for(lambda: state_in_flower(flower, handle) == "STARTED", "Flower shows STARTED", timeout=PATIENCE_S)

    ask(f"{flower}/api/task/revoke/{handle.id}?terminate=true", post=True)

    assert handle.wait(PATIENCE_S).stop_reason == "cancelled"
    wait_for(lambda: state_in_flower(flower, handle) == "REVOKED", "Flower shows REVOKED", timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def shop_of_rare_heartbeats(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    """Its worker renews its lease once a minute, which is longer than these tests wait."""
    with open_shop(tmp_path_factory.mktemp("rare"), OPENAGENTS_LEASE_MS="180000") as shop:
        yield shop


@pytest.mark.parametrize("cancel", [by_handle, by_revoke, by_group], ids=lambda way: way.__name__)
def test_a_running_model_call_is_cancelled_before_the_next_heartbeat(
    shop_of_rare_heartbeats: Shop, cancel: Cancel
) -> None:
    """The model's server sees the connection closed: the worker got the request by pub/sub."""
    shop = shop_of_rare_heartbeats
    handle = in_a_model_call(shop)

    cancel(shop, handle)

    wait_for(
        lambda: [line for line in shop.asked(handle.id) if line["event"] == "answered"],
        "the client is gone",
        timeout=PATIENCE_S,
    )


def test_a_waiting_run_that_is_cancelled_is_revoked_in_flower(shop: Shop, flower: str) -> None:
    """No worker has it: a completion message reports the end."""
    handle = retrying(shop)
    wait_for(lambda: state_in_flower(flower, handle) == "RETRY", "Flower shows RETRY", timeout=PATIENCE_S)

    handle.cancel()

    wait_for(lambda: state_in_flower(flower, handle) == "REVOKED", "Flower shows REVOKED", timeout=PATIENCE_S)
    assert ask(f"{flower}/api/tasks")[handle.id]["state"] == "REVOKED"


def test_a_run_that_is_cancelled_during_its_suspension_is_revoked_in_flower(shop: Shop, flower: str) -> None:
    """The event of its end arrives before that of its retry, which replaces it; the state is then
    repaired."""
    handles = []
    for _ in range(8):
        handle = shop.run_agent.delay(shop.request("later ok"))
        wait_for(
            lambda run=handle: run.record().state is RunState.RETRYING, "the run is suspended", poll_s=0.001
        )
        handle.cancel()
        handles.append(handle)
    last = shop.run_agent.delay(shop.request("ok"))
    wait_for(lambda: state_in_flower(flower, last) == "SUCCESS", "all previous events were received")

    def flower_states() -> set[str | None]:
        return {state_in_flower(flower, handle) for handle in handles}

    wait_for(lambda: flower_states() == {"REVOKED"}, "Flower shows REVOKED for all")


def state_in_flower(flower: str, handle: RunHandle[Any]) -> str | None:
    task = ask(f"{flower}/api/task/info/{handle.id}")
    return task["state"] if isinstance(task, dict) else None


def test_a_run_is_not_remembered_as_revoked_and_can_be_resumed(shop: Shop) -> None:
    """Celery's list of revoked ids would drop its later messages."""
    handle = in_a_tool(shop)
    other = shop.app.tasks["product.sleep_for_ever"].apply_async(countdown=600)
    shop.app.control.revoke([handle.id, other.id], terminate=True)
    handle.wait(PATIENCE_S)

    revoked_ids = wait_for(
        shop.app.control.inspect(timeout=PATIENCE_S, limit=1).revoked, "a worker replies", timeout=PATIENCE_S
    )
    checkpoint = f"{handle.id}:step:{handle.record().steps}"
    fields = {"agent_id": "clerk", "session_id": handle.record().session_id, "input_text": ""}
    again = shop.run_agent.delay({**fields, "resume_from_checkpoint": checkpoint})

    assert [id_ for ids in revoked_ids.values() for id_ in ids] == [other.id]
    wait_for(lambda: again.record().life == 2 and again.record().attempt == 2, "a worker continues it")
    again.cancel()
    assert again.wait(PATIENCE_S).stop_reason == "cancelled"


def test_a_run_expires_unless_it_has_been_started(shop: Shop) -> None:
    """Also a run that waits for its session; a run that was started in time continues."""
    waits = waiting(shop)
    session_id = waits.record().session_id
    late = shop.run_agent.apply_async((shop.request("ok", session_id=session_id),), expires=0.5)
    unread = shop.run_agent.apply_async((shop.request("ok"),), queue="unread", expires=0.5)
    delayed = shop.run_agent.apply_async((shop.request("ok"),), countdown=60, expires=0.5)
    over = shop.run_agent.apply_async((shop.request("ok"),), expires=-5)
    in_time = shop.run_agent.apply_async((shop.request("retry ok"),), expires=30)

    for handle in (late, unread, delayed, over):
        assert handle.wait(PATIENCE_S).error_details.message == "expired"  # type: ignore[union-attr]
        assert handle.state == "REVOKED"
    assert in_time.wait(PATIENCE_S).ok


@pytest.mark.long
def test_a_cancelled_run_calls_no_links(shop: Shop) -> None:
    """As a revoked Celery task; a chord gets an error."""
    handle = shop.run_agent.apply_async(
        (shop.request("hangs"),), link=shop.note("link"), link_error=shop.note("link_error")
    )
    shop.wait_asked(handle)

    handle.cancel()
    handle.wait(PATIENCE_S)

    wait_for(lambda: not shop.is_completion_pending(handle.id), "Celery was notified", timeout=PATIENCE_S)
    assert shop.notes("link") == shop.notes("link_error") == []


@pytest.mark.long
def test_a_chord_fails_if_one_of_its_runs_was_cancelled(shop: Shop) -> None:
    """Its body is not called, and `get` raises an error."""
    chorded = chord([shop.run_agent.s(shop.request("ok")), shop.run_agent.s(shop.request("later ok"))])
    result = chorded(shop.note("body"))
    later = shop.client.handle(result.parent.results[1].id)
    is_in(later, RunState.RETRYING)

    later.cancel()

    with pytest.raises(ChordError, match=later.id):
        AsyncResult(result.id, app=shop.app).get(timeout=PATIENCE_S)
    assert shop.notes("body") == []
