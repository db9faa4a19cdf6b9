"""Operations. The only place for the client methods of operators: resume runs, inspect workers and queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from openagents_worker.arguments import optional_text
from openagents_worker.errors import OpenAgentsError, RedisUnreachable
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.publisher import send_first, send_wakes
from openagents_worker.producer.publishing_app import HasPublishingApp
from openagents_worker.producer.submit import Accepted, aresume, resume
from openagents_worker.store.dead_letters import PutAside, read_put_aside
from openagents_worker.store.fleet import (
    AgentInfo,
    Fleet,
    QueueInfo,
    WorkerInfo,
    read_fleet,
    read_workers,
)
from openagents_worker.store.listing import (
    MAX_LIMIT,
    Problem,
    RunFilter,
    RunFilters,
    list_problems,
    list_runs,
)
from openagents_worker.telemetry.logs import get_logger

if TYPE_CHECKING:
    from celery import Celery

    from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
    from openagents_worker.store.client import AsyncStore, Store

__all__ = ["AsyncOperations", "Operations", "send_accepted"]

SEND_WITHIN_S = 1.5  # publishing may take three more seconds, and a submission at most five

log = get_logger(__name__)


class Operations(HasPublishingApp):
    """The methods of `Client` for operators."""

    store: Store

    def record(self, run_id: str) -> RunRecord:
        raise NotImplementedError

    def handle(self, run_id: str) -> RunHandle[Any]:
        raise NotImplementedError

    def resume(self, run_id: str, *, by: str | None = None) -> RunHandle[Any]:
        """Continue a failed or cancelled run from its last checkpoint, in a new life.

        A run without a checkpoint starts from the beginning. `by` names the user for the event `run.resumed`.
        A run that has not ended is not changed. Raises `RunNotFound`, `RunConflict` for a completed run, and
        `ConfigError` for a run that is not durable and was executed, or if two apps are registered.
        """
        started_s, by = time.monotonic(), optional_text("by", by)
        app, settings = self._publishing.to_submit()
        accepted = resume(self.store, self.record(run_id), settings=settings, by=by or "")
        send_accepted(app, accepted, started_s)
        return self.handle(run_id)

    def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> Iterator[str]:
        """Resume every run that matches the filters, newest first, and yield the id of each resumed run.

        The default of `state` is failed. A run that cannot be resumed is skipped, with the warning
        `run.not_resumed` in the log. With `dry_run` the ids are yielded, but nothing is resumed. Raises
        `ConfigError` if two apps are registered.
        """
        by = optional_text("by", by)
        _ = self._publishing.to_submit()
        for record in self._ended_runs_matching(filters):
            if dry_run:
                yield record.run_id
                continue
            try:
                self.resume(record.run_id, by=by)
            except RedisUnreachable:
                raise
            except OpenAgentsError as error:
                _log_not_resumed(record.run_id, error)
                continue
            yield record.run_id

    def _ended_runs_matching(self, filters: RunFilters) -> Iterator[RunRecord]:
        run_filter, cursor = _ended_runs(filters), None
        while True:
            page = self.store.execute(list_runs(self.store.keys, run_filter, limit=MAX_LIMIT, cursor=cursor))
            yield from (record for record in page if _may_be_resumed(record))
            if (cursor := page.next_cursor) is None:
                return

    def workers(self) -> list[WorkerInfo]:
        """The worker processes: their queues and agents, their number of runs, and their health."""
        return list(self.store.execute(read_workers(self.store.keys)))

    def queues(self) -> list[QueueInfo]:
        """The queues of runs: waiting runs, waiting times and consumers. It scans all keys of Redis."""
        return list(self._fleet().queues)

    def agents(self) -> list[AgentInfo]:
        """The agents that workers have announced, and the workers that serve each of them now."""
        return list(self._fleet().agents)

    def problems(self) -> list[Problem]:
        """The unreadable records among the 1,000 runs that were accepted last."""
        return list(self.store.execute(list_problems(self.store.keys)))

    def put_aside(self) -> list[PutAside]:
        """The invalid messages that were put aside (dead letters): newest first, at most 100.

        They are kept as long as runs.
        """
        return list(self.store.execute(read_put_aside(self.store.keys)))

    def _fleet(self) -> Fleet:
        return self.store.execute(read_fleet(self.store.keys, self.settings.queue))


class AsyncOperations(HasPublishingApp):
    """The methods of `AsyncClient` for operators."""

    store: AsyncStore

    async def record(self, run_id: str) -> RunRecord:
        raise NotImplementedError

    def handle(self, run_id: str) -> AsyncRunHandle[Any]:
        raise NotImplementedError

    async def resume(self, run_id: str, *, by: str | None = None) -> AsyncRunHandle[Any]:
        """The same as `Client.resume`."""
        started_s, by = time.monotonic(), optional_text("by", by)
        app, settings = self._publishing.to_submit()
        accepted = await aresume(self.store, await self.record(run_id), settings=settings, by=by or "")
        await asyncio.to_thread(send_accepted, app, accepted, started_s)
        return self.handle(run_id)

    async def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> AsyncIterator[str]:
        """The same as `Client.resume_all`."""
        by = optional_text("by", by)
        _ = self._publishing.to_submit()
        async for record in self._ended_runs_matching(filters):
            if dry_run:
                yield record.run_id
                continue
            try:
                await self.resume(record.run_id, by=by)
            except RedisUnreachable:
                raise
            except OpenAgentsError as error:
                _log_not_resumed(record.run_id, error)
                continue
            yield record.run_id

    async def _ended_runs_matching(self, filters: RunFilters) -> AsyncIterator[RunRecord]:
        run_filter, cursor = _ended_runs(filters), None
        while True:
            plan = list_runs(self.store.keys, run_filter, limit=MAX_LIMIT, cursor=cursor)
            page = await self.store.execute(plan)
            for record in page:
                if _may_be_resumed(record):
                    yield record
            if (cursor := page.next_cursor) is None:
                return

    async def workers(self) -> list[WorkerInfo]:
        """The same as `Client.workers`."""
        return list(await self.store.execute(read_workers(self.store.keys)))

    async def queues(self) -> list[QueueInfo]:
        """The same as `Client.queues`."""
        return list((await self._fleet()).queues)

    async def agents(self) -> list[AgentInfo]:
        """The same as `Client.agents`."""
        return list((await self._fleet()).agents)

    async def problems(self) -> list[Problem]:
        """The same as `Client.problems`."""
        return list(await self.store.execute(list_problems(self.store.keys)))

    async def put_aside(self) -> list[PutAside]:
        """The same as `Client.put_aside`."""
        return list(await self.store.execute(read_put_aside(self.store.keys)))

    async def _fleet(self) -> Fleet:
        return await self.store.execute(read_fleet(self.store.keys, self.settings.queue))


def send_accepted(app: Celery, accepted: Accepted, started_s: float) -> None:
    """Send the messages for an accepted run.

    If more than 1.5 seconds have passed since `started_s` (of `time.monotonic()`), they are left to the
    rescue loop of a worker, so that the caller does not wait longer.
    """
    if time.monotonic() - started_s > SEND_WITHIN_S:
        log.warning(
            "run.message_left",
            run_id=accepted.run_id,
            hint="the run is accepted; a worker will send its message",
        )
        return
    if accepted.first:
        send_first(app, accepted.first)
    if accepted.also:
        send_wakes(app, [accepted.also])


def _ended_runs(filters: RunFilters) -> RunFilter:
    state = filters.get("state") or RunState.FAILED
    return RunFilter.of({**filters, "state": state})


def _may_be_resumed(record: RunRecord) -> bool:
    return record.state in (RunState.FAILED, RunState.CANCELLED)


def _log_not_resumed(run_id: str, error: OpenAgentsError) -> None:
    log.warning("run.not_resumed", run_id=run_id, code=error.code, error=error.message, hint=error.hint)
