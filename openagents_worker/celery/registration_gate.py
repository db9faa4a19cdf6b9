"""The registration gate: the only place that stops an unregistered worker from fetching messages."""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

from celery import bootsteps

from openagents_worker.celery.free_slots import FreeSlots
from openagents_worker.celery.kombu_redis import Channel
from openagents_worker.celery.message_size import largest_message_bytes
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.producer.publisher import wake_queue

__all__ = ["limit_message_size", "registration_gate_step"]


def registration_gate_step(holder: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A consumer bootstep that fetches no messages while this process holds no lease.

    Without a lease it could not claim runs: each message would wait here although another worker could
    receive it. If the worker consumes queues of other tasks through the same channel, it fetches messages all
    the same, because those tasks need no lease. So it does in a prefork pool, where each child process has
    its own lease.
    """

    class RegistrationGate(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = (FreeSlots,)

        def start(self, parent: Any) -> None:
            """Called for each new connection, which has a new channel."""
            limit_message_size(holder, parent.task_consumer.channel)
            if (
                not _consumes_only(parent, holder.queues)
                or parent.connection.transport.driver_type != "redis"
            ):
                return
            channel = parent.task_consumer.channel
            if isinstance(channel, Channel) and (free_slots := channel.free_slots) is not None:
                channel.free_slots = lambda: free_slots() if holder.is_registered() else 0
            can_consume = channel.qos.can_consume

            def is_open(_: Any) -> bool:
                return holder.is_registered() and bool(can_consume())

            channel.qos.can_consume = MethodType(is_open, channel.qos)

    return RegistrationGate


def limit_message_size(holder: ProcessHolder, channel: Any) -> None:
    """Limit the size of messages of runs; messages of the app's own tasks are not limited."""
    if isinstance(channel, Channel):
        most = largest_message_bytes(holder.settings.max_payload_bytes)
        channel.max_message_bytes = lambda queue: most if _is_run_queue(holder, queue) else None


def _is_run_queue(holder: ProcessHolder, queue: object) -> bool:
    return isinstance(queue, str) and queue in _with_wake_queues(holder.queues)


@cache  # it is asked for each message
def _with_wake_queues(queues: tuple[str, ...]) -> frozenset[str]:
    return frozenset(queues) | {wake_queue(name) for name in queues}


def _consumes_only(consumer: Any, queues: tuple[str, ...]) -> bool:
    """Whether the worker consumes only these queues and the queues of their wake-ups."""
    return {queue.name for queue in consumer.task_consumer.queues} <= _with_wake_queues(queues)
