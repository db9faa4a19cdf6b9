"""Whole deployments on a Redis that asks for more than an address: a worker process, Flower, a producer."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery

from openagents_worker.celery.bootsteps import _settings_with_broker
from openagents_worker.celery.register import register
from openagents_worker.local.stack import Stack
from openagents_worker.producer.app_binding import binding_of
from openagents_worker.producer.client import Client, client_of
from openagents_worker.producer.publisher import publishing_connection, send_first
from openagents_worker.settings import load_settings
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.backlog import Backlog
from tests.deployment.flower import Flower
from tests.support.waiting import wait_for
from tests.tls.servers import Servers
from tests.tls.variants import VARIANTS

pytestmark = pytest.mark.long

AGENT = {
    "id": "echo",
    "name": "Echo",
    "llm": {"provider": "mock"},
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
}
WHOLE = ("mutual TLS", "a socket with a user")


@contextmanager
def deployment(url: str, folder: Path) -> Generator[Stack]:
    file = folder / "agents.json"
    file.write_text(json.dumps({"agents": [AGENT]}))
    env = {**os.environ, "OPENAGENTS_CONFIG": str(file), "OPENAGENTS_RESULT_BACKEND": url}
    env["FLOWER_UNAUTHENTICATED_API"] = "1"
    with Stack(redis_url=url, env=env) as stack:
        stack.start_worker("w1")
        yield stack


@pytest.mark.share(of=2)
@pytest.mark.parametrize("name", WHOLE)
def test_a_run_is_executed_and_flower_counts_the_queue(name: str, servers: Servers, tmp_path: Path) -> None:
    """Submitted, woken, executed, watched and waited for; its result is in Celery's backend, too."""
    variant = VARIANTS[name]
    with deployment(variant.url(servers), tmp_path) as stack:
        settings = stack.settings
        with Client(settings=settings) as client:
            handle = client.submit({"agent_id": "echo", "session_id": "s1", "input_text": "hi"})
            names = [event.name for event in handle.events()]
            assert names[-1] == "session.run.completed"
            assert handle.wait(timeout=60).stop_reason == "completed"
            backend = client.app.backend
            wait_for(lambda: backend.get(backend.get_key_for_task(handle.id)), "Celery's result")
            backend.client.connection_pool.disconnect()

        flower = Flower(int(stack.start_flower().rpartition(":")[2]))
        wait_for(lambda: "agents.wake" in flower.get("/broker")[1], "the queues that the worker consumes")
        wait_for(lambda: flower.json("/api/workers?refresh=1"), "the worker's answer")


def test_messages_of_a_products_app_use_the_tls_of_that_app(servers: Servers) -> None:
    """`broker_use_ssl` beside a `rediss://` broker, and the same without TLS in the URL at all."""
    folder = servers.certificates.folder
    use_ssl = {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_ca_certs": str(servers.certificates.ca_file),
        "ssl_certfile": str(folder / "client.crt"),
        "ssl_keyfile": str(folder / "client.key"),
    }
    for scheme in ("rediss", "redis"):
        app = Celery(
            "shop",
            broker=f"{scheme}://{servers.login}@localhost:{servers.tls_mutual.port}/1",
            set_as_current=False,
        )
        app.conf.broker_use_ssl = use_ssl
        with publishing_connection(app) as connection:
            connection.default_channel.client.lpush("hello", "TLS")
        with servers.inside(servers.locked, 1) as inside:
            assert inside.rpop("hello") == "TLS"
        app.close()


async def test_a_worker_of_that_app_reads_its_queues(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it can find lost messages."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", servers.free.url)
    app = Celery("shop", broker=f"rediss://localhost:{servers.tls.port}/2", set_as_current=False)
    app.conf.broker_use_ssl = {
        "ssl_cert_reqs": "required",
        "ssl_ca_certs": str(servers.certificates.ca_file),
    }
    register(app)
    with servers.inside(servers.free, 2) as inside:
        inside.lpush("agents", json.dumps({"headers": {"wake_us": "300"}}))

    settings = _settings_with_broker(app, load_settings())

    backlog = Backlog(settings.broker_url)
    assert await backlog.oldest_us("agents") == 300
    await backlog.aclose()
    client_of(app).close()
    app.close()


def test_an_app_without_options_for_tls_publishes_as_kombu_does(servers: Servers) -> None:
    """kombu then checks no certificate, with a warning. The app decides that, but the connection uses TLS."""
    app = Celery("shop", broker=f"rediss://localhost:{servers.tls.port}/0", set_as_current=False)
    assert send_first(app, Wake("r1", "agents", 300, "assistant", "s1", 1, 3, ""))
    with servers.inside(servers.free, 0) as inside:
        assert inside.llen("agents") == 1
    binding_of(app).producers.popitem()[1].connections.force_close_all()
    app.close()
