"""`http_request` with a real server: requests, replies, and addresses that are never reached."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import socket
import ssl
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import (
    OpenAgentsError,
    PermanentToolError,
    ToolError,
    ToolRateLimitError,
    ToolTimeoutError,
    ToolUnavailableError,
    ToolValidationError,
)
from openagents_worker.tools.builtin import http_client
from openagents_worker.tools.builtin.http import HttpRequest
from tests.support.listening import listening
from tests.unit.run_fakes import FakeRun

READS = ["GET", "HEAD"]
WRITES = ["POST", "PUT", "PATCH", "DELETE"]


@dataclass
class Server:
    """A server that answers with `answer`: raw bytes, or a coroutine function that returns them."""

    answer: bytes | Callable[[], Awaitable[bytes]] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    port: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/x"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in head[1:]) if n}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append((head[0], headers, body))
            answer = self.answer if isinstance(self.answer, bytes) else await self.answer()
            writer.write(answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as some of these tests want it to
        finally:
            writer.close()


def reply(status: str, body: str = "", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode()


@asynccontextmanager
async def running(server: Server, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    async with listening(server.serve, tls=tls) as server.port:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(Server()) as started:
        yield started


async def call(url: str, config: dict[str, Any] | None = None, **arguments: Any) -> Any:
    tool = HttpRequest({"allow_hosts": ["127.0.0.1"], **(config or {})})
    try:
        return await tool.invoke({"url": url, **arguments}, FakeRun())
    finally:
        await tool.close()


# --- what is sent and what comes back --------------------------------------------------------------------


async def test_an_answer_comes_back_as_data(server: Server) -> None:
    """Status, headers in lower case and the text of the body."""
    server.answer = reply("200 OK", "für dich", Content_Type="text/plain; charset=utf-8", X_Id="7")

    answer = await call(server.url)

    assert (answer["success"], answer["status"], answer["body"]) == (True, 200, "für dich")
    assert answer["headers"]["x-id"] == "7"
    assert answer["truncated"] is False


@pytest.mark.parametrize("status", ["404 Not Found", "500 Broken", "304 Not Modified"])
async def test_an_error_status_is_a_result_too(server: Server, status: str) -> None:
    """The model gets the server's text."""
    server.answer = reply(status, "" if status.startswith("304") else "because")

    answer = await call(server.url)

    assert (answer["success"], answer["status"]) == (False, int(status[:3]))


@pytest.mark.parametrize("method", WRITES)
async def test_a_request_with_effects_carries_the_idempotency_key_of_its_call(
    server: Server, method: str
) -> None:
    """Servers that support it detect a repeated request."""
    await call(server.url, method=method, body={"n": 1}, headers={"X-Team": "blue"})

    line, headers, body = server.requests[0]
    assert line == f"{method} /x HTTP/1.1"
    assert (headers["idempotency-key"], headers["x-team"]) == ("r1:u1:2", "blue")
    assert (headers["content-type"], json.loads(body)) == ("application/json", {"n": 1})


async def test_a_key_goes_into_a_header_whatever_the_tool_is_called(server: Server) -> None:
    """Tools and runs may have any name, but a header holds only printable ASCII."""
    tool = HttpRequest({"allow_hosts": ["127.0.0.1"]})
    run = FakeRun(idempotency_key="r1:u1:größe\n:0a1b:1")
    await tool.invoke({"url": server.url, "method": "POST"}, run)
    await tool.close()

    assert server.requests[0][1]["idempotency-key"] == "r1:u1:gr%C3%B6%C3%9Fe%0A:0a1b:1"


@pytest.mark.parametrize("method", READS)
async def test_a_request_that_changes_nothing_carries_no_key(server: Server, method: str) -> None:
    """Repeating it is harmless."""
    await call(server.url, method=method)
    assert "idempotency-key" not in server.requests[0][1]


async def test_a_text_body_is_sent_as_it_is(server: Server) -> None:
    """Without an added content type."""
    await call(server.url, method="POST", body="a=1", headers={"Content-Type": "text/x"})

    assert server.requests[0][1]["content-type"] == "text/x"
    assert server.requests[0][2] == b"a=1"


