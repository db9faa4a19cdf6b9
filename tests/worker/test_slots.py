"""Slots: a thousand runs that were cancelled while they waited keep no new run waiting."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import kombu
import pytest
from kombu import Connection, Queue

from openagents_worker.models import RunState
from openagents_worker.producer.broker import TRANSPORTS, Taken
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.worker import end_notices
from openagents_worker.worker.end_notices import MOST_WAITING, EndNotices
from tests.installation import PATIENCE_S, agent, installed
from tests.waiting import wait_for

CONCURRENCY = 8
CANCELLED = 300


def test_cancelled_runs_keep_no_new_run_waiting(tmp_path: Path) -> None:
    """Their messages stand before its own; it is done while Celery is still to be notified of many of them,
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

        def untold() -> int:
            with store.pipeline() as pipe:
                for handle in waiting:
                    pipe.hexists(keys("run", handle.id), "untold")
                return sum(pipe.execute())

        def answers(run_id: str) -> bool:
            if run_id == new.id and not notified:
                notified.append(CANCELLED - untold())
            return run_id not in held

        shop.model.may_answer = answers
        held.clear()

        assert new.wait(PATIENCE_S).final_output == "fine"

        assert notified[0] < CANCELLED / 4  # a handful as a rule; all where they go first
        wait_for(lambda: not untold(), "Celery is notified of every end")
        wait_for(lambda: not store.llen("agents") and not store.llen("agents.wake"), "no message is left")
        assert {handle.record().state for handle in waiting} == {RunState.CANCELLED}


# --- what is delivered when ------------------------------------------------------------------------------


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
    """A consumer with so many slots: what it was given, and what of that goes on."""

    def __init__(self, client: Client, slots: int) -> None:
        self.slots = slots
        self.ends = 0
        self.given: list[str] = []
        self.notices = EndNotices(
            store=lambda: client.store,
            free_slots=lambda: self.slots - self.ends,
            in_hand=lambda: self.ends,
            deliver=lambda message, queue: self._deliver(message, queue),
        )
        self._deliver: Callable[[dict[str, Any], str], None] = lambda message, _: self.give(
            [(message, "agents")]
        )

    def follow(self, channel: Any) -> None:
        """Read a broker by this channel, as a worker does."""
        channel.room = lambda: self.slots - self.ends
        channel.sift, channel.when_sifted = self.notices.sift, self.notices.deliver_more
        self._deliver = channel.connection._deliver

    def begin(self, _: Any, message: Any) -> None:
        self.give([({"headers": message.headers}, "agents")])
        message.ack()

    def take(self, *taken: Taken) -> list[str]:
        before = len(self.given)
        self.give(self.notices.sift(list(taken)))
        self.notices.deliver_more()
        return self.given[before:]

    def give(self, taken: list[Taken]) -> None:
        for message, _ in taken:
            self.given.append(message["headers"]["id"])
            self.ends += "run_ended" in message["headers"]

    def end_one(self) -> list[str]:
        before = len(self.given)
        self.ends -= 1
        self.notices.note_room()
        return self.given[before:]


@pytest.fixture
def client(redis_url: str) -> Generator[Client]:
    with Client(settings=load_settings({"OPENAGENTS_REDIS_URL": redis_url})) as client:
        yield client


def _now_us() -> int:
    return int(time.time() * 1_000_000)


def test_notifications_take_a_quarter_of_the_free_slots(client: Client) -> None:
    """The others wait until one is done; a run that comes meanwhile goes before them."""
    consumer = Consumer(client, slots=16)
    ends = [_message(f"e{n}", _now_us(), ended=True) for n in range(10)]

    assert consumer.take(*ends) == ["e0"]  # behind them may stand a run: nothing else is begun at first
    assert consumer.end_one() == ["e1"]
    assert consumer.end_one() == ["e2", "e3", "e4", "e5"]
    assert consumer.take(_message("r1", _now_us())) == ["r1"]
    assert consumer.end_one() == ["e6"]
    while consumer.ends:
        consumer.end_one()
    assert (consumer.notices.waiting, consumer.ends) == (0, 0)


