"""Registration: the only place that adds the tasks of this library to a Celery app, its own or another one.

The parts of a worker are imported when a worker of the app starts. A web process that imports the app to
submit runs imports only the producer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

from celery import Celery, signals

from openagents_worker.celery.flower_pages import show_pages_in_flower
from openagents_worker.celery.process_provider import ProcessProvider
from openagents_worker.celery.tasks import add_tasks
from openagents_worker.errors import ConfigError, ConfigValidationError
from openagents_worker.producer.app_binding import (
    AppBinding,
    AppKind,
    attach_binding,
    described_app,
    find_binding,
    real_app,
)
from openagents_worker.producer.publisher import RUN_AGENT
from openagents_worker.producer.task import AgentTask
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.settings import Settings, load_settings

__all__ = ["install", "register"]


def register(app: Celery, queue: str = "agents") -> AgentTask:
    """Add runs to a Celery app: tasks, remote control commands and bootsteps. Returns its task `run_agent`.

    No setting of the app is changed: the added tasks have their own settings. A process that submits runs
    needs the Redis settings of the environment (`OPENAGENTS_REDIS_URL`); a worker that consumes `queue` also
    needs the others. A worker of the app that does not consume `queue` starts no part of this library. From
    then on `openagents_worker.run_agent` is the task of this app. A second call with the same queue changes
    nothing. Raises `ConfigError` for a second call with another queue, and `ConfigValidationError` for an
    invalid queue name.

    ```python
    app = Celery("shop")
    run_agent = register(app)  # celery -A shop worker -Q celery,agents
    ```
    """
    app = real_app(app)
    parts = find_binding(app)
    settings = load_settings()
    if problem := problem_with_queue(queue, settings.key_prefix):
        raise ConfigValidationError(problem, hint="register(app, queue='reports')")
    if parts is None or not parts.kind.has_tasks:
        install(app, settings.model_copy(update={"queue": queue}), AppKind.REGISTERED)
    elif parts.settings.queue != queue:
        raise ConfigError(
            f"the app {described_app(app)} is already registered with the queue {parts.settings.queue!r}; "
            f"it cannot be registered with {queue!r} too",
            hint="call register(app, queue=...) once; agents may name other queues in the agents file",
        )
    return cast(AgentTask, app.tasks[RUN_AGENT])


def install(app: Celery, settings: Settings, kind: AppKind) -> None:
    """Add the tasks now, and the bootsteps when a worker of the app starts."""
    processes = ProcessProvider(app, settings)
    attach_binding(app, AppBinding(kind, settings, processes=processes))
    add_tasks(app, processes)
    show_pages_in_flower()
    signals.celeryd_init.connect(_on_celeryd_init, dispatch_uid="openagents_worker")
    signals.worker_init.connect(_on_worker_init, dispatch_uid="openagents_worker")


def _on_worker_init(sender: Any = None, **_: Any) -> None:
    """Called in each worker process of any app, before Celery creates its bootsteps."""
    parts = find_binding(sender.app) if sender is not None else None
    if parts is not None and parts.processes is not None:
        from openagents_worker.worker.interpreter import loading_for_life

        is_ours = parts.kind is AppKind.WORKER
        # A worker of another app may execute no runs: its garbage collector is not ours to change.
        with loading_for_life() if is_ours else nullcontext():
            from openagents_worker.celery.bootsteps import install_bootsteps

            install_bootsteps(sender, parts.processes.holder, is_ours=is_ours)


def _on_celeryd_init(instance: Any = None, options: Any = None, **_: Any) -> None:
    """Called in each worker process of any app, before Celery writes its first log lines."""
    parts = find_binding(instance.app) if instance is not None else None
    if parts is None or not parts.kind.has_tasks:
        return
    is_ours = parts.kind is AppKind.WORKER
    if is_ours:
        from openagents_worker.celery.superuser import silence_celery

        silence_celery()
    if parts.settings.log_format == "json":
        from openagents_worker.celery.logs import set_up_logging

        logfile = (options or {}).get("logfile")
        set_up_logging(instance, parts.settings, None, is_ours=is_ours, logfile=logfile)
