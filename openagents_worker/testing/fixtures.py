"""The fixtures of the pytest plugin: the only module of the library that imports pytest."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.app_binding import without_registered_apps
from openagents_worker.producer.client import default_client
from openagents_worker.producer.connection import default_connection
from openagents_worker.settings import PREFIX, load_settings, unknown_variables
from openagents_worker.store.client import Cell, Store
from openagents_worker.testing.model_server import ModelServer, ReplyFunction
from openagents_worker.testing.scripted_model import ScriptedModel
from openagents_worker.testing.worker import Agents, AgentsWorker, config_of

__all__ = [
    "StartModelServer",
    "StartWorker",
    "agents_model_server",
    "agents_redis",
    "agents_worker",
    "scripted_model",
]


class StartWorker(Protocol):
    """The type of the fixture `agents_worker`. Without `agents`, the file in `OPENAGENTS_CONFIG` is used."""

    def __call__(self, agents: Agents | None = None, **settings: str) -> AgentsWorker: ...


class StartModelServer(Protocol):
    """The type of the fixture `agents_model_server`."""

    def __call__(self, reply: ReplyFunction | Sequence[Mapping[str, Any]]) -> ModelServer: ...


@pytest.fixture(scope="session")
def _agents_redis_server() -> Generator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def agents_redis(_agents_redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """The URL of an empty Redis for this test. During the test, `run_agent` and `RunHandle(id)` use it."""
    url = _agents_redis_server.url
    store = Store(Cell(url), max_connections=1)
    store.ask(lambda r: r.flushall())
    store.close()
    monkeypatch.setenv(f"{PREFIX}REDIS_URL", url)
    monkeypatch.delenv(f"{PREFIX}BROKER_URL", raising=False)
    default_connection.cache_clear()
    with without_registered_apps(), default_client():
        yield url
    default_connection.cache_clear()


@pytest.fixture
def scripted_model() -> Generator[ScriptedModel]:
    """The model of all agents of `agents_worker` in tests that use this fixture. Its errors fail the test."""
    model = ScriptedModel()
    yield model
    if model.errors:
        raise model.errors[0]


@pytest.fixture
def agents_worker(agents_redis: str, request: pytest.FixtureRequest) -> Generator[StartWorker]:
    """Starts a worker in this process: `agents_worker([{"id": "assistant"}])`. It stops when the test ends.

    Other arguments are settings, named as in the environment but without prefix: `MAX_PAYLOAD_BYTES="1000"`.
    """
    model = request.getfixturevalue("scripted_model") if "scripted_model" in request.fixturenames else None
    with ExitStack() as stack:

        def start(agents: Agents | None = None, **settings: str) -> AgentsWorker:
            env = {f"{PREFIX}{name.upper()}": value for name, value in settings.items()}
            for name, near in unknown_variables(env):
                guess = f"; did you mean {near.removeprefix(PREFIX)}?" if near else ""
                raise TypeError(f"agents_worker() has no setting {name.removeprefix(PREFIX)}{guess}")
            with pytest.MonkeyPatch.context() as patch:
                for name, value in env.items():
                    patch.setenv(name, value)
                loaded = load_settings()
            worker = AgentsWorker(config_of(agents, loaded), loaded, model)
            return stack.enter_context(worker.running())

        yield start


@pytest.fixture
def agents_model_server() -> Generator[StartModelServer]:
    """Starts a model server from a script or a function. Its `url` is used as an agent's `llm.api_base`."""
    with ExitStack() as stack:

        def start(reply: ReplyFunction | Sequence[Mapping[str, Any]]) -> ModelServer:
            return stack.enter_context(ModelServer(reply).serve_in_thread())

        yield start
