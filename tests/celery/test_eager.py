"""Eager: under `task_always_eager` a product's tests need no worker; the store is real, and so is the run."""

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
    """No worker anywhere."""
    monkeypatch.setenv("NOTES_FOLDER", str(tmp_path))
    with open_shop(tmp_path, workers=0) as shop:
        shop.app.conf.task_always_eager = True
        yield shop
        assert shop.incarnations() == set()


def test_delay_carries_the_run_to_its_end(shop: Shop) -> None:
    """It returns a handle like any other: the record and the events are in Redis."""
    handle = shop.run_agent.delay(shop.request("ok"))

    assert isinstance(handle, RunHandle)
    assert handle.state == "SUCCESS"
    assert handle.wait(0).final_output == handle.get()["final_output"] == "done"
    assert [event.name for event in handle.events()][-1] == "session.run.completed"
    assert not shop.is_untold(handle.id)


def test_delay_carries_it_to_its_first_wait(shop: Shop) -> None:
    """A retry is not waited for: the run waits in Redis, where it can be looked at."""
    handle = shop.run_agent.delay(shop.request("later ok"))

    assert handle.record().state is RunState.RETRYING
    handle.cancel()


@pytest.mark.allow_blocking(reason="what is eager blocks whoever submits")
async def test_delay_works_inside_of_a_running_loop(shop: Shop) -> None:
    """The run has a loop of its own; `adelay` does not block the one that awaits it."""
    inside = shop.run_agent.delay(shop.request("ok"))
    awaited = await asyncio.wait_for(shop.run_agent.adelay(shop.request("ok")), 60)

    assert inside.state == "SUCCESS"
    assert (await awaited.wait(60)).final_output == "done"


def test_what_is_linked_is_called_at_once(shop: Shop) -> None:
    """Links, and a chain through a run, whose value is what a worker would give."""
    handle = shop.run_agent.apply_async((shop.request("ok"),), link=shop.note("link"))
    failed = shop.run_agent.apply_async((shop.request("fails"),), link_error=shop.note("link_error"))
    value = chain(shop.run_agent.s(shop.request("ok")), shop.note("chain")).apply_async().get()

    assert shop.notes("link") == [{"run_id": handle.id, "stop_reason": "completed"}]
    assert shop.notes("link_error") == [failed.id]
    assert shop.notes("chain") == [value]
    assert value["stop_reason"] == "completed"


def test_a_chain_stops_at_a_run_that_only_waits(shop: Shop) -> None:
    """What follows it is not called with nothing in its hand: whoever applies the chain is told."""
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


def test_a_failure_is_raised_where_the_app_says_so(shop: Shop) -> None:
    """`task_eager_propagates`, as for Celery's own tasks; without it the handle says it."""
    assert shop.run_agent.delay(shop.request("fails")).failed()

    shop.app.conf.task_eager_propagates = True
    with pytest.raises(RunFailed) as error:
        shop.run_agent.delay(shop.request("fails"))

    assert error.value.code == "llm.response"


def test_a_cancelled_run_lets_the_next_one_of_its_session_go_on(shop: Shop) -> None:
    """What would wake a worker is done here, too."""
    first = shop.run_agent.delay(shop.request("later ok", session_id="s1"))
    second = shop.run_agent.delay(shop.request("ok", session_id="s1"))
    waited = second.record().state

    first.cancel()

    assert waited is RunState.WAITING_SESSION
    assert (first.state, second.state) == ("REVOKED", "SUCCESS")
    assert not shop.is_untold(first.id)


def test_an_invalid_request_is_refused_as_ever(shop: Shop) -> None:
    """Before anything is written."""
    with pytest.raises(RequestInvalid):
        shop.run_agent.delay({"agent_id": "clerk"})


def test_a_producer_alone_carries_nothing(shop: Shop) -> None:
    """Its task has no worker's code: that is said, and nothing is accepted."""
    with make_app(load_settings({"OPENAGENTS_REDIS_URL": f"{shop.redis_url}/0"})) as app:
        app.conf.task_always_eager = True
        task = app.register_task(ProducerTask())

        with pytest.raises(ConfigError, match="cannot execute"):
            task.delay(shop.request("ok"))
