"""The backlog: when the oldest waiting message was sent, read from the broker's lists."""

from __future__ import annotations

import json

import pytest

from openagents_worker.producer.client import Client
from openagents_worker.producer.publisher import send_first, send_wakes
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.backlog import EMPTY, Backlog, oldest_of


def message(wake_us: int | None) -> str:
    headers = {} if wake_us is None else {"wake_us": str(wake_us)}
    return json.dumps({"body": "e30=", "headers": headers, "properties": {}})


def waking(run_id: str, sent_us: int, canvas: str = "") -> Wake:
    return Wake(run_id, "agents", sent_us, "assistant", "s1", 1, 3, canvas)


@pytest.mark.parametrize(
    ("messages", "oldest"),
    [
        ([], EMPTY),
        ([message(7), message(5), message(9)], 5),
        ([message(None), message(8)], 8),
        ([message(None), "no JSON"], None),
    ],
)
def test_the_oldest_time_is_found_and_foreign_messages_have_none(
    messages: list[str], oldest: int | None
) -> None:
    """Empty queue: every sent message is lost. Foreign messages only: the time is unknown."""
    assert oldest_of(messages) == oldest


async def test_the_oldest_message_is_found_in_every_list_of_a_queue(redis_url: str) -> None:
    """First messages, wake-ups and priorities are in separate lists."""
    backlog = Backlog(redis_url)
    try:
        with Client(redis_url) as client:
            assert await backlog.oldest_us("agents") == EMPTY

            send_first(client.app, waking("r1", 300))
            assert await backlog.oldest_us("agents") == 300

            send_wakes(client.app, [waking("r2", 200)])
            assert await backlog.oldest_us("agents") == 200

            send_first(client.app, waking("r3", 100, canvas='{"priority": 9}'))
            assert await backlog.oldest_us("agents") == 100
            client.store.ask(lambda r: r.flushall())  # the keys of a broker are not in the cell's key table
    finally:
        await backlog.aclose()


@pytest.mark.parametrize("url", ["amqp://guest@127.0.0.1//", "redis://127.0.0.1:1/0"])
async def test_the_backlog_of_an_unreadable_broker_is_unknown(url: str) -> None:
    """Another kind of broker, or an unreachable one."""
    backlog = Backlog(url)
    try:
        assert await backlog.oldest_us("agents") is None
    finally:
        await backlog.aclose()
