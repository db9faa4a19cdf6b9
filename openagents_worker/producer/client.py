"""Clients. The only place that offers all operations on runs and sessions by id, for sync code and asyncio.

```python
with Client() as client:
    handle = client.submit({"agent_id": "assistant", "session_id": "s1", "input_text": "hi"})
    print(handle.wait(timeout=60).final_output)
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self

from celery import Celery
from pydantic import BaseModel, JsonValue
from typing_extensions import Unpack

from openagents_worker.arguments import text_of_caller
from openagents_worker.models import RunBudget, RunRecord, output_class_of
from openagents_worker.producer import plans, sending
from openagents_worker.producer.connection import (
    AsyncConnection,
    Connection,
    cell_of,
    connection_of,
    default_connection,
)
from openagents_worker.producer.decisions import AsyncDecisions, Decisions
from openagents_worker.producer.deletion import deletion
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.operations import AsyncOperations, Operations
from openagents_worker.producer.plans import ClientOptions
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.settings import Settings
from openagents_worker.store.checkpoints import Checkpoint, acheckpoints, checkpoints
from openagents_worker.store.listing import (
    Page,
    RunFilter,
    RunFilters,
    SessionSummary,
    list_runs,
    list_sessions,
    prune_indexes,
)
from openagents_worker.store.scripts import CancelAnswer
from openagents_worker.store.sessions import SessionView, aread_session, read_session
from openagents_worker.submission.submit import Request

__all__ = ["AsyncClient", "Client", "cell_of", "client_of", "default_client"]


class Client(Operations, Decisions):
    """Submits runs and reads them by id. It is thread-safe and opens connections when they are needed.

    With `app`, messages are sent through that Celery app, which the client does not close. Without arguments
    they are sent through the app that is registered in this process (`register(app)`). Without a registered
    app, or with `redis_url`, the client makes its own app from the settings of the environment.
    """

    def __init__(
        self, redis_url: str | None = None, *, settings: Settings | None = None, app: Celery | None = None
    ) -> None:
        super().__init__(Connection(redis_url, settings, app))

    def submit(self, request: Request, **options: Unpack[ClientOptions]) -> RunHandle[Any]:
        """Submit a run. When this returns, the run is accepted, even if the broker cannot be reached.

        `queue` overrides the queue of the request. The run starts after `delay_ms`. A run that has not
        started within `expires_ms` is cancelled. `priority`, `headers` and `canvas` (Celery's options for
        linked tasks) are part of every Celery message of the run. The same request again is the same run.

        If nothing was accepted, it raises `RequestInvalid`, `RequestTooLarge`, `AgentNotFoundError`,
        `RunConflict`, `SessionBusy`, `RedisUnsafe` or `RedisUnreachable`. It raises `SubmitUnknown` if the
        run may be accepted, and with `OPENAGENTS_DURABILITY=strict` also if it may not be on disk yet.
        """
        run_id = self._execute(plans.submit(self._publishing, request, **options))
        return self.handle(run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> RunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return RunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    def record(self, run_id: str) -> RunRecord:
        """The current record of the run. Raises `RunNotFound`."""
        return self._execute(plans.record(self._keys, run_id))

    def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run. Raises `RunNotFound`.

        CANCELLED: it was cancelled at once. REQUESTED: its worker will cancel it. ALREADY: it had ended
        before.
        """
        return self._execute(plans.cancel(self._publishing, run_id, reason))

    def send(self, run_id: str, name: str, value: JsonValue = None, *, message_id: str | None = None) -> None:
        """Send a value to a run, as `RunHandle.send` does."""
        self._execute(sending.send(self._publishing, run_id, name, value, message_id))

    def steer(self, run_id: str, text: str, *, by: str | None = None, message_id: str | None = None) -> None:
        """Put a user message into a run, as `RunHandle.steer` does."""
        self._execute(sending.steer(self._publishing, run_id, text, by, message_id))

    def extend(self, run_id: str, budget: RunBudget | Mapping[str, Any], *, by: str | None = None) -> None:
        """Extend the budget of a run, as `RunHandle.extend` does."""
        self._execute(sending.extend(self._publishing, self._keys, run_id, budget, by))

    def checkpoints(self, run_id: str) -> Iterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return checkpoints(self.store, text_of_caller("run_id", run_id))

    def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that match all filters (see `RunFilters`), newest first.

        Raises `RequestInvalid` for a state, limit or cursor that is not valid.
        """
        return self._execute(list_runs(self._keys, RunFilter.of(filters), limit=limit, cursor=cursor))

    def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions. The session with the newest run is the first. Raises as `runs` does."""
        return self._execute(list_sessions(self._keys, limit=limit, cursor=cursor))

    def session(self, session_id: str) -> SessionView:
        """The current state of the session. Raises `SessionNotFound`."""
        return read_session(self.store, text_of_caller("session_id", session_id))

    def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session and all data of its runs from Redis. Returns the number of runs.

        Raises `SessionBusy` if one of its runs has not ended. With `force` the runs are cancelled first. It
        may wait up to about five seconds until Celery was notified of the end of a run.
        """
        return self._execute(deletion(self._keys, session_id, force=force, send=self._publishing.send_wakes))

    def prune(self) -> int:
        """Remove expired runs and sessions from the lists. Returns the number of removed entries."""
        return self._execute(prune_indexes())

    def close(self) -> None:
        """Close the connections. Those of a running event loop are closed when the loop ends.

        The client can be used again.
        """
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._publishing.close_own_app()


class AsyncClient(AsyncOperations, AsyncDecisions):
    """The `Client` for asyncio. It can be used on several event loops; each has separate connections."""

    def __init__(
        self, redis_url: str | None = None, *, settings: Settings | None = None, app: Celery | None = None
    ) -> None:
        super().__init__(AsyncConnection(PublishingApp(redis_url, settings, app)))

    async def submit(self, request: Request, **options: Unpack[ClientOptions]) -> AsyncRunHandle[Any]:
        """Submit a run, as `Client.submit` does."""
        run_id = await self._execute(plans.submit(self._publishing, request, **options))
        return self.handle(run_id, output_type=output_class_of(request))

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> AsyncRunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return AsyncRunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    async def record(self, run_id: str) -> RunRecord:
        """The current record of the run. Raises `RunNotFound`."""
        return await self._execute(plans.record(self._keys, run_id))

    async def cancel(self, run_id: str, reason: str | None = None) -> CancelAnswer:
        """Cancel a run, as `Client.cancel` does. Raises `RunNotFound`."""
        return await self._execute(plans.cancel(self._publishing, run_id, reason))

    async def send(
        self, run_id: str, name: str, value: JsonValue = None, *, message_id: str | None = None
    ) -> None:
        """Send a value to a run, as `RunHandle.send` does."""
        await self._execute(sending.send(self._publishing, run_id, name, value, message_id))

    async def steer(
        self, run_id: str, text: str, *, by: str | None = None, message_id: str | None = None
    ) -> None:
        """Put a user message into a run, as `RunHandle.steer` does."""
        await self._execute(sending.steer(self._publishing, run_id, text, by, message_id))

    async def extend(
        self, run_id: str, budget: RunBudget | Mapping[str, Any], *, by: str | None = None
    ) -> None:
        """Extend the budget of a run, as `RunHandle.extend` does."""
        await self._execute(sending.extend(self._publishing, self._keys, run_id, budget, by))

    def checkpoints(self, run_id: str) -> AsyncIterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return acheckpoints(self.store, text_of_caller("run_id", run_id))

    async def runs(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
    ) -> Page[RunRecord]:
        """A page of the runs that match all filters, newest first, as `Client.runs`."""
        plan = list_runs(self._keys, RunFilter.of(filters), limit=limit, cursor=cursor)
        return await self._execute(plan)

    async def sessions(self, *, limit: int = 100, cursor: str | None = None) -> Page[SessionSummary]:
        """A page of the sessions. The session with the newest run is the first. Raises as `runs` does."""
        return await self._execute(list_sessions(self._keys, limit=limit, cursor=cursor))

    async def session(self, session_id: str) -> SessionView:
        """The current state of the session. Raises `SessionNotFound`."""
        return await aread_session(self.store, text_of_caller("session_id", session_id))

    async def delete_session(self, session_id: str, *, force: bool = False) -> int:
        """Delete a session and all data of its runs from Redis, as `Client.delete_session` does."""
        return await self._execute(
            deletion(self._keys, session_id, force=force, send=self._publishing.send_wakes)
        )

    async def prune(self) -> int:
        """Remove expired runs and sessions from the lists. Returns the number of removed entries."""
        return await self._execute(prune_indexes())

    async def close(self) -> None:
        """Close the connections. The client can be used again."""
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        self._publishing.close_own_app()


def default_client() -> Client:
    """The client of this process. It uses the registered app, or the settings of the environment."""
    return Client.over(default_connection())


def client_of(app: Celery) -> Client:
    """The client of a Celery app. All clients of an app share its connection."""
    return Client.over(connection_of(app))
