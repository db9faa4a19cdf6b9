"""Connections. The only place that combines the settings, the Redis and the Celery app of a producer.

Clients and handles both use a connection; it knows neither of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from functools import cache, cached_property
from typing import Any, TypeVar, cast

from celery import Celery
from celery.backends.base import DisabledBackend

from openagents_worker.producer.app_binding import binding_of, real_app
from openagents_worker.producer.plans import Sending
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore, Cell, Plan, Store

__all__ = [
    "AsyncConnection",
    "Connection",
    "cell_of",
    "connection_of",
    "default_connection",
    "default_app",
]

ANSWER_TIMEOUT_S = 2.0  # short, because a caller waits for the answer

T = TypeVar("T")


def cell_of(settings: Settings) -> Cell:
    """The Redis, the key prefix and the limits of these settings."""
    return Cell(
        url=settings.redis_url,
        prefix=settings.key_prefix,
        events_maxlen=settings.events_maxlen,
        run_ttl_ms=settings.run_ttl_s * 1000,
        session_ttl_ms=settings.session_ttl_s * 1000,
        max_watchers=settings.max_watchers,
    )


class Connection:
    """The Redis and the Celery app of a producer. It is thread-safe and connects when it is needed."""

    def __init__(
        self, redis_url: str | None = None, settings: Settings | None = None, app: Celery | None = None
    ) -> None:
        self.publishing = PublishingApp(redis_url, settings, app, self)
        self.store = Store(cell_of(self.publishing.given_settings), answer_timeout_s=ANSWER_TIMEOUT_S)

    def execute(self, plan: Plan[T]) -> T:
        """Execute a plan of `producer.plans`."""
        return self.store.execute(plan, _wait_or_send)

    def stream(self, plan: Plan[None]) -> Generator[Any]:
        """Execute a plan of `producer.plans`, and yield the items that it emits."""
        return self.store.stream(plan, _wait_or_send)

    @cached_property
    def no_backend(self) -> Any:
        """The result backend of handles. Celery requires one, but a handle reads the record of the run."""
        return DisabledBackend(self.publishing.app)

    @cached_property
    def for_asyncio(self) -> AsyncConnection:
        """The `AsyncConnection` with the same settings. Its connections are closed with the running loop."""
        return AsyncConnection(self.publishing)

    def close(self) -> None:
        """Close the connections. Those of a running event loop are closed when the loop ends.

        The object can be used again.
        """
        self.store.close()
        if "for_asyncio" in self.__dict__:
            self.for_asyncio.store.leave_closed_loops()
        self.publishing.close_producers(of_given_app=True)


class AsyncConnection:
    """The `Connection` for asyncio. It can be used on several event loops; each has separate connections."""

    def __init__(self, publishing: PublishingApp) -> None:
        self.publishing = publishing
        self.store = AsyncStore(cell_of(publishing.given_settings), answer_timeout_s=ANSWER_TIMEOUT_S)

    def execute(self, plan: Plan[T]) -> Coroutine[Any, Any, T]:
        """Execute a plan of `producer.plans`."""
        return self.store.execute(plan, _execute_step)

    def stream(self, plan: Plan[None]) -> AsyncGenerator[Any]:
        """Execute a plan of `producer.plans`, and yield the items that it emits."""
        return self.store.stream(plan, _execute_step)

    async def close(self) -> None:
        """Close the connections. The object can be used again."""
        await self.store.close()
        self.publishing.close_producers(of_given_app=False)


def _wait_or_send(step: float | Sending) -> None:
    if isinstance(step, Sending):
        step.send()
    else:
        time.sleep(step)


async def _execute_step(step: float | Sending) -> None:
    """Wait for a number of seconds, or send messages to the broker in a thread."""
    if isinstance(step, Sending):
        await asyncio.to_thread(step.send)
    else:
        await asyncio.sleep(step)


@cache
def default_connection() -> Connection:
    """The connection of this process. It uses the registered app, or the settings of the environment."""
    return Connection()


def connection_of(app: Celery) -> Connection:
    """The connection of a Celery app. The first call makes it."""
    app = real_app(app)
    binding = binding_of(app)
    if binding.connection is None:
        binding.connection = Connection(settings=binding.settings, app=app)
    return cast(Connection, binding.connection)


def default_app() -> Celery:
    """The current app of `openagents_worker.run_agent`. Raises `ConfigError` if two apps are registered."""
    return default_connection().publishing.to_submit()[0]