@pytest.mark.parametrize("name", ["Idempotency-Key", "host", "Content-Length", "Transfer-Encoding"])
async def test_headers_that_belong_to_the_transport_cannot_be_set(server: Server, name: str) -> None:
    """A model cannot set the idempotency key either."""
    with pytest.raises(ToolValidationError, match=name.lower()):
        await call(server.url, method="POST", headers={name: "1"})
    assert server.requests == []


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("ftp://127.0.0.1/", {}),
        ("/relative", {}),
        ("http://", {}),
        ("http://127.0.0.1:99999/", {}),
        ("file:///etc/passwd", {}),
        ("http://127.0.0.1/", {"X": "a\r\nHost: b"}),
        ("http://127.0.0.1/", {"ü": "a"}),
    ],
)
async def test_a_request_that_cannot_be_made_is_the_models_mistake(url: str, headers: dict[str, str]) -> None:
    """The error is for the model, and nothing is sent."""
    with pytest.raises(ToolValidationError):
        await call(url, headers=headers, method="POST")


async def test_a_long_body_is_cut(server: Server) -> None:
    """At most `max_bytes` are kept, and the rest is not read."""

    async def endless() -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 5000

    server.answer = endless

    answer = await call(server.url, {"max_bytes": 1000})

    assert (len(answer["body"]), answer["truncated"]) == (1000, True)


async def test_no_cookie_passes_from_one_call_to_the_next(server: Server) -> None:
    """One tool serves many runs, so cookies must not pass from one to another."""
    server.answer = reply("200 OK", "", Set_Cookie="session=secret")
    tool = HttpRequest({"allow_hosts": ["127.0.0.1"]})

    await tool.invoke({"url": server.url}, None)
    await tool.invoke({"url": server.url}, None)
    await tool.close()

    assert all("cookie" not in headers for _, headers, _ in server.requests)


async def test_a_closed_tool_opens_again_when_it_is_used(server: Server) -> None:
    """`close()` closes the connections; the tool still works."""
    server.answer = reply("200 OK")
    tool = HttpRequest({"allow_hosts": ["127.0.0.1"]})
    for _ in range(2):
        assert (await tool.invoke({"url": server.url}, None))["status"] == 200
        await tool.close()


# --- what goes wrong on the way --------------------------------------------------------------------------


async def silence() -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("never reached")


async def nothing() -> bytes:
    return b""


@pytest.mark.parametrize("method", READS)
@pytest.mark.parametrize(("answer", "error"), [(silence, ToolTimeoutError), (nothing, ToolUnavailableError)])
async def test_a_read_without_an_answer_may_be_tried_again(
    server: Server, method: str, answer: Any, error: type[OpenAgentsError]
) -> None:
    """The error is retryable. It names the host and not the URL, whose query may hold a key."""
    server.answer = answer

    with pytest.raises(error, match=r"127\.0\.0\.1") as caught:
        await call(f"{server.url}?key=secret", {"timeout": 0.2}, method=method)
    assert caught.value.retryable
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize("answer", [silence, nothing])
async def test_a_write_without_an_answer_is_never_repeated_unasked(
    server: Server, method: str, answer: Any
) -> None:
    """The outcome is unknown, and the error says so."""
    server.answer = answer

    with pytest.raises(PermanentToolError, match=r"outcome of .* is unknown") as caught:
        await call(server.url, {"timeout": 0.2}, method=method)
    assert not caught.value.retryable


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_without_a_connection_any_method_may_be_retried(method: str) -> None:
    """Without a connection nothing was sent, so nothing was changed."""
    async with running(Server()) as gone:
        url = gone.url

    with pytest.raises(ToolUnavailableError):
        await call(url, method=method)


async def test_a_write_whose_connection_takes_too_long_may_be_retried(server: Server) -> None:
    """The timeout of the call ends the TLS handshake: the request was not sent."""
    server.answer = silence

    with pytest.raises(ToolTimeoutError):
        await call(server.url.replace("http:", "https:"), {"timeout": 0.2}, method="POST")
    assert server.requests == []


