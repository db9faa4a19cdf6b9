"""The official MCP SDK: the only place that imports it, and that knows how its versions 1 and 2 differ.

Requests and results cross as plain JSON with the names of the protocol. The classes of the SDK have other
names in each version, and check a result against its schema on the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from inspect import signature
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["McpMessage", "RequestFailed", "Sdk", "load_sdk"]

CONNECTION_CLOSED = -32000
ANSWER_LOST = ("connection closed", "sse stream ended", "sse stream failed")
INVALID_ANSWER = 0


class McpMessage(BaseModel):
    """A request or a notification, as both versions send it."""

    name_param: ClassVar[str | None] = None
    """Read by version 2: the parameter that is also sent as an HTTP header. None: none is."""

    method: str
    params: dict[str, Any] | None = None


class AnyResult(BaseModel):
    """A result with the names of the protocol, unchecked."""

    model_config = ConfigDict(extra="allow")


@dataclass(eq=False)
class RequestFailed(Exception):
    """The server has answered a request with an error of JSON-RPC."""

    code: int
    message: str

    def __str__(self) -> str:
        return f"{self.message} (code {self.code})"

    @property
    def is_closed(self) -> bool:
        """Whether the SDK says this, because the answer was lost. Servers use the code for other errors."""
        return self.code == CONNECTION_CLOSED and any(text in self.message.lower() for text in ANSWER_LOST)

    @property
    def is_unknown(self) -> bool:
        """Whether the server does not know the method, or the name in its parameters."""
        return self.code in (-32601, -32602)


class Sdk:
    """The parts of the SDK that connections use."""

    def __init__(self) -> None:
        import mcp.client.session
        import mcp.client.sse
        import mcp.client.streamable_http
        import mcp.shared.exceptions
        import mcp.shared.message
        import mcp.types

        self.version = version("mcp")
        self.is_second = not self.version.startswith("1.")
        http: Any = mcp.client.streamable_http
        self.httpx: Any = http.httpx2 if self.is_second else http.httpx
        """The HTTP library of this version."""
        self._streamable_http = http.streamable_http_client
        self._limits_events = "max_sse_event_size" in signature(self._streamable_http).parameters
        self._sse: Any = mcp.client.sse.sse_client
        self._session: Any = mcp.client.session.ClientSession
        self._types: Any = mcp.types
        self._errors: type[Exception] = getattr(
            mcp.shared.exceptions, "MCPError" if self.is_second else "McpError"
        )
        self._session_message: Any = mcp.shared.message.SessionMessage
        self._implementation = self._types.Implementation(
            name="openagents-worker", version=version("openagents-worker")
        )

    # --- messages ----------------------------------------------------------------------------------------

    def parse(self, line: bytes) -> Any:
        """A message of a server, as a session reads it. Raises ValueError."""
        if self.is_second:
            return self._session_message(
                self._types.jsonrpc_message_adapter.validate_json(line, by_name=False)
            )
        return self._session_message(self._types.JSONRPCMessage.model_validate_json(line))

    def to_json(self, message: Any) -> dict[str, Any]:
        """A message of a session, as it is sent."""
        dumped: dict[str, Any] = message.message.model_dump(
            by_alias=True,
            mode="json",
            **({"exclude_unset": True} if self.is_second else {"exclude_none": True}),
        )
        return dumped

    # --- sessions ----------------------------------------------------------------------------------------

    def session(
        self, read: Any, write: Any, on_message: Callable[[Any], Awaitable[None]]
    ) -> AbstractAsyncContextManager[Any]:
        """A session over the streams of a transport. It offers the server nothing: no sampling, no roots."""
        session: AbstractAsyncContextManager[Any] = self._session(
            read, write, message_handler=on_message, client_info=self._implementation
        )
        return session

    async def initialize(self, session: Any) -> dict[str, Any]:
        """Agree with the server on a version. Returns its capabilities. Raises `RequestFailed`."""
        try:
            result = await session.initialize()
        except self._errors as error:
            if not self.is_second:
                raise self._failed(error) from error
            result = await self._discovered(session, self._failed(error))
        capabilities = getattr(result, "capabilities", None)
        return capabilities.model_dump(by_alias=True, mode="json") if capabilities is not None else {}

    async def _discovered(self, session: Any, failed: RequestFailed) -> Any:
        """What a server says that knows only versions without a handshake. Raises `failed` if it says
        nothing."""
        try:
            return await session.discover()
        except (self._errors, RuntimeError, ValidationError):
            raise failed from None

    async def request(self, session: Any, message: McpMessage) -> dict[str, Any]:
        """The result of a request. Raises `RequestFailed`, and whatever the transport raises."""
        try:
            result: AnyResult = await session.send_request(message, AnyResult)
        except self._errors as error:
            raise self._failed(error) from error
        except ValidationError as error:  # of version 2, which checks what it gets
            [first, *_] = error.errors(include_url=False, include_input=False)
            where = ".".join(map(str, first["loc"]))
            text = f"its answer is not valid in the protocol: {where}: {first['msg']}"
            raise RequestFailed(INVALID_ANSWER, text) from None
        return result.model_dump()

    def _failed(self, error: Any) -> RequestFailed:
        return RequestFailed(int(error.error.code), str(error.error.message))

    def is_list_change(self, message: Any) -> bool:
        """Whether a message of the server says that its list of tools has changed."""
        method = getattr(getattr(message, "root", message), "method", None)
        return method == "notifications/tools/list_changed"

    # --- transports --------------------------------------------------------------------------------------

    def streamable_http(self, url: str, client: Any) -> AbstractAsyncContextManager[Any]:
        # The limit of version 2 for an event is lower than ours, which the client has.
        options = {"max_sse_event_size": None} if self._limits_events else {}
        transport: AbstractAsyncContextManager[Any] = self._streamable_http(
            url, http_client=client, **options
        )
        return transport

    def sse(self, url: str, make_client: Callable[..., Any]) -> AbstractAsyncContextManager[Any]:
        transport: AbstractAsyncContextManager[Any] = self._sse(url, httpx_client_factory=make_client)
        return transport


@lru_cache(maxsize=1)
def load_sdk() -> Sdk:
    """Import the SDK: a second, at the first use of an MCP server. Raises `ImportError`."""
    return Sdk()
