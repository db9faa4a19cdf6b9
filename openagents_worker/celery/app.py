"""The worker's Celery app: the only place with the Celery settings of our own workers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from celery import Celery
from celery.utils.nodenames import default_nodename, host_format
from kombu.entity import Exchange, Queue

from openagents_worker.celery.flower_pages import load_flower_with_pages
from openagents_worker.celery.kombu_redis import use_in_workers_of
from openagents_worker.celery.register import install
from openagents_worker.producer.app_binding import AppKind
from openagents_worker.producer.publisher import make_app, wake_queue
from openagents_worker.settings import Settings

__all__ = ["make_worker_app", "queues_of", "run_flower", "run_worker"]


def make_worker_app(settings: Settings) -> Celery:
    """Create the app that `celery -A … worker` runs. This opens no connection and reads no agents file.

    Every worker of a queue also consumes the queue of its wake-ups, also with `-Q other`.
    """
    app = make_app(settings)
    app.conf.update(
        task_queues=queues_of([settings.queue]),
        worker_pool="openagents_worker.celery.pool:TaskPool",
        worker_concurrency=settings.concurrency,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # messages that a dead worker has prefetched are in no queue
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # runs continue without the broker
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    use_in_workers_of(app)
    install(app, settings, AppKind.WORKER)
    return app


def queues_of(names: Sequence[str]) -> list[Queue]:
    """The queues of runs, each with the queue of its wake-ups, declared as producers declare them."""
    return [
        Queue(name, Exchange(name), name)  # type: ignore[no-untyped-call]
        for queue in names
        for name in (queue, wake_queue(queue))
    ]


def run_worker(
    settings: Settings, *, name: str, concurrency: int | None = None, queues: Sequence[str] = ()
) -> None:
    """Run a worker in this process until a stop signal. Raises SystemExit with its exit code."""
    from openagents_worker.worker.interpreter import loading_for_life

    app = make_worker_app(settings)
    app.conf.task_queues = queues_of(queues or [settings.queue])
    # Not through Celery's command line, which imports every installed plugin, such as Flower and a shell.
    # Without mingle and gossip: workers share all state through Redis. It also saves a second at the start.
    with loading_for_life():
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
    """Run Flower in this process, on the loopback interface only."""
    conf = (
        files("openagents_worker.dashboard") / "local_flower.py"
    )  # a path, not an import: Flower executes it
    arguments = ["flower", "--address=127.0.0.1", f"--port={port}", f"--conf={conf}"]
    load_flower_with_pages()
    make_worker_app(settings).start(arguments)
