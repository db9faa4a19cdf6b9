"""Completion messages: a thousand cancelled runs that were waiting do not delay a new run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import kombu
import pytest
from kombu import Connection, Queue

from openagents_worker.celery import completion_messages
from openagents_worker.celery.completion_messages import MAX_WAITING, CompletionMessages
from openagents_worker.celery.kombu_redis import TRANSPORTS, Taken
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from tests.support.deployment import PATIENCE_S, agent, installed
from tests.support.waiting import wait_for

CONCURRENCY = 8
CANCELLED = 300


@pytest.mark.long
def test_cancelled_runs_do_not_delay_a_new_run(tmp_path: Path) -> None:
    """Their messages are before its own in the queue. It completes while many completions are still pending,
    and in the end Celery is notified of each."""
    with installed(tmp_path, agent("clerk"), OPENAGENTS_CONCURRENCY=str(CONCURRENCY)) as shop:
        held = [f"held-{uuid.uuid4().hex}" for _ in range(CONCURRENCY)]
        shop.model.will_say({"text": "fine"})
        shop.model.may_answer = lambda run_id: run_id not in held
        working = [shop.submit("clerk", run_id=run_id) for run_id in held]
        store, keys = shop.client.store.redis, shop.client.store.keys
        wait_for(
            lambda: all(handle.record().state is RunState.RUNNING for handle in working),
            "the slots are taken",
        )
        waiting = [shop.submit("clerk") for _ in range(CANCELLED)]
        for handle in waiting:
            handle.cancel()
        new = shop.submit("clerk")
        notified: list[int] = []

        def count_pending() -> int:
            with store.pipeline() as pipe:
                for handle in waiting:
                    pipe.hexists(keys("run", handle.id), "untold")
                return sum(pipe.execute())

        def answers(run_id: str) -> bool:
            if run_id == new.id and not notified:
                notified.append(CANCELLED - count_pending())
            return run_id not in held

        shop.model.may_answer = answers
        held.clear()

        assert new.wait(PATIENCE_S).final_output == "fine"

        assert notified[0] < CANCELLED / 4  # a few; all of them if they were delivered first
        wait_for(lambda: not count_pending(), "Celery is notified of every end")
        wait_for(lambda: not store.llen("agents") and not store.llen("agents.wake"), "no message is left")
        assert {handle.record().state for handle in waiting} == {RunState.CANCELLED}


# --- the order of delivery ------------------------------------------------------------------------------


def _message(run_id: str, sent_us: int = 0, *, ended: bool = False, **headers: Any) -> Taken:
    own = {"id": run_id, "wake_us": str(sent_us), **({"run_ended": 1} if ended else {}), **headers}
    return {"headers": own, "body": ""}, "agents"


def _submit(client: Client, *run_ids: str, cancelled: tuple[str, ...]) -> None:
    """Submit these runs, each in a session of its own, and cancel some of them."""
    for run_id in run_ids:
        client.submit({"agent_id": "a", "session_id": run_id, "input_text": "hi", "run_id": run_id})
    for run_id in cancelled:
        client.cancel(run_id)


class Consumer:
    """A consumer with `slots` slots; `delivered` are the run ids of the delivered messages."""

    def __init__(self, client: Client, slots: int) -> None:
        self.slots = slots
        self.unfinished = 0
        self.delivered: list[str] = []
        self.messages = CompletionMessages(
            store=lambda: client.store,
            free_slots=lambda: self.slots - self.unfinished,
            unfinished=lambda: self.unfinished,
            deliver=lambda message, queue: self._deliver_to(message, queue),
        )
        self._deliver_to: Callable[[dict[str, Any], str], None] = lambda message, _: self.deliver(
            [(message, "agents")]
        )

    def follow(self, channel: Any) -> None:
        """Attach the channel as a worker does."""
        channel.free_slots = lambda: self.slots - self.unfinished
        channel.select_messages, channel.after_selection = (
            self.messages.select_deliverable,
            self.messages.deliver_more,
        )
        self._deliver_to = channel.connection._deliver

    def begin(self, _: Any, message: Any) -> None:
        self.deliver([({"headers": message.headers}, "agents")])
        message.ack()

    def take(self, *taken: Taken) -> list[str]:
        before = len(self.delivered)
        self.deliver(self.messages.select_deliverable(list(taken)))
        self.messages.deliver_more()
        return self.delivered[before:]

    def deliver(self, taken: list[Taken]) -> None:
        for message, _ in taken:
            self.delivered.append(message["headers"]["id"])
            self.unfinished += "run_ended" in message["headers"]

    def end_one(self) -> list[str]:
        before = len(self.delivered)
        self.unfinished -= 1
        self.messages.on_task_end()
        return self.delivered[before:]


@pytest.fixture
def client(redis_url: str) -> Generator[Client]:
    with Client(settings=load_settings({"OPENAGENTS_REDIS_URL": redis_url})) as client:
        yield client


def _now_us() -> int:
    return int(time.time() * 1_000_000)


def test_completion_messages_get_a_quarter_of_the_free_slots(client: Client) -> None:
    """The others wait until one is done; a run that arrives meanwhile is delivered before them."""
    consumer = Consumer(client, slots=16)
    unfinished = [_message(f"e{n}", _now_us(), ended=True) for n in range(10)]

    assert consumer.take(*unfinished) == ["e0"]  # a run may wait behind them: only one is delivered at first
    assert consumer.end_one() == ["e1"]
    assert consumer.end_one() == ["e2", "e3", "e4", "e5"]
    assert consumer.take(_message("r1", _now_us())) == ["r1"]
    assert consumer.end_one() == ["e6"]
    while consumer.unfinished:
        consumer.end_one()
    assert (consumer.messages.waiting, consumer.unfinished) == (0, 0)


def test_a_new_run_is_read_before_completion_messages_are_delivered(
    redis_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The completion messages and the cancelled runs' own messages are before it in the queue. All are read
    in one fetch, however few the slots are, and one completion message per fetch is delivered too."""
    cancelled = [f"c{number}" for number in range(100)]
    for run_id in (*cancelled, "new"):
        if run_id == "new":
            for each in cancelled:
                client.cancel(each)
        client.submit({"agent_id": "a", "session_id": run_id, "input_text": "hi", "run_id": run_id})
    monkeypatch.setattr(completion_messages, "CHECK_AFTER_US", 0)
    consumer = Consumer(client, slots=4)
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as connection:
        channel, readings = connection.default_channel, 0
        consumer.follow(channel)
        with kombu.Consumer(channel, [Queue("agents"), Queue("agents.wake")], callbacks=[consumer.begin]):
            while "new" not in consumer.delivered:
                connection.drain_events(timeout=PATIENCE_S)
                readings += 1
        channel.close()

    assert readings == 1
    assert consumer.delivered[0] == "new"
    assert len(consumer.delivered) == 2
    assert consumer.messages.waiting == len(cancelled) - 1


