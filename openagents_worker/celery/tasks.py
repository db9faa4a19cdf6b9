"""Our tasks. The only place that gives Celery something to execute: names and settings.

Their bodies, and with them the models' clients, tools and patterns, are loaded when the first one is called:
a process that only submits runs may have this app, too.
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
from openagents_worker.producer.submit import submit
from openagents_worker.producer.task import AgentTask
from openagents_worker.producer.task_options import parse_task_options, stamps_of, task_options_json
from openagents_worker.store.scripts import Wake

if TYPE_CHECKING:
    from openagents_worker.celery.process_provider import ProcessProvider

__all__ = ["OWN_TASKS", "PRUNE", "RECOVER_RUNS", "add_tasks"]

RECOVER_RUNS = "tasks.recover_runs"
PRUNE = "tasks.prune"
OWN_TASKS = (RUN_AGENT, RESUME_RUN, RECOVER_RUNS, PRUNE)

SETTINGS: Mapping[str, Any] = {
    "bind": True,
    "shared": False,  # or Celery gives them to every other app of this process, too
    "acks_late": False,  # with late acknowledgement a connection blip starts a message a second time
    "acks_on_failure_or_timeout": True,
    "acks_on_failure": True,
    "acks_on_timeout": True,
    "reject_on_worker_lost": False,
    "retry_on_worker_lost": False,  # whose worker died, the rescue loop sees
    "serializer": "json",
    "compression": None,
    "throws": (OpenAgentsError,),  # expected: one line in the log and no traceback
    "typing": False,  # a message with wrong arguments is answered, not refused by Celery
    "rate_limit": 0,  # none; None would mean the app's default, here and below
    "time_limit": 0,
    "soft_time_limit": 0,
    "track_started": False,
    "store_errors_even_if_ignored": False,
    "waits_on_loop": True,  # see pool.ON_LOOP
    "Request": "openagents_worker.celery.request:RunMessage",
}
"""All that a run needs of Celery, per task: the app may have other habits."""


class _OwnTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task that is what it is here, whatever the app's `task_annotations` say of all tasks."""

    abstract = True

    @classmethod
    def annotate(cls) -> None:
        """Celery would set attributes of the task from the app's settings here."""


class RunTask(_OwnTask):
    """A task that carries a run; the tracer calls `after_return` once it has told of an end."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """What Celery's event and Flower show as the traceback: that of the user's code, and none of ours."""
        if isinstance(exc, RunFailed):
            einfo.traceback = exc.traceback or str(exc)

    def after_return(self, status: str, retval: Any, task_id: str, *_: Any) -> None:
        from openagents_worker.celery.task_handlers import completion_notified

        completion_notified(self, status)


class _Waiting(EagerResult):  # type: ignore[misc]  # Celery ships no types
    """An eager run that only waits. Celery's would give None, and a chain would go on with that."""

    def get(self, *_: Any, **__: Any) -> Any:
        """Raises `WaitTimeout`: there is no value, and nobody here to wait for."""
        raise WaitTimeout(f"the run {self.id!r} waits ({self.result}); nothing behind it is called eagerly")


class RunAgent(RunTask, AgentTask):
    """`run_agent` where runs are carried: under `task_always_eager` it carries them in this very process."""

    abstract = True

    @property
    def processes(self) -> ProvidesProcess:
        """What carries runs in this process; it belongs to the app."""
        parts = find_binding(self.app)
        assert parts is not None
        assert parts.processes is not None, "the app that has this task has what carries its runs"
        return parts.processes

    def apply(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        throw: bool | None = None,
        **options: Any,
    ) -> Any:
        """Submit a run and carry it here, to its end or its first wait: Celery's `EagerResult`."""
        request, how = self._submission(args or (), kwargs or {}, options)
        client, linked = client_of(self.app), how.pop("canvas")
        canvas = task_options_json(
            linked, max_bytes=client.settings.max_payload_bytes, key_prefix=client.settings.key_prefix
        )
        with self.processes.eager():
            accepted = submit(client.store, request, settings=client.settings, canvas=canvas, **how)
            self.execute_wakes([accepted.also] if accepted.also is not None else [])
            result = self.execute_here(accepted.run_id, linked)
        if result.state == states.RETRY:
            return _Waiting(result.id, result.result, result.state, name=self.name)
        if self.app.conf.task_eager_propagates if throw is None else throw:
            result.maybe_throw()
        return result

    def execute_wakes(self, wakes: Iterable[Wake]) -> int:
        """Do at once what these wake-ups ask a worker to do; says how many there were."""
        wakes = list(wakes)
        if wakes:
            with self.processes.eager():
                for wake in wakes:
                    self.execute_here(wake.run_id, parse_task_options(wake.canvas))
        return len(wakes)

    def execute_here(self, run_id: str, linked: Mapping[str, Any]) -> Any:
        """Do here what a worker does with a message of the run. Call it inside of `processes.eager()`."""
        return Task.apply(
            self,
            ({"run_id": run_id, "agent_id": "", "session_id": ""},),
            task_id=run_id,
            headers={"wake_us": "0"},  # the mark of a message of ours
            throw=False,
            link=self._links(linked),
            link_error=linked.get("link_error"),
            **stamps_of(linked),
        )

    def _links(self, linked: Mapping[str, Any]) -> list[Any]:
        """What follows the run: an eager task is told of its links alone, so a chain's rest becomes one."""
        links = [*(maybe_list(linked.get("link")) or [])]
        rest = [maybe_signature(each, app=self.app) for each in reversed(linked.get("chain") or [])]
        return [*links, chain(*rest, app=self.app)] if rest else links


def add_tasks(app: Celery, processes: ProcessProvider) -> None:
    """Register `tasks.run_agent`, `.resume_run`, `.recover_runs`, `.prune`; touch nothing else of the app."""

    def run_agent(self: RunAgent, *args: Any, **kwargs: Any) -> dict[str, str]:
        from openagents_worker.celery import task_handlers as bodies

        return bodies.run_agent(self, processes.at_work(self), args, kwargs)

    def resume_run(self: RunTask, *args: Any, **kwargs: Any) -> dict[str, str]:
        from openagents_worker.celery import task_handlers as bodies

        return bodies.resume_run(self, processes.at_work(self), args, kwargs)

    def recover_runs(self: Task) -> int:
        from openagents_worker.celery import task_handlers as bodies

        return bodies.recover_runs(processes.at_work(self))

    def prune(self: Task) -> int:
        from openagents_worker.celery import task_handlers as bodies

        return bodies.prune(processes.at_work(self))

    app.task(run_agent, name=RUN_AGENT, base=RunAgent, **SETTINGS)
    app.task(resume_run, name=RESUME_RUN, base=RunTask, **SETTINGS)
    app.task(recover_runs, name=RECOVER_RUNS, base=_OwnTask, **SETTINGS)
    app.task(prune, name=PRUNE, base=_OwnTask, **SETTINGS)