async def test_a_write_redirected_to_a_connection_that_takes_too_long_has_an_unknown_outcome(
    server: Server,
) -> None:
    """The first server got the request."""
    async with running(Server(silence)) as slow:
        server.answer = reply("307 Again", Location=slow.url.replace("http:", "https:"))
        with pytest.raises(PermanentToolError, match="unknown"):
            await call(server.url, {"timeout": 0.5}, method="POST")


@pytest.mark.parametrize("status", ["303 See Other", "307 Temporary Redirect"])
async def test_a_write_redirected_to_a_closed_port_has_an_unknown_outcome(
    server: Server, status: str
) -> None:
    """Also on the same host: the first server got the request."""
    async with running(Server()) as gone:
        elsewhere = gone.url
    server.answer = reply(status, Location=elsewhere)

    with pytest.raises(PermanentToolError, match="unknown"):
        await call(server.url, method="POST")


async def test_a_write_redirected_to_an_unreachable_host_has_an_unknown_outcome(server: Server) -> None:
    """The first server got the request, even if the second one is unreachable."""
    async with running(Server()) as gone:
        elsewhere = gone.url.replace("127.0.0.1", "localhost")
    server.answer = reply("303 See Other", Location=elsewhere)

    with pytest.raises(PermanentToolError, match="unknown"):
        await call(server.url, {"allow_hosts": ["127.0.0.1", "localhost"]}, method="POST")


