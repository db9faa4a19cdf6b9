"""The Celery task, as producers see it. The only place that reads the options of a submission."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import Any, Self, cast

from celery import Task
from celery.backends.base import DisabledBackend
from celery.local import Proxy
from celery.utils.time import maybe_make_aware

from openagents_worker.arguments import TEN_YEARS_MS, iso_time, number_of, optional_text, refusing
from openagents_worker.errors import ConfigError, RequestInvalid, TwoArguments
from openagents_worker.models import RunRequest, output_class_of, parse_request
from openagents_worker.producer.client import client_of, front_door_app
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.publisher import RUN_AGENT
from openagents_worker.producer.results import no_results_for_a_chord
from openagents_worker.producer.task_options import KEPT, stamps_of

__all__ = ["AgentTask", "ProducerTask", "front_door_task", "not_called", "run_agent"]

HONOURED = ("countdown", "eta", "expires", "queue", "task_id", *KEPT)
# Celery beat and groups hand their connection over: ours, which has time-outs, does the same.
OF_CELERY = frozenset(["producer", "add_to_parent"])

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
        """Submit a run with Celery's options. One that would be ignored raises `RequestInvalid`.

        Under `task_always_eager` the run is carried here, to its end or its first wait.
        """
        if self.app.conf.task_always_eager:
            done = self.apply(args, kwargs, **options)
            asked = _only_argument(args or (), kwargs or {})
            return client_of(self.app).handle(done.id, output_type=output_class_of(asked))
        request, how = self._submission(args or (), kwargs or {}, options)
        handle = client_of(self.app).submit(request, **how)
        parent = self.app.current_worker_task
        if parent is not None and options.get("add_to_parent", True):
            parent.add_trail(handle)
        return handle

    async def adelay(self, request: Request, **options: Any) -> AsyncRunHandle[Any]:
        """As `delay`, for asyncio; options as in `apply_async`."""
        client = await client_of(self.app).on_this_loop()
        if self.app.conf.task_always_eager:
            result = await asyncio.to_thread(self.apply, (request,), **options)
            return client.handle(result.id, output_type=output_class_of(request))
        request, how = self._submission((request,), {}, options)
        return await client.submit(request, **how)

    def apply(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Carry a run in this process; only where the code is that does it."""
        raise _carries_nothing()

    def delay_on_commit(self, request: Request) -> RunHandle[Any]:
        """Submit a run once Django's transaction is committed, and never when it is rolled back.

        The handle knows its id at once; the run is known from the commit on. An invalid request raises here.
        """
        return self.apply_async_on_commit((request,))

    def apply_async_on_commit(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        """As `delay_on_commit`, with Celery's options; times count from the commit."""
        request, _ = self._submission(args or (), kwargs or {}, options)
        client = client_of(self.app)
        parsed = parse_request(request, max_bytes=client.settings.max_payload_bytes)
        _on_commit(lambda: self.apply_async((parsed,), **{**options, "task_id": parsed.run_id}))
        return client.handle(parsed.run_id, output_type=parsed.output_class)

    def AsyncResult(self, task_id: str, **_: Any) -> RunHandle[Any]:
        """The handle of a run."""
        return client_of(self.app).handle(task_id)

    def signature(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        """A signature of a run. With a run_id of its own it is that run, else each application a new one."""
        args = [_as_fields(value) for value in args or ()]
        kwargs = {name: _as_fields(value) for name, value in (kwargs or {}).items()}
        signature = super().signature(args, kwargs, *more, **options)
        request = next(iter([*args, *kwargs.values()]), None)
        run_id = request.get("run_id") if isinstance(request, Mapping) else None
        return signature.set(task_id=run_id) if run_id else signature

    def map(self, it: Any) -> Any:
        """Refused: a run is not executed by Celery's task that would call it."""
        raise _not_called("map")

    def starmap(self, it: Any) -> Any:
        """Refused, as `map` is."""
        raise _not_called("starmap")

    def chunks(self, it: Any, n: int) -> Any:
        """Refused, as `map` is."""
        raise _not_called("chunks")

    def _submission(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """What to submit, and how: the keyword arguments of `Client.submit`."""
        given = {name: options[name] for name in options.keys() - OF_CELERY if options[name] is not None}
        stamps = stamps_of(given)
        if ignored := sorted(given.keys() - set(HONOURED) - stamps.keys()):
            raise RequestInvalid(
                f"a run cannot be submitted with {', '.join(ignored)}: nothing would come of it",
                hint=f"options that work: {', '.join(HONOURED)}",
            )
        if "chord" in given and isinstance(self.app.backend, DisabledBackend):
            raise no_results_for_a_chord()
        request = _with_run_id(_only_argument(args, kwargs), given.get("task_id"))
        return request, {
            "queue": given.get("queue"),
            "delay_ms": self._delay_ms(given.get("countdown"), given.get("eta")),
            "expires_ms": self._expires_ms(given.get("expires")),
            "canvas": self._family() | {name: given[name] for name in KEPT if name in given} | stamps,
        }

    def _family(self) -> dict[str, Any]:
        """Whose child the run is: that of the task that submits it, as with Celery's own tasks."""
        parent = self.app.current_worker_task
        if parent is None:
            return {}
        return {"parent_id": parent.request.id, "root_id": parent.request.root_id or parent.request.id}

    def _delay_ms(self, countdown: float | None, eta: datetime | str | None) -> int:
        if countdown is not None and eta is not None:
            raise RequestInvalid("countdown and eta both say when the run is due", hint="give one of them")
        return self._ms_until("countdown or eta", eta if eta is not None else countdown or 0)

    def _expires_ms(self, expires: float | datetime | str | None) -> int:
        # A time that is over is a millisecond from now: the run is accepted, and cancelled.
        return 0 if expires is None else max(1, self._ms_until("expires", expires))

    def _ms_until(self, what: str, when: float | datetime | str) -> int:
        try:
            if isinstance(when, str):
                when = iso_time(when)
            if isinstance(when, datetime):
                when = (maybe_make_aware(when, self.app.timezone) - self.app.now()).total_seconds()
            if isinstance(when, bool) or not isinstance(when, int | float):
                raise TypeError(f"{type(when).__name__} is not a number of seconds")
            after_ms = max(0, math.ceil(float(when) * 1000))
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestInvalid(
                f"{what} is not a valid time: {error}",
                hint="a number of seconds from now, a datetime or its ISO 8601 text (countdown: seconds)",
            ) from None
        return number_of(f"{what} in milliseconds from now", after_ms, most=TEN_YEARS_MS)


class ProducerTask(AgentTask):
    """`run_agent` where no worker's code is: it submits, and never runs anything."""

    name = RUN_AGENT

    def __new__(cls) -> Self:
        """Celery notes a task's app in its class: each task has one of its own, as `@app.task` makes it."""
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__new__": object.__new__})
        return object.__new__(own)

    def run(self, request: Request) -> None:
        raise _carries_nothing()


def _not_called(name: str) -> RequestInvalid:
    return not_called(f"run_agent.{name}(...)")


def not_called(what: str) -> RequestInvalid:
    """The error of whoever lets Celery call runs as functions; `what` does so."""
    return RequestInvalid(
        f"{what} would call runs inside one Celery task, and a run is not a function to call",
        hint="group(run_agent.s(request) for request in requests) submits a run for each request",
    )


def _carries_nothing() -> ConfigError:
    return ConfigError(
        "this process submits runs, it does not carry them",
        hint="run_agent.delay(request) submits one; `celery -A tasks worker` starts a worker; under "
        "task_always_eager take run_agent from the worker's app",
    )


def _on_commit(call: Callable[[], object]) -> None:
    try:
        transaction = import_module("django.db.transaction")
    except ImportError as error:
        raise ConfigError(
            "there is no transaction to wait for: Django is not installed", hint="run_agent.delay(request)"
        ) from error
    transaction.on_commit(call)


def _as_fields(value: Any) -> Any:
    """A request as a signature holds it: JSON, and without an id that nobody has chosen."""
    if not isinstance(value, RunRequest):
        return value
    refusing(dict(value))
    return value.model_dump(mode="json", exclude_unset=True)


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
    if optional_text("task_id", task_id) is None or not isinstance(request, RunRequest | Mapping):
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


class _FrontDoorTask(ProducerTask):
    """The front door's task while no app is registered.

    A signature that was made of it may be applied after an app was: the run then goes out by that app.
    """

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        task = front_door_task()
        if task is self:
            return super().apply_async(args, kwargs, **options)
        return task.apply_async(args, kwargs, **options)

    def apply(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        task = front_door_task()
        return super().apply(args, kwargs, **options) if task is self else task.apply(args, kwargs, **options)


def front_door_task() -> AgentTask:
    """The task that the front door's `run_agent` stands for now.

    It is that of the app which is registered in this process; where none is, a producer's own, with the
    settings of the environment. Raises `ConfigError` when two apps are registered.
    """
    app = front_door_app()
    if RUN_AGENT not in app.tasks:
        app.register_task(_FrontDoorTask())
    return cast(AgentTask, app.tasks[RUN_AGENT])


class _FrontDoor(Proxy):  # type: ignore[misc]  # Celery ships no types
    """Stands for `front_door_task()`. Whoever only looks what kind of object it is gets an answer, as test
    runners and `inspect` do: no app is looked for, and none is made."""

    def _get_class(self) -> type:
        return ProducerTask

    def __repr__(self) -> str:
        return f"<{RUN_AGENT} of the registered app, else of the environment's settings>"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except ConfigError as error:
            if name.startswith("__"):
                raise AttributeError(name) from error
            raise


run_agent: AgentTask = cast(AgentTask, _FrontDoor(front_door_task, name=RUN_AGENT))
"""`tasks.run_agent` of the registered app (`register(app)`), else of the environment's settings.

Which one is decided with each use, so that it may be imported before the app is registered.
"""
