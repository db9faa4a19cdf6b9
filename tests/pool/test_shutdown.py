"""Shutdown of a worker with our pool: warm, soft and cold; and autoscaling."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from openagents_worker.producer.client import Client
from tests.pool.shopkeeper import PATIENCE_S, new_tag, open_shop
from tests.support.waiting import wait_for


def test_a_warm_shutdown_waits_for_running_tasks(tmp_path: Path, redis_url: str) -> None:
    """Running tasks end and are reported; waiting messages go back to the broker."""
    running, waiting = new_tag(), new_tag()
    with open_shop(tmp_path, redis_url, "-c", "1") as shop:
        result = shop.send("stand", running)
        shop.wait_begun(running)
        shop.send("stand", waiting)

        shop.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in shop.log, "it handles the signal")
        shop.redis.rpush(f"notes:{running} may end", "now")

        assert shop.process.wait(PATIENCE_S) == 0
        assert result.get(timeout=PATIENCE_S) == running
        assert shop.notes(running) == ["begun", "ended"]
        assert shop.notes(waiting) == []
        assert (shop.in_broker(), shop.redis.hlen("unacked")) == (1, 0)


def test_a_run_is_handed_over_by_a_warm_shutdown(tmp_path: Path, redis_url: str) -> None:
    """It does not wait for the model; the next worker continues the run."""
    env = {"OPENAGENTS_DRAIN_TIMEOUT_S": "0.2"}
    with open_shop(tmp_path, redis_url, env=env) as shop:
        handle = shop.client.submit({"agent_id": "waiter", "session_id": "s1", "input_text": "hi"})
        wait_for(lambda: handle.record().state == "running", "the run is executed", PATIENCE_S)

        assert shop.signal(signal.SIGTERM) == 0

        assert handle.record().state == "queued"
        handle.cancel()


@pytest.mark.long
@pytest.mark.parametrize("late", [False, True])
def test_a_soft_shutdown_cancels_slow_tasks(tmp_path: Path, redis_url: str, late: bool) -> None:
    """A task with late acknowledgement goes back to the broker; any other is reported as cancelled."""
    tag = new_tag()
    with open_shop(tmp_path, redis_url, env={"SOFT_SHUTDOWN_S": "0.5"}) as shop:
        shop.send("hold_late" if late else "hold", tag)
        shop.wait_begun(tag)

        shop.signal(signal.SIGQUIT)

        assert shop.notes(tag) == ["begun", "cancelled"]
        assert (shop.in_broker(), shop.redis.hlen("unacked")) == (int(late), 0)


def test_a_run_survives_a_cold_shutdown(tmp_path: Path, redis_url: str) -> None:
    """It is released before the process ends, before the expiry of the lease."""
    with open_shop(tmp_path, redis_url) as shop:
        handle = shop.client.submit({"agent_id": "waiter", "session_id": "s1", "input_text": "hi"})
        wait_for(lambda: handle.record().state == "running", "the run is executed", PATIENCE_S)

        shop.signal(signal.SIGQUIT)

    with Client(redis_url) as client:
        assert client.record(handle.id).state == "queued"
        client.cancel(handle.id)


@pytest.mark.long
def test_an_autoscaled_worker_respects_its_maximum(tmp_path: Path, redis_url: str) -> None:
    """`--autoscale=MAX,MIN`: up to MAX tasks at a time, the others wait in the broker."""
    tags = [new_tag() for _ in range(6)]
    with open_shop(tmp_path, redis_url, "--autoscale=4,1") as shop:
        results = [shop.send("hold", tag) for tag in tags]

        wait_for(lambda: sum(bool(shop.notes(tag)) for tag in tags) == 4, "four run", PATIENCE_S)
        wait_for(lambda: shop.in_broker() == 2, "the others wait", PATIENCE_S)

        assert shop.stats()["autoscaler"] == {"max": 4, "min": 1, "current": 4, "qty": 4}
        for result in results:
            shop.tell("revoke", task_id=result.id, terminate=True)
