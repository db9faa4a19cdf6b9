"""Remote control of a worker with our pool: the commands of an operator and of Flower's buttons."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from celery.exceptions import TimeLimitExceeded
from celery.result import AsyncResult

from tests.pool.shopkeeper import PATIENCE_S, Shop, new_tag
from tests.support.waiting import wait_for

SIZE = 3
ARGUMENTS = ("-c", str(SIZE))


@pytest.fixture
def holding(shop: Shop) -> Generator[list[AsyncResult]]:
    """Waiting tasks of a test; they are terminated afterwards."""
    holding: list[AsyncResult] = []
    yield holding
    for result in holding:
        shop.tell("revoke", task_id=result.id, terminate=True)
    wait_for(lambda: shop.active() == 0, "no task is left", PATIENCE_S)


def hold(shop: Shop, holding: list[AsyncResult], count: int = 1) -> list[str]:
    tags = [new_tag() for _ in range(count)]
    holding += [shop.send("hold", tag) for tag in tags]
    return tags


def begun(shop: Shop, tags: list[str]) -> int:
    return sum(bool(shop.notes(tag)) for tag in tags)


def is_revoked(result: AsyncResult) -> bool:
    state: str = result.state
    return state == "REVOKED"


def test_terminate_ends_a_task_at_once(shop: Shop) -> None:
    """Its coroutine is cancelled, its state is REVOKED, and its slot is free."""
    tag = new_tag()
    result = shop.send("hold", tag)
    shop.wait_begun(tag)

    shop.tell("revoke", task_id=result.id, terminate=True, signal="SIGTERM")

    wait_for(lambda: shop.notes(tag) == ["begun", "cancelled"], "the task was cancelled", PATIENCE_S)
    wait_for(lambda: is_revoked(result), "the task is revoked", PATIENCE_S)
    wait_for(lambda: shop.active() == 0, "its slot is free", PATIENCE_S)


def test_a_revoked_task_never_starts(shop: Shop, holding: list[AsyncResult]) -> None:
    """It waits in the broker and is dropped when it is received."""
    first = hold(shop, holding, SIZE)
    shop.wait_begun(*first)
    tag = new_tag()
    waiting = shop.send("hold", tag)

    shop.tell("revoke", task_id=waiting.id)
    for result in holding[:SIZE]:
        shop.tell("revoke", task_id=result.id, terminate=True)

    wait_for(lambda: is_revoked(waiting), "the task is revoked", PATIENCE_S)
    wait_for(lambda: shop.in_broker() == 0, "its message is gone", PATIENCE_S)
    assert shop.notes(tag) == []


def test_a_soft_time_limit_is_raised_in_the_body(shop: Shop) -> None:
    """`SoftTimeLimitExceeded` is raised where the body waits: it can clean up and even succeed."""
    tag = new_tag()

    result = shop.send("hold", tag, soft_time_limit=0.3)

    assert result.get(timeout=PATIENCE_S) == "cleaned up"
    assert shop.notes(tag) == ["begun", "soft"]


def test_a_hard_time_limit_ends_the_task(shop: Shop) -> None:
    """It fails as in other pools, and its coroutine is cancelled."""
    tag = new_tag()

    result = shop.send("hold", tag, time_limit=0.3)

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=PATIENCE_S)
    wait_for(lambda: shop.notes(tag) == ["begun", "cancelled"], "the task was cancelled", PATIENCE_S)


def test_time_limits_can_be_changed_while_the_worker_runs(shop: Shop) -> None:
    """`celery control time_limit` applies to the next tasks."""
    tag = new_tag()
    shop.tell("time_limit", task_name="tests.pool.shop.hold", soft=0.3)
    try:
        assert shop.send("hold", tag).get(timeout=PATIENCE_S) == "cleaned up"
    finally:
        shop.tell("time_limit", task_name="tests.pool.shop.hold")


def test_a_task_in_a_thread_is_revoked_although_it_cannot_be_stopped(shop: Shop) -> None:
    """The revocation is reported at once; the later result of the thread is dropped."""
    tag = new_tag()
    result = shop.send("blocks_and_notes", tag, 1.0)
    shop.wait_begun(tag)

    shop.tell("revoke", task_id=result.id, terminate=True)

    wait_for(lambda: is_revoked(result), "the task is revoked", PATIENCE_S)
    wait_for(lambda: shop.notes(tag) == ["begun", "ended"], "its thread has ended", PATIENCE_S)
    assert is_revoked(result)


def test_no_more_tasks_are_received_than_run(shop: Shop, holding: list[AsyncResult]) -> None:
    """The others wait in the broker, where any worker can receive them."""
    tags = hold(shop, holding, SIZE + 4)

    wait_for(lambda: begun(shop, tags) == SIZE, "all slots are used", PATIENCE_S)
    wait_for(lambda: shop.in_broker() == 4, "the others wait in the broker", PATIENCE_S)

    assert shop.tell("reserved") == []
    assert shop.stats()["pool"]["running"] == SIZE


def test_the_pool_grows_and_shrinks(shop: Shop, holding: list[AsyncResult]) -> None:
    """Waiting tasks use new slots at once; tasks in removed slots are not interrupted."""
    tags = hold(shop, holding, SIZE + 4)
    wait_for(lambda: begun(shop, tags) == SIZE, "all slots are used", PATIENCE_S)

    shop.tell("pool_grow", n=2)
    wait_for(lambda: begun(shop, tags) == SIZE + 2, "the new slots are used", PATIENCE_S)
    shop.tell("pool_shrink", n=2)
    shop.tell("revoke", task_id=holding[0].id, terminate=True)

    wait_for(lambda: shop.active() == SIZE + 1, "one task has ended", PATIENCE_S)
    assert shop.stats()["pool"]["max-concurrency"] == SIZE
    assert begun(shop, tags) == SIZE + 2


def test_running_tasks_can_be_inspected(shop: Shop, holding: list[AsyncResult]) -> None:
    """`inspect active`, `query_task` and `stats` reply while every slot is used."""
    tags = hold(shop, holding, SIZE)
    shop.wait_begun(*tags)

    active = {task["id"] for task in shop.tell("active")}

    assert active == {result.id for result in holding}
    assert shop.tell("query_task", ids=[holding[0].id])[holding[0].id][0] == "active"
    assert shop.stats()["openagents"]["loop"].keys() == {"blocks", "longest_block_ms"}


@pytest.mark.parametrize("queue", ["slow", "slow.wake"])
def test_a_worker_takes_no_further_queue_of_runs(shop: Shop, queue: str) -> None:
    """It would read no wake-ups of these runs, and not announce the queue. The reply says what to do."""
    answer = shop.tell("add_consumer", queue=queue)

    assert "the queue slow contains runs" in answer["error"]
    assert "add slow to -Q and restart the worker" in answer["error"]
    assert "queue.refused" in shop.log
    assert queue not in {each["name"] for each in shop.tell("active_queues")}


def test_a_run_that_is_terminated_is_cancelled(shop: Shop) -> None:
    """In its record, so that no worker stores its id as revoked."""
    handle = shop.client.submit({"agent_id": "waiter", "session_id": new_tag(), "input_text": "hi"})
    wait_for(lambda: handle.record().state == "running", "the run is executed", PATIENCE_S)

    shop.tell("revoke", task_id=handle.id, terminate=True)

    assert handle.wait(PATIENCE_S).stop_reason == "cancelled"
    assert handle.id not in shop.tell("revoked")
