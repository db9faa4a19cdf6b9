"""A broker behind sentinels: Celery gets what it wants to know of it, and our transport is at work."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from celery import Celery

from openagents_worker.celery.bootsteps import _settings_with_broker
from openagents_worker.producer.client import Client
from openagents_worker.producer.publisher import make_app, publishing_connection, send_first
from openagents_worker.producer.redis_transport import SentinelPublishingTransport
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.backlog import EMPTY, Backlog
from tests.sentinel.watched import MASTER, SENTINEL_PASSWORD, Watched

pytestmark = pytest.mark.long

WAKE = Wake("r1", "agents", 300, "assistant", "s1", 1, 3, "")


@pytest.fixture
def settings(watched: Watched) -> Settings:
    return load_settings({"OPENAGENTS_REDIS_URL": watched.url, "OPENAGENTS_RESULT_BACKEND": watched.url})


@pytest.fixture
def app(settings: Settings) -> Generator[Celery]:
    app = make_app(settings)
    yield app
    app.close()


def close(client: Any) -> None:
    """Celery closes neither its backend's connections nor those to the sentinels that it asked."""
    pool = client.connection_pool
    for each in (pool, *(sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)):
        each.disconnect()


def test_celery_reaches_the_master_as_broker_and_as_backend(app: Celery, watched: Watched) -> None:
    """By its own transport, with both passwords: so does whoever has the app, such as Flower."""
    with app.connection_for_write() as connection:
        clients = connection.default_channel.client, app.backend.client
        ports = [client.info("server")["tcp_port"] for client in clients]
    close(app.backend.client)

    assert ports == [watched.master.port] * 2


def test_a_worker_waits_for_messages_without_limit_and_for_a_connection_with_one(app: Celery) -> None:
    """A master's machine that is gone is not waited for while another Redis has taken over."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.socket_timeout is None
        assert channel.socket_connect_timeout == channel.sentinel_kwargs["socket_connect_timeout"] == 1.0


def test_a_producer_publishes_through_our_transport(app: Celery) -> None:
    """It keeps one client, and hears of a silent broker."""
    with publishing_connection(app) as connection:
        assert isinstance(connection.transport, SentinelPublishingTransport)
        assert connection.default_channel.socket_timeout is not None


async def test_its_oldest_message_is_read_by_whichever_url_it_is_named(
    settings: Settings, app: Celery, watched: Watched
) -> None:
    """Ours, or that of a product's own app with its transport options."""
    of_product = Celery(broker=watched.address.celery_url, set_as_current=False)
    of_product.conf.broker_transport_options = watched.address.celery_options()
    told = _settings_with_broker(of_product, load_settings({}))
    assert send_first(app, WAKE)

    for url in (settings.broker_url, told.broker_url):
        backlog = Backlog(url)
        assert await backlog.oldest_us("agents") == 300
        assert await backlog.oldest_us("others") == EMPTY
        await backlog.aclose()

    with Client(settings=settings) as client:
        client.store.ask(lambda r: r.flushall())


def test_a_products_broker_without_its_masters_name_cannot_be_read(watched: Watched) -> None:
    """Celery says so itself when it connects."""
    app = Celery(broker=watched.address.celery_url, set_as_current=False)
    assert _settings_with_broker(app, load_settings({})).broker_url == ""


def test_celery_shows_neither_password(app: Celery) -> None:
    """`inspect conf` and Flower show an app's settings."""
    shown = app.conf.humanize(with_defaults=False)

    assert MASTER in shown
    assert SENTINEL_PASSWORD not in shown
    assert "data" not in shown
