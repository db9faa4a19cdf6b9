"""Tasks in our pool: they behave as in every other pool, and are isolated from each other."""

from __future__ import annotations

import pytest
from celery import chain
from celery.exceptions import WorkerLostError
from celery.result import AsyncResult

from tests.pool.shopkeeper import PATIENCE_S, Shop, new_tag
from tests.support.waiting import wait_for

ARGUMENTS = ("-c", "100")
MANY = 300


def value_of(result: AsyncResult) -> object:
    return result.get(timeout=PATIENCE_S)


def test_hundreds_of_tasks_never_see_each_others_request(shop: Shop) -> None:
    """`self.request`, `current_task` and context variables always belong to the task itself."""
    sent = {tag: shop.send("look_around", tag, 5) for tag in (f"tag-{n}" for n in range(MANY))}

    for tag, result in sent.items():
        seen = value_of(result)
        assert seen == {"seen": [[result.id, result.id, tag, tag]], "thread": "openagents-loop"}


def test_a_sync_task_blocks_no_other_task(shop: Shop) -> None:
    """It runs in a thread with its request; other tasks continue."""
    slow = shop.send("blocks", until := new_tag())

    assert value_of(shop.send("add", 1, 2)) == 3

    assert not slow.ready()
    shop.redis.rpush(f"notes:{until}", "may end")
    seen = slow.get(timeout=PATIENCE_S)
    assert seen["id"] == slow.id
    assert seen["thread"].startswith("openagents-task")


def test_signals_are_sent_before_and_after_the_body(shop: Shop) -> None:
    """With the request of the task, as in every pool."""
    result = shop.send("add", 1, 2)

    value_of(result)

    tag = f"signals-{result.id}"
    wait_for(lambda: shop.notes(tag) == ["prerun", "postrun SUCCESS"], "both signals were sent", PATIENCE_S)


def test_a_failure_is_the_tasks_own(shop: Shop) -> None:
    """Its exception is the result, and its traceback names the line that raised it."""
    result = shop.send("fail", "out of stock")

    with pytest.raises(ValueError, match="out of stock"):
        value_of(result)

    assert "raise ValueError(text)" in str(result.traceback)


def test_a_task_that_exits_ends_only_itself(shop: Shop) -> None:
    """Celery reports a SystemExit as a lost worker; the process continues."""
    result = shop.send("leave")

    with pytest.raises(WorkerLostError, match="exitcode 3"):
        value_of(result)

    assert value_of(shop.send("add", 2, 2)) == 4


def test_retries_work_from_inside_of_an_async_body(shop: Shop) -> None:
    """With `self.retry` and with `autoretry_for`."""
    assert value_of(shop.send("asks_again")) == 1
    assert value_of(shop.send("third_time_lucky")) == 2


def test_ignore_and_reject_have_their_usual_results(shop: Shop) -> None:
    """A rejected message is not redelivered, and Celery marks it as failed."""
    tag = new_tag()
    ignored, rejected = shop.send("ignored"), shop.send("rejected", tag)

    shop.wait_begun(tag)
    assert value_of(shop.send("add", 1, 1)) == 2

    wait_for(lambda: rejected.state == "FAILURE", "the rejected task has failed", PATIENCE_S)
    assert ignored.state == "PENDING"
    assert shop.notes(tag) == ["rejected"]
    wait_for(lambda: shop.redis.hlen("unacked") == 0, "its message is gone", PATIENCE_S)


def test_a_task_can_send_others_and_be_followed_by_some(shop: Shop) -> None:
    """A sent task has its parent id; links and chains continue with its result."""
    tag = new_tag()

    sent = shop.app.AsyncResult(str(value_of(shop.send("orders", tag))))
    total = chain(
        shop.app.signature("tests.pool.shop.add", (1, 2)), shop.app.signature("tests.pool.shop.add", (10,))
    ).apply_async()

    assert value_of(sent) == tag
    assert value_of(total) == 13


def test_blocking_calls_inside_celery_run_in_threads(shop: Shop) -> None:
    """Results are stored and messages are sent in threads, not on the loop."""
    value_of(shop.send("add", 1, 2))

    pool = shop.stats()["pool"]

    assert pool["implementation"] == "openagents_worker.celery.pool.task_pool:TaskPool"
    assert pool["blocking"]["threads"] > 0
    assert pool["blocking"]["limit"] == 16
