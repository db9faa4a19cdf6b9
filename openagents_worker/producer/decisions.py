"""Decisions. The only place that gives clients and handles their methods to decide about calls."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue
from typing_extensions import Unpack

from openagents_worker.models import Approval, Decision
from openagents_worker.producer.connection import AsyncConnection, Connection
from openagents_worker.producer.deciding import ResolveAction, approve, deny, resolve
from openagents_worker.store.approvals import ApprovalFilters, list_approvals, run_approvals
from openagents_worker.store.index_pages import Page

__all__ = ["AsyncDecisions", "AsyncRunDecisions", "Decisions", "RunDecisions"]


class Decisions:
    """The methods of `Client` that decide about calls."""

    connection: Connection

    def approve(
        self,
        run_id: str,
        call_id: str,
        *,
        by: str,
        arguments: Mapping[str, JsonValue] | None = None,
        note: str | None = None,
    ) -> Decision:
        """Approve a call that waits for it. The run goes on when all calls of its turn are decided.

        `arguments` replace those of the model: give all of them. The worker checks them. `by` names who
        decides, for the events of the run. `call_id` may be the beginning of the id. Raises `RunNotFound`,
        `RequestInvalid` and, if somebody else has decided before, `ApprovalNotPending`.
        """
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(
            approve(publishing, keys, run_id, call_id, by=by, arguments=arguments, note=note)
        )

    def deny(self, run_id: str, call_id: str, *, by: str, note: str | None = None) -> Decision:
        """Deny a call that waits for an approval. The model gets `note`. Raises as `approve` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(deny(publishing, keys, run_id, call_id, by=by, note=note))

    def approvals(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[ApprovalFilters]
    ) -> Page[Approval]:
        """A page of the calls that wait for an approval. The run that asked last is the first.

        The calls of one run are on one page, which may therefore have a few more than `limit`. Raises
        `RequestInvalid` for a filter, limit or cursor that is not valid.
        """
        plan = list_approvals(self.connection.store.keys, filters, limit=limit, cursor=cursor)
        return self.connection.execute(plan)

    def resolve(
        self,
        run_id: str,
        call_id: str,
        action: ResolveAction,
        *,
        by: str,
        result: JsonValue = None,
        note: str | None = None,
    ) -> Decision:
        """Decide what becomes of a call whose outcome is unknown: its worker died while it made the call.

        `rerun` makes the call again, with the same idempotency key. `skip` continues with `result` as the
        result of the call. `fail` ends the run as failed. `call_id` may be the beginning of the id. Raises
        `RunNotFound`, `RequestInvalid` and, if somebody else has decided before, `ApprovalNotPending`.
        """
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(
            resolve(publishing, keys, run_id, call_id, action, by=by, result=result, note=note)
        )


class AsyncDecisions:
    """The methods of `AsyncClient` that decide about calls."""

    connection: AsyncConnection

    async def approve(
        self,
        run_id: str,
        call_id: str,
        *,
        by: str,
        arguments: Mapping[str, JsonValue] | None = None,
        note: str | None = None,
    ) -> Decision:
        """The same as `Client.approve`."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(
            approve(publishing, keys, run_id, call_id, by=by, arguments=arguments, note=note)
        )

    async def deny(self, run_id: str, call_id: str, *, by: str, note: str | None = None) -> Decision:
        """The same as `Client.deny`."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(deny(publishing, keys, run_id, call_id, by=by, note=note))

    async def approvals(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[ApprovalFilters]
    ) -> Page[Approval]:
        """The same as `Client.approvals`."""
        plan = list_approvals(self.connection.store.keys, filters, limit=limit, cursor=cursor)
        return await self.connection.execute(plan)

    async def resolve(
        self,
        run_id: str,
        call_id: str,
        action: ResolveAction,
        *,
        by: str,
        result: JsonValue = None,
        note: str | None = None,
    ) -> Decision:
        """The same as `Client.resolve`."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(
            resolve(publishing, keys, run_id, call_id, action, by=by, result=result, note=note)
        )


class RunDecisions:
    """The methods of `RunHandle` that decide about calls of its run."""

    id: str
    connection: Connection

    def approve(
        self,
        call_id: str,
        *,
        by: str,
        arguments: Mapping[str, JsonValue] | None = None,
        note: str | None = None,
    ) -> Decision:
        """Approve a call that waits for it, as `Client.approve` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(
            approve(publishing, keys, self.id, call_id, by=by, arguments=arguments, note=note)
        )

    def deny(self, call_id: str, *, by: str, note: str | None = None) -> Decision:
        """Deny a call that waits for an approval, as `Client.deny` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(deny(publishing, keys, self.id, call_id, by=by, note=note))

    def approvals(self) -> list[Approval]:
        """The calls of the run that wait for an approval, the oldest first."""
        return self.connection.execute(run_approvals(self.connection.store.keys, self.id))

    def resolve(
        self,
        call_id: str,
        action: ResolveAction,
        *,
        by: str,
        result: JsonValue = None,
        note: str | None = None,
    ) -> Decision:
        """Decide what becomes of a call whose outcome is unknown, as `Client.resolve` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return self.connection.execute(
            resolve(publishing, keys, self.id, call_id, action, by=by, result=result, note=note)
        )


class AsyncRunDecisions:
    """The methods of `AsyncRunHandle` that decide about calls of its run."""

    id: str
    connection: AsyncConnection

    async def approve(
        self,
        call_id: str,
        *,
        by: str,
        arguments: Mapping[str, JsonValue] | None = None,
        note: str | None = None,
    ) -> Decision:
        """Approve a call that waits for it, as `Client.approve` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(
            approve(publishing, keys, self.id, call_id, by=by, arguments=arguments, note=note)
        )

    async def deny(self, call_id: str, *, by: str, note: str | None = None) -> Decision:
        """Deny a call that waits for an approval, as `Client.deny` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(deny(publishing, keys, self.id, call_id, by=by, note=note))

    async def approvals(self) -> list[Approval]:
        """The calls of the run that wait for an approval, the oldest first."""
        return await self.connection.execute(run_approvals(self.connection.store.keys, self.id))

    async def resolve(
        self,
        call_id: str,
        action: ResolveAction,
        *,
        by: str,
        result: JsonValue = None,
        note: str | None = None,
    ) -> Decision:
        """Decide what becomes of a call whose outcome is unknown, as `Client.resolve` does."""
        publishing, keys = self.connection.publishing, self.connection.store.keys
        return await self.connection.execute(
            resolve(publishing, keys, self.id, call_id, action, by=by, result=result, note=note)
        )
