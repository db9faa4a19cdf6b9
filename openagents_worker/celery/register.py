"""Registration. The only place that puts us into a Celery app: ours, or one that exists.

What a worker needs besides is loaded when a worker of the app starts: a web process that imports the app in
order to submit runs loads a producer.
"""

from __future__ import annotations

from typing import Any, cast

from celery import Celery, signals

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
    """Put our tasks, our remote control and our part of a worker into a Celery app; its task `run_agent`.

    None of the app's settings is changed: what runs need is set at our tasks. Whoever submits needs the
    Redis settings of the environment (`OPENAGENTS_REDIS_URL`), a worker that consumes `queue` the others,
    too. A worker of the app that does not consume it starts nothing of ours. From then on
    `openagents_worker.run_agent` is this app's task. An app that is registered already stays as it is; raises
    `ConfigError` when it was registered with another queue, `ConfigValidationError` for a name that no queue
    may have.

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
            f"the app {described_app(app)} is registered with the queue {parts.settings.queue!r} already, "
            f"and now with {queue!r}",
            hint="call register(app, queue=...) once; agents may name other queues in the agents file",
        )
    return cast(AgentTask, app.tasks[RUN_AGENT])


def install(app: Celery, settings: Settings, kind: AppKind) -> None:
    """Add the tasks now, and the rest when a worker of the app starts."""
    processes = ProcessProvider(app, settings)
    attach_binding(app, AppBinding(kind, settings, processes=processes))
    add_tasks(app, processes)
    signals.celeryd_init.connect(_begin_log, dispatch_uid="openagents_worker")
    signals.worker_init.connect(_equip, dispatch_uid="openagents_worker")


def _equip(sender: Any = None, **_: Any) -> None:
    """Called in each worker process of any app, before it makes its steps."""
    parts = find_binding(sender.app) if sender is not None else None
    if parts is not None and parts.processes is not None:
        from openagents_worker.celery.bootsteps import install_bootsteps

        install_bootsteps(sender, parts.processes.host, is_ours=parts.kind is AppKind.WORKER)


def _begin_log(instance: Any = None, options: Any = None, **_: Any) -> None:
    """Called in each worker process of any app, before Celery writes its first lines."""
    parts = find_binding(instance.app) if instance is not None else None
    if parts is not None and parts.kind.has_tasks and parts.settings.log_format == "json":
        from openagents_worker.celery.logs import set_up_logging

        is_ours, logfile = parts.kind is AppKind.WORKER, (options or {}).get("logfile")
        set_up_logging(instance, parts.settings, None, is_ours=is_ours, logfile=logfile)
