"""Registration. The only place that puts us into a Celery app: ours, or one that exists.

What a worker needs besides is loaded when a worker of the app starts: a web process that imports the app in
order to submit runs loads a producer.
"""

from __future__ import annotations

from typing import Any, cast

from celery import Celery, signals

from openagents_worker.producer.task import AgentTask
from openagents_worker.producer.transport import RUN_AGENT
from openagents_worker.settings import Settings, load_settings
from openagents_worker.worker.crew import Crew
from openagents_worker.worker.tasks import add_tasks

__all__ = ["install", "register"]


def register(app: Celery, queue: str = "agents") -> AgentTask:
    """Put our tasks, our remote control and our part of a worker into a Celery app; its task `run_agent`.

    None of the app's settings is changed: what runs need is set at our tasks. Whoever submits needs the
    Redis settings of the environment (`OPENAGENTS_REDIS_URL`), a worker that consumes `queue` the others,
    too. A worker of the app that does not consume it starts nothing of ours.

    ```python
    app = Celery("shop")
    run_agent = register(app)  # celery -A shop worker -Q celery,agents
    ```
    """
    settings = load_settings().model_copy(update={"queue": queue})
    install(app, settings, is_ours=False)
    return cast(AgentTask, app.tasks[RUN_AGENT])


def install(app: Celery, settings: Settings, *, is_ours: bool) -> None:
    """Add the tasks now, and the rest when a worker of the app starts."""
    crew = Crew(app, settings)
    app.openagents_settings = settings
    add_tasks(app, crew)

    def equip(sender: Any = None, **_: Any) -> None:
        if sender is not None and sender.app is app:
            from openagents_worker.worker.step import tie

            tie(sender, crew.host, is_ours=is_ours)

    def begin_log(instance: Any = None, options: Any = None, **_: Any) -> None:
        """Celery writes its first lines before it says that a worker begins."""
        if instance is not None and instance.app is app and settings.log_format == "json":
            from openagents_worker.worker.logs import set_up_logging

            set_up_logging(instance, settings, None, is_ours=is_ours, logfile=(options or {}).get("logfile"))

    signals.celeryd_init.connect(begin_log, weak=False, dispatch_uid=f"openagents log of {id(app)}")
    signals.worker_init.connect(equip, weak=False, dispatch_uid=f"openagents of {id(app)}")
