"""A broker that says nothing, and does not close the connection either: the worker notices."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.pool.shopkeeper import Shop, new_tag, open_shop
from tests.producer.proxy import Proxy
from tests.waiting import wait_for

PATIENCE_S = 90  # each connection that went silent costs its own time limit, of five seconds
SOON = {"health_check_interval": 1}
LOST = "Connection to broker lost"


@pytest.fixture
def broker() -> Generator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@contextmanager
def shop_at(folder: Path, broker: EmbeddedRedis, url: str, *arguments: str) -> Generator[Shop]:
    """A shop whose runs are in a Redis of their own, which is well."""
    with EmbeddedRedis() as store:
        env = {
            "OPENAGENTS_REDIS_URL": store.url,
            "OPENAGENTS_BROKER_URL": url,
            "SHOP_BROKER_OPTIONS": json.dumps(SOON),
        }
        with open_shop(folder, broker.url, *arguments, env=env) as shop:
            yield shop


def takes_a_message(shop: Shop) -> None:
    """One of those that are sent; Redis may give another to a connection that is silent."""
    tags: list[str] = []

    def taken() -> bool:
        if shop.in_broker() == 0:
            tags.append(new_tag())
            shop.send("blocks_and_notes", tags[-1], 0)
        return any(shop.notes(tag) for tag in tags)

    wait_for(taken, "the worker takes a message", PATIENCE_S)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [(), ("--pool=threads", "--concurrency=2")], ids=["ours", "threads"])
def test_a_connection_that_went_silent_is_made_anew(
    tmp_path: Path, broker: EmbeddedRedis, pool: tuple[str, ...]
) -> None:
    """As when a firewall forgets a connection: no byte comes any more, also no end of it."""
    with Proxy(broker.url) as proxy, shop_at(tmp_path, broker, proxy.url, *pool) as shop:
        takes_a_message(shop)
        proxy.silence()
        takes_a_message(shop)
        proxy.silence()
        takes_a_message(shop)


@pytest.mark.slow
def test_a_broker_that_stood_still_is_connected_to_again(tmp_path: Path, broker: EmbeddedRedis) -> None:
    """It takes connections and says nothing, as a machine that swaps does; then it goes on."""
    with Proxy(broker.url) as proxy, shop_at(tmp_path, broker, proxy.url) as shop:
        takes_a_message(shop)
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: LOST in shop.log, "the worker notices", PATIENCE_S)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        takes_a_message(shop)
