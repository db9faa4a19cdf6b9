"""The queues of runs, in a worker of somebody's app. The only place that takes runs apart from other tasks.

Celery reads all queues of a worker through one channel, with one limit: the app's `worker_concurrency` times
its prefetch multiplier. Where our pool has a limit of its own for runs, the app's waiting tasks would use
that one up, and no run would be taken any more; and with `worker_disable_prefetch`, runs that wait for their
models would keep out the app's tasks. So the queues of runs get a channel and a limit of their own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.messaging import Consumer

from openagents_worker.celery.free_slots import sift_ends
from openagents_worker.celery.pool.task_pool import TaskPool
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.celery.registration_gate import bound_messages
from openagents_worker.producer.publisher import WakesFirst, wake_queue

__all__ = ["run_queues_of"]

MOST_AHEAD = 8  # messages that are taken and not begun; a run is acknowledged when it begins


def run_queues_of(host: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A step of the consumer, for a pool that has a limit of its own for runs."""

    class RunQueues(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, parent: Any) -> None:
            """Called again with each new connection, after Celery has made its consumer for it."""
            pool = parent.pool
            if isinstance(pool, TaskPool) and pool.has_run_limit and host.queues:
                names = {name for queue in host.queues for name in (queue, wake_queue(queue))}
                parent.task_consumer = _divided(parent, pool, names, host)

    return RunQueues


def _divided(consumer: Any, pool: TaskPool, names: set[str], host: ProcessHolder) -> DividedConsumer:
    celerys = consumer.task_consumer
    channel = consumer.connection.channel()
    channel.basic_qos(0, min(MOST_AHEAD, pool.run_limit), consumer.qos_global)
    _limit(channel, lambda: host.is_registered() and pool.runs_in_hand() < pool.run_limit)
    bound_messages(host, channel)
    sift_ends(channel, pool, consumer.app, free_slots=lambda: pool.run_limit - pool.runs_in_hand())
    if hasattr(channel, "_queue_cycle"):  # Redis: runs that have begun go before those that have not
        channel._queue_cycle = WakesFirst()  # type: ignore[no-untyped-call]  # as all of kombu
    if consumer.app.conf.worker_disable_prefetch:
        _limit_to_begin(celerys.channel, consumer, pool)
    options = {"accept": celerys.accept, "on_decode_error": celerys.on_decode_error}
    of_runs = [queue for queue in celerys.queues if queue.name in names]
    runs = Consumer(channel, of_runs, **options)  # type: ignore[no-untyped-call]  # as all of kombu
    others = [queue for queue in celerys.queues if queue.name not in names]
    return DividedConsumer(celerys.channel, others, runs=runs, names=names, **options)


def _limit(channel: Any, has_room: Any) -> None:
    """Ask for no message while there is no room for it. AMQP counts by itself what it has sent."""
    qos = getattr(channel, "qos", None)
    if qos is not None and hasattr(qos, "can_consume"):
        celerys = qos.can_consume
        qos.can_consume = MethodType(lambda _: has_room() and celerys(), qos)


def _limit_to_begin(channel: Any, consumer: Any, pool: TaskPool) -> None:
    """What `worker_disable_prefetch` does, for the app's own tasks alone; Celery counts runs as well."""
    if consumer.connection.transport.driver_type != "redis":
        return
    vars(channel.qos).pop("can_consume", None)  # Celery's, set a moment ago

    def has_room() -> bool:
        limit = getattr(consumer.controller, "max_concurrency", None) or pool.num_processes
        return len(state.reserved_requests) - pool.runs_in_hand() < int(limit)

    _limit(channel, has_room)


class DividedConsumer(Consumer):
    """Celery's consumer of all queues, of which `runs` reads those named `names` through its own channel."""

    def __init__(self, channel: Any, queues: Any, *, runs: Consumer, names: set[str], **options: Any) -> None:
        self.runs = runs
        self.names = names
        super().__init__(channel, queues, **options)  # type: ignore[no-untyped-call]  # as all of kombu

    @property
    def queues(self) -> list[Any]:
        """All of them: what `inspect active_queues` and Flower show."""
        own, of_runs = dict(self._queues or {}), dict(self.runs._queues or {})
        return [*own.values(), *of_runs.values()]

    @queues.setter
    def queues(self, queues: Any) -> None:
        self._queues = {queue.name: queue for queue in queues}

    def consume(self, no_ack: bool | None = None) -> None:
        self.runs.on_message = self.on_message
        super().consume(no_ack)  # type: ignore[no-untyped-call]
        self.runs.consume(no_ack)  # type: ignore[no-untyped-call]

    def cancel(self) -> None:
        super().cancel()  # type: ignore[no-untyped-call]
        self.runs.cancel()  # type: ignore[no-untyped-call]

    close = cancel

    def add_queue(self, queue: Any) -> Any:
        """Remote control adds one; those of runs stay together."""
        if queue.name in self.names:
            return self.runs.add_queue(queue)  # type: ignore[no-untyped-call]
        return super().add_queue(queue)  # type: ignore[no-untyped-call]

    def cancel_by_queue(self, queue: Any) -> None:
        name = getattr(queue, "name", queue)
        if name in self.names:
            self.runs.cancel_by_queue(name)  # type: ignore[no-untyped-call]
        else:
            super().cancel_by_queue(name)  # type: ignore[no-untyped-call]

    def consuming_from(self, queue: Any) -> bool:
        return bool(super().consuming_from(queue) or self.runs.consuming_from(queue))  # type: ignore[no-untyped-call]
