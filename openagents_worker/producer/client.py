"""Clients. The only place that offers all operations on runs and sessions by id, for sync code and asyncio.

```python
with Client() as client:
    handle = client.submit({"agent_id": "assistant", "session_id": "s1", "input_text": "hi"})
    print(handle.wait(timeout=60).final_output)
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from celery import Celery
from pydantic import BaseModel
from typing_extensions import Unpack

from openagents_worker.arguments import text_of_caller
from openagents_worker.models import output_class_of
from openagents_worker.producer import deletion, inspection, plans, sending
from openagents_worker.producer.connection import (
    AsyncConnection,
    Connection,
    cell_of,
    connection_of,
    default_connection,
)
from openagents_worker.producer.decisions import AsyncDecisions, Decisions
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.methods import asynchronous, blocking
from openagents_worker.producer.operations import AsyncOperations, Operations
from openagents_worker.producer.plans import ClientOptions
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.settings import Settings
from openagents_worker.store.checkpoints import Checkpoint, acheckpoints, checkpoints
from openagents_worker.submission.submit import Request

__all__ = ["AsyncClient", "Client", "cell_of", "client_of", "default_client"]


class Client(Operations, Decisions):
    """Submits runs and reads them by id. It is thread-safe and opens connections when they are needed.

    With `app`, messages are sent through that Celery app, which the client does not close. Without arguments
    they are sent through the app that is registered in this process (`register(app)`). Without a registered
    app, or with `redis_url`, the client makes its own app from the settings of the environment. Through an
    app with runs they go to the queue of `register(app, queue=...)`. Raises `ConfigError` if `redis_url` is
    not that of `settings`.
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
        return self.handle(self._submit(request, **options), output_type=output_class_of(request))

    _submit = blocking(plans.submit)

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> RunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return RunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    record = blocking(plans.record)
    cancel = blocking(plans.cancel)
    send = blocking(sending.send)
    steer = blocking(sending.steer)
    extend = blocking(sending.extend)
    runs = blocking(inspection.runs)
    sessions = blocking(inspection.sessions)
    session = blocking(inspection.session)
    delete_session = blocking(deletion.delete_session)
    prune = blocking(deletion.prune)

    def checkpoints(self, run_id: str) -> Iterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return checkpoints(self.store, text_of_caller("run_id", run_id))

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
        return self.handle(await self._submit(request, **options), output_type=output_class_of(request))

    _submit = asynchronous(plans.submit)

    def handle(self, run_id: str, *, output_type: type[BaseModel] | None = None) -> AsyncRunHandle[Any]:
        """A handle of the run; it does not read anything yet.

        `wait()` parses the answer to `output_type`, a pydantic class.
        """
        return AsyncRunHandle(text_of_caller("run_id", run_id), client=self, output_type=output_type)

    record = asynchronous(plans.record)
    cancel = asynchronous(plans.cancel)
    send = asynchronous(sending.send)
    steer = asynchronous(sending.steer)
    extend = asynchronous(sending.extend)
    runs = asynchronous(inspection.runs)
    sessions = asynchronous(inspection.sessions)
    session = asynchronous(inspection.session)
    delete_session = asynchronous(deletion.delete_session)
    prune = asynchronous(deletion.prune)

    def checkpoints(self, run_id: str) -> AsyncIterator[Checkpoint]:
        """The recorded calls of the run with their complete results, in order. Raises `RunNotFound`."""
        return acheckpoints(self.store, text_of_caller("run_id", run_id))

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