@pytest.mark.parametrize(
    ("headers", "wait_ms"),
    [
        ({"Retry-After": "7"}, 7000),
        ({"Retry-After": "Sun, 31 Mar 2024 12:00:02 GMT"}, 2000),
        ({"Retry-After": "Sun, 31 Mar 2024 11:00:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
async def test_retry_after_of_a_429_is_respected(
    server: Server, headers: dict[str, str], wait_ms: int | None
) -> None:
    """A 429 for a GET is retryable, not earlier than `Retry-After`."""
    server.answer = reply("429 Too Many Requests", **headers)
    tool = HttpRequest({"allow_hosts": ["127.0.0.1"]}, now=lambda: datetime(2024, 3, 31, 12, tzinfo=UTC))

    with pytest.raises(ToolRateLimitError) as caught:
        await tool.invoke({"url": server.url}, None)
    await tool.close()
    assert caught.value.retry_after_ms == wait_ms


async def test_a_write_that_was_refused_for_its_rate_is_an_answer(server: Server) -> None:
    """The model decides what to do; the runtime does not repeat writes."""
    server.answer = reply("429 Too Many Requests")
    assert (await call(server.url, method="POST"))["status"] == 429


async def test_a_page_after_a_write_that_was_refused_for_its_rate_is_an_answer(server: Server) -> None:
    """The write has happened: a retryable error would ask for it again."""
    async with running(Server(reply("429 Too Many Requests"))) as busy:
        server.answer = reply("303 See Other", Location=busy.url)
        assert (await call(server.url, method="POST"))["status"] == 429


# --- what is never reached -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0.0.0.0",  # noqa: S104 - asked for, not bound
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[2002:7f00:1::]",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "[fe80::1]",
        "[fd00::1]",
        "224.0.0.1",
        "[::127.0.0.1]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::808:808]",
        "[2001:0:808:808::1]",
        "[fec0::1]",
        "[2606:4700::5efe:10.0.0.1]",
        "127.1",
        "0x7f.1",
        "127.0.0.1.",
        "user:password@127.0.0.1",
        "example.com@127.0.0.1",
        "127.0.0.1:80#@example.com",
        "127。0。0。1",
    ],
)
async def test_private_networks_are_refused_by_address(host: str) -> None:
    """Loopback, private, link-local, shared and multicast addresses, in any spelling, get no connection."""
    with pytest.raises(PermanentToolError, match="private network") as caught:
        await call(f"http://{host}/latest/meta-data", {"allow_hosts": None})
    assert "allow_hosts" in str(caught.value.hint)


@pytest.fixture
def localhosts_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """A server's TLS context for the name `localhost` only, which the clients of this test trust."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with openssl, which is not installed")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [openssl, *made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    http_client._certificates.cache_clear()
    yield context
    http_client._certificates.cache_clear()


async def test_a_certificate_is_checked_against_the_name_though_an_address_is_connected_to(
    localhosts_certificate: ssl.SSLContext,
) -> None:
    """The client connects to the checked address, and verifies the certificate for the host name."""
    config = {"allow_hosts": ["localhost", "127.0.0.1"]}
    async with running(Server(reply("200 OK", "hello")), localhosts_certificate) as server:
        by_name = await call(f"https://localhost:{server.port}/", config)

        with pytest.raises(ToolUnavailableError, match="certificate"):
            await call(f"https://127.0.0.1:{server.port}/", config)

    assert by_name["body"] == "hello"
    assert [headers["host"] for _, headers, _ in server.requests] == [f"localhost:{server.port}"]


async def serve_again_and_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request of a connection, and keeps the connection open."""
    with suppress(ConnectionError, asyncio.IncompleteReadError):  # the client has closed it
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            await writer.drain()


async def test_a_connection_that_was_verified_for_one_host_is_not_used_for_another(
    localhosts_certificate: ssl.SSLContext,
) -> None:
    """Also if both are at one address: the server has shown only that it is the first one."""
    tool = HttpRequest({"allow_hosts": ["localhost", "127.0.0.1"]})
    async with listening(serve_again_and_again, tls=localhosts_certificate) as port:
        try:
            answers = [await tool.invoke({"url": f"https://localhost:{port}/"}, None) for _ in range(2)]
            with pytest.raises(ToolUnavailableError, match="certificate"):
                await tool.invoke({"url": f"https://127.0.0.1:{port}/"}, None)
        finally:
            await tool.close()

    assert [answer["body"] for answer in answers] == ["hi", "hi"]


async def test_an_address_is_checked_at_each_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was public a moment ago and is private now (DNS rebinding) gets no connection."""
    addresses = iter(["93.184.215.14", "127.0.0.1"])
    connected = record_connections(monkeypatch)
    resolve_to(addresses, monkeypatch)
    tool = HttpRequest()

    with pytest.raises(ToolUnavailableError):
        await tool.invoke({"url": f"http://example.com:{server.port}/"}, None)
    with pytest.raises(PermanentToolError, match="private network"):
        await tool.invoke({"url": f"http://example.com:{server.port}/"}, None)
    await tool.close()

    assert (connected, server.requests) == (["93.184.215.14"], [])


async def test_a_name_is_resolved_as_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own encoding of names (IDNA 2003) makes `strasse.de`, a host of others, of `straße.de`."""
    names = resolve_to(iter(["93.184.215.14"] * 2), monkeypatch)
    record_connections(monkeypatch)
    for allowed in ("straße.de", "xn--strae-oqa.de"):
        with pytest.raises(ToolUnavailableError):
            await call("https://straße.de/", {"allow_hosts": [allowed]})

    assert names == ["xn--strae-oqa.de"] * 2


def resolve_to(addresses: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every host have the next of these addresses. Returns the list of the names asked for."""
    names: list[str] = []

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses), port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return names


def record_connections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every connection be refused. Returns the list of the addresses."""
    addresses: list[str] = []

    async def refused(protocol: Any, host: str, port: int, **options: Any) -> Any:
        addresses.append(host)
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", refused)
    return addresses


async def test_only_listed_hosts_are_reached(server: Server) -> None:
    """`*.example.com` allows its subdomains. An allowed host may be private."""
    config = {"allow_hosts": ["127.0.0.*", "*.example.com"]}

    assert (await call(server.url, config))["success"]
    with pytest.raises(PermanentToolError, match=r"example\.org is not in allow_hosts"):
        await call("http://example.org/", config)


async def test_a_redirect_is_checked_like_a_request(server: Server) -> None:
    """A public page cannot send the tool into the private network."""
    async with running(Server()) as private:
        server.answer = reply("302 Found", Location=private.url.replace("127.0.0.1", "localhost"))

        with pytest.raises(PermanentToolError, match="localhost is not in allow_hosts"):
            await call(server.url)
        assert private.requests == []


async def test_an_allowed_redirect_is_followed(server: Server) -> None:
    """The result is the reply of the last server."""
    async with running(Server(reply("200 OK", "here"))) as other:
        server.answer = reply("302 Found", Location=other.url)
        assert (await call(server.url))["body"] == "here"


CREDENTIALS = {
    "Authorization": "Bearer sk-secret",
    "X-Api-Key": "secret",
    "Api-Key": "secret",
    "Cookie": "session=secret",
    "Proxy-Authorization": "Basic secret",
    "X-Auth-Token": "secret",
    "X-Goog-Api-Key": "secret",
    "PRIVATE-TOKEN": "secret",
    "X-Anything-At-All": "secret",
}


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Again", "308 For Good"])
async def test_no_credential_travels_along_to_another_host(server: Server, status: str) -> None:
    """Only headers that never hold credentials are sent to another origin."""
    async with running(Server(reply("200 OK", "here"))) as other:
        server.answer = reply(status, Location=other.url)
        await call(server.url, headers={**CREDENTIALS, "Accept-Language": "de"}, method="PUT", body="text")

    (_, first, _), (_, second, _) = *server.requests, *other.requests
    assert {name.lower() for name in CREDENTIALS} <= set(first)
    assert "secret" not in str(second)
    assert (second["accept-language"], second["host"]) == ("de", f"127.0.0.1:{other.port}")


async def test_credentials_travel_along_to_the_same_host(server: Server) -> None:
    """A redirect within one origin keeps all headers."""
    answers = iter([reply("302 Found", Location="/y"), reply("200 OK", "here")])

    async def answer() -> bytes:
        return next(answers)

    server.answer = answer
    await call(server.url, headers=CREDENTIALS)

    assert all(headers["x-api-key"] == "secret" for _, headers, _ in server.requests)


@pytest.mark.parametrize(
    "location",
    [
        *(
            "http://[::1",
            "http://a:b:c/",
            "http://xn--a.example/",
            "http://\x7f/",
            "//",
            "http:///x",
            "x" * 60_000,
        ),
        *("javascript:alert(1)", "file:///etc/passwd", "ftp://127.0.0.1/", "http://127.0.0.1:99999/"),
        *("http://" + "a" * 300 + "/", "http://a..b/", "\xff\xfe", "http://ⓔ.example:port/", "data:,x"),
        *("http://127.0.0.1:1@[::1]:x/", "http://%00/", "http://exa mple/", "gopher://127.0.0.1/"),
    ],
)
async def test_a_redirect_to_nowhere_is_a_coded_error(server: Server, location: str) -> None:
    """For any `Location`: an error with a code, or a text for the model."""
    server.answer = reply("302 Found", Location=location)

    with pytest.raises(ToolError) as caught:
        await call(server.url)
    assert caught.value.code.startswith("tool.")


async def test_the_body_of_a_redirect_is_not_read(server: Server) -> None:
    """It is not needed, and may be endless."""
    async with running(Server(reply("200 OK", "here"))) as other:
        server.answer = (
            f"HTTP/1.1 302 Found\r\nLocation: {other.url}\r\nContent-Length: 99999999999\r\n\r\nx".encode()
        )
        assert (await call(server.url))["body"] == "here"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_is_cut_after_it_was_decompressed(server: Server, encoding: str) -> None:
    """The server compresses without being asked; a small body could expand a thousandfold."""
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    packed = pack(b"x" * 4 * 1024 * 1024)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(packed)}\r\n\r\n"
    server.answer = head.encode() + packed

    answer = await call(server.url, {"max_bytes": 1000})

    assert (answer["body"], answer["truncated"]) == ("x" * 1000, True)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [(None, "identity"), ("br, zstd", "identity"), ("gzip;q=0.9, deflate, br", "gzip;q=0.9, deflate")],
)
async def test_only_a_readable_compression_is_asked_for(server: Server, asked: str | None, sent: str) -> None:
    """A model that copies the headers of a browser would get bytes that cannot be read."""
    await call(server.url, headers={} if asked is None else {"Accept-Encoding": asked})
    assert server.requests[0][1]["accept-encoding"] == sent


@pytest.mark.parametrize(("status", "method"), [("200 OK", "HEAD"), ("304 Not Modified", "GET")])
async def test_an_answer_without_a_body_has_nothing_to_decompress(
    server: Server, status: str, method: str
) -> None:
    """Its headers say how the body would be compressed."""
    server.answer = f"HTTP/1.1 {status}\r\nContent-Encoding: br\r\nContent-Length: 9\r\n\r\n".encode()

    answer = await call(server.url, method=method)

    assert (answer["status"], answer["body"]) == (int(status[:3]), "")
    assert answer["headers"]["content-encoding"] == "br"


async def test_a_body_is_cut_between_characters(server: Server) -> None:
    """An incomplete character at the end is left out."""
    server.answer = reply("200 OK", "äöü")
    answer = await call(server.url, {"max_bytes": 3})
    assert (answer["body"], answer["truncated"]) == ("ä", True)


UNREADABLE = {
    "an encoding nobody asked for": b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nhi",
    "compressed twice": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: 2\r\n\r\nhi",
    "not compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nhi",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhi",
    "a chunk of a negative size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nhi",
    "a chunk of a huge size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"f" * 40
    + b"\r\nhi",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi",
    "a length of 5,000 digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nhi",
    "no HTTP": b"220 smtp.example.com ESMTP\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "a status of words": b"HTTP/1.1 OK fine\r\n\r\n",
    "a status of 9 digits": b"HTTP/1.1 200000000 OK\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: bbbbbbbbbbbbbbbb\r\n" * 100_000,
    "one endless header": b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 2_000_000,
    "an endless status": b"HTTP/1.1 200 " + b"b" * 2_000_000,
    "a control character in a header": b"HTTP/1.1 200 OK\r\nX-A: \x00\r\n\r\n",
    "nothing": b"",
    "nothing but line ends": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("answer", UNREADABLE.values(), ids=UNREADABLE)
async def test_an_answer_that_cannot_be_read_is_a_coded_error(server: Server, answer: bytes) -> None:
    """Exceptions of libraries are always converted."""
    server.answer = answer

    with pytest.raises(ToolError) as caught:
        await call(server.url)
    assert caught.value.code in ("tool.unavailable", "tool.permanent")


@pytest.mark.parametrize(
    "charset", ["hex", "idna", "punycode", "undefined", "utf-7", "zlib", "x" * 900, "\xff"]
)
async def test_a_body_is_text_whatever_its_header_calls_it(server: Server, charset: str) -> None:
    """`charset=hex` is the name of a Python codec that does not decode to text."""
    server.answer = reply("200 OK", "für dich", Content_Type=f"text/plain; charset={charset}")
    assert (await call(server.url))["body"] == "für dich"


@pytest.mark.parametrize(
    ("status", "method", "answered"),
    [("302 Found", "DELETE", "GET"), ("303 See Other", "POST", "GET"), ("307 Again", "POST", "POST")],
)
async def test_a_result_names_the_request_that_was_answered(
    server: Server, status: str, method: str, answered: str
) -> None:
    """A DELETE that was redirected to a login page has deleted nothing, though the status is 200."""
    async with running(Server(reply("200 OK", "log in"))) as other:
        server.answer = reply(status, Location=f"{other.url}/login")
        redirected = await call(server.url, method=method)
    server.answer = reply("200 OK")
    direct = await call(server.url, method=method)

    assert redirected["redirected_to"] == f"{answered} {other.url}/login"
    assert "redirected_to" not in direct


async def test_redirects_in_a_circle_end(server: Server) -> None:
    """At most five redirects are followed."""
    server.answer = reply("302 Found", Location=server.url)

    with pytest.raises(PermanentToolError, match="more than 5 redirects"):
        await call(server.url)
    assert len(server.requests) == 6


async def test_private_networks_can_be_allowed(server: Server) -> None:
    """`deny_private_networks: false` is for networks that the operator controls."""
    assert (await call(server.url, {"allow_hosts": None, "deny_private_networks": False}))["success"]
