"""The control channel: a cancel request reaches its run at once."""

from __future__ import annotations

from functools import partial

from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.worker.control_channel import ControlChannel
from tests.support.scripts import Hand
from tests.support.waiting import await_for


async def test_a_cancel_arrives_before_the_next_heartbeat(cell: Cell) -> None:
    """The worker listens on the channel of its current incarnation."""
    received: list[str] = []
    store, control_channel = AsyncStore(cell), ControlChannel(cell, on_notice=received.append)
    try:
        for incarnation, run_id in (("w:1", "r1"), ("w:2", "r2")):
            control_channel.follow(incarnation)
            await await_for(partial(_publish, store, incarnation, ""), "it listens")

            await _publish(store, incarnation, run_id)

            await await_for(partial(received.count, run_id), "the request was received")
    finally:
        await control_channel.aclose()
        await store.close()


async def test_the_cancel_script_publishes_on_that_channel(cell: Cell, redis_url: str) -> None:
    """The client that cancels does not know which worker has the run."""
    received: list[str] = []
    store, control_channel = AsyncStore(cell), ControlChannel(cell, on_notice=received.append)
    try:
        with Hand(redis_url) as hand:
            hand.submit("r1")
            hand.claim("r1")
            control_channel.follow(hand.incarnation)
            await await_for(partial(_publish, store, hand.incarnation, ""), "it listens")

            await store.run(scripts.cancel(run_id="r1", reason="", force=False))

            await await_for(lambda: "r1" in received, "the request was received")
    finally:
        await control_channel.aclose()
        await store.close()


async def _publish(store: AsyncStore, incarnation: str, run_id: str) -> int:
    """Publish a cancel request; returns the number of subscribers."""
    channel = store.keys.notices(incarnation)
    listeners: int = await store.ask(lambda r: r.publish(channel, run_id))
    return listeners
