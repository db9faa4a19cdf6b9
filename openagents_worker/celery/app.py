"""The worker's Celery app. The only place for the settings that a worker of ours needs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from celery import Celery
from celery.utils.nodenames import default_nodename, host_format
from kombu.entity import Queue

from openagents_worker.celery.register import install
from openagents_worker.producer.app_binding import AppKind
from openagents_worker.producer.kombu_redis import use_in_workers_of
from openagents_worker.producer.publisher import make_app, wake_queue
from openagents_worker.settings import Settings

__all__ = ["make_worker_app", "queues_of", "run_flower", "run_worker"]


def make_worker_app(settings: Settings) -> Celery:
    """The app that `celery -A … worker` runs. Making it opens no connection and reads no agents file.

    Every worker of a queue also consumes its wake-ups: `-Q other` alone would leave them lying.
    """
    app = make_app(settings)
    app.conf.update(
        task_queues=queues_of([settings.queue]),
        worker_pool="openagents_worker.celery.pool:TaskPool",
        worker_concurrency=settings.concurrency,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # what is prefetched by a worker that dies waits in no queue
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # runs do not need the broker
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    use_in_workers_of(app)
    install(app, settings, AppKind.WORKER)
    return app


def queues_of(names: Sequence[str]) -> list[Queue]:
    """The queues of runs, each with the one of its wake-ups."""
    return [
        Queue(name)  # type: ignore[no-untyped-call]
        for queue in names
        for name in (queue, wake_queue(queue))
    ]


def run_worker(
    settings: Settings, *, name: str, concurrency: int | None = None, queues: Sequence[str] = ()
) -> None:
    """Run a worker in this process until it is told to stop. Raises SystemExit with its exit code."""
    app = make_worker_app(settings)
    app.conf.task_queues = queues_of(queues or [settings.queue])
    # Not by Celery's command line: it loads what each installed plugin adds to it, Flower and a shell too.
    # Workers need not know of each other: Redis tells them all they have to. It saves a second at start, too.
    worker = app.Worker(
        hostname=host_format(default_nodename(f"{name}@%h")),
        loglevel=settings.log_level or "INFO",
        concurrency=concurrency,
        without_mingle=True,
        without_gossip=True,
    )
    worker.start()
    raise SystemExit(worker.exitcode)


def run_flower(settings: Settings, *, port: int) -> None:
    """Run Flower in this process, on this machine's loopback only."""
    conf = files("openagents_worker.dashboard") / "local_flower.py"  # named, not imported: Flower reads it
    arguments = ["flower", "--address=127.0.0.1", f"--port={port}", f"--conf={conf}"]
    make_worker_app(settings).start(arguments)
