"""The step. The only place that ties a worker process to the life of a Celery worker."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery, bootsteps, signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.transport import wake_queue
from openagents_worker.settings import unknown_variables
from openagents_worker.telemetry import configure_logging, get_logger
from openagents_worker.worker.pool import TaskPool
from openagents_worker.worker.process import Host

__all__ = ["EX_CONFIG", "tie"]

log = get_logger(__name__)

EX_CONFIG = 2
POLL_S = 0.2  # how soon a worker that waits for Redis notices that it is told to stop


def tie(app: Celery, host: Host) -> None:
    """Start the host's process before a worker of this app consumes, and end it when the worker does."""
    app.steps["worker"].add(_step_of(host))

    def set_up_log(sender: Any = None, **_: Any) -> None:
        # Before Celery sets up its own: our lines have fields, and a format of their own.
        if sender is not None and sender.app is app:
            configure_logging(host.settings)

    def start_child(**_: Any) -> None:
        host.process()  # does not wait for Redis: Celery kills a child that takes long to start

    def stop_child(**_: Any) -> None:
        host.close()

    def only_prefork(sender: Any = None, **_: Any) -> None:
        if sender is not None and sender.app is app and _forks(sender):
            signals.worker_process_init.connect(start_child, weak=False)
            signals.worker_process_shutdown.connect(stop_child, weak=False)

    signals.worker_init.connect(set_up_log, weak=False)
    signals.worker_init.connect(only_prefork, weak=False)


def _forks(worker: Any) -> bool:
    pool = worker.pool_cls
    return pool == "prefork" if isinstance(pool, str) else issubclass(pool, PreforkPool)


def _step_of(host: Host) -> type[bootsteps.StartStopStep]:
    class Runs(bootsteps.StartStopStep):  # type: ignore[misc]
        """Started after the pool and before the first message; stopped before the pool waits for tasks."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, parent: Any, **_: Any) -> None:
            """What is wrong with the configuration ends the start here, before anything is consumed."""
            host.node = parent.hostname
            host.queues = _with_wakes(parent.app)
            try:
                host.check()
            except OpenAgentsError as error:
                print(f"error: {error.code}: {error}", file=sys.stderr)
                raise SystemExit(EX_CONFIG) from None

        def start(self, parent: Any) -> None:
            for name, meant in unknown_variables(os.environ):
                log.warning("settings.unknown", variable=name, did_you_mean=meant)
            if _forks(parent):
                return
            host.bridge = parent.pool.bridge if isinstance(parent.pool, TaskPool) else None
            process = host.process()
            while process is not None and not process.heartbeat.wait_registered(POLL_S):
                state.maybe_shutdown()

        def info(self, parent: Any) -> dict[str, Any]:
            """What `celery inspect stats` and Flower show of us."""
            return {"openagents": host.stats()}

        def stop(self, parent: Any) -> None:
            host.close()

        terminate = stop

    return Runs


def _with_wakes(app: Celery) -> tuple[str, ...]:
    """The queues of runs that this worker consumes; whoever consumes one consumes its wake-ups, too."""
    queues = app.amqp.queues
    names = tuple(name for name in queues.consume_from if name != wake_queue(name.removesuffix(".wake")))
    for name in names:
        queues.select_add(wake_queue(name))
    return names