def test_a_resent_completion_message_replaces_the_first(client: Client) -> None:
    """Celery is notified once of each end, however often the message was sent while it waited."""
    consumer = Consumer(client, slots=0)
    consumer.take(*(_message("e1", _now_us() + number, ended=True) for number in range(5)))

    assert consumer.messages.waiting == 1


def test_a_completion_message_is_delivered_until_celery_was_notified(client: Client) -> None:
    """Also after several re-sends, when the time of its next sending is already stored."""
    consumer = Consumer(client, slots=9)
    _submit(client, "pending", "notified", "goes-on", cancelled=("pending", "notified"))
    client.store.run(scripts.confirm_completion(runs=["notified", str(client.record("notified").life)]))
    client.store.redis.zadd(client.store.keys("sent", "agents"), {"pending": _now_us() + 60_000_000})

    delivered = consumer.take(
        *(_message(run_id, 1_000_000, ended=True) for run_id in ("notified", "goes-on", "gone", "pending"))
    )

    assert delivered == ["pending"]


def test_one_completion_message_is_delivered_if_few_slots_are_free(client: Client) -> None:
    """With no free slot none is delivered; with one slot, one is."""
    consumer = Consumer(client, slots=0)

    assert consumer.take(_message("e1", _now_us(), ended=True)) == []
    consumer.slots = 1
    consumer.messages.deliver_more()
    assert consumer.delivered == ["e1"]


