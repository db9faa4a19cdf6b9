"""Notices: a cancel reaches its run at once."""

from __future__ import annotations

from functools import partial

from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.worker.control_channel import ControlChannel
from tests.producer.hand import Hand
from tests.waiting import await_for


async def test_a_cancel_is_heard_without_waiting_for_a_beat(cell: Cell) -> None:
    """The worker listens on the channel of its own incarnation, and after a new one on that."""
    heard: list[str] = []
    store, notices = AsyncStore(cell), ControlChannel(cell, on_cancel=heard.append)
    try:
        for incarnation, run_id in (("w:1", "r1"), ("w:2", "r2")):
            notices.follow(incarnation)
            await await_for(partial(_told, store, incarnation, ""), "it listens")

            await _told(store, incarnation, run_id)

            await await_for(partial(heard.count, run_id), "the notice was heard")
    finally:
        await notices.aclose()
        await store.close()


async def test_the_cancel_script_speaks_on_that_channel(cell: Cell, redis_url: str) -> None:
    """Whoever cancels need not know where the run is."""
    heard: list[str] = []
    store, notices = AsyncStore(cell), ControlChannel(cell, on_cancel=heard.append)
    try:
        with Hand(redis_url) as hand:
            hand.submit("r1")
            hand.claim("r1")
            notices.follow(hand.incarnation)
            await await_for(partial(_told, store, hand.incarnation, ""), "it listens")

            await store.run(scripts.cancel(run_id="r1", reason="", force=False))

            await await_for(lambda: "r1" in heard, "the notice was heard")
    finally:
        await notices.aclose()
        await store.close()


async def _told(store: AsyncStore, incarnation: str, run_id: str) -> int:
    """How many have heard it."""
    channel = store.keys.notices(incarnation)
    listeners: int = await store.ask(lambda r: r.publish(channel, run_id))
    return listeners
