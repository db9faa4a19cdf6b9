"""The broker's transport: Redis as kombu speaks it, made safer and cheaper.

kombu lets an item that it cannot read end the whole worker: anybody who can write to the list could stop all
of them. Ours drops such an item and says so. And kombu makes a Redis client for every message it sends and
acknowledges, each with a table of all commands: a fifth of what a busy worker computed. Ours keeps one.
"""

from __future__ import annotations

import json
from queue import Empty
from typing import Any

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES, _transport_cache, redis

from openagents_worker.telemetry import get_logger

__all__ = ["TRANSPORT", "Transport", "use_in_workers_of"]

log = get_logger(__name__)

SHOWN_CHARS = 200
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError)
"""What kombu raises for a part that is not of the type which it takes for granted; Celery's callbacks, which
run inside, answer their own (worker/refusal.py)."""


class Channel(redis.Channel):
    _kept_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all that a channel asks; its connections are those of the channel's pool."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = super()._create_client()  # type: ignore[no-untyped-call]
        return self._kept_client

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # as all of kombu
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            log.error("message.unreadable", error=str(error)[:SHOWN_CHARS])
            raise Empty from None


class Transport(redis.Transport):
    """Redis as kombu speaks it, but for items that are no messages."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        if problem := _problem(message):
            log.error("message.unreadable", queue=queue, error=problem)
            return
        try:
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
        except UNREADABLE as error:  # kombu's own, while it makes a message of it: nothing holds it yet
            log.error(
                "message.unreadable", queue=queue, error=f"{type(error).__name__}: {error}"[:SHOWN_CHARS]
            )


TRANSPORT = f"{Transport.__module__}:{Transport.__name__}"
"""As kombu names a transport."""


def use_in_workers_of(app: Celery) -> None:
    """Let workers of this app read a Redis broker through our transport; other processes are left alone."""

    def in_its_worker(sender: Any = None, **_: Any) -> None:
        # By its alias, not by the setting broker_transport: Flower takes that for the scheme of the URL.
        if sender is not None and sender.app is app:
            for alias in ("redis", "rediss"):
                TRANSPORT_ALIASES[alias] = TRANSPORT
                _transport_cache.pop(alias, None)  # somebody may have asked for it already

    signals.worker_init.connect(in_its_worker, weak=False)


def _problem(message: Any) -> str | None:
    """What keeps this from being a message of kombu's; None when nothing does."""
    if not isinstance(message, dict):
        return f"a {type(message).__name__} is no message"
    properties = message.get("properties")
    if not isinstance(properties, dict) or "delivery_tag" not in properties:
        return "it has no properties.delivery_tag"
    if not isinstance(properties.get("delivery_info"), dict):
        return "it has no properties.delivery_info"
    return None if isinstance(message.get("body"), str | bytes) else "it has no body"
