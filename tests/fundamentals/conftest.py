"""The shop: one deployment for all these tests, with its agents, and the objects that a producer uses."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from openagents_worker import Client
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Installation, Model, agent, installed

TOOLS = {
    tool: f"tests.fundamentals.shop.{tool}"
    for tool in ("price", "pay", "deliver", "ring", "ask_the_customer", "wait_for_the_bank")
}

AGENTS = (
    agent("clerk", tools=TOOLS),
    agent("regular", memory={"type": "window_buffer", "config": {"window_size": 2}}),
)


@pytest.fixture(scope="package")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    """Redis, a model server and a worker process."""
    env = {"OPENAGENTS_LEASE_MS": "1000", "OPENAGENTS_RETRY_AFTER_MAX_MS": "100"}
    with installed(tmp_path_factory.mktemp("shop"), *AGENTS, **env) as installation:
        yield installation


@pytest.fixture
def run_agent(shop: Installation) -> AgentTask:
    """The same as `from openagents_worker import run_agent`, configured for the Redis of the shop."""
    return shop.run_agent


@pytest.fixture
def client(shop: Installation) -> Client:
    """The same as `Client()`, configured for the Redis of the shop."""
    return shop.client


@pytest.fixture
def model(shop: Installation) -> Model:
    """The model. `will_say(…)` sets its replies, one per turn. `asked(run_id)` returns its requests."""
    return shop.model
