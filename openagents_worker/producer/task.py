"""The Celery task. The only place that reads the options of `delay` and `apply_async`."""

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

from openagents_worker.arguments import TEN_YEARS_MS, iso_time, number_of, optional_text, reject_unstorable
from openagents_worker.errors import ConfigError, RequestInvalid, TwoArguments
from openagents_worker.models import RunRequest, output_class_of, parse_request
from openagents_worker.producer.client import AsyncClient, client_of
from openagents_worker.producer.connection import connection_of, default_app
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.publisher import RUN_AGENT
from openagents_worker.producer.results import no_results_for_a_chord
from openagents_worker.producer.task_options import STORED_OPTIONS, stamps_of

__all__ = ["AgentTask", "ProducerTask", "default_task", "not_called", "run_agent"]

SUPPORTED_OPTIONS = ("countdown", "eta", "expires", "queue", "task_id", *STORED_OPTIONS)
# Celery beat and groups pass these internally. They are ignored: our own producer has timeouts.
CELERY_INTERNAL_OPTIONS = frozenset(["producer", "add_to_parent"])

Request = RunRequest | Mapping[str, Any]


class AgentTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task whose only argument is the request of a run. A submission stores the run before it sends a
    message.

    It is the base class of the tasks of producers and of workers, so `delay` is the same everywhere.
    """

    abstract = True

    def delay(self, request: Request, *others: Any) -> RunHandle[Any]:
        """Submit a run. The request is a `RunRequest` or a dict of its fields. Raises as `Client.submit`
        does."""
        return self.apply_async((request, *others))

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        """Submit a run with Celery's options. An unsupported option raises `RequestInvalid`.

        With `task_always_eager` the run is executed in this process, until it ends or has to wait.
        """
        if self.app.conf.task_always_eager:
            result = self.apply(args, kwargs, **options)
            eager_request = _only_argument(args or (), kwargs or {})
            return client_of(self.app).handle(result.id, output_type=output_class_of(eager_request))
        request, submit_options = self._submission(args or (), kwargs or {}, options)
        handle = client_of(self.app).submit(request, **submit_options)
        parent = self.app.current_worker_task
        if parent is not None and options.get("add_to_parent", True):
            parent.add_trail(handle)
        return handle

    async def adelay(self, request: Request, **options: Any) -> AsyncRunHandle[Any]:
        """The same as `delay`, for asyncio, with the options of `apply_async`."""
        client = AsyncClient.over(connection_of(self.app).for_asyncio)
        if self.app.conf.task_always_eager:
            result = await asyncio.to_thread(self.apply, (request,), **options)
            return client.handle(result.id, output_type=output_class_of(request))
        request, submit_options = self._submission((request,), {}, options)
        return await client.submit(request, **submit_options)

    def apply(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Execute a run in this process. Only the task of a worker's app can do it."""
        raise _cannot_execute()

    def delay_on_commit(self, request: Request) -> RunHandle[Any]:
        """Submit a run when Django's transaction is committed. If it is rolled back, nothing is submitted.

        The handle has its id at once, but the run exists only after the commit. An invalid request raises
        here.
        """
        return self.apply_async_on_commit((request,))

    def apply_async_on_commit(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        """The same as `delay_on_commit`, with Celery's options. Delays count from the commit."""
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
        """A signature of a run. With a `run_id` it is always this run, else each call submits a new run."""
        args = [_as_fields(value) for value in args or ()]
        kwargs = {name: _as_fields(value) for name, value in (kwargs or {}).items()}
        signature = super().signature(args, kwargs, *more, **options)
        request = next(iter([*args, *kwargs.values()]), None)
        run_id = request.get("run_id") if isinstance(request, Mapping) else None
        return signature.set(task_id=run_id) if run_id else signature

    def map(self, it: Any) -> Any:
        """Not supported: Celery would call the runs inside one task. Raises `RequestInvalid`."""
        raise _not_called("map")

    def starmap(self, it: Any) -> Any:
        """Not supported, as `map`. Raises `RequestInvalid`."""
        raise _not_called("starmap")

    def chunks(self, it: Any, n: int) -> Any:
        """Not supported, as `map`. Raises `RequestInvalid`."""
        raise _not_called("chunks")

    def _submission(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """The request, and the keyword arguments of `Client.submit`."""
        set_options = {
            name: options[name]
            for name in options.keys() - CELERY_INTERNAL_OPTIONS
            if options[name] is not None
        }
        stamps = stamps_of(set_options)
        if ignored := sorted(set_options.keys() - set(SUPPORTED_OPTIONS) - stamps.keys()):
            raise RequestInvalid(
                f"a run does not support the option {', '.join(ignored)}",
                hint=f"supported options: {', '.join(SUPPORTED_OPTIONS)}",
            )
        if "chord" in set_options and isinstance(self.app.backend, DisabledBackend):
            raise no_results_for_a_chord()
        request = _with_run_id(_only_argument(args, kwargs), set_options.get("task_id"))
        return request, {
            "queue": set_options.get("queue"),
            "delay_ms": self._delay_ms(set_options.get("countdown"), set_options.get("eta")),
            "expires_ms": self._expires_ms(set_options.get("expires")),
            "canvas": self._parent_ids()
            | {name: set_options[name] for name in STORED_OPTIONS if name in set_options}
            | stamps,
        }

    def _parent_ids(self) -> dict[str, Any]:
        """The ids of the task that submits the run and of its root, as Celery sets them; empty without
        one."""
        parent = self.app.current_worker_task
        if parent is None:
            return {}
        return {"parent_id": parent.request.id, "root_id": parent.request.root_id or parent.request.id}

    def _delay_ms(self, countdown: float | None, eta: datetime | str | None) -> int:
        if countdown is not None and eta is not None:
            raise RequestInvalid("countdown and eta cannot be used together", hint="remove one of them")
        return self._ms_until("countdown or eta", eta if eta is not None else countdown or 0)

    def _expires_ms(self, expires: float | datetime | str | None) -> int:
        # A time in the past counts as a millisecond from now: the run is accepted and then cancelled.
        return 0 if expires is None else max(1, self._ms_until("expires", expires))

    def _ms_until(self, what: str, when: float | datetime | str) -> int:
        """Milliseconds from now until `when`, 0 for the past. `what` names the option in errors."""
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
                hint="use a number of seconds from now, a datetime, or text in ISO 8601 (countdown: seconds)",
            ) from None
        return number_of(f"{what} in milliseconds from now", after_ms, most=TEN_YEARS_MS)


class ProducerTask(AgentTask):
    """`run_agent` in a producer: it submits runs and cannot execute them."""

    name = RUN_AGENT

    def __new__(cls) -> Self:
        """Make a separate class for each task, as `@app.task` does: Celery stores the app in the class."""
        task_class = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__new__": object.__new__})
        return object.__new__(task_class)

    def run(self, request: Request) -> None:
        raise _cannot_execute()


def _not_called(name: str) -> RequestInvalid:
    return not_called(f"run_agent.{name}(...)")


def not_called(what: str) -> RequestInvalid:
    """The error for `what`, a Celery feature that would call runs as functions."""
    return RequestInvalid(
        f"{what} is not supported: it would call runs inside one Celery task, but a run is not a function",
        hint="use group(run_agent.s(request) for request in requests) to submit a run for each request",
    )


def _cannot_execute() -> ConfigError:
    return ConfigError(
        "this process can submit runs, but cannot execute them",
        hint="submit a run with run_agent.delay(request), and start a worker with `celery -A tasks worker`; "
        "with task_always_eager, import run_agent from the app of the worker",
    )


def _on_commit(call: Callable[[], object]) -> None:
    """Call it after the commit of Django's current transaction. Raises `ConfigError` without Django."""
    try:
        transaction = import_module("django.db.transaction")
    except ImportError as error:
        raise ConfigError(
            "Django is not installed, so there is no transaction to wait for",
            hint="use run_agent.delay(request)",
        ) from error
    transaction.on_commit(call)


def _as_fields(value: Any) -> Any:
    """A request as JSON for a signature, without a generated `run_id`."""
    if not isinstance(value, RunRequest):
        return value
    reject_unstorable(dict(value))
    return value.model_dump(mode="json", exclude_unset=True)


def _only_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """The request, the only argument of a run. Raises `TwoArguments` or `RequestInvalid`."""
    values = [*args, *kwargs.values()]
    if len(values) > 1:
        raise TwoArguments(
            f"a run has one argument, its request, but {len(values)} were given",
            hint="after another task in a chain, use .si(request) instead of .s(request)",
        )
    if not values or (kwargs and "request" not in kwargs):
        raise RequestInvalid(
            "the request is missing",
            hint="run_agent.delay(RunRequest(agent_id=..., session_id=..., input_text=...))",
        )
    return cast(Request, values[0])


def _with_run_id(request: Request, task_id: str | None) -> Request:
    """The request with the Celery task id as its `run_id`. A `run_id` in the request must be equal."""
    if optional_text("task_id", task_id) is None or not isinstance(request, RunRequest | Mapping):
        return request
    fields_set = request.model_fields_set if isinstance(request, RunRequest) else request.keys()
    run_id = request.run_id if isinstance(request, RunRequest) else request.get("run_id")
    if "run_id" in fields_set and run_id != task_id:
        raise RequestInvalid(
            f"the task_id {task_id!r} and the run_id {run_id!r} are different",
            hint="they must be the same id: remove one of them, or make them equal",
        )
    fields = dict(request) if isinstance(request, RunRequest) else request
    return {**fields, "run_id": task_id}


class _DefaultTask(ProducerTask):
    """The task of `openagents_worker.run_agent` while no app is registered.

    If an app is registered later, signatures of this task submit their runs through that app.
    """

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle[Any]:
        task = default_task()
        if task is self:
            return super().apply_async(args, kwargs, **options)
        return task.apply_async(args, kwargs, **options)

    def apply(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        task = default_task()
        return super().apply(args, kwargs, **options) if task is self else task.apply(args, kwargs, **options)


def default_task() -> AgentTask:
    """The current task of `openagents_worker.run_agent`.

    It is the task of the app that is registered in this process. Without one, it is a task of a producer with
    the settings of the environment. Raises `ConfigError` if two apps are registered.
    """
    app = default_app()
    if RUN_AGENT not in app.tasks:
        app.register_task(_DefaultTask())
    return cast(AgentTask, app.tasks[RUN_AGENT])


class _DefaultTaskProxy(Proxy):  # type: ignore[misc]  # Celery ships no types
    """A proxy of `default_task()`.

    Test runners and `inspect` look at its class and its special attributes. These work without searching or
    making an app.
    """

    def _get_class(self) -> type:
        return ProducerTask

    def __repr__(self) -> str:
        return f"<{RUN_AGENT} of the registered app, or with the settings of the environment>"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except ConfigError as error:
            if name.startswith("__"):
                raise AttributeError(name) from error
            raise


run_agent: AgentTask = cast(AgentTask, _DefaultTaskProxy(default_task, name=RUN_AGENT))
"""`tasks.run_agent` of the registered app (`register(app)`), or of a producer with the settings of the
environment.

The app is chosen at each use, so `run_agent` can be imported before the app is registered.
"""
