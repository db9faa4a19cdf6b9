"""Operations. What clients offer to whoever runs a deployment: resume runs, look at workers and queues."""

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
from openagents_worker.producer.publishing_app import Publishes
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

SEND_WITHIN_S = 1.5  # publishing takes up to three seconds, and a submission five in all

log = get_logger(__name__)


class Operations(Publishes):
    """The part of `Client` that operators use."""

    store: Store

    def record(self, run_id: str) -> RunRecord:
        raise NotImplementedError

    def handle(self, run_id: str) -> RunHandle[Any]:
        raise NotImplementedError

    def resume(self, run_id: str, *, by: str | None = None) -> RunHandle[Any]:
        """Let a run that has failed or was cancelled go on from its last checkpoint, in a new life.

        One that ended before it had a checkpoint begins. `by` is who wants it; it stands in the event
        `run.resumed`. A run that is not over goes on as it is. Raises `RunNotFound`, `RunConflict` for a run
        that has completed, `ConfigError` for one that is not durable and was executed, or where two apps are
        registered.
        """
        began, by = time.monotonic(), optional_text("by", by)
        app, settings = self._publishing.to_submit()
        accepted = resume(self.store, self.record(run_id), settings=settings, by=by or "")
        send_accepted(app, accepted, began)
        return self.handle(run_id)

    def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> Iterator[str]:
        """Resume every run that passes the filters, newest first; gives the id of each that goes on.

        Without a `state` these are the failed ones. A run that cannot be resumed is left out, with the
        warning `run.not_resumed` in the log. With `dry_run` nothing is resumed: it gives the ids that would
        be. Raises `ConfigError` where two apps are registered.
        """
        by = optional_text("by", by)
        _ = self._publishing.to_submit()
        for record in self._ended(filters):
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

    def _ended(self, filters: RunFilters) -> Iterator[RunRecord]:
        wanted, cursor = _ended_runs(filters), None
        while True:
            page = self.store.execute(list_runs(self.store.keys, wanted, limit=MAX_LIMIT, cursor=cursor))
            yield from (record for record in page if _may_be_resumed(record))
            if (cursor := page.next_cursor) is None:
                return

    def workers(self) -> list[WorkerInfo]:
        """The worker processes: what each serves, how many runs it works on, and how it does."""
        return list(self.store.execute(read_workers(self.store.keys)))

    def queues(self) -> list[QueueInfo]:
        """The queues of runs: what waits in each, for how long, who consumes it. Looks through all keys."""
        return list(self._fleet().queues)

    def agents(self) -> list[AgentInfo]:
        """The agents that workers have announced, and who serves each of them now."""
        return list(self._fleet().agents)

    def problems(self) -> list[Problem]:
        """What is stored and cannot be read, among the 1,000 runs that were accepted last."""
        return list(self.store.execute(list_problems(self.store.keys)))

    def put_aside(self) -> list[PutAside]:
        """What nobody could use and was put aside, newest first, at most 100: kept as long as runs are."""
        return list(self.store.execute(read_put_aside(self.store.keys)))

    def _fleet(self) -> Fleet:
        return self.store.execute(read_fleet(self.store.keys, self.settings.queue))


class AsyncOperations(Publishes):
    """The part of `AsyncClient` that operators use."""

    store: AsyncStore

    async def record(self, run_id: str) -> RunRecord:
        raise NotImplementedError

    def handle(self, run_id: str) -> AsyncRunHandle[Any]:
        raise NotImplementedError

    async def resume(self, run_id: str, *, by: str | None = None) -> AsyncRunHandle[Any]:
        """As `Client.resume`."""
        began, by = time.monotonic(), optional_text("by", by)
        app, settings = self._publishing.to_submit()
        accepted = await aresume(self.store, await self.record(run_id), settings=settings, by=by or "")
        await asyncio.to_thread(send_accepted, app, accepted, began)
        return self.handle(run_id)

    async def resume_all(
        self, *, by: str | None = None, dry_run: bool = False, **filters: Unpack[RunFilters]
    ) -> AsyncIterator[str]:
        """As `Client.resume_all`."""
        by = optional_text("by", by)
        _ = self._publishing.to_submit()
        async for record in self._ended(filters):
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

    async def _ended(self, filters: RunFilters) -> AsyncIterator[RunRecord]:
        wanted, cursor = _ended_runs(filters), None
        while True:
            plan = list_runs(self.store.keys, wanted, limit=MAX_LIMIT, cursor=cursor)
            page = await self.store.execute(plan)
            for record in page:
                if _may_be_resumed(record):
                    yield record
            if (cursor := page.next_cursor) is None:
                return

    async def workers(self) -> list[WorkerInfo]:
        """As `Client.workers`."""
        return list(await self.store.execute(read_workers(self.store.keys)))

    async def queues(self) -> list[QueueInfo]:
        """As `Client.queues`."""
        return list((await self._fleet()).queues)

    async def agents(self) -> list[AgentInfo]:
        """As `Client.agents`."""
        return list((await self._fleet()).agents)

    async def problems(self) -> list[Problem]:
        """As `Client.problems`."""
        return list(await self.store.execute(list_problems(self.store.keys)))

    async def put_aside(self) -> list[PutAside]:
        """As `Client.put_aside`."""
        return list(await self.store.execute(read_put_aside(self.store.keys)))

    async def _fleet(self) -> Fleet:
        return await self.store.execute(read_fleet(self.store.keys, self.settings.queue))


def send_accepted(app: Celery, accepted: Accepted, began: float) -> None:
    """Send what an accepted run needs sent, unless the caller has waited long enough: rescue does it then."""
    if time.monotonic() - began > SEND_WITHIN_S:
        log.warning(
            "run.message_left", run_id=accepted.run_id, hint="accepted; a worker's rescue loop sends it"
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
