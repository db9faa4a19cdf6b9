"""The gate: a worker that is not registered takes no message."""

from __future__ import annotations

from types import MethodType
from typing import Any

from celery import bootsteps

from openagents_worker.celery.free_slots import FreeSlots
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.producer.kombu_redis import Channel
from openagents_worker.producer.message_size import largest_message_bytes
from openagents_worker.producer.publisher import wake_queue

__all__ = ["bound_messages", "gate_of"]


def gate_of(host: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A step of the consumer that keeps it from taking messages while this process holds no lease.

    It could not claim their runs: each message would wait here, and another worker could have taken it. Where
    the worker also consumes queues of other tasks, by the same channel, it takes messages all the same, as
    those need no lease. In prefork it does, too: there each child process has a lease of its own.
    """

    class Gate(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = (FreeSlots,)

        def start(self, parent: Any) -> None:
            """Called again with each new connection, which has a channel of its own."""
            bound_messages(host, parent.task_consumer.channel)
            if not _consumes_only(parent, host.queues) or parent.connection.transport.driver_type != "redis":
                return
            channel = parent.task_consumer.channel
            if isinstance(channel, Channel) and (free_slots := channel.free_slots) is not None:
                channel.free_slots = lambda: free_slots() if host.is_registered() else 0
            can_consume = channel.qos.can_consume

            def is_open(_: Any) -> bool:
                return host.is_registered() and bool(can_consume())

            channel.qos.can_consume = MethodType(is_open, channel.qos)

    return Gate


def bound_messages(host: ProcessHolder, channel: Any) -> None:
    """Messages of runs have a limit; those of an app's own tasks are its own affair."""
    if isinstance(channel, Channel):
        most = largest_message_bytes(host.settings.max_payload_bytes)
        channel.max_message_bytes = lambda queue: most if _is_of_runs(host, queue) else None


def _is_of_runs(host: ProcessHolder, queue: object) -> bool:
    return any(queue in (name, wake_queue(name)) for name in host.queues)


def _consumes_only(consumer: Any, queues: tuple[str, ...]) -> bool:
    """Whether the worker consumes only these queues, and those of their wake-ups."""
    ours = {*queues, *(wake_queue(name) for name in queues)}
    return {queue.name for queue in consumer.task_consumer.queues} <= ours
