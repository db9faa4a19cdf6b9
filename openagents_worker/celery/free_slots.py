"""Room. The only place that tells the broker's transport how many messages more the worker can begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker import state

from openagents_worker.celery.completion_messages import EndNotices
from openagents_worker.celery.pool.task_pool import TaskPool, no_more
from openagents_worker.producer.client import client_of
from openagents_worker.producer.kombu_redis import Channel

__all__ = ["FreeSlots", "sift_ends"]


class FreeSlots(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A step of the consumer. Where Celery prefetches, it takes more than it can begin, and asks nobody."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Called again with each new connection, which has a channel of its own."""
        channel = parent.task_consumer.channel
        if not (isinstance(channel, Channel) and parent.app.conf.worker_disable_prefetch):
            return
        channel.free_slots = lambda: _room(parent)
        if isinstance(parent.pool, TaskPool) and not parent.pool.has_run_limit:
            sift_ends(channel, parent.pool, parent.app, free_slots=lambda: _room(parent))

    def stop(self, parent: Any) -> None:
        """Nothing is delivered any more: what waits in memory is sent again to other workers."""
        if isinstance(parent.pool, TaskPool):
            parent.pool.after_job = no_more


def sift_ends(channel: Any, pool: TaskPool, app: Any, *, free_slots: Callable[[], int]) -> None:
    """Let notifications of ends that come by this channel wait where they would take too many slots."""
    if not isinstance(channel, Channel):
        return
    notices = EndNotices(
        store=lambda: client_of(app).store,
        free_slots=free_slots,
        in_hand=pool.ends_in_hand,
        deliver=channel.connection._deliver,
    )
    channel.select_messages, channel.after_selection = notices.sift, notices.deliver_more
    pool.after_job = notices.note_room


def _room(consumer: Any) -> int:
    """As Celery decides whether to ask for one message more (`worker_disable_prefetch`)."""
    limit = getattr(consumer.controller, "max_concurrency", None) or consumer.pool.num_processes
    return int(limit) - len(state.reserved_requests)
