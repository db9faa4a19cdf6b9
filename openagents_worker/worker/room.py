"""Room. The only place that tells the broker's transport how many messages more the worker can begin."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.worker import state

from openagents_worker.producer.broker import Channel

__all__ = ["Room"]


class Room(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A step of the consumer. Where Celery prefetches, it takes more than it can begin, and asks nobody."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Called again with each new connection, which has a channel of its own."""
        channel = parent.task_consumer.channel
        if isinstance(channel, Channel) and parent.app.conf.worker_disable_prefetch:
            channel.room = lambda: _room(parent)


def _room(consumer: Any) -> int:
    """As Celery decides whether to ask for one message more (`worker_disable_prefetch`)."""
    limit = getattr(consumer.controller, "max_concurrency", None) or consumer.pool.num_processes
    return int(limit) - len(state.reserved_requests)
