"""Free slots: the only place that informs the broker's transport how many more messages the worker can
start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker import state

from openagents_worker.celery.completion_messages import CompletionMessages
from openagents_worker.celery.kombu_redis import Channel
from openagents_worker.celery.pool.task_pool import TaskPool, do_nothing
from openagents_worker.producer.client import client_of

__all__ = ["FreeSlots", "delay_completion_messages"]


class FreeSlots(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A consumer bootstep that limits fetching to the free slots, if `worker_disable_prefetch` is set."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Called for each new connection, which has a new channel."""
        channel = parent.task_consumer.channel
        if not (isinstance(channel, Channel) and parent.app.conf.worker_disable_prefetch):
            return
        channel.free_slots = lambda: _count_free_slots(parent)
        if isinstance(parent.pool, TaskPool) and not parent.pool.has_run_limit:
            delay_completion_messages(
                channel, parent.pool, parent.app, free_slots=lambda: _count_free_slots(parent)
            )

    def stop(self, parent: Any) -> None:
        """Stop the delivery: messages that wait in memory are re-sent to other workers."""
        if isinstance(parent.pool, TaskPool):
            parent.pool.on_task_end = do_nothing


def delay_completion_messages(
    channel: Any, pool: TaskPool, app: Any, *, free_slots: Callable[[], int]
) -> None:
    """Delay completion messages of this channel if they would take too many free slots."""
    if not isinstance(channel, Channel):
        return
    completion_messages = CompletionMessages(
        store=lambda: client_of(app).store,
        free_slots=free_slots,
        unfinished=pool.unfinished_completions,
        deliver=channel.connection._deliver,
    )
    channel.select_messages, channel.after_selection = (
        completion_messages.select_deliverable,
        completion_messages.deliver_more,
    )
    pool.on_task_end = completion_messages.on_task_end


def _count_free_slots(consumer: Any) -> int:
    """The free slots as Celery counts them for `worker_disable_prefetch`."""
    limit = getattr(consumer.controller, "max_concurrency", None) or consumer.pool.num_processes
    return int(limit) - len(state.reserved_requests)
