"""States: Celery's events and Flower's states of a run, under one id, through all of its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest
from celery.result import AsyncResult

from openagents_worker.errors import RunFailed
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.task_options import task_options_json
from openagents_worker.submission.submit import submit
from tests.celery.shop import PATIENCE_S, Shop, ask, open_shop
from tests.support.scripts import Hand
from tests.support.waiting import wait_for

Received = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("states")) as shop:
        yield shop


@pytest.fixture(scope="module")
def flower(shop: Shop) -> str:
    return shop.start_flower()


@pytest.fixture(scope="module")
def received(shop: Shop) -> Generator[Received]:
    with shop.events() as received:
        yield received


def events_until(received: Received, handle: RunHandle[Any], last: str) -> list[str]:
    """Wait for an event of kind `last`; returns the kinds of the run's events."""
    wait_for(lambda: last in kinds(received, handle), f"{last} was received", timeout=PATIENCE_S)
    return kinds(received, handle)


def kinds(received: Received, handle: RunHandle[Any]) -> list[str]:
    return [kind.removeprefix("task-") for kind, event in received if event.get("uuid") == handle.id]


def wait_for_state(flower: str, handle: RunHandle[Any], state: str) -> dict[str, Any]:
    url = f"{flower}/api/task/info/{handle.id}"
    wait_for(lambda: (ask(url) or {}).get("state") == state, f"Flower shows {state}", timeout=PATIENCE_S)
    task: dict[str, Any] = ask(url)
    return task


def test_a_successful_run(shop: Shop, received: Received, flower: str) -> None:
    """Its arguments in Flower show agent, session and run, but no input and no output."""
    handle = shop.run_agent.delay(shop.request("ok secret"))

    assert events_until(received, handle, "succeeded") == ["received", "started", "succeeded"]
    task = wait_for_state(flower, handle, "SUCCESS")
    assert f"agent=clerk session={handle.record().session_id} run={handle.id}" in task["args"]
    assert "secret" not in str(task)
    assert "done" not in str(task)


def test_a_run_that_is_retried_is_started_again(shop: Shop, received: Received, flower: str) -> None:
    """RETRY with the reason while it waits; then it is received and started under the same id."""
    handle = shop.run_agent.delay(shop.request("retry ok"))

    assert events_until(received, handle, "succeeded") == [
        "received",
        "started",
        "retried",
        "received",
        "started",
        "succeeded",
    ]
    retried = next(
        event for kind, event in received if (kind, event.get("uuid")) == ("task-retried", handle.id)
    )
    assert "llm.connection" in retried["exception"]
    wait_for_state(flower, handle, "SUCCESS")


def test_a_run_that_lost_its_worker_is_started_again(shop: Shop, received: Received, flower: str) -> None:
    """STARTED until another worker reclaims it, then received and started under the same id; no failure."""
    handle = shop.run_agent.delay(shop.request("lost ok"))
    shop.wait_asked(handle)
    wait_for_state(flower, handle, "STARTED")

    shop.workers[-1].kill()
    shop.start_worker()

    kinds = events_until(received, handle, "succeeded")
    assert kinds == ["received", "started", "received", "started", "succeeded"]
    wait_for_state(flower, handle, "SUCCESS")
    assert ask(f"{flower}/api/tasks")[handle.id]["state"] == "SUCCESS"


def test_a_run_that_waits_for_a_retry_is_shown_as_retry(shop: Shop, received: Received, flower: str) -> None:
    """Also after a duplicate of its message was received by a worker."""
    handle = shop.run_agent.delay(shop.request("later ok"))
    wait_for_state(flower, handle, "RETRY")

    ids = {"run_id": handle.id, "agent_id": "clerk", "session_id": handle.record().session_id}
    shop.app.send_task(
        "tasks.run_agent", [ids], task_id=handle.id, queue="agents", headers={"wake_us": "1"}
    ).forget()

    wait_for(
        lambda: kinds(received, handle).count("retried") == 2,
        "the retry is reported again",
        timeout=PATIENCE_S,
    )
    wait_for_state(flower, handle, "RETRY")
    handle.cancel()
    wait_for_state(flower, handle, "REVOKED")


