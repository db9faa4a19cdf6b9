"""The built-in tool `mcp`: a server's tools as a toolset. One instance serves one attempt of a run."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

from openagents_worker.agents.plugin import Plugin
from openagents_worker.errors import (
    OpenAgentsError,
    PermanentToolError,
    ToolAuthError,
    ToolError,
    ToolNotFoundError,
    ToolRateLimitError,
    ToolUnavailableError,
)
from openagents_worker.jsontext import canonical_json
from openagents_worker.redaction import safe_message
from openagents_worker.tools.builtin.environment import may_read
from openagents_worker.tools.mcp.connection import ConnectionFailed, McpConnection, McpEndpoint
from openagents_worker.tools.mcp.connections import ConnectionLease, Connections, McpServers
from openagents_worker.tools.mcp.http import SESSION_MAY_BE_GONE
from openagents_worker.tools.mcp.listed import McpTool, listed_tools
from openagents_worker.tools.mcp.lists import MAX_LISTED, Found, all_pages, all_tools
from openagents_worker.tools.mcp.options import McpOptions, check_installed, find_command
from openagents_worker.tools.mcp.results import (
    MAX_ERROR_CHARS,
    original_result,
    prompt_result,
    resource_result,
    text_of_error,
    tool_result,
)
from openagents_worker.tools.mcp.sdk import RequestFailed
from openagents_worker.tools.mcp.tokens import ResolveKey, bearer_token

__all__ = ["McpToolset"]

REFUSES = (401, 403)


class McpToolset(Plugin):
    """The tools of a server that speaks the Model Context Protocol.

    The model gets each of its tools with the name, description and schema that the server gives. What the
    server says about a tool (`readOnlyHint` and so on) decides whether its calls run concurrently, whether
    they may be repeated, and whether they need an approval; `overrides` take precedence.
    """

    class Config(McpOptions):
        """Options of the built-in tool `mcp`."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        check_installed()
        self.options: McpOptions = self.cfg
        server = self.options.server
        server.remember_secrets()
        passed = {name: value for name, value in os.environ.items() if may_read(name, server.env_passthrough)}
        self._env = {**passed, **server.env}
        program = find_command(server, self._env)
        self._argv = () if program is None else (program, *server.args)
        self._tool_id = "mcp"
        self._servers: McpServers | None = None
        self._resolve: ResolveKey | None = None
        self._tools: dict[str, Any] = {}
        self._leases: dict[str, ConnectionLease] = {}
        self._leasing = asyncio.Lock()
        self._in_flight: dict[str, _SharedCall] = {}

    def attach(self, tool_id: str, servers: McpServers, resolve: ResolveKey | None) -> None:
        """Give it what the worker has: its id in the agents file, the connections, the source of tokens."""
        self._tool_id, self._servers, self._resolve = tool_id, servers, resolve

    # --- the contract of a toolset -----------------------------------------------------------------------

    async def open(self) -> None:
        """Nothing: a connection is opened by what needs one."""

    async def list(self, context: Any) -> Sequence[McpTool]:
        """The tools of the server now, or as they were known not long ago."""
        started = time.monotonic()
        result = "ok"
        try:
            key, endpoint = await self._endpoint(context)
            found = None if self.options.probe_on_preflight else self._connections.known_tools(key)
            result = "ok" if found is None else "cached-ok"
            if found is None:
                found = await self._asked_for_tools(context, key, endpoint)
        except OpenAgentsError as error:
            await self._emit_preflight(context, "error", started, error=str(error))
            raise
        await self._emit_preflight(context, result, started)
        # In a thread: reading the schemas of a thousand tools takes a second.
        return await asyncio.to_thread(listed_tools, self.options, self._tool_id, found)

    def recorded(self, tools: Sequence[Any]) -> None:
        """The tools with which the run began. Called in each attempt before the first call."""
        self._tools = {tool.name: tool for tool in tools}

    async def warm_up(self, context: Any) -> None:
        """Open the pooled connection before the pattern begins, if the agents file says so."""
        if self.options.prelaunch == "eager":
            key, endpoint = await self._endpoint(context)
            async with self._translated():
                lease = await self._lease(context, key, endpoint)
            if lease.entry is None:  # all places of the pool are taken
                self._connections.release(lease)

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        """The result of a tool. Raises `ToolError` and its subclasses."""
        tool = self._tools.get(tool_id)
        source = getattr(tool, "source", None) or {}
        if own := source.get("own"):
            return await self._own_call(str(own), params, context)
        if source.get("one"):
            return await self._one_call(params, context)
        remote = source.get("tool")
        if not isinstance(remote, str):
            raise ToolNotFoundError(f"the MCP server {self._shown} has no tool {tool_id!r}", tool_id)
        may_repeat = bool(getattr(tool, "durable_idempotent", False))
        call = self._call_of(remote, params, context, may_repeat=may_repeat)
        if may_repeat and self.options.dedup_inflight:
            result = await self._shared(canonical_json([remote, params]), call)
        else:
            result = await call()
        return tool_result(result, tool_id)

    async def close(self) -> None:
        """Give the connections back. Called at the end of the attempt."""
        leases = [*self._leases.values()]
        self._leases.clear()
        for lease in leases:
            self._connections.release(lease)

    # --- calls -------------------------------------------------------------------------------------------

    def _call_of(
        self, remote: str, arguments: dict[str, Any], context: Any, *, may_repeat: bool
    ) -> Callable[[], Coroutine[Any, Any, dict[str, Any]]]:
        async def ask(connection: McpConnection) -> dict[str, Any]:
            try:
                result = await connection.call(remote, arguments, context.idempotency_key)
            except RequestFailed as failed:
                if failed.is_unknown and await self._is_gone(connection, remote):
                    raise self._gone(remote) from failed
                raise
            if result.get("isError") and _says_unknown(result) and await self._is_gone(connection, remote):
                raise self._gone(remote)
            return result

        async def call() -> dict[str, Any]:
            result: dict[str, Any] = await self._with_connection(context, ask, may_repeat=may_repeat)
            return result

        return call

    async def _one_call(self, params: dict[str, Any], context: Any) -> dict[str, Any]:
        remote = str(params.get("tool"))
        if self.options.tools and remote not in self.options.tools:
            raise PermanentToolError(
                f"the tool {remote[:200]!r} is not among the tools of the agent", self._tool_id
            )
        call = self._call_of(remote, dict(params.get("arguments") or {}), context, may_repeat=False)
        return original_result(await call())

    async def _own_call(self, own: str, params: dict[str, Any], context: Any) -> Any:
        """List or read resources and prompts."""

        async def ask(connection: McpConnection) -> Any:
            async with asyncio.timeout(self.options.call_timeout_ms / 1000):
                match own:
                    case "list_resources":
                        return await all_pages(connection, "resources/list", "resources", MAX_LISTED)
                    case "read_resource":
                        return resource_result(await connection.request("resources/read", uri=params["uri"]))
                    case "list_prompts":
                        return await all_pages(connection, "prompts/list", "prompts", MAX_LISTED)
                    case "get_prompt":
                        arguments = {"arguments": params["arguments"]} if "arguments" in params else {}
                        found = await connection.request("prompts/get", name=params["name"], **arguments)
                        return prompt_result(found)
            raise ToolNotFoundError(f"there is no tool {own!r}", self._tool_id)

        return await self._with_connection(context, ask, may_repeat=True)

    async def _with_connection(
        self, context: Any, ask: Callable[[McpConnection], Coroutine[Any, Any, Any]], *, may_repeat: bool
    ) -> Any:
        """The answer over an open connection. If the connection is lost, a second one is opened within the
        call, unless the server may have executed a call that must not be repeated."""
        key, endpoint = await self._endpoint(context)
        async with self._translated():
            lease = await self._lease(context, key, endpoint)
            try:
                return await self._asked(ask, key, lease)
            except ConnectionFailed as failed:
                self._connections.forget_tools(key)
                if failed.may_have_run and not may_repeat:
                    raise
                may_be_gone = failed.status == SESSION_MAY_BE_GONE and lease.entry is not None
                if not failed.is_gone and not (may_be_gone and not await lease.connection.answers()):
                    raise
            return await self._asked(ask, key, await self._lease(context, key, endpoint))

    async def _asked(
        self, ask: Callable[[McpConnection], Coroutine[Any, Any, Any]], key: str, lease: ConnectionLease
    ) -> Any:
        """The answer over one connection. It is given back if it is for this call only, or is lost."""
        try:
            return await ask(lease.connection)
        finally:
            if lease.entry is None or not lease.connection.is_open:
                self._give_back(key, lease)

    async def _shared(self, key: str, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The result of an identical call that is already being made, or of this one."""
        shared = self._in_flight.get(key)
        if shared is None or shared.is_over:
            shared = self._in_flight[key] = _SharedCall(asyncio.create_task(call(), name="mcp shared call"))
        try:
            return await shared.result()
        finally:
            if shared.is_over and self._in_flight.get(key) is shared:
                del self._in_flight[key]

    # --- connections -------------------------------------------------------------------------------------

    @property
    def _connections(self) -> Connections:
        if self._servers is None:
            self._servers = McpServers()
        return self._servers.here()

    @property
    def _shown(self) -> str:
        return self.options.server.shown

    async def _endpoint(self, context: Any) -> tuple[str, McpEndpoint]:
        """How to connect for this run, and the key of the server with the token."""
        server = self.options.server
        token = await bearer_token(server, self._tool_id, context, self._resolve)
        headers = dict(server.headers)
        identity = server.identity()
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
            identity += sha256(token.encode()).hexdigest()
        return identity, McpEndpoint(server, self._argv, self._env, headers)

    async def _lease(self, context: Any, key: str, endpoint: McpEndpoint) -> ConnectionLease:
        """A connection for a call. A pooled one is kept until the end of the attempt."""
        if self.options.connection_mode == "per_call":
            return await self._take(context, key, endpoint, None)
        async with self._leasing:
            kept = self._leases.get(key)
            if kept is not None and await kept.connection.answers():
                return kept
            if kept is not None:
                self._give_back(key, kept)
            shared = context.session_id if self.options.pool_scope == "session" else ""
            lease = await self._take(context, key, endpoint, f"{key} {shared}")
            if lease.entry is not None:
                self._leases[key] = lease
            return lease

    async def _take(self, context: Any, key: str, endpoint: McpEndpoint, pool: str | None) -> ConnectionLease:
        lease, is_new = await self._connections.acquire(endpoint, pool)
        lease.connection.when_tools_change = partial(self._connections.forget_tools, key)
        if is_new:
            try:
                await self._emit_connect(context)
            except BaseException:  # the attempt stops: nobody else knows the connection
                self._connections.release(lease)
                raise
        return lease

    def _give_back(self, key: str, lease: ConnectionLease) -> None:
        if lease.entry is not None and self._leases.get(key) is not lease:
            return  # another call has already given it back
        if self._leases.get(key) is lease:
            del self._leases[key]
        self._connections.release(lease)

    async def _asked_for_tools(self, context: Any, key: str, endpoint: McpEndpoint) -> Found:
        async def ask(connection: McpConnection) -> tuple[Found, bool]:
            connection.has_changed_tools = False
            async with asyncio.timeout(self.options.server.init_timeout_s):
                found = await all_tools(connection)
            return found, connection.has_changed_tools

        listed: tuple[Found, bool] = await self._with_connection(context, ask, may_repeat=True)
        found, has_changed_meanwhile = listed
        if not has_changed_meanwhile:
            self._connections.remember_tools(key, found)
        return found

    async def _is_gone(self, connection: McpConnection, remote: str) -> bool:
        """Whether the server has no tool with this name any more."""
        try:
            async with asyncio.timeout(self.options.server.init_timeout_s):
                found = await all_tools(connection)
        except (ConnectionFailed, RequestFailed, TimeoutError):
            return False
        return all(tool.get("name") != remote for tool in found)

    def _gone(self, remote: str) -> ToolNotFoundError:
        return ToolNotFoundError(
            f"the MCP server {self._shown} no longer has the tool {remote!r}",
            self._tool_id,
            hint="a run keeps the tools that it began with; a new run gets the current ones",
        )

    # --- errors and events -------------------------------------------------------------------------------

    def _translated(self) -> _Translated:
        return _Translated(self._tool_id, self._shown)

    async def _emit_connect(self, context: Any) -> None:
        server, mode = self._shown, self.options.connection_mode
        await context.emit("tool.mcp.connect", tool_id=self._tool_id, server=server, mode=mode)

    async def _emit_preflight(self, context: Any, result: str, started: float, **more: str) -> None:
        duration_ms = round((time.monotonic() - started) * 1000)
        await context.emit(
            "tool.preflight", tool_id=self._tool_id, result=result, duration_ms=duration_ms, **more
        )


class _SharedCall:
    """A call with several waiters. It is cancelled when none of them waits any more."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._waiters = 0
        self._is_cancelled = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended or is being cancelled, so that nobody else can wait for it."""
        return self._is_cancelled or self._task.done()

    async def result(self) -> Any:
        self._waiters += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._waiters -= 1
            if not self._waiters and not self._task.done():
                self._is_cancelled = True
                self._task.cancel()
                await asyncio.wait({self._task})


class _Translated:
    """`async with …` turns errors of connections and servers into errors of tools."""

    def __init__(self, tool_id: str, shown: str) -> None:
        self._tool_id, self._shown = tool_id, shown

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RequestFailed):
            text = safe_message(f"the MCP server {self._shown} answers: {error}", MAX_ERROR_CHARS)
            raise ToolError(text, self._tool_id) from error
        if isinstance(error, ConnectionFailed):
            raise self._of(error) from error
        if isinstance(error, TimeoutError):
            text = f"the MCP server {self._shown} has not answered in time"
            raise ToolUnavailableError(text, self._tool_id) from error

    def _of(self, failed: ConnectionFailed) -> ToolError:
        status = failed.status
        error: ToolError
        if failed.is_final:
            return PermanentToolError(failed.reason, self._tool_id)
        if status in REFUSES:
            return ToolAuthError(f"{failed.reason}: it rejects the credentials", self._tool_id)
        if status == 429:
            error = ToolRateLimitError(failed.reason, self._tool_id, failed.retry_after_ms)
        elif status is not None and status < 500 and status != 404:
            return PermanentToolError(failed.reason, self._tool_id)
        else:
            error = ToolUnavailableError(failed.reason, self._tool_id)
        error.was_executed = None if failed.may_have_run else False
        return error


def _says_unknown(result: Mapping[str, Any]) -> bool:
    """Whether an error result may mean that the server does not have the tool."""
    text = text_of_error(result).lower()
    return "tool" in text and ("unknown" in text or "not found" in text)
