"""States: what Celery's events and Flower's rows say of a run, under one id, through all of its messages."""

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
from openagents_worker.producer.submit import submit
from openagents_worker.producer.task_options import task_options_json
from tests.celery.shop import PATIENCE_S, Shop, ask, open_shop
from tests.producer.hand import Hand
from tests.waiting import wait_for

Heard = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("states")) as shop:
        yield shop


@pytest.fixture(scope="module")
def flower(shop: Shop) -> str:
    return shop.start_flower()


@pytest.fixture(scope="module")
def heard(shop: Shop) -> Generator[Heard]:
    with shop.events() as heard:
        yield heard


def told(heard: Heard, handle: RunHandle[Any], last: str) -> list[str]:
    """The events of a run up to one of this kind, which is waited for."""
    wait_for(lambda: last in kinds(heard, handle), f"{last} is heard", timeout=PATIENCE_S)
    return kinds(heard, handle)


def kinds(heard: Heard, handle: RunHandle[Any]) -> list[str]:
    return [kind.removeprefix("task-") for kind, event in heard if event.get("uuid") == handle.id]


def row_becomes(flower: str, handle: RunHandle[Any], state: str) -> dict[str, Any]:
    url = f"{flower}/api/task/info/{handle.id}"
    wait_for(lambda: (ask(url) or {}).get("state") == state, f"Flower shows {state}", timeout=PATIENCE_S)
    row: dict[str, Any] = ask(url)
    return row


def test_a_run_that_goes_well(shop: Shop, heard: Heard, flower: str) -> None:
    """Its row names agent, session and run, and neither what was asked nor what was answered."""
    handle = shop.run_agent.delay(shop.request("ok secret"))

    assert told(heard, handle, "succeeded") == ["received", "started", "succeeded"]
    row = row_becomes(flower, handle, "SUCCESS")
    assert f"agent=clerk session={handle.record().session_id} run={handle.id}" in row["args"]
    assert "secret" not in str(row)
    assert "done" not in str(row)


def test_a_run_that_is_retried_is_started_again(shop: Shop, heard: Heard, flower: str) -> None:
    """RETRY while it waits, with the reason; then it is received and started under the same id."""
    handle = shop.run_agent.delay(shop.request("retry ok"))

    assert told(heard, handle, "succeeded") == [
        "received",
        "started",
        "retried",
        "received",
        "started",
        "succeeded",
    ]
    retried = next(event for kind, event in heard if (kind, event.get("uuid")) == ("task-retried", handle.id))
    assert "llm.connection" in retried["exception"]
    row_becomes(flower, handle, "SUCCESS")


def test_a_run_that_lost_its_worker_is_started_again(shop: Shop, heard: Heard, flower: str) -> None:
    """STARTED until another worker takes it, then received and started under the same id; it never failed."""
    handle = shop.run_agent.delay(shop.request("lost ok"))
    shop.wait_asked(handle)
    row_becomes(flower, handle, "STARTED")

    shop.workers[-1].kill()
    shop.start_worker()

    kinds = told(heard, handle, "succeeded")
    assert kinds == ["received", "started", "received", "started", "succeeded"]
    row_becomes(flower, handle, "SUCCESS")
    assert ask(f"{flower}/api/tasks")[handle.id]["state"] == "SUCCESS"


def test_a_run_that_waits_for_a_retry_is_a_retry(shop: Shop, heard: Heard, flower: str) -> None:
    """Also after a doubled message of it has reached a worker."""
    handle = shop.run_agent.delay(shop.request("later ok"))
    row_becomes(flower, handle, "RETRY")

    ids = {"run_id": handle.id, "agent_id": "clerk", "session_id": handle.record().session_id}
    shop.app.send_task(
        "tasks.run_agent", [ids], task_id=handle.id, queue="agents", headers={"wake_us": "1"}
    ).forget()

    wait_for(lambda: kinds(heard, handle).count("retried") == 2, "it is told again", timeout=PATIENCE_S)
    row_becomes(flower, handle, "RETRY")
    handle.cancel()
    row_becomes(flower, handle, "REVOKED")


def test_a_run_that_fails(shop: Shop, heard: Heard, flower: str) -> None:
    """FAILURE with the run's own code; what a model or a tool said stays in the record."""
    handle = shop.run_agent.delay(shop.request("fails"))

    assert told(heard, handle, "failed")[-1] == "failed"
    row = row_becomes(flower, handle, "FAILURE")
    assert "llm.response" in row["exception"]
    assert row["traceback"] == "llm.response: the run ended as failed", "no frames: the code says it"
    with pytest.raises(RunFailed):
        AsyncResult(handle.id, app=shop.app).get(timeout=PATIENCE_S)


def test_where_a_run_failed_is_shown_wherever_people_look(shop: Shop, heard: Heard, flower: str) -> None:
    """The worker's traceback of the user's code: in Celery's event, in Flower's row, in everybody's result,
    below a producer's exception and by `show`; without frames of ours and without secrets."""
    handle = shop.run_agent.delay(shop.request("breaks"))
    told(heard, handle, "failed")
    event = next(event for kind, event in heard if (kind, event.get("uuid")) == ("task-failed", handle.id))
    row = row_becomes(flower, handle, "FAILURE")
    with pytest.raises(RunFailed) as raised:
        handle.get(timeout=PATIENCE_S)
    command = [sys.executable, "-m", "openagents_worker.cli", "show", handle.id]
    shown = subprocess.run(
        command, env={**os.environ, **shop.env}, capture_output=True, text=True, check=True
    )

    texts = [
        event["traceback"],
        row["traceback"],
        str(AsyncResult(handle.id, app=shop.app).traceback),
        str(handle.traceback),
        "\n".join(raised.value.__notes__),
        shown.stdout,
    ]
    for text in texts:
        assert "in break_down" in text
        assert "ValueError: no answer from redis://:***@shop/0" in text
        assert "hunter2" not in text
    for text in (event["traceback"], row["traceback"], str(handle.traceback)):
        assert "openagents_worker/" not in text
        assert text.startswith("Traceback (most recent call last):\n")


def test_anybodys_result_is_how_the_run_ended(shop: Shop) -> None:
    """With a result backend a plain `AsyncResult` knows it, too."""
    handle = shop.run_agent.delay(shop.request("ok"))

    value = AsyncResult(handle.id, app=shop.app).get(timeout=PATIENCE_S)

    assert value == {"run_id": handle.id, "stop_reason": "completed"}


def test_an_end_that_nobody_told_is_told_by_another_worker(shop: Shop, heard: Heard) -> None:
    """Whoever carried it died after its end and before Celery sent what is linked: it is sent."""
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

    wait_for(lambda: not shop.is_untold("orphan"), "it is noted as told", timeout=PATIENCE_S)
    assert shop.notes("orphan") == [{"run_id": "orphan", "stop_reason": "completed"}]
    told(heard, client.handle("orphan"), "succeeded")


def test_a_message_of_a_foreign_producer_keeps_its_links(shop: Shop) -> None:
    """Without our package: the request in the message, Celery's options beside it; it is retried once."""
    request = shop.request("retry ok")

    result = shop.app.send_task("tasks.run_agent", [request], queue="agents", link=shop.note("foreign"))

    wait_for(lambda: shop.notes("foreign"), "the link is called", timeout=PATIENCE_S)
    assert shop.notes("foreign") == [{"run_id": result.id, "stop_reason": "completed"}]
    result.forget()
