"""Run queues: the only place that separates the queues of runs from other queues in a registered app's
worker.

Celery reads all queues of a worker through one channel with one limit: `worker_concurrency` times the
prefetch multiplier. Our pool has a separate limit for runs. With one channel, waiting tasks of the app would
use up the prefetch limit, and no run would be received. With `worker_disable_prefetch`, runs that wait for
their models would block the app's tasks. So the queues of runs get their own channel and limit.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.messaging import Consumer

from openagents_worker.celery.free_slots import delay_completion_messages
from openagents_worker.celery.pool.task_pool import TaskPool
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.celery.registration_gate import limit_message_size
from openagents_worker.producer.publisher import WakesFirst, wake_queue

__all__ = ["run_queues_step"]

MAX_PREFETCH = 8  # messages that are received and not started; a run is acknowledged when it starts


def run_queues_step(holder: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A consumer bootstep for a pool that has a separate limit for runs."""

    class RunQueuesStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, parent: Any) -> None:
            """Called for each new connection, after Celery has created its consumer."""
            pool = parent.pool
            if isinstance(pool, TaskPool) and pool.has_run_limit and holder.queues:
                names = {name for queue in holder.queues for name in (queue, wake_queue(queue))}
                parent.task_consumer = _split_consumer(parent, pool, names, holder)

    return RunQueuesStep


def _split_consumer(consumer: Any, pool: TaskPool, names: set[str], holder: ProcessHolder) -> SplitConsumer:
    """Replace Celery's consumer by one that reads the queues of runs through a new channel."""
    celery_consumer = consumer.task_consumer
    channel = consumer.connection.channel()
    channel.basic_qos(0, min(MAX_PREFETCH, pool.run_limit), consumer.qos_global)
    _limit(channel, lambda: holder.is_registered() and pool.unfinished_runs() < pool.run_limit)
    limit_message_size(holder, channel)
    delay_completion_messages(
        channel, pool, consumer.app, free_slots=lambda: pool.run_limit - pool.unfinished_runs()
    )
    if hasattr(channel, "_queue_cycle"):  # Redis: wake-ups of started runs are read before new runs
        channel._queue_cycle = WakesFirst()  # type: ignore[no-untyped-call]  # as all of kombu
    if consumer.app.conf.worker_disable_prefetch:
        _limit_app_tasks(celery_consumer.channel, consumer, pool)
    options = {"accept": celery_consumer.accept, "on_decode_error": celery_consumer.on_decode_error}
    run_queues = [queue for queue in celery_consumer.queues if queue.name in names]
    runs = Consumer(channel, run_queues, **options)  # type: ignore[no-untyped-call]  # as all of kombu
    others = [queue for queue in celery_consumer.queues if queue.name not in names]
    return SplitConsumer(celery_consumer.channel, others, runs=runs, names=names, **options)


def _limit(channel: Any, has_free_slot: Any) -> None:
    """Request messages only while a slot is free. An AMQP broker applies the prefetch limit itself."""
    qos = getattr(channel, "qos", None)
    if qos is not None and hasattr(qos, "can_consume"):
        can_consume = qos.can_consume
        qos.can_consume = MethodType(lambda _: has_free_slot() and can_consume(), qos)


def _limit_app_tasks(channel: Any, consumer: Any, pool: TaskPool) -> None:
    """Apply `worker_disable_prefetch` to the app's own tasks only; Celery would count runs too."""
    if consumer.connection.transport.driver_type != "redis":
        return
    vars(channel.qos).pop("can_consume", None)  # set by Celery just before

    def has_free_slot() -> bool:
        limit = getattr(consumer.controller, "max_concurrency", None) or pool.num_processes
        return len(state.reserved_requests) - pool.unfinished_runs() < int(limit)

    _limit(channel, has_free_slot)


class SplitConsumer(Consumer):
    """Celery's consumer of all queues; `runs` reads the queues in `names` through its own channel."""

    def __init__(self, channel: Any, queues: Any, *, runs: Consumer, names: set[str], **options: Any) -> None:
        self.runs = runs
        self.names = names
        super().__init__(channel, queues, **options)  # type: ignore[no-untyped-call]  # as all of kombu

    @property
    def queues(self) -> list[Any]:
        """All queues, as `inspect active_queues` and Flower show them."""
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
        """Called by remote control; a queue of runs is added to `runs`."""
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