def test_a_run_that_fails(shop: Shop, received: Received, flower: str) -> None:
    """FAILURE with the code of the run; texts of a model or a tool are only in the record."""
    handle = shop.run_agent.delay(shop.request("fails"))

    assert events_until(received, handle, "failed")[-1] == "failed"
    task = wait_for_state(flower, handle, "FAILURE")
    assert "llm.response" in task["exception"]
    assert task["traceback"] == "llm.response: the run ended as failed", (
        "no frames: the code describes the failure"
    )
    with pytest.raises(RunFailed):
        AsyncResult(handle.id, app=shop.app).get(timeout=PATIENCE_S)


def test_the_traceback_of_a_failed_run_is_shown_everywhere(
    shop: Shop, received: Received, flower: str
) -> None:
    """The traceback of the user's code is in Celery's event, in Flower, in every result, in the notes of the
    producer's exception and in `show`, without frames of this library and without secrets."""
    handle = shop.run_agent.delay(shop.request("breaks"))
    events_until(received, handle, "failed")
    event = next(event for kind, event in received if (kind, event.get("uuid")) == ("task-failed", handle.id))
    task = wait_for_state(flower, handle, "FAILURE")
    with pytest.raises(RunFailed) as raised:
        handle.get(timeout=PATIENCE_S)
    command = [sys.executable, "-m", "openagents_worker.cli", "show", handle.id]
    shown = subprocess.run(
        command, env={**os.environ, **shop.env}, capture_output=True, text=True, check=True
    )

    texts = [
        event["traceback"],
        task["traceback"],
        str(AsyncResult(handle.id, app=shop.app).traceback),
        str(handle.traceback),
        "\n".join(raised.value.__notes__),
        shown.stdout,
    ]
    for text in texts:
        assert "in break_down" in text
        assert "ValueError: no answer from redis://:***@shop/0" in text
        assert "hunter2" not in text
    for text in (event["traceback"], task["traceback"], str(handle.traceback)):
        assert "openagents_worker/" not in text
        assert text.startswith("Traceback (most recent call last):\n")


def test_an_async_result_has_the_end_of_the_run(shop: Shop) -> None:
    """With a result backend a plain `AsyncResult` has the value."""
    handle = shop.run_agent.delay(shop.request("ok"))

    value = AsyncResult(handle.id, app=shop.app).get(timeout=PATIENCE_S)

    assert value == {"run_id": handle.id, "stop_reason": "completed"}


def test_an_unreported_end_is_reported_by_another_worker(shop: Shop, received: Received) -> None:
    """If a worker dies after the end of a run and before Celery sent its links, the links are still sent."""
    client = shop.client
    linked = {"link": [shop.note("orphan")]}
    with Hand(f"{shop.redis_url}/0") as hand:
        request = shop.request("ok", run_id="orphan")
        submit(
            client.store, request, settings=client.settings, canvas=task_options_json(linked, max_bytes=9_999)
        )
        hand.claim("orphan")
        hand.finish("orphan")

        wait_for(lambda: shop.notes("orphan"), "the link is called", timeout=PATIENCE_S)

    wait_for(
        lambda: not shop.is_completion_pending("orphan"), "the completion is acknowledged", timeout=PATIENCE_S
    )
    assert shop.notes("orphan") == [{"run_id": "orphan", "stop_reason": "completed"}]
    events_until(received, client.handle("orphan"), "succeeded")


@pytest.mark.long
def test_a_message_of_a_foreign_producer_keeps_its_links(shop: Shop) -> None:
    """A producer without this package: the message has the request and Celery's options; one retry."""
    request = shop.request("retry ok")

    result = shop.app.send_task("tasks.run_agent", [request], queue="agents", link=shop.note("foreign"))

    wait_for(lambda: shop.notes("foreign"), "the link is called", timeout=PATIENCE_S)
    assert shop.notes("foreign") == [{"run_id": result.id, "stop_reason": "completed"}]
    result.forget()