def test_at_most_max_waiting_completion_messages_wait(client: Client) -> None:
    """More are dropped: Redis lists them as sent, and the rescue loop re-sends them."""
    consumer = Consumer(client, slots=0)

    consumer.take(*(_message(f"e{n}", _now_us(), ended=True) for n in range(MAX_WAITING + 100)))

    assert consumer.messages.waiting == MAX_WAITING


def test_a_message_that_another_one_has_replaced_is_dropped(client: Client) -> None:
    """Redis stores when the latest message of a run was sent; a message of a notified end is not needed."""
    consumer = Consumer(client, slots=9)
    _submit(client, "queued", "cancelled", "notified", cancelled=("cancelled", "notified"))
    life = client.record("notified").life
    client.store.run(scripts.confirm_completion(runs=["notified", str(life)]))
    sent = client.store.keys("sent", "agents")
    first_us = int(client.store.redis.zscore(sent, "queued") or 0)
    client.store.redis.zadd(sent, {"queued": first_us - 10_000_000, "cancelled": first_us})

    delivered = consumer.take(
        _message("queued", first_us - 10_000_000),
        _message("queued", first_us - 11_000_000),
        _message("cancelled", first_us - 10_000_000),
        _message("notified", first_us - 10_000_000),
        _message("unknown", first_us - 10_000_000),
    )

    assert delivered == ["queued", "unknown"]


@pytest.mark.parametrize(
    "headers",
    [
        {"id": None},
        {"id": 7},
        {"wake_us": None},
        {"wake_us": 5},
        {"wake_us": "x"},
        {"wake_us": "9" * 5000},
        {"wake_us": "٣"},
    ],
)
def test_a_message_with_invalid_headers_is_delivered(client: Client, headers: dict[str, Any]) -> None:
    """The consumer that receives it reports the error."""
    consumer = Consumer(client, slots=9)
    message, queue = _message("r1")
    message["headers"] |= headers

    assert consumer.messages.select_deliverable([(message, queue)]) == [(message, queue)]


def test_a_message_without_headers_is_delivered(client: Client) -> None:
    """Also a message whose headers are not an object."""
    consumer = Consumer(client, slots=9)

    for message in ({"body": ""}, {"headers": None}, {"headers": [1]}, {"headers": "x"}):
        assert consumer.messages.select_deliverable([(message, "agents")]) == [(message, "agents")]


def test_no_more_messages_are_fetched_than_can_start(tmp_path: Path) -> None:
    """Messages of one fetch count before they are delivered: the others stay in the broker."""
    with installed(tmp_path, agent("clerk"), OPENAGENTS_CONCURRENCY="3") as shop:
        runs = [f"held-{uuid.uuid4().hex}" for _ in range(12)]
        shop.model.will_say({"text": "fine"})
        released: list[str] = []
        shop.model.may_answer = lambda run_id: run_id in released
        handles = [shop.submit("clerk", run_id=run_id) for run_id in runs]

        def working() -> list[str]:
            return [each.id for each in handles if each.record().state is RunState.RUNNING]

        for done in range(9):
            wait_for(lambda: len(working()) == 3, "three runs are executed")
            rest = len(runs) - done - 3
            wait_for(lambda rest=rest: shop.client.store.redis.llen("agents") == rest, "the others wait")  # type: ignore[misc]
            released.append(working()[0])
            shop.client.handle(released[-1]).wait(PATIENCE_S)
        released.extend(runs)
        assert all(handle.wait(PATIENCE_S).ok for handle in handles)
