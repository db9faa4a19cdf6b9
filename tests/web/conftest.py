"""Fixtures of the tests of watching: a run that a test executes by hand, and its watchers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import pytest

from openagents_worker.producer.client import AsyncClient
from openagents_worker.settings import load_settings
from openagents_worker.store.client import AsyncStore
from tests.support.scripts import Hand


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    """It executes the run r1."""
    with Hand(redis_url) as hand:
        hand.submit("r1")
        hand.claim("r1")
        yield hand


@pytest.fixture
async def store(hand: Hand) -> AsyncGenerator[AsyncStore]:
    store = AsyncStore(hand.store.cell)
    yield store
    await store.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncGenerator[AsyncClient]:
    async with AsyncClient(settings=load_settings({"OPENAGENTS_REDIS_URL": redis_url})) as client:
        yield client
