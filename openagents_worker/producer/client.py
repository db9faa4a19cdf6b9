"""Clients. The only place where settings, store and broker come together for somebody who submits and looks.

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
from openagents_worker.producer.app_binding import parts_of, real_app
from openagents_worker.producer.deletion import deletion
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.operations import AsyncOperations, Operations, send_accepted
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.producer.submit import asubmit, submit
from openagents_worker.producer.task_options import canvas_of
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

__all__ = ["AsyncClient", "Client", "cell_of", "client_of", "default_client", "front_door_app"]

ANSWER_TIMEOUT_S = 2.0  # somebody waits for it


def cell_of(settings: Settings) -> Cell:
    """The cell that these settings name."""
    return Cell(
        url=settings.redis_url,
        prefix=settings.key_prefix,
        events_maxlen=settings.events_maxlen,
        run_ttl_ms=settings.run_ttl_s * 1000,
        session_ttl_ms=settings.session_ttl_s * 1000,
        max_watchers=settings.max_watchers,
    )


class Client(Operations):
    """Submits runs and looks at them, by id. Thread-safe; opens its connections when they are needed.

    With `app`, messages go out as that Celery app would send them; it stays the caller's. Without arguments
    they go out by the app that is registered in this process (`register(app)`); where there is none, and with
    a `redis_url`, by an app of the client's own, as the environment's settings say.
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
        """Submit a run: accepted when this returns, also if the broker is away. Raises as `submit` does.

        A run that has not been started within `expires_ms` is cancelled. `priority`, `headers` and `canvas`,
        which are Celery's options for what is linked to a task, go on every Celery message of the run.
        """
        began = time.monotonic()
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
        send_accepted(app, accepted, began)
        return self.handle(accepted.run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> RunHandle[Any]:
        """A view of the run; asks nothing yet. With a pydantic class, `wait()` parses the answer to it."""
        return RunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    def record(self, run_id: str) -> RunRecord:
        """The run as it stands now. Raises `RunNotFound`."""
        return read_record(self.store, text_of_caller("run_id", run_id))

    def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run: CANCELLED at once, REQUESTED of its worker, or ALREADY over. Raises `RunNotFound`."""
        answer = self.store.run(_cancel(run_id, reason))
        self._publishing.send_wakes(_wakes(run_id, answer))
        return answer.answer

    def checkpoints(self, run_id: str) -> Iterator[Checkpoint]:
        """The run's recorded calls with all that they gave, in their order. Raises `RunNotFound`."""
        return checkpoints(self.store, text_of_caller("run_id", run_id))

    def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that pass every filter given (see `RunFilters`), newest first.

        Raises `RequestInvalid` for a state, limit or cursor that is not valid.
        """
        wanted = RunFilter.of(filters)
        return self.store.execute(list_runs(self.store.keys, wanted, limit=limit, cursor=cursor))

    def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions, the one with the newest run first. Raises as `runs` does."""
        return self.store.execute(list_sessions(self.store.keys, limit=limit, cursor=cursor))

    def session(self, session_id: str) -> SessionView:
        """The session as it stands now. Raises `SessionNotFound`."""
        return read_session(self.store, text_of_caller("session_id", session_id))

    def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session, its runs and all that they left; says how many runs. No byte of them remains.

        Raises `SessionBusy` when one of its runs has not ended; with `force` they are cancelled first.
        Takes up to about five seconds while Celery is to be told of an end.
        """
        plan = deletion(self.store.keys, text_of_caller("session_id", session_id), force=force)
        return self.store.execute(plan, self._wait_or_wake)

    def prune(self) -> int:
        """Take runs and sessions that have expired out of the lists; says how many entries that were."""
        return self.store.execute(prune_indexes())

    def _wait_or_wake(self, step: float | Sequence[Wake]) -> None:
        if isinstance(step, float):
            time.sleep(step)
        else:
            self._publishing.send_wakes(step)

    @cached_property
    def no_backend(self) -> Any:
        """Celery wants a result backend in every result; a run's handle needs none."""
        return DisabledBackend(self.app)

    async def on_this_loop(self) -> AsyncClient:
        """The asyncio twin; what it opens on the running loop is closed when the loop is."""
        return self._twin

    @cached_property
    def _twin(self) -> AsyncClient:
        twin = AsyncClient(settings=self._publishing.given_settings)
        twin._publishing = self._publishing
        return twin

    def close(self) -> None:
        """Close its connections; it may be used again. Those of a loop that runs are closed when it ends."""
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
    """As `Client`, for asyncio. It may be used on any event loop; each has connections of its own."""

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
        """Submit a run: accepted when this returns, also if the broker is away. Raises as `submit` does."""
        began = time.monotonic()
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
        await asyncio.to_thread(send_accepted, app, accepted, began)
        return self.handle(accepted.run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> AsyncRunHandle[Any]:
        """A view of the run; asks nothing yet. With a pydantic class, `wait()` parses the answer to it."""
        return AsyncRunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    async def record(self, run_id: str) -> RunRecord:
        """The run as it stands now. Raises `RunNotFound`."""
        return await aread_record(self.store, text_of_caller("run_id", run_id))

    async def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run: CANCELLED at once, REQUESTED of its worker, or ALREADY over. Raises `RunNotFound`."""
        answer = await self.store.run(_cancel(run_id, reason))
        if wakes := _wakes(run_id, answer):
            await asyncio.to_thread(self._publishing.send_wakes, wakes)
        return answer.answer

    def checkpoints(self, run_id: str) -> AsyncIterator[Checkpoint]:
        """The run's recorded calls with all that they gave, in their order. Raises `RunNotFound`."""
        return acheckpoints(self.store, text_of_caller("run_id", run_id))

    async def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that pass every filter given (see `RunFilters`), newest first.

        Raises `RequestInvalid` for a state, limit or cursor that is not valid.
        """
        wanted = RunFilter.of(filters)
        return await self.store.execute(list_runs(self.store.keys, wanted, limit=limit, cursor=cursor))

    async def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions, the one with the newest run first. Raises as `runs` does."""
        return await self.store.execute(list_sessions(self.store.keys, limit=limit, cursor=cursor))

    async def session(self, session_id: str) -> SessionView:
        """The session as it stands now. Raises `SessionNotFound`."""
        return await aread_session(self.store, text_of_caller("session_id", session_id))

    async def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session, its runs and all that they left; says how many runs. No byte of them remains.

        Raises `SessionBusy` when one of its runs has not ended; with `force` they are cancelled first.
        Takes up to about five seconds while Celery is to be told of an end.
        """
        return await self.store.execute(
            deletion(self.store.keys, text_of_caller("session_id", session_id), force=force),
            self._wait_or_wake,
        )

    async def prune(self) -> int:
        """Take runs and sessions that have expired out of the lists; says how many entries that were."""
        return await self.store.execute(prune_indexes())

    async def _wait_or_wake(self, step: float | Sequence[Wake]) -> None:
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif step:
            await asyncio.to_thread(self._publishing.send_wakes, step)

    async def close(self) -> None:
        """Close its connections; it may be used again."""
        await self.store.close()
        self._publishing.close_producers(of_given_app=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        self._publishing.close_own_app()


def _canvas(settings: Settings, canvas: Mapping[str, Any] | None, **options: Any) -> str:
    if canvas is not None and not isinstance(canvas, Mapping):
        raise RequestInvalid(f"canvas is options with their values, not {type(canvas).__name__}")
    given = {name: value for name, value in options.items() if value is not None}
    return canvas_of(
        {**(canvas or {}), **given}, max_bytes=settings.max_payload_bytes, key_prefix=settings.key_prefix
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
    """This process's client: it submits by the registered app, else with the settings of its environment."""
    return Client()


def front_door_app() -> Celery:
    """The app that the front door's `run_agent` belongs to now. Raises `ConfigError` when there are two."""
    return default_client()._publishing.to_submit()[0]


def client_of(app: Celery) -> Client:
    """The client that belongs to a Celery app, made when it is first asked for."""
    app = real_app(app)
    parts = parts_of(app)
    if (client := parts.client) is None:
        client = parts.client = Client(settings=parts.settings, app=app)
    return client
