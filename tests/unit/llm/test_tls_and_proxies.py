"""How a model is reached: TLS with an own authority and a client certificate, a proxy, HTTP/2."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError
from openagents_worker.llm.connection_options import ConnectionOptions
from openagents_worker.llm.http import HttpModelClient
from openagents_worker.llm.providers import make_client
from openagents_worker.testing.model_server import ModelServer
from tests.support.fronts import forward_proxy, http2_server, tls_front
from tests.support.waiting import await_for
from tests.tls.certificates import KEY_PASSWORD, Certificates
from tests.unit.llm.raw_server import delta, sse
from tests.unit.llm.wire import HI, Heard

STREAM = [sse(delta(content="hel")), sse(delta(content="lo")), sse(delta("stop"), "[DONE]")]
HTTPS = httpx.URL("https://models.example.com/v1")
LOGIN = "ann:pr0xy-Passw0rd"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.made(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def client(url: str, env: dict[str, str] | None = None, **options: Any) -> HttpModelClient:
    given = {"provider": "openai_compatible", "api_base": url, "retry": {"max_attempts": 1}, **options}
    made = make_client(LLMOptions(**given), env=env or {})
    assert isinstance(made, HttpModelClient)
    return made


async def ask(url: str, env: dict[str, str] | None = None, **options: Any) -> str:
    """The text of one reply."""
    model = client(url, env, **options)
    try:
        return (await model.generate(messages=HI)).output_text
    finally:
        await model.aclose()


@pytest.fixture
def server() -> Generator[ModelServer]:
    with ModelServer(lambda _: {"text": "hello"}).serve_in_thread() as server:
        yield server


# --- certificates ----------------------------------------------------------------------------------------


async def test_a_server_is_verified_with_the_authority_of_the_agent(
    server: ModelServer, certificates: Certificates
) -> None:
    """`ca_file` is for a server inside a company. Without it, the error says what to set."""
    async with tls_front(server.port, certificates.server()) as url:
        assert await ask(url, ca_file=str(certificates.ca_file)) == "hello"
        for options in ({}, {"ca_file": str(certificates.stranger_file)}):
            with pytest.raises(LLMConnectionError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                await ask(url, **options)
            assert "llm.ca_file" in str(caught.value.hint)


async def test_a_server_whose_certificate_has_another_name_is_refused(
    server: ModelServer, certificates: Certificates
) -> None:
    async with tls_front(server.port, certificates.server("other.example.org")) as url:
        with pytest.raises(LLMConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(url, ca_file=str(certificates.ca_file))


@pytest.mark.parametrize(
    ("cert", "more"),
    [
        ("client.pem", {}),
        ("client.crt", {"client_key": "client.key"}),
        (
            "client.crt",
            {"client_key": "client-encrypted.key", "client_key_password_env": "KEY_PASSWORD"},
        ),
    ],
    ids=["one file", "two files", "with a password"],
)
async def test_a_client_certificate_is_shown(
    server: ModelServer, certificates: Certificates, cert: str, more: dict[str, str]
) -> None:
    """Certificate and key in one file or in two; the key may have a password."""
    folder = certificates.folder
    files = {name: str(folder / value) if name == "client_key" else value for name, value in more.items()}
    async with tls_front(server.port, certificates.server(wants_client=True)) as url:
        options = {"ca_file": str(certificates.ca_file), "client_cert": str(folder / cert), **files}
        assert await ask(url, {"KEY_PASSWORD": KEY_PASSWORD}, **options) == "hello"


async def test_a_missing_client_certificate_is_named(server: ModelServer, certificates: Certificates) -> None:
    async with tls_front(server.port, certificates.server(wants_client=True)) as url:
        with pytest.raises(LLMConnectionError) as caught:
            await ask(url, ca_file=str(certificates.ca_file))

    assert "client" in str(caught.value.hint) or "api_base" in str(caught.value.hint)


async def test_a_replaced_certificate_is_used_for_new_connections(
    server: ModelServer, certificates: Certificates, tmp_path: Path
) -> None:
    """Short-lived certificates are replaced while the worker runs. Half a replacement changes nothing."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(certificates.stranger_file.read_bytes())
    async with tls_front(server.port, certificates.server()) as url:
        model = client(url, ca_file=str(ca_file))
        with pytest.raises(LLMConnectionError):
            await model.generate(messages=HI)
        ca_file.write_text("half a file")
        with pytest.raises(LLMConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await model.generate(messages=HI)
        ca_file.write_bytes(certificates.ca_file.read_bytes())
        reply = await model.generate(messages=HI)
        await model.aclose()

    assert reply.output_text == "hello"


# --- proxies ---------------------------------------------------------------------------------------------


async def test_the_proxy_of_the_agent_goes_before_the_environment(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for a host in NO_PROXY: the agents file says it about this model."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "*")
    async with forward_proxy() as proxy:
        assert await ask(server.url, proxy=proxy.url()) == "hello"

    assert proxy.requests == [f"POST {server.url}/chat/completions HTTP/1.1"]


async def test_tls_goes_through_a_proxy_that_asks_for_a_password(
    server: ModelServer, certificates: Certificates
) -> None:
    """The proxy sees the host, and no byte of the request."""
    async with tls_front(server.port, certificates.server()) as url, forward_proxy(LOGIN) as proxy:
        options = {"ca_file": str(certificates.ca_file)}
        assert await ask(url, proxy=proxy.url(f"{LOGIN}@"), **options) == "hello"
        with pytest.raises(LLMConnectionError, match="407") as caught:
            await ask(url, proxy=proxy.url("ann:another-Passw0rd@"), **options)

    host = httpx.URL(url).netloc.decode()
    assert proxy.requests == [f"CONNECT {host} HTTP/1.1"] * 2
    assert "llm.proxy" in str(caught.value.hint)
    assert "another-Passw0rd" not in f"{caught.value!r} {caught.value.hint}"


# --- HTTP/2 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server_cert(certificates: Certificates) -> Path:
    file = certificates.folder / "server.pem"
    certificates.ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(file)
    return file


@pytest.mark.parametrize(("http2", "version"), [(None, "2"), (True, "2"), (False, "1.1")])
async def test_http_2_is_used_where_it_is_offered(
    certificates: Certificates, server_cert: Path, http2: bool | None, version: str
) -> None:
    """With the extra `http2`, unless the agent says no. Connections are reused."""
    async with http2_server(STREAM, server_cert) as server:
        model = client(server.url, ca_file=str(certificates.ca_file), http2=http2)
        heard = Heard()
        for _ in range(3):
            assert (await model.generate(messages=HI, on_delta=heard)).output_text == "hello"
        await model.aclose()

    assert server.versions == [version] * 3
    assert len(server.clients) == 1
    assert heard.text == "hello" * 3


async def test_a_server_without_http_2_is_asked_with_the_older_version(
    server: ModelServer, certificates: Certificates
) -> None:
    async with tls_front(server.port, certificates.server()) as url:
        assert await ask(url, ca_file=str(certificates.ca_file), http2=True) == "hello"


@pytest.mark.parametrize("http2", [True, False])
async def test_the_provider_learns_that_a_call_is_cancelled(
    certificates: Certificates, server_cert: Path, http2: bool
) -> None:
    """Its connection is closed, so the provider can stop. The next call opens a new one."""
    async with http2_server(STREAM[:1], server_cert, hangs=True) as server:
        model = client(server.url, ca_file=str(certificates.ca_file), http2=http2)
        heard = Heard()
        call = asyncio.create_task(model.generate(messages=HI, on_delta=heard))
        await await_for(lambda: heard.pieces, "a piece of the reply")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await await_for(lambda: server.gone == 1, "the server sees that the client is gone")
        await model.aclose()


def test_certificates_of_a_client_need_no_terminal(certificates: Certificates) -> None:
    """OpenSSL would ask for the password of a key at the terminal; here an error names the option."""
    options = ConnectionOptions(
        client_cert=str(certificates.folder / "client.crt"),
        client_key=str(certificates.folder / "client-encrypted.key"),
    )
    with pytest.raises(ValueError, match="set client_key_password_env"):
        options.context(HTTPS)
    assert isinstance(ConnectionOptions().context(HTTPS), ssl.SSLContext)


def test_the_public_authorities_are_read_once_and_not_for_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read them takes 0.1 s, by which the first call of every agent would be later."""
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent-for-a-new-entry-of-the-cache")
    read: list[ssl.SSLContext] = []
    monkeypatch.setattr(
        httpx, "create_ssl_context", lambda: read.append(ssl.create_default_context()) or read[-1]
    )

    plain = ConnectionOptions().context(httpx.URL("http://models.internal/v1"))
    contexts = {id(ConnectionOptions().context(HTTPS)) for _ in range(3)}

    assert contexts == {id(read[0])}
    assert len(read) == 1
    assert plain.verify_mode is ssl.CERT_REQUIRED
    assert not plain.get_ca_certs()
