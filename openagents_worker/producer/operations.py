"""Operations. The only place for the client methods of operators: resume runs, inspect workers and queues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from celery import Celery
from typing_extensions import Unpack

from openagents_worker.producer import inspection, plans
from openagents_worker.producer.connection import AsyncConnection, Connection
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.methods import asynchronous, blocking
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore, Store
from openagents_worker.store.listing import RunFilters
from openagents_worker.submission.submit import ForkOptions

__all__ = ["AsyncOperations", "Operations"]


class _Connected:
    """Base class of both clients: the Celery app that sends their messages, and its settings."""

    connection: Connection | AsyncConnection

    @property
    def settings(self) -> Settings:
        """The settings for submissions of this client."""
        return self._publishing.settings

    @property
    def app(self) -> Celery:
        """The Celery app that sends the messages of this client."""
        return self._publishing.app

    @property
    def _publishing(self) -> PublishingApp:
        return self.connection.publishing


class Operations(_Connected):
    """The methods of `Client` for operators."""

    connection: Connection

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @classmethod
    def over(cls, connection: Connection) -> Self:
        """A client that shares the connection with others."""
        client = cls.__new__(cls)
        Operations.__init__(client, connection)
        return client

    @property
    def store(self) -> Store:
        """The Redis of this client."""
        return self.connection.store

    def resume(self, run_id: str, *, by: str | None = None) -> RunHandle[Any]:
        """Continue a failed or cancelled run from its last checkpoint, in a new life.

        A run without a checkpoint starts from the beginning. `by` names the user for the event `run.resumed`.
        A run that has not ended is not changed. Raises `RunNotFound`, `RunConflict` for a completed run, and
        `ConfigError` for a run that is not durable and was executed, or if two apps are registered.
        """
        return RunHandle(self._resume(run_id, by), client=self)

    def fork(self, of_run: str, checkpoint_id: str, /, **options: Unpack[ForkOptions]) -> RunHandle[Any]:
        """Start a new run that continues from a checkpoint (`{of_run}:step:{n}`) of a run, in any state.

        The calls up to the checkpoint are not made again: the new run has a copy of their records. Later
        calls get new idempotency keys, and need their own approvals. `input_text` replaces the question.
        By default, the new run has a new session: a copy of that of the run as it was when the run began,
        with the state of now. With the session_id of the run, it waits at the end of that session. Another
        session must not exist. `run_id` is the id of the new run: the same fork again is the same run.
        Raises `RequestInvalid`, `RunNotFound`, `RunConflict`, or `ConfigError` for an unknown checkpoint.
        """
        return RunHandle(self._fork(of_run, checkpoint_id, **options), client=self)

    def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> Iterator[str]:
        """Resume every run that matches the filters, newest first, and yield the id of each resumed run.

        `state` is failed, which is the default, cancelled, or both. A run that cannot be resumed is skipped,
        with the warning `run.not_resumed` in the log. With `dry_run` the ids are yielded, but nothing is
        resumed. Raises `RequestInvalid` for a filter that is not valid, and `ConfigError` if two apps are
        registered.
        """
        return self.connection.stream(plans.resume_all(self._publishing, filters, by=by, dry_run=dry_run))

    _resume = blocking(plans.resume)
    _fork = blocking(plans.fork)
    fork_session = blocking(plans.fork_session)
    workers = blocking(inspection.workers)
    queues = blocking(inspection.queues)
    agents = blocking(inspection.agents)
    problems = blocking(inspection.problems)
    put_aside = blocking(inspection.put_aside)


class AsyncOperations(_Connected):
    """The methods of `AsyncClient` for operators."""

    connection: AsyncConnection

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    @classmethod
    def over(cls, connection: AsyncConnection) -> Self:
        """A client that shares the connection with others."""
        client = cls.__new__(cls)
        AsyncOperations.__init__(client, connection)
        return client

    @property
    def store(self) -> AsyncStore:
        """The Redis of this client."""
        return self.connection.store

    async def resume(self, run_id: str, *, by: str | None = None) -> AsyncRunHandle[Any]:
        """The same as `Client.resume`."""
        return AsyncRunHandle(await self._resume(run_id, by), client=self)

    async def fork(
        self, of_run: str, checkpoint_id: str, /, **options: Unpack[ForkOptions]
    ) -> AsyncRunHandle[Any]:
        """The same as `Client.fork`."""
        return AsyncRunHandle(await self._fork(of_run, checkpoint_id, **options), client=self)

    def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> AsyncIterator[str]:
        """The same as `Client.resume_all`."""
        return self.connection.stream(plans.resume_all(self._publishing, filters, by=by, dry_run=dry_run))

    _resume = asynchronous(plans.resume)
    _fork = asynchronous(plans.fork)
    fork_session = asynchronous(plans.fork_session)
    workers = asynchronous(inspection.workers)
    queues = asynchronous(inspection.queues)
    agents = asynchronous(inspection.agents)
    problems = asynchronous(inspection.problems)
    put_aside = asynchronous(inspection.put_aside)
