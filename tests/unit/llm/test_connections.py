"""The connection pool of a model client: one connection per running call, reused afterwards."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.llm.connection_pool import IDLE_S, MAX_IDLE, ConnectionPool
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from openagents_worker.tools.builtin.http import HttpRequest
from tests.support.listening import listening
from tests.support.waiting import await_for, wait_for

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def _post(http: httpx.AsyncClient, url: str, count: int = 1) -> None:
    await asyncio.gather(*(http.post(f"{url}/chat/completions", json=BODY) for _ in range(count)))


def _together(count: int) -> Callable[[ModelServerRequest], Awaitable[dict[str, Any]]]:
    """A model that answers no request until `count` requests have arrived."""
    asked = itertools.count(1)
    enough = asyncio.Event()

    async def reply(_: ModelServerRequest) -> dict[str, Any]:
        if next(asked) >= count:
            enough.set()
        await enough.wait()
        return {"text": "ok"}

    return reply


def _http(server: ModelServer, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=ConnectionPool(server.url, **options), timeout=60)


async def test_every_call_under_way_has_a_connection_and_leaves_it_to_the_next() -> None:
    """Ten concurrent calls open ten connections; the next ten calls reuse them."""
    async with ModelServer(_together(10)) as server, _http(server) as http:
        await _post(http, server.url, 10)
        await _post(http, server.url, 10)

    assert server.connections == 10


async def test_idle_connections_are_closed_after_a_while() -> None:
    """The next call closes the connections of a burst that were idle for too long."""
    now = 0.0
    async with ModelServer(_together(5)) as server, _http(server, clock=lambda: now) as http:
        await _post(http, server.url, 5)
        before = server.open_connections
        now = IDLE_S + 1
        await _post(http, server.url)
        await await_for(lambda: server.open_connections == 1, "the idle connections are closed")

    assert before == 5


async def test_a_burst_leaves_a_bounded_number_of_idle_connections() -> None:
    """At most `MAX_IDLE` connections stay open, however many calls ran concurrently."""
    count = MAX_IDLE + 20
    async with ModelServer(_together(count)) as server, _http(server) as http:
        await _post(http, server.url, count)
        await await_for(lambda: server.open_connections == MAX_IDLE, "the others are closed")


async def test_a_cancelled_call_keeps_no_connection_and_harms_none() -> None:
    """Its connection is closed at once, and the next call works."""

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        return {"text": "ok", "latency_ms": request.body["latency_ms"]}

    async with ModelServer(reply) as server, _http(server) as http:
        address = f"{server.url}/chat/completions"
        task = asyncio.create_task(http.post(address, json=BODY | {"latency_ms": 600_000}))
        await await_for(lambda: server.log, "the server got the request")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (await http.post(address, json=BODY | {"latency_ms": 0})).status_code == 200


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxy variables."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_the_proxy_of_the_environment_is_used(environment: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY, HTTPS_PROXY and ALL_PROXY set the proxy."""
    first_lines: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first_lines.append((await reader.readuntil(b"\r\n\r\n")).splitlines()[0])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with listening(proxy) as port:
        environment.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        async with httpx.AsyncClient(transport=ConnectionPool("http://provider.test")) as http:
            reply = await http.get("http://provider.test/")

    assert reply.text == "ok"
    assert first_lines == [b"GET http://provider.test/ HTTP/1.1"]


async def test_an_address_in_no_proxy_is_reached_directly(environment: pytest.MonkeyPatch) -> None:
    """NO_PROXY lists the exceptions. The proxy of this test does not exist."""
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    environment.setenv("NO_PROXY", "127.0.0.1")

    async with ModelServer([]) as server, _http(server) as http:
        assert (await http.get(f"{server.url}/models")).status_code == 200


# --- loops that end, servers that close ------------------------------------------------------------------


def _model(server: ModelServer) -> Callable[[], Awaitable[Any]]:
    client = OpenAICompatibleClient(
        LLMOptions(provider="openai_compatible", api_base=server.url), api_key="k"
    )
    return lambda: client.generate(messages=BODY["messages"])


def _tool(server: ModelServer) -> Callable[[], Awaitable[Any]]:
    tool = HttpRequest({"deny_private_networks": False})
    return lambda: tool.invoke({"url": f"{server.url}/models"}, None)


@pytest.mark.parametrize("make", [_model, _tool])
@pytest.mark.defect("L02")
def test_one_client_serves_many_loops_and_leaves_nothing_on_those_that_are_closed(
    make: Callable[[ModelServer], Callable[[], Awaitable[Any]]],
) -> None:
    """A loop that was closed without notice: the next new connection closes its connections."""
    with ModelServer([{"text": "ok"}] * 40).serve_in_thread() as server:
        ask, most = make(server), 0
        for _ in range(20):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(_await(ask()))
            loop.run_until_complete(_await(ask()))
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            most = max(most, server.open_connections)
        asyncio.run(_await(ask()))

        assert most <= 2
        wait_for(lambda: server.open_connections == 0, "the last loop's connection is closed, too")
        assert server.connections == 21


@pytest.mark.parametrize("make", [_model, _tool])
def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used(
    make: Callable[[ModelServer], Callable[[], Awaitable[Any]]],
) -> None:
    """Even if the event loop has not run since, and so has not noticed it."""
    loop = asyncio.new_event_loop()
    server = ModelServer([{"text": "ok"}] * 40)
    with server.serve_in_thread():
        ask = make(server)
        loop.run_until_complete(_await(ask()))
    with server.serve_in_thread():
        loop.run_until_complete(_await(ask()))

    assert server.connections == 2
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _await(work: Awaitable[Any]) -> Any:
    return await work
