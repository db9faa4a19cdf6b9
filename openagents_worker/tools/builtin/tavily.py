"""Web search with Tavily: `tavily_search`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import httpx
from pydantic import Field

from openagents_worker.errors import (
    PermanentToolError,
    ToolAuthError,
    ToolError,
    ToolRateLimitError,
    ToolTimeoutError,
    ToolUnavailableError,
    ToolValidationError,
)
from openagents_worker.http_replies import ReplyTooLarge, ReplyUnreadable, body_of, with_translated_errors
from openagents_worker.jsontext import loads
from openagents_worker.retry_after import retry_after_ms
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.builtin.clock import utc_now
from openagents_worker.tools.builtin.http_client import open_client
from openagents_worker.tools.keyed import KeyedTool
from openagents_worker.tools.typed import TypedTool, with_own_limit

__all__ = ["TavilySearch"]

MAX_RESULTS = 20  # of the service
MAX_DOMAINS = 150
MAX_QUERY_CHARS = 2_000
MAX_REPLY_BYTES = 2_000_000
MAX_CONTENT_CHARS = 20_000  # of one result; it is a summary, usually of a few hundred characters
LONGEST_TIMEOUT_MS = 10 * 60 * 1000
USED_UP = frozenset({432, 433})  # the limit of the plan, or of pay as you go


class TavilySearch(KeyedTool):
    """Searches the web. A search changes nothing, so it may be repeated; it costs credits of the account."""

    name = "tavily_search"
    description = "Searches the web and gives title, URL and a summary of the content of each page found."
    spec = ToolExecutionSpec(concurrency_safe=True, side_effects="network")
    service = "tavily"

    class Config(KeyedTool.Config):
        api_key_env: str = Field(
            "TAVILY_API_KEY", min_length=1, description="The environment variable with the API key."
        )
        default_max_results: int = Field(
            5, ge=1, le=MAX_RESULTS, description="Number of pages, unless the call gives one."
        )
        default_search_depth: Literal["basic", "advanced"] = Field(
            "basic",
            description="Depth of the search, unless the call gives one: `advanced` costs two credits.",
        )
        timeout_ms: int = Field(
            15_000, ge=1, le=LONGEST_TIMEOUT_MS, description="Timeout of a search in milliseconds."
        )
        api_base: str = Field(
            "https://api.tavily.com",
            pattern=r"^https?://[^\s/?#]+[^\s?#]*$",
            description="The service's address.",
        )

    class Params(TypedTool.Params):
        query: str = Field(min_length=1, max_length=MAX_QUERY_CHARS, description="What to search for.")
        max_results: int | None = Field(None, ge=1, le=MAX_RESULTS, description="How many pages at most.")
        search_depth: Literal["basic", "advanced"] | None = Field(
            None, description="`advanced` finds more relevant content and takes longer."
        )
        include_domains: list[str] | None = Field(
            None, max_length=MAX_DOMAINS, description="Only pages of these domains."
        )
        exclude_domains: list[str] | None = Field(
            None, max_length=MAX_DOMAINS, description="No pages of these domains."
        )

    def __init__(
        self, config: dict[str, Any] | None = None, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        super().__init__(config)
        self._now = now
        self._client: httpx.AsyncClient | None = None

    def execution_spec(self) -> ToolExecutionSpec:
        return with_own_limit(self.spec, self.cfg.timeout_ms)

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        asked = self._request_body(args)
        key = await self.api_key(context)
        try:
            async with asyncio.timeout(self.cfg.timeout_ms / 1000):
                status, headers, body = await self._exchange(asked, key)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise ToolTimeoutError(f"tavily: no answer within {self.cfg.timeout_ms} ms", self.name) from error
        except (ReplyTooLarge, ReplyUnreadable) as error:
            raise PermanentToolError(f"tavily: the answer cannot be read: {error}", self.name) from error
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ToolUnavailableError(f"tavily: {reason}", self.name) from error
        if status != httpx.codes.OK:
            raise self._failure(status, headers, body)
        return self._result(body, asked)

    async def close(self) -> None:
        """Close the connections; the next search opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _request_body(self, args: Params) -> dict[str, Any]:
        query = args.query.strip()
        if not query:
            raise ToolValidationError("query: it is empty", self.name)
        domains = {"include_domains": args.include_domains, "exclude_domains": args.exclude_domains}
        return {
            "query": query,
            "max_results": args.max_results or self.cfg.default_max_results,
            "search_depth": args.search_depth or self.cfg.default_search_depth,
            **{name: each for name, each in domains.items() if each},
        }

    async def _exchange(self, asked: dict[str, Any], key: str) -> tuple[int, httpx.Headers, bytes]:
        client = await self._open_client()
        request = client.build_request(
            "POST",
            f"{self.cfg.api_base.rstrip('/')}/search",
            json=asked,
            headers={"authorization": f"Bearer {key}", "accept-encoding": "identity"},
        )
        response = await with_translated_errors(client.send(request, stream=True))
        try:
            body = await body_of(response, max_bytes=MAX_REPLY_BYTES)
            return response.status_code, response.headers, body
        finally:
            await response.aclose()

    async def _open_client(self) -> httpx.AsyncClient:
        if self._client is None:
            # The operator may have named a private host, for example of a proxy.
            allowed = [httpx.URL(self.cfg.api_base).host] if "api_base" in self.config else None
            opened = await open_client(self.name, allowed, True, timeout_s=self.cfg.timeout_ms / 1000)
            self._client = self._client or opened
        return self._client

    def _failure(self, status: int, headers: httpx.Headers, body: bytes) -> ToolError:
        """The error for an answer without results; `retryable` if the same search may succeed later."""
        text = f"tavily answered with status {status}: {_detail(body)}".removesuffix(": ")
        if status == httpx.codes.TOO_MANY_REQUESTS:
            return ToolRateLimitError(text, self.name, retry_after_ms(headers, now=self._now()))
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return ToolAuthError(text, self.name, hint="check the API key of the worker")
        if status in USED_UP:
            return PermanentToolError(text, self.name, hint="the credits of the account are used up")
        if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            return ToolValidationError(text, self.name)
        if status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return ToolUnavailableError(text, self.name)
        return PermanentToolError(text, self.name)

    def _result(self, body: bytes, asked: dict[str, Any]) -> dict[str, Any]:
        found = _object_in(body)
        results = found.get("results")
        if not isinstance(results, list):
            raise PermanentToolError("tavily: the answer cannot be read: it has no results", self.name)
        kept = [_cut(each) for each in results[: asked["max_results"]] if isinstance(each, dict)]
        query = found.get("query")
        return {
            "query": query if isinstance(query, str) else asked["query"],
            "results": kept,
            "search_depth": asked["search_depth"],
        }


def _object_in(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; an empty one if there is none."""
    try:
        value = loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _detail(body: bytes) -> str:
    """What the service says about a failure: `{"detail": {"error": "…"}}`, or a text in place of either."""
    detail = _object_in(body).get("detail", "")
    text = detail.get("error", "") if isinstance(detail, dict) else detail
    return text[:300] if isinstance(text, str) else ""


def _cut(result: dict[str, Any]) -> dict[str, Any]:
    """A result with texts of bounded length."""
    return {
        name: value[:MAX_CONTENT_CHARS] if isinstance(value, str) else value for name, value in result.items()
    }
