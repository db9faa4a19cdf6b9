"""A silent broker: it sends nothing and keeps the connection open; the worker detects it."""

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
from tests.support.lossy_proxy import Proxy
from tests.support.waiting import wait_for

PATIENCE_S = 90  # each silent connection costs its own time-out of five seconds
SOON = {"health_check_interval": 1}
LOST = "Connection to broker lost"


@pytest.fixture
def broker() -> Generator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@contextmanager
def shop_at(folder: Path, broker: EmbeddedRedis, url: str, *arguments: str) -> Generator[Shop]:
    """A shop whose runs are in a separate, healthy Redis."""
    with EmbeddedRedis() as store:
        env = {
            "OPENAGENTS_REDIS_URL": store.url,
            "OPENAGENTS_BROKER_URL": url,
            "SHOP_BROKER_OPTIONS": json.dumps(SOON),
        }
        with open_shop(folder, broker.url, *arguments, env=env) as shop:
            yield shop


def wait_for_a_message(shop: Shop) -> None:
    """Wait until the worker receives a message; Redis may deliver others to a silent connection."""
    tags: list[str] = []

    def taken() -> bool:
        if shop.in_broker() == 0:
            tags.append(new_tag())
            shop.send("blocks_and_notes", tags[-1], 0)
        return any(shop.notes(tag) for tag in tags)

    wait_for(taken, "the worker receives a message", PATIENCE_S)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [(), ("--pool=threads", "--concurrency=2")], ids=["ours", "threads"])
def test_a_worker_replaces_a_silent_connection(
    tmp_path: Path, broker: EmbeddedRedis, pool: tuple[str, ...]
) -> None:
    """As when a firewall drops a connection: no data and no end of the connection arrive."""
    with Proxy(broker.url) as proxy, shop_at(tmp_path, broker, proxy.url, *pool) as shop:
        wait_for_a_message(shop)
        proxy.silence()
        wait_for_a_message(shop)
        proxy.silence()
        wait_for_a_message(shop)


@pytest.mark.slow
def test_a_worker_reconnects_to_a_broker_that_was_paused(tmp_path: Path, broker: EmbeddedRedis) -> None:
    """It accepts connections without replies, as a swapping machine does; then it continues."""
    with Proxy(broker.url) as proxy, shop_at(tmp_path, broker, proxy.url) as shop:
        wait_for_a_message(shop)
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: LOST in shop.log, "the worker detects it", PATIENCE_S)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        wait_for_a_message(shop)
