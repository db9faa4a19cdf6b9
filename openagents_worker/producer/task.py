"""The Celery task, as producers see it. The only place that reads the options of a submission."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from celery import Task
from celery.local import PromiseProxy
from celery.utils.time import maybe_make_aware

from openagents_worker.errors import ConfigError, RequestInvalid, TwoArguments
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import client_of, default_client
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.transport import RUN_AGENT

__all__ = ["AgentTask", "ProducerTask", "run_agent"]

HONOURED = ("countdown", "eta", "headers", "priority", "queue", "task_id")
OF_BEAT = "producer"  # Celery beat hands its own connection over; ours, which has time-outs, does the same

Request = RunRequest | Mapping[str, Any]


class AgentTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task whose one argument is a run's request; submitting it writes the run before any message is sent.

    The worker's task and the producer's share it, so `delay` means the same wherever it is called.
    """

    abstract = True

    def delay(self, request: Request, *others: Any) -> RunHandle[Any]:
        """Submit a run: its request as a `RunRequest` or a dict of its fields. Raises as `Client.submit`."""
        return self.apply_async((request, *others))

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        """Submit a run with Celery's options. One that would be ignored raises `RequestInvalid`."""
        request, how = self._submission(args or (), kwargs or {}, options)
        return client_of(self.app).submit(request, **how)

    async def adelay(self, request: Request, **options: Any) -> AsyncRunHandle[Any]:
        """As `delay`, for asyncio; options as in `apply_async`."""
        request, how = self._submission((request,), {}, options)
        client = await client_of(self.app).on_this_loop()
        return await client.submit(request, **how)

    def AsyncResult(self, task_id: str, **_: Any) -> RunHandle[Any]:
        """The handle of a run."""
        return client_of(self.app).handle(task_id)

    def _submission(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """What to submit, and how: the keyword arguments of `Client.submit`."""
        given = {name: value for name, value in options.items() if value is not None and name != OF_BEAT}
        if ignored := sorted(given.keys() - set(HONOURED)):
            raise RequestInvalid(
                f"a run cannot be submitted with {', '.join(ignored)}: nothing would come of it",
                hint=f"options that work: {', '.join(HONOURED)}",
            )
        request = _with_run_id(_only_argument(args, kwargs), given.get("task_id"))
        how = {name: given.get(name) for name in ("queue", "priority", "headers")}
        return request, how | {"delay_ms": self._delay_ms(given.get("countdown"), given.get("eta"))}

    def _delay_ms(self, countdown: float | None, eta: datetime | str | None) -> int:
        if countdown is not None and eta is not None:
            raise RequestInvalid("countdown and eta both say when the run is due", hint="give one of them")
        try:
            if eta is not None:
                when = datetime.fromisoformat(eta) if isinstance(eta, str) else eta
                countdown = (maybe_make_aware(when, self.app.timezone) - self.app.now()).total_seconds()
            return max(0, math.ceil(float(countdown or 0) * 1000))
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestInvalid(
                f"countdown or eta is no time: {error}",
                hint="countdown is a number of seconds, eta a datetime or its ISO 8601 text",
            ) from None


class ProducerTask(AgentTask):
    """`run_agent` where no worker's code is: it submits, and never runs anything."""

    name = RUN_AGENT

    def run(self, request: Request) -> None:
        raise ConfigError(
            "this process submits runs, it does not carry them",
            hint="run_agent.delay(request) submits one; `celery -A tasks worker` starts a worker",
        )


def _only_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    values = [*args, *kwargs.values()]
    if len(values) > 1:
        raise TwoArguments(
            f"a run has one argument, its request; {len(values)} were given",
            hint="behind another task in a chain, use .si(request) instead of .s(request)",
        )
    if not values or (kwargs and "request" not in kwargs):
        raise RequestInvalid(
            "a run needs its request",
            hint="run_agent.delay(RunRequest(agent_id=..., session_id=..., input_text=...))",
        )
    return cast(Request, values[0])


def _with_run_id(request: Request, task_id: str | None) -> Request:
    """The request under the Celery task's id: they are one. A run_id that was given must agree."""
    if task_id is None or not isinstance(request, RunRequest | Mapping):
        return request
    given = request.model_fields_set if isinstance(request, RunRequest) else request.keys()
    run_id = request.run_id if isinstance(request, RunRequest) else request.get("run_id")
    if "run_id" in given and run_id != task_id:
        raise RequestInvalid(
            f"the task_id {task_id!r} and the run_id {run_id!r} do not agree",
            hint="they are one id: give one of them, or both alike",
        )
    fields = dict(request) if isinstance(request, RunRequest) else request
    return {**fields, "run_id": task_id}


def _make_run_agent() -> AgentTask:
    app = default_client().app
    return cast(
        AgentTask, app.tasks[RUN_AGENT] if RUN_AGENT in app.tasks else app.register_task(ProducerTask())
    )


run_agent: AgentTask = cast(AgentTask, PromiseProxy(_make_run_agent, name=RUN_AGENT))
"""`tasks.run_agent`, to be submitted to wherever the environment's settings say."""
