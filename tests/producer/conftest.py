"""What the producer's tests share: a client of the test's Redis, and a worker by hand."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from openagents_worker.producer.client import Client
from openagents_worker.settings import Settings, load_settings
from tests.support.scripts import Hand


@pytest.fixture
def settings(redis_url: str) -> Settings:
    return load_settings({"OPENAGENTS_REDIS_URL": redis_url})


@pytest.fixture
def client(settings: Settings) -> Generator[Client]:
    with Client(settings=settings) as client:
        yield client


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        yield hand
