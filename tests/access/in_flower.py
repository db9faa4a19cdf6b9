"""Flower as a user of Redis that sees the events and queues of Celery, but no data of runs."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Generator

import pytest
import redis

from openagents_worker.store.roles import RoleName
from tests.access.users import Guarded
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import PATIENCE_S, wait_for


@pytest.fixture(scope="module")
def flower(shop: Installation, redis_of_users: Guarded) -> Generator[str]:
    shop.stack.set_env(OPENAGENTS_REDIS_URL=redis_of_users.url(RoleName.FLOWER), FLOWER_READ_ONLY="0")
    try:
        url = shop.stack.start_flower()
        wait_for(lambda: json.loads(ask(f"{url}/api/workers?status=true")), "Flower hears the worker")
        yield url
    finally:
        shop.stack.set_env(OPENAGENTS_REDIS_URL=redis_of_users.url(RoleName.WORKER))


def ask(url: str, method: str = "GET") -> str:
    request = urllib.request.Request(url, method=method)  # noqa: S310 - http to this machine
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
        return str(answer.read().decode())


def test_its_pages_and_its_buttons_work(flower: str, shop: Installation, model: Model) -> None:
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Delivered."})
    handle = shop.submit("clerk")
    wait_for(lambda: handle.id in json.loads(ask(f"{flower}/api/tasks")), "Flower has heard of the run")
    for page in ("workers", "tasks", "broker"):
        assert "Flower" in ask(f"{flower}/{page}")
    assert json.loads(ask(f"{flower}/api/workers?refresh=1"))
    (queue,) = (
        one
        for one in json.loads(ask(f"{flower}/api/queues/length"))["active_queues"]
        if one["name"] == "agents"
    )
    assert queue["messages"] == 0

    ask(f"{flower}/api/task/revoke/{handle.id}?terminate=true", "POST")

    assert handle.wait(timeout=PATIENCE_S).stop_reason == "cancelled"


def test_it_reads_nothing_of_a_run(redis_of_users: Guarded, shop: Installation) -> None:
    with redis.Redis.from_url(redis_of_users.url(RoleName.FLOWER)) as own:
        for command in (("HGETALL", "oa:run:x"), ("KEYS", "*"), ("LRANGE", "agents", "0", "-1")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                own.execute_command(*command)
    redis_of_users.refusals()


def test_it_counts_the_fleet_for_prometheus(flower: str, redis_of_users: Guarded) -> None:
    """Beside its own metrics. It may read how many runs wait, not which.

    Of an ended run that is still in `sent` it would ask whether it has ended, and be refused.
    """
    wait_for(lambda: not redis_of_users.admin.zcard("oa:sent:agents"), "Celery is notified of the end")
    text = ask(f"{flower}/metrics")

    assert "openagents_fleet_up 1.0" in text
    assert 'openagents_fleet_workers{state="alive"} 1.0' in text
    assert 'openagents_queue_workers{queue="agents"} 1.0' in text
    assert "flower_events_total" in text