def test_a_new_run_is_read_before_notifications_begin(
    redis_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it stand the notifications and the cancelled runs' own messages. All of them are read together,
    however few the slots are, and one notification a reading is begun beside that."""
    cancelled = [f"c{number}" for number in range(100)]
    for run_id in (*cancelled, "new"):
        if run_id == "new":
            for each in cancelled:
                client.cancel(each)
        client.submit({"agent_id": "a", "session_id": run_id, "input_text": "hi", "run_id": run_id})
    monkeypatch.setattr(end_notices, "OLD_US", 0)
    consumer = Consumer(client, slots=4)
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as line:
        channel, readings = line.default_channel, 0
        consumer.follow(channel)
        with kombu.Consumer(channel, [Queue("agents"), Queue("agents.wake")], callbacks=[consumer.begin]):
            while "new" not in consumer.given:
                line.drain_events(timeout=PATIENCE_S)
                readings += 1
        channel.close()

    assert readings == 1
    assert consumer.given[0] == "new"
    assert len(consumer.given) == 2
    assert consumer.notices.waiting == len(cancelled) - 1


def test_a_notification_that_is_sent_once_more_takes_the_place_of_the_first(client: Client) -> None:
    """Each end is notified once, however often its notification was sent while it waited."""
    consumer = Consumer(client, slots=0)
    consumer.take(*(_message("e1", _now_us() + number, ended=True) for number in range(5)))

    assert consumer.notices.waiting == 1


def test_a_notification_is_delivered_until_celery_knows_the_end(client: Client) -> None:
    """Also when it has been sent again and again: its next sending is noted ahead of time then."""
    consumer = Consumer(client, slots=9)
    _submit(client, "untold", "told", "goes-on", cancelled=("untold", "told"))
    client.store.run(scripts.told(runs=["told", str(client.record("told").life)]))
    client.store.redis.zadd(client.store.keys("sent", "agents"), {"untold": _now_us() + 60_000_000})

    given = consumer.take(
        *(_message(run_id, 1_000_000, ended=True) for run_id in ("told", "goes-on", "gone", "untold"))
    )

    assert given == ["untold"]


def test_one_notification_is_under_way_where_there_are_few_slots(client: Client) -> None:
    """With no free slot none is; with one, one is."""
    consumer = Consumer(client, slots=0)

    assert consumer.take(_message("e1", _now_us(), ended=True)) == []
    consumer.slots = 1
    consumer.notices.deliver_more()
    assert consumer.given == ["e1"]


def test_so_many_notifications_wait_at_most(client: Client) -> None:
    """What is beyond is dropped: Redis lists it as sent, and the rescue loop sends it again."""
    consumer = Consumer(client, slots=0)

    consumer.take(*(_message(f"e{n}", _now_us(), ended=True) for n in range(MOST_WAITING + 100)))

    assert consumer.notices.waiting == MOST_WAITING


def test_a_message_that_another_one_has_replaced_is_dropped(client: Client) -> None:
    """Redis knows when a run's latest message was sent; and of an end that Celery knows, nobody waits."""
    consumer = Consumer(client, slots=9)
    _submit(client, "queued", "cancelled", "told", cancelled=("cancelled", "told"))
    life = client.record("told").life
    client.store.run(scripts.told(runs=["told", str(life)]))
    sent = client.store.keys("sent", "agents")
    first_us = int(client.store.redis.zscore(sent, "queued") or 0)
    client.store.redis.zadd(sent, {"queued": first_us - 10_000_000, "cancelled": first_us})

    given = consumer.take(
        _message("queued", first_us - 10_000_000),
        _message("queued", first_us - 11_000_000),
        _message("cancelled", first_us - 10_000_000),
        _message("told", first_us - 10_000_000),
        _message("unknown", first_us - 10_000_000),
    )

    assert given == ["queued", "unknown"]


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
def test_a_message_with_odd_headers_goes_on(client: Client, headers: dict[str, Any]) -> None:
    """Whoever delivers it says what is wrong with it."""
    consumer = Consumer(client, slots=9)
    message, queue = _message("r1")
    message["headers"] |= headers

    assert consumer.notices.sift([(message, queue)]) == [(message, queue)]


def test_a_message_without_headers_goes_on(client: Client) -> None:
    """Also one whose headers are not an object."""
    consumer = Consumer(client, slots=9)

    for message in ({"body": ""}, {"headers": None}, {"headers": [1]}, {"headers": "x"}):
        assert consumer.notices.sift([(message, "agents")]) == [(message, "agents")]


def test_no_more_is_taken_than_can_be_begun(tmp_path: Path) -> None:
    """Messages that are looked at together count before they are delivered: the others stay in the broker."""
    with installed(tmp_path, agent("clerk"), OPENAGENTS_CONCURRENCY="3") as shop:
        runs = [f"held-{uuid.uuid4().hex}" for _ in range(12)]
        shop.model.will_say({"text": "fine"})
        released: list[str] = []
        shop.model.may_answer = lambda run_id: run_id in released
        handles = [shop.submit("clerk", run_id=run_id) for run_id in runs]

        def working() -> list[str]:
            return [each.id for each in handles if each.record().state is RunState.RUNNING]

        for done in range(9):
            wait_for(lambda: len(working()) == 3, "three runs are at work")
            most = len(runs) - done - 3
            wait_for(lambda most=most: shop.client.store.redis.llen("agents") == most, "the others wait")  # type: ignore[misc]
            released.append(working()[0])
            shop.client.handle(released[-1]).wait(PATIENCE_S)
        released.extend(runs)
        assert all(handle.wait(PATIENCE_S).ok for handle in handles)
