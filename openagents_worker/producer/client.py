"""Clients. The only place that combines settings, store and broker to submit runs and to read them.

```python
with Client() as client:
    handle = client.submit({"agent_id": "assistant", "session_id": "s1", "input_text": "hi"})
    print(handle.wait(timeout=60).final_output)
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, Self

from celery import Celery
from celery.backends.base import DisabledBackend
from pydantic import BaseModel
from typing_extensions import Unpack

from openagents_worker.arguments import optional_text, text_of_caller
from openagents_worker.errors import RequestInvalid
from openagents_worker.models import RunRecord, RunRequest, output_class_of
from openagents_worker.producer.app_binding import binding_of, real_app
from openagents_worker.producer.deletion import deletion
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.operations import AsyncOperations, Operations, send_accepted
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.producer.submit import asubmit, submit
from openagents_worker.producer.task_options import task_options_json
from openagents_worker.redaction import shown_reason
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.checkpoints import Checkpoint, acheckpoints, checkpoints
from openagents_worker.store.client import AsyncStore, Cell, Store
from openagents_worker.store.listing import (
    Page,
    RunFilter,
    RunFilters,
    SessionSummary,
    list_runs,
    list_sessions,
    prune_indexes,
)
from openagents_worker.store.records import (
    SessionView,
    aread_record,
    aread_session,
    read_record,
    read_session,
    run_not_found,
)
from openagents_worker.store.scripts import CancelAnswer, Cancelled, ScriptCall, Wake
from openagents_worker.telemetry.signals import with_traceparent

__all__ = ["AsyncClient", "Client", "cell_of", "client_of", "default_client", "front_door_app"]

ANSWER_TIMEOUT_S = 2.0  # short, because a caller waits for the answer


def cell_of(settings: Settings) -> Cell:
    """The Redis, the key prefix and the limits of these settings."""
    return Cell(
        url=settings.redis_url,
        prefix=settings.key_prefix,
        events_maxlen=settings.events_maxlen,
        run_ttl_ms=settings.run_ttl_s * 1000,
        session_ttl_ms=settings.session_ttl_s * 1000,
        max_watchers=settings.max_watchers,
    )


class Client(Operations):
    """Submits runs and reads them by id. It is thread-safe and opens connections when they are needed.

    With `app`, messages are sent through that Celery app, which the client does not close. Without arguments
    they are sent through the app that is registered in this process (`register(app)`). Without a registered
    app, or with `redis_url`, the client makes its own app from the settings of the environment.
    """

    def __init__(
        self, redis_url: str | None = None, *, settings: Settings | None = None, app: Celery | None = None
    ) -> None:
        self._publishing = PublishingApp(redis_url, settings, app, self)
        self.store = Store(cell_of(self._publishing.given_settings), answer_timeout_s=ANSWER_TIMEOUT_S)

    def submit(
        self,
        request: RunRequest | Mapping[str, Any],
        *,
        queue: str | None = None,
        delay_ms: int = 0,
        expires_ms: int = 0,
        priority: int | None = None,
        headers: Mapping[str, Any] | None = None,
        canvas: Mapping[str, Any] | None = None,
    ) -> RunHandle[Any]:
        """Submit a run. When this returns, the run is accepted, even if the broker cannot be reached.

        A run that has not started within `expires_ms` is cancelled. `priority`, `headers` and `canvas`
        (Celery's options for linked tasks) are part of every Celery message of the run. Raises as `submit`
        does.
        """
        started_s = time.monotonic()
        app, settings = self._publishing.to_submit()
        accepted = submit(
            self.store,
            request,
            settings=settings,
            queue=queue,
            delay_ms=delay_ms,
            expires_ms=expires_ms,
            canvas=_canvas(settings, canvas, priority=priority, headers=headers),
        )
        send_accepted(app, accepted, started_s)
        return self.handle(accepted.run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> RunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return RunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    def record(self, run_id: str) -> RunRecord:
        """The current record of the run. Raises `RunNotFound`."""
        return read_record(self.store, text_of_caller("run_id", run_id))

    def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run. Raises `RunNotFound`.

        CANCELLED: it was cancelled at once. REQUESTED: its worker will cancel it. ALREADY: it had ended
        before.
        """
        answer = self.store.run(_cancel(run_id, reason))
        self._publishing.send_wakes(_wakes(run_id, answer))
        return answer.answer

    def checkpoints(self, run_id: str) -> Iterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return checkpoints(self.store, text_of_caller("run_id", run_id))

    def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that match all filters (see `RunFilters`), newest first.

        Raises `RequestInvalid` for a state, limit or cursor that is not valid.
        """
        run_filter = RunFilter.of(filters)
        return self.store.execute(list_runs(self.store.keys, run_filter, limit=limit, cursor=cursor))

    def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions. The session with the newest run is the first. Raises as `runs` does."""
        return self.store.execute(list_sessions(self.store.keys, limit=limit, cursor=cursor))

    def session(self, session_id: str) -> SessionView:
        """The current state of the session. Raises `SessionNotFound`."""
        return read_session(self.store, text_of_caller("session_id", session_id))

    def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session and all data of its runs from Redis. Returns the number of runs.

        Raises `SessionBusy` if one of its runs has not ended. With `force` the runs are cancelled first. It
        may wait up to about five seconds until Celery was notified of the end of a run.
        """
        plan = deletion(self.store.keys, text_of_caller("session_id", session_id), force=force)
        return self.store.execute(plan, self._wait_or_wake)

    def prune(self) -> int:
        """Remove expired runs and sessions from the lists. Returns the number of removed entries."""
        return self.store.execute(prune_indexes())

    def _wait_or_wake(self, step: float | Sequence[Wake]) -> None:
        """Execute a step of the deletion plan: wait for some seconds, or send wake-ups."""
        if isinstance(step, float):
            time.sleep(step)
        else:
            self._publishing.send_wakes(step)

    @cached_property
    def no_backend(self) -> Any:
        """The result backend of handles. Celery requires one, but a handle reads the record of the run."""
        return DisabledBackend(self.app)

    async def on_this_loop(self) -> AsyncClient:
        """The `AsyncClient` with the same settings. Its connections are closed together with the running
        loop."""
        return self._twin

    @cached_property
    def _twin(self) -> AsyncClient:
        twin = AsyncClient(settings=self._publishing.given_settings)
        twin._publishing = self._publishing
        return twin

    def close(self) -> None:
        """Close the connections. Those of a running event loop are closed when the loop ends.

        The client can be used again.
        """
        self.store.close()
        if "_twin" in self.__dict__:
            self._twin.store.leave_closed_loops()
        self._publishing.close_producers(of_given_app=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._publishing.close_own_app()


class AsyncClient(AsyncOperations):
    """The `Client` for asyncio. It can be used on several event loops; each has separate connections."""

    def __init__(
        self, redis_url: str | None = None, *, settings: Settings | None = None, app: Celery | None = None
    ) -> None:
        self._publishing = PublishingApp(redis_url, settings, app)
        self.store = AsyncStore(cell_of(self._publishing.given_settings), answer_timeout_s=ANSWER_TIMEOUT_S)

    async def submit(
        self,
        request: RunRequest | Mapping[str, Any],
        *,
        queue: str | None = None,
        delay_ms: int = 0,
        expires_ms: int = 0,
        priority: int | None = None,
        headers: Mapping[str, Any] | None = None,
        canvas: Mapping[str, Any] | None = None,
    ) -> AsyncRunHandle[Any]:
        """Submit a run, as `Client.submit` does."""
        started_s = time.monotonic()
        app, settings = self._publishing.to_submit()
        accepted = await asubmit(
            self.store,
            request,
            settings=settings,
            queue=queue,
            delay_ms=delay_ms,
            expires_ms=expires_ms,
            canvas=_canvas(settings, canvas, priority=priority, headers=headers),
        )
        await asyncio.to_thread(send_accepted, app, accepted, started_s)
        return self.handle(accepted.run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> AsyncRunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return AsyncRunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    async def record(self, run_id: str) -> RunRecord:
        """The current record of the run. Raises `RunNotFound`."""
        return await aread_record(self.store, text_of_caller("run_id", run_id))

    async def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run. Raises `RunNotFound`.

        CANCELLED: it was cancelled at once. REQUESTED: its worker will cancel it. ALREADY: it had ended
        before.
        """
        answer = await self.store.run(_cancel(run_id, reason))
        if wakes := _wakes(run_id, answer):
            await asyncio.to_thread(self._publishing.send_wakes, wakes)
        return answer.answer

    def checkpoints(self, run_id: str) -> AsyncIterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return acheckpoints(self.store, text_of_caller("run_id", run_id))

    async def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that match all filters (see `RunFilters`), newest first.

        Raises `RequestInvalid` for a state, limit or cursor that is not valid.
        """
        run_filter = RunFilter.of(filters)
        return await self.store.execute(list_runs(self.store.keys, run_filter, limit=limit, cursor=cursor))

    async def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions. The session with the newest run is the first. Raises as `runs` does."""
        return await self.store.execute(list_sessions(self.store.keys, limit=limit, cursor=cursor))

    async def session(self, session_id: str) -> SessionView:
        """The current state of the session. Raises `SessionNotFound`."""
        return await aread_session(self.store, text_of_caller("session_id", session_id))

    async def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session and all data of its runs from Redis. Returns the number of runs.

        Raises `SessionBusy` if one of its runs has not ended. With `force` the runs are cancelled first. It
        may wait up to about five seconds until Celery was notified of the end of a run.
        """
        return await self.store.execute(
            deletion(self.store.keys, text_of_caller("session_id", session_id), force=force),
            self._wait_or_wake,
        )

    async def prune(self) -> int:
        """Remove expired runs and sessions from the lists. Returns the number of removed entries."""
        return await self.store.execute(prune_indexes())

    async def _wait_or_wake(self, step: float | Sequence[Wake]) -> None:
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif step:
            await asyncio.to_thread(self._publishing.send_wakes, step)

    async def close(self) -> None:
        """Close the connections. The client can be used again."""
        await self.store.close()
        self._publishing.close_producers(of_given_app=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        self._publishing.close_own_app()


def _canvas(settings: Settings, canvas: Mapping[str, Any] | None, **options: Any) -> str:
    """The task options of a submission as JSON. Raises as `task_options_json` does."""
    if canvas is not None and not isinstance(canvas, Mapping):
        raise RequestInvalid(f"canvas must be a mapping of options to values, not {type(canvas).__name__}")
    set_options = {name: value for name, value in options.items() if value is not None}
    return task_options_json(
        with_traceparent({**(canvas or {}), **set_options}),
        max_bytes=settings.max_payload_bytes,
        key_prefix=settings.key_prefix,
    )


def _cancel(run_id: str, reason: str | None) -> ScriptCall[Cancelled]:
    return scripts.cancel(
        run_id=text_of_caller("run_id", run_id),
        reason=shown_reason(optional_text("reason", reason)),
        force=False,
    )


def _wakes(run_id: str, answer: Cancelled) -> tuple[Wake, ...]:
    if answer.answer is CancelAnswer.UNKNOWN:
        raise run_not_found(run_id)
    return answer.wakes


@cache
def default_client() -> Client:
    """The client of this process. It uses the registered app, or the settings of the environment."""
    return Client()


def front_door_app() -> Celery:
    """The current app of `openagents_worker.run_agent`. Raises `ConfigError` if two apps are registered."""
    return default_client()._publishing.to_submit()[0]


def client_of(app: Celery) -> Client:
    """The client of a Celery app. The first call makes it."""
    app = real_app(app)
    binding = binding_of(app)
    if (client := binding.client) is None:
        client = binding.client = Client(settings=binding.settings, app=app)
    return client
