"""`tavily_search` with a real HTTP server in the place of the service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker.agents import load_agents
from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    OpenAgentsError,
    PermanentToolError,
    ToolAuthError,
    ToolError,
    ToolRateLimitError,
    ToolUnavailableError,
)
from openagents_worker.llm import api_keys
from openagents_worker.llm.api_keys import register_api_keys
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.tools.builtin.tavily import TavilySearch
from tests.support.listening import listening

KEY = "tvly-planted-0123456789abcdef"
PAGE = {"title": "T", "url": "https://a.org/", "content": "C", "score": 0.9, "raw_content": None}
FOUND = {"query": "as corrected", "results": [PAGE, PAGE, PAGE], "response_time": 1.5, "images": []}


@dataclass
class Service:
    """Gives one answer to all requests, and remembers them."""

    status: int = 200
    body: bytes = json.dumps(FOUND).encode()
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.asked.append((first, headers, json.loads(body)))
        sent = {"content-length": str(len(self.body)), "connection": "close", **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"HTTP/1.1 {self.status} x\r\n{head}\r\n".encode() + self.body)
        await writer.drain()
        writer.close()

    async def search(self, config: dict[str, Any] | None = None, context: Any = None, **more: Any) -> Any:
        tool = TavilySearch({"api_base": self.url, **(config or {})})
        try:
            return await tool.invoke({"query": "what", **more}, context)
        finally:
            await tool.close()


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setenv("TAVILY_API_KEY", KEY)
    service = Service()
    async with listening(service.serve) as port:
        service.url = f"http://127.0.0.1:{port}"
        yield service


async def test_a_search_is_one_request_with_the_key_in_its_header(service: Service) -> None:
    """The key is not in the body, which servers log. Options of the call go before those of the config."""
    found = await service.search(
        {"default_search_depth": "advanced", "default_max_results": 9},
        max_results=2,
        include_domains=["a.org"],
    )

    ((request, headers, body),) = service.asked
    assert request == "POST /search HTTP/1.1"
    assert (headers["authorization"], headers["content-type"]) == (f"Bearer {KEY}", "application/json")
    assert body == {
        "query": "what",
        "max_results": 2,
        "search_depth": "advanced",
        "include_domains": ["a.org"],
    }
    assert found == {"query": "as corrected", "results": [PAGE, PAGE], "search_depth": "advanced"}


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "tool.validation", False),
        (401, "tool.auth", False),
        (403, "tool.auth", False),
        (422, "tool.validation", False),
        (429, "tool.rate_limit", True),
        (432, "tool.permanent", False),
        (433, "tool.permanent", False),
        (301, "tool.permanent", False),
        (500, "tool.unavailable", True),
        (503, "tool.unavailable", True),
    ],
)
@pytest.mark.parametrize("form", [{"detail": {"error": "why"}}, {"detail": "why"}, {"detail": 7}, [1], None])
async def test_each_status_has_a_code(
    service: Service, status: int, code: str, retryable: bool, form: Any
) -> None:
    """What the service says is in the error, whatever its form; a redirect is not followed."""
    service.status, service.headers = status, {"retry-after": "7", "location": "http://127.0.0.1:9/"}
    service.body = b"<html>" if form is None else json.dumps(form).encode()

    with pytest.raises(ToolError) as caught:
        await service.search()

    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert ("why" in str(caught.value)) is ("why" in str(form))
    if isinstance(caught.value, ToolRateLimitError):
        assert caught.value.retry_after_ms == 7_000
    assert len(service.asked) == 1


async def test_the_key_is_in_no_error(service: Service) -> None:
    """Not even if the service repeats it."""
    service.status, service.body = 401, json.dumps({"detail": {"error": f"{KEY} is not valid"}}).encode()

    with pytest.raises(ToolAuthError) as caught:
        await service.search()

    assert "is not valid" in str(caught.value)
    assert KEY not in f"{caught.value!r} {caught.value.to_dict()}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"results": 7}',
        b"[" * 100_000,
        b'{"results": [' + b"1," * 1_500_000 + b"1]}",
    ],
    ids=["empty", "cut", "a list", "no results", "a number", "deep", "too large"],
)
async def test_an_answer_that_cannot_be_read_is_a_coded_error(service: Service, body: bytes) -> None:
    service.body = body
    with pytest.raises(PermanentToolError, match="cannot be read"):
        await service.search()


async def test_results_are_bounded(service: Service) -> None:
    """Their number and the length of their texts, whatever the service sends. Other values are left out."""
    service.body = json.dumps({"results": [{"content": "x" * 100_000}, 7, *[PAGE] * 50]}).encode()

    results = (await service.search())["results"]

    assert len(results) == 4
    assert len(results[0]["content"]) == 20_000


@pytest.mark.parametrize("key", [None, "", "two\nlines", "é"])
async def test_without_a_valid_key_nothing_is_asked(
    service: Service, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """The hint names the variable."""
    monkeypatch.setenv("OTHER", key) if key is not None else monkeypatch.delenv("OTHER", raising=False)

    with pytest.raises(ToolAuthError):
        await service.search({"api_key_env": "OTHER"})

    assert service.asked == []


async def test_a_key_that_is_not_in_the_environment_comes_from_the_registered_function(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked with the tenant of the run. Its errors become errors of the tool."""
    monkeypatch.delenv("TAVILY_API_KEY")
    run = SimpleNamespace(run_request=SimpleNamespace(tenant="blue"))
    answers: list[str | Exception] = ["of-blue", LLMConnectionError("down"), LLMAuthError("no"), ""]
    asked: list[tuple[str, str | None]] = []

    async def resolve(name: str, tenant: str | None) -> str | None:
        asked.append((name, tenant))
        answer = answers.pop(0)
        if isinstance(answer, OpenAgentsError):
            raise answer
        return str(answer)

    monkeypatch.setattr(TavilySearch, "resolve_key", staticmethod(resolve))

    await service.search(context=run)
    assert service.asked[0][1]["authorization"] == "Bearer of-blue"
    for error in (ToolUnavailableError, ToolAuthError, ToolAuthError):
        with pytest.raises(error):
            await service.search(context=run)
    assert asked == [("tavily", "blue")] * 4


async def test_a_worker_gives_the_tool_the_registered_function(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent of the agents file has it without any configuration."""
    monkeypatch.delenv("TAVILY_API_KEY")
    monkeypatch.setattr(api_keys, "_resolver", None)
    register_api_keys(lambda provider, tenant: f"key of {tenant} for {provider}")
    tools = [{"id": "web", "type": "tavily_search", "config": {"api_base": service.url}}]
    parts = {"llm": {"provider": "mock"}, "pattern": {"type": "react"}, "memory": {"type": "buffer"}}
    agent = {"id": "a", "name": "a", **parts, "tools": tools}
    tool = (
        Assembly(load_agents(json.dumps({"agents": [agent]}), env={}), env={})
        .parts("a")
        .single_tools()["web"]
    )

    await tool.invoke({"query": "x"}, None)
    await tool.close()

    assert service.asked[0][1]["authorization"] == "Bearer key of None for tavily"


async def test_a_service_that_cannot_be_reached_is_a_retryable_error(service: Service) -> None:
    """A private address is refused unless the agents file names it as `api_base`."""
    with pytest.raises(ToolUnavailableError):
        await service.search({"api_base": "http://127.0.0.1:9"})
