"""Agents as tools of an MCP server: the only place that turns their calls into runs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from openagents_worker.agents.plugin_refs import function_name
from openagents_worker.cli.mcp.protocol import ToolRequest
from openagents_worker.cli.mcp.tree import WatchedTree, asking_runs, run_that_asks
from openagents_worker.errors import OpenAgentsError, RequestInvalid
from openagents_worker.events import RunEvent
from openagents_worker.jsontext import LARGEST_INTEGER, dumps
from openagents_worker.models import RunRecord, RunResult, StopReason
from openagents_worker.producer.client import AsyncClient
from openagents_worker.producer.handle import AsyncRunHandle
from openagents_worker.store.stored_events import history

__all__ = ["AgentTools", "ServedAgent"]

MAX_EVENTS = 100
MAX_SHOWN_CHARS = 300
KEY = "openagents-worker/idempotencyKey"
"""The entry of `_meta` with which a worker of this library says which call it makes."""

TEXT = {"type": "string"}
RUN_ID = {"type": "string", "description": "The id of the run, from the result of an agent."}
CALL_ID = {"type": "string", "description": "The id of the call, from `approvals` of the result."}
ASKING_ID = {"type": "string", "description": "The id of the run, from `approvals` of the result."}
NOTE = {"type": "string", "description": "A note for the events of the run."}


@dataclass(frozen=True, slots=True)
class ServedAgent:
    """An agent that is offered as a tool."""

    id: str
    description: str


def _tool(
    name: str, description: str, properties: Mapping[str, Any], required: Sequence[str], *, read_only: bool
) -> dict[str, Any]:
    schema = {"type": "object", "properties": dict(properties), "required": list(required)}
    hints = {"readOnlyHint": read_only, **({} if read_only else {"destructiveHint": False})}
    return {
        "name": name,
        "description": description,
        "inputSchema": {**schema, "additionalProperties": False},
        "annotations": hints,
    }


RUN_TOOLS = (
    _tool(
        "run_result",
        "The result of a run, or its state if it has not ended. `wait` waits for the end, or until a person "
        "has to decide about a call, of the run or of one that it waits for.",
        {"run_id": RUN_ID, "wait": {"type": "boolean"}},
        ["run_id"],
        read_only=True,
    ),
    _tool(
        "run_events",
        f"The events of a run after the number `after`, at most {MAX_EVENTS}.",
        {"run_id": RUN_ID, "after": {"type": "integer", "minimum": 0}},
        ["run_id"],
        read_only=True,
    ),
    _tool(
        "approve_call",
        "Approves a call of a tool that waits for an approval. `arguments` replace those of the model.",
        {"run_id": ASKING_ID, "call_id": CALL_ID, "arguments": {"type": "object"}, "note": NOTE},
        ["run_id", "call_id"],
        read_only=False,
    ),
    _tool(
        "deny_call",
        "Denies a call of a tool that waits for an approval. The agent gets the note.",
        {"run_id": ASKING_ID, "call_id": CALL_ID, "note": NOTE},
        ["run_id", "call_id"],
        read_only=False,
    ),
    _tool("cancel_run", "Cancels a run.", {"run_id": RUN_ID, "reason": TEXT}, ["run_id"], read_only=False),
)

AGENT_ARGUMENTS = {
    "input": {"type": "string", "description": "What the agent is asked to do."},
    "session": {
        "type": "string",
        "description": "The conversation to continue, from an earlier result. Without it, a new one begins.",
    },
    "wait": {
        "type": "boolean",
        "description": "false: returns the id of the run at once; `run_result` gives the result later.",
    },
}


class AgentTools:
    """Agents, and what one does with their runs, as tools. `by` is who decides about calls."""

    instructions = (
        "Each agent is a tool. Its run continues if this connection ends; run_result gives its result later. "
        "If a result says that the run waits for a person, approve_call and deny_call decide."
    )

    def __init__(self, client: AsyncClient, agents: Sequence[ServedAgent], *, by: str) -> None:
        self._client = client
        self._by = by
        taken = {tool["name"] for tool in RUN_TOOLS}
        self._agents: dict[str, ServedAgent] = {}
        for agent in agents:
            name = function_name(agent.id, taken)
            taken.add(name)
            self._agents[name] = agent

    async def tools(self) -> list[dict[str, Any]]:
        agents = [
            _tool(name, agent.description, AGENT_ARGUMENTS, ["input"], read_only=False)
            for name, agent in self._agents.items()
        ]
        return [*agents, *RUN_TOOLS]

    async def call(self, asked: ToolRequest) -> dict[str, Any]:
        try:
            if (agent := self._agents.get(asked.name)) is not None:
                return await self._run(agent, asked)
            return await _METHODS[asked.name](self, asked)
        except OpenAgentsError as error:
            hint = f" ({error.hint})" if error.hint else ""
            return _result({"code": error.code}, f"{error.code}: {error}{hint}", is_error=True)

    # --- runs --------------------------------------------------------------------------------------------

    async def _run(self, agent: ServedAgent, asked: ToolRequest) -> dict[str, Any]:
        key = asked.meta.get(KEY)
        of_key = f"mcp-{sha256(key.encode()).hexdigest()[:32]}" if isinstance(key, str) else None
        session_id = _text(asked, "session") or f"mcp-{of_key or uuid.uuid4().hex}"
        request = {
            "agent_id": agent.id,
            "session_id": session_id,
            "input_text": _text(asked, "input", required=True),
            **({"run_id": of_key} if of_key else {}),
        }
        handle = await self._client.submit(request)  # a model may have named a session that is not an id
        if asked.arguments.get("wait") is False:
            return _result({"run_id": handle.id, "session": session_id, "state": "queued"})
        return await self._watched(handle, asked, cancels=True)

    async def _watched(
        self, handle: AsyncRunHandle[Any], asked: ToolRequest, *, cancels: bool, after: int = 0
    ) -> dict[str, Any]:
        """Wait for the end of a run, or until a person has to decide. Each event is reported."""
        try:
            async with WatchedTree(self._client, handle.id, after) as tree:
                async for run_id, event in tree.events():
                    if event.seq is not None and run_id == handle.id:
                        await asked.report(_shown(event))
                    if event.name == "run.waiting" and (waiting := await self._waiting(handle)) is not None:
                        return waiting
            return await self._ended(handle)
        except asyncio.CancelledError:
            if cancels and asked.is_withdrawn():  # and not if the client has ended
                await asyncio.shield(self._client.cancel(handle.id, reason="cancelled by the MCP client"))
            raise

    async def _ended(self, handle: AsyncRunHandle[Any]) -> dict[str, Any]:
        record = await handle.record()
        assert record.result is not None, "its last event was read"
        return _ended(record, record.result)

    async def _waiting(self, handle: AsyncRunHandle[Any]) -> dict[str, Any] | None:
        """What a parked run shows, if it waits for a person, or for a child that does."""
        record = await handle.record()
        asking = await asking_runs(self._client, handle.id)
        if not asking:
            return None
        shown = [
            {
                "run_id": each.run_id,
                "call_id": each.call_id,
                "tool": each.tool_id,
                "arguments": each.arguments,
            }
            for run in asking
            for each in run.approvals
        ]
        waits = [each.model_dump(mode="json", exclude_none=True) for each in record.waiting]
        waits += [
            {"run_id": run.record.run_id, **each.model_dump(mode="json", exclude_none=True)}
            for run in asking
            for each in run.waits
            if run.record.run_id != record.run_id
        ]
        found = {"state": record.state.value, "waits_for": waits, "approvals": shown}
        return _result({"run_id": record.run_id, "session": record.session_id, **found})

    # --- the tools for runs ------------------------------------------------------------------------------

    async def _run_result(self, asked: ToolRequest) -> dict[str, Any]:
        handle = self._handle(asked)
        record = await handle.record()
        if record.result is not None:
            return _ended(record, record.result)
        if (waiting := await self._waiting(handle)) is not None:
            return waiting
        if asked.arguments.get("wait"):
            return await self._watched(handle, asked, cancels=False)
        return _result({"run_id": record.run_id, "session": record.session_id, "state": record.state.value})

    async def _run_events(self, asked: ToolRequest) -> dict[str, Any]:
        after = asked.arguments.get("after", 0)
        if type(after) is not int or not 0 <= after <= LARGEST_INTEGER:
            raise RequestInvalid("after must be a whole number, at least 0")
        record = await self._handle(asked).record()
        keys = self._client.store.keys
        stored = await self._client.store.execute(history(keys, record.run_id, after=after, most=MAX_EVENTS))
        events = [{"seq": event.seq, "name": event.name, "payload": event.payload} for event in stored]
        return _result({"run_id": record.run_id, "state": record.state.value, "events": events})

    async def _approve(self, asked: ToolRequest) -> dict[str, Any]:
        arguments = asked.arguments.get("arguments")
        call_id = _text(asked, "call_id", required=True)
        decision = await (await self._asking(asked, call_id)).approve(
            call_id, by=self._by, arguments=arguments, note=_text(asked, "note") or None
        )
        return _result({"call_id": call_id, "action": decision.action})

    async def _deny(self, asked: ToolRequest) -> dict[str, Any]:
        call_id = _text(asked, "call_id", required=True)
        run = await self._asking(asked, call_id)
        decision = await run.deny(call_id, by=self._by, note=_text(asked, "note") or None)
        return _result({"call_id": call_id, "action": decision.action})

    async def _cancel(self, asked: ToolRequest) -> dict[str, Any]:
        run_id = _text(asked, "run_id", required=True)
        answer = await self._client.cancel(run_id, reason=_text(asked, "reason") or None)
        return _result({"run_id": run_id, "answer": str(answer)})

    async def _asking(self, asked: ToolRequest, call_id: str) -> AsyncRunHandle[Any]:
        """The run whose call waits: the named one, or one below it. Raises as `run_that_asks`."""
        run_id = _text(asked, "run_id", required=True)
        return self._client.handle(await run_that_asks(self._client, run_id, call_id))

    def _handle(self, asked: ToolRequest) -> AsyncRunHandle[Any]:
        return self._client.handle(_text(asked, "run_id", required=True))


_METHODS = {
    "run_result": AgentTools._run_result,
    "run_events": AgentTools._run_events,
    "approve_call": AgentTools._approve,
    "deny_call": AgentTools._deny,
    "cancel_run": AgentTools._cancel,
}


def _ended(record: RunRecord, result: RunResult[Any]) -> dict[str, Any]:
    """The result of a run that has ended."""
    found: dict[str, Any] = {
        "run_id": record.run_id,
        "session": record.session_id,
        "state": record.state.value,
        "stop_reason": result.stop_reason.value,
        "output": result.final_output,
    }
    if result.stop_reason is StopReason.COMPLETED:
        output = result.final_output
        return _result(found, output if isinstance(output, str) else dumps(output))
    details = result.error_details
    if details is not None:
        found["error"] = {"code": details.code, "message": details.message, "hint": details.hint}
    text = f"the run {record.run_id} ended as {result.stop_reason.value}"
    return _result(found, f"{text}: {details.message}" if details is not None else text, is_error=True)


def _result(found: Mapping[str, Any], text: str | None = None, *, is_error: bool = False) -> dict[str, Any]:
    content = [{"type": "text", "text": dumps(found) if text is None else text}]
    return {"content": content, "structuredContent": dict(found), "isError": is_error}


def _text(asked: ToolRequest, name: str, *, required: bool = False) -> str:
    value = asked.arguments.get(name, "")
    if not isinstance(value, str) or (required and not value):
        raise RequestInvalid(f"{name} must be a text{', which is required' if required else ''}")
    return value


def _shown(event: RunEvent) -> str:
    """An event in one line."""
    names = ("tool_id", "model", "action", "code", "error")
    values = [str(event.payload[name]) for name in names if event.payload.get(name)]
    return " ".join([event.name, *values])[:MAX_SHOWN_CHARS]
