"""A worker with our pool ends: warm, soft or cold; and one that scales by itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from openagents_worker.producer.client import Client
from tests.pool.shopkeeper import PATIENCE_S, new_tag, open_shop
from tests.waiting import wait_for


def test_a_warm_shutdown_waits_for_what_runs(tmp_path: Path, redis_url: str) -> None:
    """Tasks end and are told of; what had not begun is back in the broker."""
    running, waiting = new_tag(), new_tag()
    with open_shop(tmp_path, redis_url, "-c", "1") as shop:
        result = shop.send("stand", running)
        shop.wait_begun(running)
        shop.send("stand", waiting)

        shop.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in shop.log, "it has heard it")
        shop.redis.rpush(f"notes:{running} may end", "now")

        assert shop.process.wait(PATIENCE_S) == 0
        assert result.get(timeout=PATIENCE_S) == running
        assert shop.notes(running) == ["begun", "ended"]
        assert shop.notes(waiting) == []
        assert (shop.in_broker(), shop.redis.hlen("unacked")) == (1, 0)


def test_a_run_is_handed_over_by_a_warm_shutdown(tmp_path: Path, redis_url: str) -> None:
    """It does not wait for the model; the next worker carries the run on."""
    env = {"OPENAGENTS_DRAIN_TIMEOUT_S": "0.2"}
    with open_shop(tmp_path, redis_url, env=env) as shop:
        handle = shop.client.submit({"agent_id": "waiter", "session_id": "s1", "input_text": "hi"})
        wait_for(lambda: handle.record().state == "running", "the run is carried", PATIENCE_S)

        assert shop.signal(signal.SIGTERM) == 0

        assert handle.record().state == "queued"
        handle.cancel()


@pytest.mark.parametrize("late", [False, True])
def test_a_soft_shutdown_cancels_what_takes_too_long(tmp_path: Path, redis_url: str, late: bool) -> None:
    """A task that acknowledges late goes back to the broker; any other is told to have been cancelled."""
    tag = new_tag()
    with open_shop(tmp_path, redis_url, env={"SOFT_SHUTDOWN_S": "0.5"}) as shop:
        shop.send("hold_late" if late else "hold", tag)
        shop.wait_begun(tag)

        shop.signal(signal.SIGQUIT)

        assert shop.notes(tag) == ["begun", "cancelled"]
        assert (shop.in_broker(), shop.redis.hlen("unacked")) == (int(late), 0)


def test_a_run_survives_a_cold_shutdown(tmp_path: Path, redis_url: str) -> None:
    """It is given back before the process ends, and not only when its lease would."""
    with open_shop(tmp_path, redis_url) as shop:
        handle = shop.client.submit({"agent_id": "waiter", "session_id": "s1", "input_text": "hi"})
        wait_for(lambda: handle.record().state == "running", "the run is carried", PATIENCE_S)

        shop.signal(signal.SIGQUIT)

    with Client(redis_url) as client:
        assert client.record(handle.id).state == "queued"
        client.cancel(handle.id)


def test_a_worker_that_scales_by_itself_takes_what_it_may(tmp_path: Path, redis_url: str) -> None:
    """`--autoscale=MAX,MIN`: up to MAX tasks at once, the others wait in the broker."""
    tags = [new_tag() for _ in range(6)]
    with open_shop(tmp_path, redis_url, "--autoscale=4,1") as shop:
        results = [shop.send("hold", tag) for tag in tags]

        wait_for(lambda: sum(bool(shop.notes(tag)) for tag in tags) == 4, "four run", PATIENCE_S)
        wait_for(lambda: shop.in_broker() == 2, "the others wait", PATIENCE_S)

        assert shop.stats()["autoscaler"] == {"max": 4, "min": 1, "current": 4, "qty": 4}
        for result in results:
            shop.tell("revoke", task_id=result.id, terminate=True)
