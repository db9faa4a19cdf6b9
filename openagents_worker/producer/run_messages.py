"""Messages to runs. The only place that gives handles their methods to send something to a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from openagents_worker.models import RunBudget
from openagents_worker.producer import sending
from openagents_worker.producer.connection import AsyncConnection, Connection

__all__ = ["AsyncRunMessages", "RunMessages"]


class RunMessages:
    """The methods of `RunHandle` that send something to its run."""

    id: str
    connection: Connection

    def send(self, name: str, value: JsonValue = None, *, message_id: str | None = None) -> None:
        """Send a value to the run, which it gets from `context.receive(name)`. It is kept until then.

        The same `message_id` counts once: give one if you repeat a call. Raises `RunNotFound`, `RunConflict`
        if the run is over, `RequestInvalid`, and `RequestTooLarge`.
        """
        self.connection.execute(sending.send(self.connection.publishing, self.id, name, value, message_id))

    def steer(self, text: str, *, by: str | None = None, message_id: str | None = None) -> None:
        """Put a user message into the run: the model sees it in its next call, in every pattern of ours.

        It does not interrupt anything. The event `run.steered` says that the run has it. A message that
        arrives after the last call of the model is not used. Arguments and errors as those of `send`.
        """
        self.connection.execute(sending.steer(self.connection.publishing, self.id, text, by, message_id))

    def extend(self, budget: RunBudget | Mapping[str, Any], *, by: str | None = None) -> None:
        """Extend the budget of the run: limits of steps, tool calls, cost or tokens, none of them smaller.

        A run that waits because its budget is used up (`on_breach="pause"`) continues. Any other run uses the
        extension when it needs it. Raises as `send` does.
        """
        connection = self.connection
        plan = sending.extend(connection.publishing, connection.store.keys, self.id, budget, by)
        connection.execute(plan)


class AsyncRunMessages:
    """The methods of `AsyncRunHandle` that send something to its run."""

    id: str
    connection: AsyncConnection

    async def send(self, name: str, value: JsonValue = None, *, message_id: str | None = None) -> None:
        """Send a value to the run, as `RunHandle.send` does."""
        plan = sending.send(self.connection.publishing, self.id, name, value, message_id)
        await self.connection.execute(plan)

    async def steer(self, text: str, *, by: str | None = None, message_id: str | None = None) -> None:
        """Put a user message into the run, as `RunHandle.steer` does."""
        plan = sending.steer(self.connection.publishing, self.id, text, by, message_id)
        await self.connection.execute(plan)

    async def extend(self, budget: RunBudget | Mapping[str, Any], *, by: str | None = None) -> None:
        """Extend the budget of the run, as `RunHandle.extend` does."""
        connection = self.connection
        plan = sending.extend(connection.publishing, connection.store.keys, self.id, budget, by)
        await connection.execute(plan)
