"""Our Celery tasks: the only place that defines their names and settings.

Their handlers, and with them the model clients, tools and patterns, are imported at the first call: a process
that only submits runs may use this app too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery import Celery, Task, chain, maybe_signature, states
from celery.result import EagerResult
from celery.utils.functional import maybe_list

from openagents_worker.errors import OpenAgentsError, RunFailed
from openagents_worker.producer.app_binding import ProvidesProcess, find_binding
from openagents_worker.producer.client import client_of
from openagents_worker.producer.handle import WaitTimeout
from openagents_worker.producer.publisher import RESUME_RUN, RUN_AGENT
from openagents_worker.producer.task import AgentTask
from openagents_worker.producer.task_options import parse_task_options, stamps_of, task_options_json
from openagents_worker.store.scripts import Wake
from openagents_worker.submission.submit import submit

if TYPE_CHECKING:
    from openagents_worker.celery.process_provider import ProcessProvider

__all__ = ["OWN_TASKS", "PRUNE", "RECOVER_RUNS", "add_tasks"]

RECOVER_RUNS = "tasks.recover_runs"
PRUNE = "tasks.prune"
OWN_TASKS = (RUN_AGENT, RESUME_RUN, RECOVER_RUNS, PRUNE)

SETTINGS: Mapping[str, Any] = {
    "bind": True,
    "shared": False,  # else Celery adds them to every other app of this process
    "acks_late": False,  # with late acknowledgement a short loss of connection delivers a message twice
    "acks_on_failure_or_timeout": True,
    "acks_on_failure": True,
    "acks_on_timeout": True,
    "reject_on_worker_lost": False,
    "retry_on_worker_lost": False,  # the rescue loop detects dead workers
    "serializer": "json",
    "compression": None,
    "throws": (OpenAgentsError,),  # expected: one line in the log and no traceback
    "typing": False,  # we handle a message with wrong arguments, Celery does not reject it
    "rate_limit": 0,  # no limit; None would mean the app's default, here and below
    "time_limit": 0,
    "soft_time_limit": 0,
    "track_started": False,
    "store_errors_even_if_ignored": False,
    "waits_on_loop": True,  # see pool.ON_LOOP
    "Request": "openagents_worker.celery.request:RunMessage",
}
"""The Celery options that runs need, set per task because the app may have other defaults."""


class _OwnTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task that ignores the app's `task_annotations`."""

    abstract = True

    @classmethod
    def annotate(cls) -> None:
        """Do nothing; Celery's method sets attributes of the task from the app's settings."""


class RunTask(_OwnTask):
    """A task that executes a run; Celery's tracer calls `after_return` after it has reported an end."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Set the traceback that Celery's event and Flower show: the user's code only."""
        if isinstance(exc, RunFailed):
            einfo.traceback = exc.traceback or str(exc)

    def after_return(self, status: str, retval: Any, task_id: str, *_: Any) -> None:
        from openagents_worker.celery.task_handlers import completion_notified

        completion_notified(self, status)


class _WaitingResult(EagerResult):  # type: ignore[misc]  # Celery ships no types
    """The result of an eager run that waits. Celery's class would return None, and a chain would continue."""

    def get(self, *_: Any, **__: Any) -> Any:
        """Raises `WaitTimeout`: the run has no value yet, and no other process will end it."""
        raise WaitTimeout(
            f"the run {self.id!r} waits ({self.result}); tasks that follow it are not called eagerly"
        )


class RunAgent(RunTask, AgentTask):
    """`run_agent` in a process that executes runs; under `task_always_eager` it executes them here."""

    abstract = True

    @property
    def processes(self) -> ProvidesProcess:
        """The app's provider of worker processes in this process."""
        parts = find_binding(self.app)
        assert parts is not None
        assert parts.processes is not None, "an app with this task has a process provider"
        return parts.processes

    def apply(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        throw: bool | None = None,
        **options: Any,
    ) -> Any:
        """Submit a run and execute it here until its end or its first wait; returns an `EagerResult`."""
        request, how = self._submission(args or (), kwargs or {}, options)
        client, linked = client_of(self.app), how.pop("canvas")
        canvas = task_options_json(
            linked, max_bytes=client.settings.max_payload_bytes, key_prefix=client.settings.key_prefix
        )
        with self.processes.eager():
            accepted = submit(client.store, request, settings=client.settings, canvas=canvas, **how)
            self.execute_wakes(accepted.also)
            result = self.execute_here(accepted.run_id, linked)
        if result.state == states.RETRY:
            return _WaitingResult(result.id, result.result, result.state, name=self.name)
        if self.app.conf.task_eager_propagates if throw is None else throw:
            result.maybe_throw()
        return result

    def execute_wakes(self, wakes: Iterable[Wake]) -> int:
        """Execute the runs of these wake-ups here; returns the number of wake-ups."""
        wakes = list(wakes)
        if wakes:
            with self.processes.eager():
                for wake in wakes:
                    self.execute_here(wake.run_id, parse_task_options(wake.canvas))
        return len(wakes)

    def execute_here(self, run_id: str, linked: Mapping[str, Any]) -> Any:
        """Execute a run here as a worker does for its message. Call it inside `processes.eager()`."""
        return Task.apply(
            self,
            ({"run_id": run_id, "agent_id": "", "session_id": ""},),
            task_id=run_id,
            headers={"wake_us": "0"},  # marks a message of our producer
            throw=False,
            link=self._links(linked),
            link_error=linked.get("link_error"),
            **stamps_of(linked),
        )

    def _links(self, linked: Mapping[str, Any]) -> list[Any]:
        """The tasks that follow the run. An eager task gets links only, so the rest of a chain becomes
        one."""
        links = [*(maybe_list(linked.get("link")) or [])]
        rest = [maybe_signature(each, app=self.app) for each in reversed(linked.get("chain") or [])]
        return [*links, chain(*rest, app=self.app)] if rest else links


def add_tasks(app: Celery, processes: ProcessProvider) -> None:
    """Register `tasks.run_agent`, `.resume_run`, `.recover_runs` and `.prune`; change nothing else."""

    def run_agent(self: RunAgent, *args: Any, **kwargs: Any) -> dict[str, str]:
        from openagents_worker.celery import task_handlers as handlers

        request = self.request  # Celery finds it again at each access
        process = handlers.running_process(processes.process_for(self, request))
        run_id, format_ = handlers.accept_run(request, process, args, kwargs)
        return handlers.report(self, request, process, run_id, process.execute(run_id, format_))

    def resume_run(self: RunTask, *args: Any, **kwargs: Any) -> dict[str, str]:
        from openagents_worker.celery import task_handlers as handlers

        request = self.request
        process = handlers.running_process(processes.process_for(self, request))
        run_id, format_ = handlers.accepted_run(request, args, kwargs)
        return handlers.report(self, request, process, run_id, process.execute(run_id, format_))

    def recover_runs(self: Task) -> int:
        from openagents_worker.celery import task_handlers

        return task_handlers.recover_runs(processes.process_for(self, self.request))

    def prune(self: Task) -> int:
        from openagents_worker.celery import task_handlers

        return task_handlers.prune(processes.process_for(self, self.request))

    app.task(run_agent, name=RUN_AGENT, base=RunAgent, **SETTINGS)
    app.task(resume_run, name=RESUME_RUN, base=RunTask, **SETTINGS)
    app.task(recover_runs, name=RECOVER_RUNS, base=_OwnTask, **SETTINGS)
    app.task(prune, name=PRUNE, base=_OwnTask, **SETTINGS)
