"""Eager mode: under `task_always_eager` a product's tests need no worker; the store and the run are real."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from pathlib import Path

import pytest
from celery import chain, chord

from openagents_worker.errors import ConfigError, RequestInvalid, RunFailed
from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle, WaitTimeout
from openagents_worker.producer.publisher import make_app
from openagents_worker.producer.task import ProducerTask
from openagents_worker.settings import load_settings
from tests.celery.shop import Shop, open_shop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Shop]:
    """A shop without a worker."""
    monkeypatch.setenv("NOTES_FOLDER", str(tmp_path))
    with open_shop(tmp_path, workers=0) as shop:
        shop.app.conf.task_always_eager = True
        yield shop
        assert shop.incarnations() == set()


def test_delay_executes_the_run_to_its_end(shop: Shop) -> None:
    """It returns a usual handle; the record and the events are in Redis."""
    handle = shop.run_agent.delay(shop.request("ok"))

    assert isinstance(handle, RunHandle)
    assert handle.state == "SUCCESS"
    assert handle.wait(0).final_output == handle.get()["final_output"] == "done"
    assert [event.name for event in handle.events()][-1] == "session.run.completed"
    assert not shop.is_completion_pending(handle.id)


def test_delay_executes_the_run_to_its_first_wait(shop: Shop) -> None:
    """It does not wait for a retry: the run waits in Redis."""
    handle = shop.run_agent.delay(shop.request("later ok"))

    assert handle.record().state is RunState.RETRYING
    handle.cancel()


def test_children_are_executed_at_once(shop: Shop) -> None:
    """The run waits for its child, which is executed here, too."""
    handle = shop.run_agent.delay(shop.request("ok", agent_id="manager"))

    assert handle.wait(60).final_output == "done"
    [child] = shop.client.runs(parent_run_id=handle.id).items
    assert child.state is RunState.COMPLETED


@pytest.mark.allow_blocking(reason="an eager call blocks its caller")
async def test_delay_works_inside_a_running_loop(shop: Shop) -> None:
    """The run has a separate loop; `adelay` does not block the caller's loop."""
    inside = shop.run_agent.delay(shop.request("ok"))
    awaited = await asyncio.wait_for(shop.run_agent.adelay(shop.request("ok")), 60)

    assert inside.state == "SUCCESS"
    assert (await awaited.wait(60)).final_output == "done"


def test_links_are_called_at_once(shop: Shop) -> None:
    """Links, and a chain with a run; the value is the same as with a worker."""
    handle = shop.run_agent.apply_async((shop.request("ok"),), link=shop.note("link"))
    failed = shop.run_agent.apply_async((shop.request("fails"),), link_error=shop.note("link_error"))
    value = chain(shop.run_agent.s(shop.request("ok")), shop.note("chain")).apply_async().get()

    assert shop.notes("link") == [{"run_id": handle.id, "stop_reason": "completed"}]
    assert shop.notes("link_error") == [failed.id]
    assert shop.notes("chain") == [value]
    assert value["stop_reason"] == "completed"


def test_a_chain_stops_at_a_run_that_only_waits(shop: Shop) -> None:
    """The next task is not called without a value: the caller of the chain gets an error."""
    first = shop.request("later ok", run_id="waits")

    with pytest.raises(WaitTimeout, match=r"'waits' waits .*llm\.rate_limit"):
        chain(shop.run_agent.s(first), shop.note("chain behind")).apply_async()

    handle = shop.client.handle("waits")
    assert handle.record().state is RunState.RETRYING
    assert shop.notes("chain behind") == []
    handle.cancel()


def test_a_chord_stops_at_a_run_that_only_waits(shop: Shop) -> None:
    """Its body is not called."""
    waits = shop.run_agent.s(shop.request("later ok", run_id="chorded"))

    with pytest.raises(WaitTimeout, match="'chorded' waits"):
        chord([shop.run_agent.s(shop.request("ok")), waits])(shop.note("body")).get()

    assert shop.notes("body") == []
    shop.client.handle("chorded").cancel()


def test_a_failure_is_raised_if_the_app_propagates_it(shop: Shop) -> None:
    """With `task_eager_propagates`, as for Celery's tasks; without it the handle shows the failure."""
    assert shop.run_agent.delay(shop.request("fails")).failed()

    shop.app.conf.task_eager_propagates = True
    with pytest.raises(RunFailed) as error:
        shop.run_agent.delay(shop.request("fails"))

    assert error.value.code == "llm.response"


def test_after_a_cancelled_run_the_next_one_of_its_session_is_executed(shop: Shop) -> None:
    """Wake-ups are executed in the process too."""
    first = shop.run_agent.delay(shop.request("later ok", session_id="s1"))
    second = shop.run_agent.delay(shop.request("ok", session_id="s1"))
    waited = second.record().state

    first.cancel()

    assert waited is RunState.WAITING_SESSION
    assert (first.state, second.state) == ("REVOKED", "SUCCESS")
    assert not shop.is_completion_pending(first.id)


def test_an_invalid_request_is_refused(shop: Shop) -> None:
    """Before a key is written."""
    with pytest.raises(RequestInvalid):
        shop.run_agent.delay({"agent_id": "clerk"})


def test_a_producer_executes_no_runs(shop: Shop) -> None:
    """Its task has no worker code: it raises an error, and accepts no run."""
    with make_app(load_settings({"OPENAGENTS_REDIS_URL": f"{shop.redis_url}/0"})) as app:
        app.conf.task_always_eager = True
        task = app.register_task(ProducerTask())

        with pytest.raises(ConfigError, match="cannot execute"):
            task.delay(shop.request("ok"))
